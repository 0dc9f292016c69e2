"""attngen: attention at linear cost for Hugging Face diffusers.

`attngen.apply(pipe, "agent")` changes the attention of a pipeline, `handle.remove()` takes it back.
"""

# diffusers looks up these two names in a library that holds components of a pipeline.
from diffusers import ModelMixin, SchedulerMixin

from attngen import functional
from attngen.calibration import calibrate
from attngen.hosts.hooks import AttnGenWarning
from attngen.hosts.registry import register
from attngen.learned import LearnedLayers
from attngen.methods import (
    AgentAttention,
    DownsampledKV,
    FocalAttention,
    LinearAttention,
    SoftmaxAttention,
    TokenMerging,
)
from attngen.methods.learned import LearnedLinear, LearnedMediators
from attngen.models import SiTPipeline, SiTTransformer2DModel, UNetClassPipeline
from attngen.patch import AttentionPatch, apply, remove
from attngen.plan import Plan, Stage
from attngen.presets import METHODS
from attngen.report import Report
from attngen.schedule import ChangeSchedule, Schedule
from attngen.schedulers import InterpolantScheduler

__version__ = "0.1.0"

register()

__all__ = [
    "METHODS",
    "AgentAttention",
    "AttentionPatch",
    "AttnGenWarning",
    "ChangeSchedule",
    "DownsampledKV",
    "FocalAttention",
    "InterpolantScheduler",
    "LearnedLayers",
    "LearnedLinear",
    "LearnedMediators",
    "LinearAttention",
    "ModelMixin",
    "Plan",
    "Report",
    "Schedule",
    "SchedulerMixin",
    "SiTPipeline",
    "SiTTransformer2DModel",
    "SoftmaxAttention",
    "Stage",
    "TokenMerging",
    "UNetClassPipeline",
    "apply",
    "calibrate",
    "functional",
    "remove",
]
