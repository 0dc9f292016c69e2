"""What is trained: configuration, presets, objectives, and the UNet."""
