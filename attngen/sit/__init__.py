"""Models as diffusers classes."""

from attngen.sit.model import SiTTransformer2DModel
from attngen.sit.pipeline import SiTPipeline
from attngen.sit.unet_pipeline import UNetClassPipeline

__all__ = ["SiTPipeline", "SiTTransformer2DModel", "UNetClassPipeline"]
