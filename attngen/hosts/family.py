"""`Family`: how to read one kind of denoiser; clocks and grids that the rows of `attngen.hosts.families` share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from attngen.checks import Grid


@dataclass(frozen=True)
class Core:
    """Where the image is in a core host's attention products.

    Attributes:
        layers: pattern of the names of attention modules that see the image (fnmatch).
        text: where text is in their sequence: "first", "last", or "none" for layers of image tokens alone. Reference
            images follow the image.
    """

    layers: str
    text: Literal["first", "last", "none"]

    def in_front(self, num_keys: int, tokens: int, text_tokens: int) -> int:
        """Keys before those of the image.

        Args:
            num_keys: all keys of a product.
            tokens: of the image.
            text_tokens: 0 where their number is not known; text is then all that is not the image.
        """
        if self.text != "first":
            return 0
        others = max(0, num_keys - tokens)
        return min(others, text_tokens) if text_tokens else others


@dataclass(frozen=True)
class Family:
    """How to read one kind of denoiser.

    Attributes:
        sample: name of the forward argument with the latents.
        time: name of the forward argument with the time step.
        channel: name of the forward argument whose entries reach the attention processors; None for a core host.
        clock: time step -> time in [0, 1], 1 is noise.
        grid: (model, arguments by name) -> (height, width) of the tokens, for a UNet of the latents; for a core host
            (frames, height, width).
        spatial_block: class name of the modules that turn latents into tokens, one a level, or None where the whole
            model works on one grid.
        text: name of the forward argument with the text tokens, where layers attend to image and text jointly.
        rotary: whether layers rotate queries and keys by position.
        mask: name of the forward argument whose value reaches self-attention as a mask, or None.
        core: where the image is in the attention products of a core host, or None for a layer host.
        references: (model, arguments by name) -> (height, width) in tokens of each reference image, which follow the
            image; None where the class has none, or attngen cannot find them.
    """

    sample: str
    time: str
    channel: str | None
    clock: Callable[[float], float]
    grid: Callable[[nn.Module, dict[str, Any]], tuple[int, ...]]
    spatial_block: str | None = None
    text: str | None = None
    rotary: bool = False
    mask: str | None = None
    core: Core | None = None
    references: Callable[[nn.Module, dict[str, Any]], tuple[Grid, ...]] | None = None


def discrete(timestep: float) -> float:
    """Steps, 1,000 is noise."""
    return _clamped(timestep / 1000)


def continuous(timestep: float) -> float:
    """Times, 1 is noise."""
    return _clamped(timestep)


def data_at_one(timestep: float) -> float:
    """Times, 1 is data."""
    return _clamped(1.0 - timestep)


def steps_to_data(timestep: float) -> float:
    """Steps, 1,000 is data."""
    return _clamped(1.0 - timestep / 1000)


def _clamped(time: float) -> float:
    if math.isnan(time):
        raise ValueError("the time step is NaN")
    return min(1.0, max(0.0, time))


def latents(model: nn.Module, arguments: dict[str, Any]) -> Grid:
    """Grid of a UNet's latents."""
    height, width = arguments["sample"].shape[-2:]
    return int(height), int(width)


def config_of(model: nn.Module) -> Any:
    """A model's configuration."""
    return model.config


def patches(model: nn.Module, arguments: dict[str, Any]) -> Grid:
    """Grid of latents (B, C, H, W) cut into patches."""
    height, width = arguments["hidden_states"].shape[-2:]
    side = config_of(model)["patch_size"]
    return int(height) // side, int(width) // side


def packed(model: nn.Module, arguments: dict[str, Any]) -> Grid:
    """Grid of FLUX's packed tokens, from the position ids of the image: id 0 is 0 there, and not in references."""
    ids: Tensor | None = arguments.get("img_ids")
    tokens = int(arguments["hidden_states"].shape[1])
    if ids is None:
        side = math.isqrt(tokens)
        return side, tokens // max(1, side)
    # Reading waits for the GPU, so it is done once a tensor.
    known = _GRIDS.get(ids)
    if known is None:
        rows = ids.reshape(-1, ids.shape[-1])
        image = rows[rows[:, 0] == 0]
        size = (image if len(image) else rows)[:, 1:3].amax(dim=0) + 1
        height, width = size.int().tolist()
        known = _GRIDS[ids] = (height, width)
    return known


_GRIDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
