"""Programs that make pictures; run from the repository's root: python -m pipelines.class2image --help."""
