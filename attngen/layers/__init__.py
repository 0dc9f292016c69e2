"""Attention layers, below hosts and SiT: how a layer is read, which code computes it, mediators."""
