"""Models as diffusers classes."""

from attngen.models.sit import SiTTransformer2DModel
from attngen.models.sit_pipeline import SiTPipeline
from attngen.models.unet_pipeline import UNetClassPipeline

__all__ = ["SiTPipeline", "SiTTransformer2DModel", "UNetClassPipeline"]
