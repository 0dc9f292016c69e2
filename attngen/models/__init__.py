"""Models as diffusers classes."""

from attngen.models.sit import SiTTransformer2DModel

__all__ = ["SiTTransformer2DModel"]
