"""Data to train on: images in folders, of the hub, in tar shards, or their latents."""
