"""`Family`: how to read one kind of denoiser; clocks and grids that the rows of `attngen.hosts.families` share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from attngen.checks import Grid


class Unreadable(Exception):
    """Raised by a row for a call whose image it does not find; the message is the reason why layers stay exact."""


@dataclass(frozen=True)
class Core:
    """Where the image is in a core host's attention products.

    Attributes:
        layers: pattern of the names of attention modules that see the image (fnmatch); several with | between them.
        text: where text is in their sequence: "first", "last", "around" for both, or "none" for layers of image tokens
            alone. Reference images follow the image.
        levels: whether the layers are on the levels of a UNet, so that their grids are halves of the model's.
        cross: whether diffusers marks the layers as cross-attention, though they attend to themselves.
    """

    layers: str
    text: Literal["first", "last", "around", "none"]
    levels: bool = False
    cross: bool = False

    def in_front(self, num_keys: int, tokens: int, text_tokens: int) -> int | None:
        """Keys before those of the image; None where the image is not among the keys.

        Args:
            num_keys: all keys of a product.
            tokens: of the image.
            text_tokens: 0 where their number is not known; text is then all that is not the image.
        """
        others = num_keys - tokens
        if self.text == "none" and others or self.text == "around" and text_tokens > others or others < 0:
            return None
        if self.text == "around":
            return text_tokens
        if self.text != "first":
            return 0
        return min(others, text_tokens) if text_tokens else others

    def grid_of(self, grid: Grid, tokens: int) -> Grid:
        """The grid of a product's image: that of the model, or of the level of a UNet that has as many tokens."""
        return level_with(grid, tokens) if self.levels else grid


@dataclass(frozen=True)
class Family:
    """How to read one kind of denoiser.

    Attributes:
        sample: name of the forward argument with the latents.
        time: name of the forward argument with the time step, or None for a model without.
        channel: name of the forward argument whose entries reach the attention processors; None for a core host.
        clock: time step -> time in [0, 1], 1 is noise.
        grid: (model, arguments by name) -> (height, width) of the tokens, for a UNet of the latents; for a core host
            (frames, height, width).
        spatial_block: class name of the modules that turn latents into tokens, one a level, or None where the whole
            model works on one grid.
        text: name of the forward argument with the text tokens, where layers attend to image and text jointly; or
            (model, arguments by name) -> number of tokens before the image.
        rotary: whether layers rotate queries and keys by position.
        mask: name of the forward argument whose value reaches self-attention as a mask, or None.
        core: where the image is in the attention products of a core host, or None for a layer host.
        times_of: what one sample has one time step for: "samples", or "tokens", of which given ones have the time of
            data.
        references: (model, arguments by name) -> (height, width) in tokens of each reference image, which follow the
            image; None where the class has none, or attngen cannot find them.
    """

    sample: str
    time: str | None
    channel: str | None
    clock: Callable[[float], float]
    grid: Callable[[nn.Module, dict[str, Any]], tuple[int, ...]]
    spatial_block: str | None = None
    text: str | Callable[[nn.Module, dict[str, Any]], int] | None = None
    rotary: bool = False
    mask: str | None = None
    core: Core | None = None
    times_of: Literal["samples", "tokens"] = "samples"
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


def level_with(grid: Grid, tokens: int) -> Grid:
    """The grid with that many tokens among a grid and its halves, which convolutions round up or down."""
    *frames, height, width = grid
    for times in range(8):
        for up in (1, 0):
            sides = tuple(max(1, -(-side // 2**times) if up else side // 2**times) for side in (height, width))
            if sides[0] * sides[1] == tokens:
                return cast("Grid", (*frames, *sides))
    return grid


def config_of(model: nn.Module) -> Any:
    """A model's configuration."""
    return model.config


def patches(model: nn.Module, arguments: dict[str, Any]) -> Grid:
    """Grid of latents (B, C, H, W) cut into patches."""
    height, width = arguments["hidden_states"].shape[-2:]
    side = config_of(model)["patch_size"] or 1
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
