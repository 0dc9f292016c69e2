"""The attention methods that programs and page offer, derived from attngen's own; python -m pipelines.methods."""
