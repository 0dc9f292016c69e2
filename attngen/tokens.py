"""Tokens as heads and as a grid: splitting, pooling, positions, convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attngen.checks import Grid, check_count, check_tokens, sides


def depthwise_convolution(channels: int) -> nn.Conv2d:
    """A 3 x 3 convolution with one filter a channel, initialised with zeros: before training it adds nothing."""
    conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def convolve_tokens(conv: nn.Conv2d, x: Tensor, grid: Grid) -> Tensor:
    """Apply `conv` to tokens (B, N, C) seen as an image of `grid`; returns (B, N, C)."""
    return conv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H · D) -> (B, H, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H · D)."""
    return x.transpose(1, 2).flatten(2)


def pool_tokens(x: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Average the tokens of each cell of a coarser grid (adaptive average pooling, cells may overlap by a token).

    Args:
        x: (B, N, C), tokens in row-major order.
        grid: (height, width) or (frames, height, width) of the tokens, N in all.
        size: as many sides, of the result; where there are more than tokens, tokens are repeated.

    Returns:
        (B, M, C), M the product of `size`, row-major, in the dtype of `x`.

    Raises:
        ValueError: if the tokens do not fill the grid, or for a side of `size` below 1.
    """
    check_tokens(x, grid)
    if len(size) != len(grid) or min(size) < 1:
        raise ValueError(f"cannot pool a grid of {sides(grid)} to {sides(size)}")
    image = _to_image(x, grid)
    if len(size) == 2:
        return _to_tokens(F.adaptive_avg_pool2d(image, size))
    return _to_tokens(F.adaptive_avg_pool3d(image, (size[0], size[1], size[2])))


def agent_grid(num_agents: int, grid: Grid, frames: int | None = None) -> Grid:
    """Sides of at most `num_agents` cells on a token grid of any shape.

    The largest count whose cells are no more than twice as long as wide (or as near to that as the grid allows); among
    equals the squarest cells. A square count on a square grid gives the square root, so 64 on 32 x 32 is 8 x 8.

    Args:
        num_agents: largest number of cells, at least 1.
        grid: (height, width) or (frames, height, width) of the tokens.
        frames: of a video, how many a cell covers at most, where there are cells enough for that; None for cells about
            as many frames long as they are tokens wide.
    """
    check_count("num_agents", num_agents)
    if len(grid) == 2:
        return _rows_and_columns(num_agents, grid)
    length, height, width = grid
    if frames is not None:
        number = min(-(-length // frames), num_agents)
        return number, *_rows_and_columns(num_agents // number, (height, width))
    best, best_rank = (1, 1, 1), (float("inf"), 0, 0.0)
    for number in _near((num_agents * length * length / (height * width)) ** (1 / 3), min(length, num_agents)):
        rows, columns = _rows_and_columns(num_agents // number, (height, width))
        cell = length / number, height / rows, width / columns
        stretch = max(cell) / min(cell)
        rank = (max(stretch, 2.0), -number * rows * columns, stretch)
        if rank < best_rank:
            best, best_rank = (number, rows, columns), rank
    return best


def _rows_and_columns(num_agents: int, grid: Grid) -> tuple[int, int]:
    """`agent_grid` of an image."""
    height, width = grid
    # A plain loop, because torch.compile cannot trace min() with a key over sizes it keeps symbolic.
    best, best_rank = (1, 1), (float("inf"), 0, 0.0)
    for rows in _near((num_agents * height / width) ** 0.5, min(height, num_agents)):
        columns = min(width, num_agents // rows)
        stretch = max(height * columns / (width * rows), width * rows / (height * columns))
        rank = (max(stretch, 2.0), -rows * columns, stretch)
        if rank < best_rank:
            best, best_rank = (rows, columns), rank
    return best


def _near(ideal: float, most: int) -> range:
    """Numbers around the ideal one, from 1 to `most`."""
    return range(min(max(1, int(ideal / 1.5)), most), min(int(ideal * 1.5) + 1, most) + 1)


def downsample_tokens(x: Tensor, grid: Grid, factor: int, frames: int = 1) -> Tensor:
    """Keep one token of each factor x factor cell (nearest to its centre).

    Args:
        x: (B, N, C), row-major.
        grid: (height, width) or (frames, height, width), N in all.
        factor: whole number, at least 1.
        frames: of a video, how many give one; at least 1, which keeps every frame.

    Returns:
        (B, M, C), M the product of the sides of `coarse_grid`.

    Raises:
        ValueError: if the tokens do not fill the grid, or for a factor or frames below 1.
    """
    check_tokens(x, grid)
    check_count("factor", factor)
    check_count("frames", frames)
    return _to_tokens(F.interpolate(_to_image(x, grid), size=coarse_grid(grid, factor, frames), mode="nearest-exact"))


def nearest_positions(grid: Grid, size: Grid, device: torch.device | None = None) -> Tensor:
    """(M,) the token nearest to the centre of each cell when `grid` is cut into `size` cells."""
    axes = [
        ((torch.arange(cells, device=device) + 0.5) * (length / cells)).long().clamp(max=length - 1)
        for cells, length in zip(size, grid, strict=True)
    ]
    return flat_positions(axes, grid).flatten()


def flat_positions(axes: Sequence[Tensor], grid: Grid) -> Tensor:
    """(a, b, …) positions in `grid` of all combinations of indices (a,), (b,), … along its axes."""
    position = axes[0]
    for index, length in zip(axes[1:], grid[1:], strict=True):
        position = position[..., None] * length + index
    return position


def coarse_grid(grid: Grid, factor: int, frames: int = 1) -> Grid:
    """A grid whose height and width are `factor` times shorter, with `frames` times fewer frames; at least 1 each."""
    *length, height, width = grid
    return *(max(1, each // frames) for each in length), max(1, height // factor), max(1, width // factor)


def _to_image(x: Tensor, grid: Grid) -> Tensor:
    """(B, N, C) -> (B, C, …grid), which is already in channels-last memory order: no copy."""
    return x.unflatten(1, grid).movedim(-1, 1)


def _to_tokens(image: Tensor) -> Tensor:
    """(B, C, …grid) -> (B, N, C)."""
    return image.movedim(1, -1).flatten(1, -2)


Tensors = tuple[Tensor, ...]

_MADE: dict[Any, Tensors] = {}
_MOST_MADE = 256


def made_once(build: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """A function of sizes that makes index tensors: for equal sizes and device they are made once.

    Args:
        build: of whole numbers and tuples of them; its tensors are on a CPU.

    Returns:
        The function, with `device=`. Under `torch.compile` it builds, and the compiler folds the constants.
    """

    def made(*sizes: Any, device: torch.device) -> Tensors:
        # Tensors made under a mode, such as fake ones, or while a CUDA graph is captured, are of no use outside of it.
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return tuple(x.to(device) for x in build(*sizes))
        key = build, sizes, device
        found = _MADE.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = tuple(x.to(device) for x in build(*sizes))
            if len(_MADE) >= _MOST_MADE:
                _MADE.clear()
            if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                _MADE[key] = found
        return found

    return made
