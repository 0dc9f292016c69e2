"""attngen: attention at linear cost for Hugging Face diffusers.

`attngen.apply(pipe, "agent")` changes the attention of a pipeline, `handle.remove()` restores it, bit for bit.
"""

# diffusers looks up these two names in a library that holds components of a pipeline.
from diffusers import ModelMixin, SchedulerMixin  # noqa: F401

from attngen import functional
from attngen.calibration import calibrate
from attngen.hosts.register import register_model
from attngen.hosts.registry import register
from attngen.hosts.seen import AttnGenWarning
from attngen.learned.file import LearnedLayers
from attngen.learned.methods import LearnedLinear, LearnedMediators
from attngen.methods import (
    AgentAttention,
    DownsampledKV,
    FocalAttention,
    LinearAttention,
    SoftmaxAttention,
    TileAttention,
    TokenMerging,
)
from attngen.patch import AttentionPatch, apply, remove
from attngen.plan import Plan, Stage
from attngen.presets import PRESETS
from attngen.report import Report
from attngen.schedule import ChangeSchedule, Schedule
from attngen.sit.model import SiTTransformer2DModel
from attngen.sit.pipeline import SiTPipeline
from attngen.sit.scheduler import InterpolantScheduler
from attngen.sit.unet_pipeline import UNetClassPipeline
from attngen.version import __version__  # noqa: F401

register()

# In groups: patch, methods, plans, models.
__all__ = [
    "AttentionPatch",
    "AttnGenWarning",
    "Report",
    "apply",
    "register_model",
    "remove",
    "AgentAttention",
    "DownsampledKV",
    "FocalAttention",
    "LearnedLayers",
    "LearnedLinear",
    "LearnedMediators",
    "LinearAttention",
    "SoftmaxAttention",
    "TileAttention",
    "TokenMerging",
    "functional",
    "PRESETS",
    "ChangeSchedule",
    "Plan",
    "Schedule",
    "Stage",
    "calibrate",
    "InterpolantScheduler",
    "SiTPipeline",
    "SiTTransformer2DModel",
    "UNetClassPipeline",
]
