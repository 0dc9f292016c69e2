"""Fused kernels for CUDA devices."""
