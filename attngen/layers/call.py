"""One call of the denoiser, in the form that is passed to its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from attngen.checks import Grid

if TYPE_CHECKING:
    from attngen.methods.base import AttentionMethod

CHANNEL_KEY = "attngen"
"""Key of the payload in diffusers' attention kwargs, and name of the processors' argument."""


class Call(NamedTuple):
    """Immutable, made for every call of the denoiser and passed down as an argument.

    So gradient checkpointing, threads and `torch.compile` see the values of the call that a layer belongs to.

    Attributes:
        stage: index of the plan's stage, as text: torch.compile treats text as a constant, one graph a stage.
        grid: (height, width) of the image tokens in the module that receives it; of a video (frames, height, width).
        context: text tokens before the image tokens, in layers that get one joint sequence.
        metric: (B, N, C), the transformer block's input, where a method measures similarity on it.
        draws: (K,) random whole numbers for this timestep, where a method needs them.
        method: runs in place of the plan's method, or None: calibration compares methods on one call.
        trace: key of the running trace, see `attngen.layers.trace`, or None.
        references: (height, width) in tokens of each reference image, where the patch reduces their keys.
    """

    stage: str
    grid: Grid
    context: int = 0
    metric: Tensor | None = None
    draws: Tensor | None = None
    method: AttentionMethod | None = None
    trace: str | None = None
    references: tuple[Grid, ...] = ()
