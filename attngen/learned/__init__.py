"""Layers with learned weights, kept in a file apart from the model."""
