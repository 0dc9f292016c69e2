"""What a call of a denoiser was like, for reports; and warnings at the line of the user's code."""

from __future__ import annotations

import inspect
import warnings
from typing import NamedTuple

import torch

from attngen.checks import Grid


class AttnGenWarning(UserWarning):
    """Something attngen did not do that was probably expected."""


class Seen(NamedTuple):
    """The properties of a denoiser call that decide what its layers run.

    Attributes:
        grid: (height, width) of the latents of a UNet, or of the tokens of a transformer; frames before in videos.
        text: text tokens in joint attention, else 0.
        tokens: image tokens; other than the grid holds where another tool changed their number.
        batch: samples, both halves of guidance counted.
        dtype: of the latents.
        device: of the latents.
        records: whether gradients were recorded.
        requires_grad: whether the latents have one.
        autocast: its dtype, or None.
        masked: whether the model was given a mask for self-attention.
        references: tokens of reference images, which follow the image and are context.
        reference_grids: (height, width) of each where a patch reduces their keys.
    """

    grid: Grid
    text: int
    tokens: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    records: bool = False
    requires_grad: bool = False
    autocast: torch.dtype | None = None
    masked: bool = False
    references: int = 0
    reference_grids: tuple[Grid, ...] = ()


def warn(message: str) -> None:
    """Warn at the line of the user's code: the nearest one outside of attngen, diffusers and torch."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("attngen", "diffusers", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, AttnGenWarning, stacklevel=level)
