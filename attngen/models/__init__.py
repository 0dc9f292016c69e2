"""Models as diffusers classes."""

from attngen.models.sit import SiTTransformer2DModel
from attngen.models.sit_pipeline import SiTPipeline

__all__ = ["SiTPipeline", "SiTTransformer2DModel"]
