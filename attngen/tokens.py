"""Tokens as heads and as a grid: splitting, pooling, positions, convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attngen.checks import Grid, check_count, check_tokens


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
        grid: (height, width) of the tokens, height times width = N.
        size: (rows, columns) of the result; where there are more than tokens, tokens are repeated.

    Returns:
        (B, rows · columns, C), row-major, in the dtype of `x`.

    Raises:
        ValueError: if the tokens do not fill the grid, or for a side of `size` below 1.
    """
    check_tokens(x, grid)
    if min(size) < 1:
        raise ValueError(f"cannot pool a grid of {grid[0]} x {grid[1]} to {size[0]} x {size[1]}")
    # (B, N, C) seen as an image is already in channels-last memory order: no copy.
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(image, size).permute(0, 2, 3, 1).flatten(1, 2)


def agent_grid(num_agents: int, grid: Grid) -> Grid:
    """Rows and columns of at most `num_agents` cells on a token grid of any shape.

    The largest count whose cells are no more than twice as long as wide (or as near to that as the grid allows); among
    equals the squarest cells. A square count on a square grid gives the square root, so 64 on 32 x 32 is 8 x 8.

    Args:
        num_agents: largest number of cells, at least 1.
        grid: (height, width) of the tokens.
    """
    check_count("num_agents", num_agents)
    height, width = grid
    ideal = (num_agents * height / width) ** 0.5
    most = min(height, num_agents)
    low, high = min(max(1, int(ideal / 1.5)), most), min(int(ideal * 1.5) + 1, most)
    # A plain loop, because torch.compile cannot trace min() with a key over sizes it keeps symbolic.
    best, best_rank = (1, 1), (float("inf"), 0, 0.0)
    for rows in range(low, high + 1):
        columns = min(width, num_agents // rows)
        stretch = max(height * columns / (width * rows), width * rows / (height * columns))
        rank = (max(stretch, 2.0), -rows * columns, stretch)
        if rank < best_rank:
            best, best_rank = (rows, columns), rank
    return best


def downsample_tokens(x: Tensor, grid: Grid, factor: int) -> Tensor:
    """Keep one token of each factor x factor cell (nearest to its centre).

    Args:
        x: (B, N, C), row-major.
        grid: (height, width), N = height · width.
        factor: whole number, at least 1.

    Returns:
        (B, max(1, height // factor) · max(1, width // factor), C).

    Raises:
        ValueError: if the tokens do not fill the grid, or for a factor below 1.
    """
    check_tokens(x, grid)
    check_count("factor", factor)
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(image, size=coarse_grid(grid, factor), mode="nearest-exact").permute(0, 2, 3, 1).flatten(1, 2)


def nearest_positions(grid: Grid, size: Grid, device: torch.device | None = None) -> Tensor:
    """(rows · columns,) the token nearest to the centre of each cell when `grid` is cut into `size` cells."""
    row, column = (
        ((torch.arange(cells, device=device) + 0.5) * (length / cells)).long().clamp(max=length - 1)
        for cells, length in zip(size, grid, strict=True)
    )
    return (row[:, None] * grid[1] + column[None, :]).flatten()


def coarse_grid(grid: Grid, factor: int) -> Grid:
    """(rows, columns) of a grid whose sides are `factor` times shorter, at least 1."""
    return max(1, grid[0] // factor), max(1, grid[1] // factor)
