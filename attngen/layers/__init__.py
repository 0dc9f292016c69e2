"""What an attention layer is, below hosts and SiT: how it is read, which code computes it, mediators."""
