"""attngen: attention at linear cost for Hugging Face diffusers."""

__version__ = "0.1.0"
