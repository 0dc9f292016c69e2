"""Focal attention: exact to nearby tokens, to means of cells farther away, so cost grows linearly with tokens.

Paper: Focal Self-attention, Yang et al. 2021, arXiv 2107.00641, section 3.1. Its cells are pooled by learned weights;
here they are plain means, weighted by the number of their tokens, which needs no training.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Results of some of torch's methods have no types.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attngen.checks import Grid, check_heads
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Attention, Layer, Selection
from attngen.layers.route import Route, exact
from attngen.methods.base import AttentionMethod, LayerShape, Preset, option
from attngen.tokens import agent_grid, join_heads

_NOTHING = -50.0
"""Bias of a cell without weight. Its mean is among the region's tokens, so no logit can make up for it."""


def focal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    *,
    window: int = 8,
    margin: int = 4,
    num_cells: int = 64,
    context: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each window of queries to near keys exactly and to all others as means of cells.

    The grid is cut into windows of `window` x `window` queries. A window's region reaches `margin` tokens beyond it on
    each side; at the border of the grid it is moved inwards, so that all regions have one size. The grid is also cut
    into `num_cells` cells. Of a query's logits, those of its region are q · k · s, and a cell with n > 0 tokens outside
    the region adds one of q · mean(k) · s + log n with the value mean(v), both means over the whole cell.

    Args:
        query: (B, H, N, D), image tokens in row-major order.
        key: (B, H, N, D).
        value: (B, H, N, E).
        grid: (height, width), N = height · width.
        window: side of a window, in tokens.
        margin: tokens beyond the window on each side, at least 0.
        num_cells: most cells, arranged by `agent_grid`.
        context: keys and values (B, H, T, ·) that every query attends to exactly, such as those of a text.
        scale: s; D**-0.5 if None.

    Returns:
        (B, H, N, E) in the dtype of `value`.

    Raises:
        ValueError: for a wrong rank, head size, batch or dtype, tokens that do not fill the grid, a count below 1, or a
            scale of 0.
    """
    check_heads(query, key, value)
    if context is not None:
        check_heads(query, *context)
    if scale == 0:
        raise ValueError("scale must not be 0, because the weight of a cell is a part of its logits")
    tokens = math.prod(grid)
    if min(grid) < 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise ValueError(
            f"{query.shape[2]} queries and {key.shape[2]} keys do not fill a grid of {grid[0]} x {grid[1]} = {tokens}"
        )
    FocalAttention(window, margin, num_cells)  # checks the options
    return _Regions(grid, window, margin, num_cells).attend(query, key, value, context, scale)


class _Regions:
    """How a grid is cut: windows of queries, the region of keys of each, and cells.

    Attributes:
        grid: (height, width) of the tokens.
        window: sides of a window.
        windows: rows and columns of windows; the last of a row or column may reach beyond the grid.
        region: sides of a region.
        cells: rows and columns of cells.
    """

    def __init__(self, grid: Grid, window: int, margin: int, num_cells: int) -> None:
        self.grid = grid
        self.window = min(window, grid[0]), min(window, grid[1])
        self.windows = -(-grid[0] // self.window[0]), -(-grid[1] // self.window[1])
        self.region = min(self.window[0] + 2 * margin, grid[0]), min(self.window[1] + 2 * margin, grid[1])
        self.cells = agent_grid(num_cells, grid)
        self._margin = margin

    @property
    def num_keys(self) -> int:
        """Keys of a query."""
        return math.prod(self.region) + math.prod(self.cells)

    @property
    def num_queries(self) -> int:
        """Queries of all windows, with those beyond the grid."""
        return math.prod(self.windows) * math.prod(self.window)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: tuple[Tensor, Tensor] | None,
        scale: float | None,
        attention: Attention | Callable[..., Tensor] = F.scaled_dot_product_attention,
    ) -> Tensor:
        """See `focal_attention`; by `attention`, which needs to support neither biases nor masks.

        The bias is a channel of the keys instead, against ones in the queries. All fused attention kernels can run
        that; with a bias only some can, 4 times slower on a CPU.
        """
        batch, heads, _, size = query.shape
        scale = float(size**-0.5) if scale is None else scale
        width = _padded(max(size + 2, value.shape[3]))
        text_key, text_value = context or (None, None)
        queries = self._cut(_widen(query, width, 1.0))
        keys = self._gather(_widen(key, width), None if text_key is None else _widen(text_key, width))
        values = self._gather(_widen(value, width), None if text_value is None else _widen(text_value, width))
        largest = torch.finfo(keys.dtype).max
        bias = self._bias(torch.promote_types(query.dtype, torch.float32), query.device) / scale
        bias = bias.clamp(-largest, largest)
        # In two parts, for half precision: the second channel has the rounding error of the first.
        coarse = bias.to(keys.dtype)
        keys[:, :, : bias.shape[1], size] = coarse
        keys[:, :, : bias.shape[1], size + 1] = (bias - coarse).to(keys.dtype)
        mixed = attention(queries, keys, values, scale=scale)
        return self._join(mixed[..., : value.shape[3]]).unflatten(0, (batch, heads))

    # Windows of queries

    def _cut(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B · H, windows, tokens of a window, D), zeros beyond the grid."""
        (rows, columns), (height, width) = self.windows, self.window
        image = x.flatten(0, 1).unflatten(1, self.grid)
        image = F.pad(image, (0, 0, 0, columns * width - self.grid[1], 0, rows * height - self.grid[0]))
        cut = image.unflatten(2, (columns, width)).unflatten(1, (rows, height))
        return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        """The result of `_cut`, back to (B · H, N, D)."""
        image = x.unflatten(2, self.window).unflatten(1, self.windows).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return image[:, : self.grid[0], : self.grid[1]].flatten(1, 2)

    # Keys of each window

    def _gather(self, x: Tensor, text: Tensor | None) -> Tensor:
        """(B, H, N, D) -> (B · H, windows, keys, D): the region's tokens, the means of all cells, and those of text."""
        image = x.flatten(0, 1)
        parts = [image, self._means(image.unflatten(1, self.grid))]
        parts += [] if text is None else [text.flatten(0, 1)]
        rows, columns = (self._positions(axis, x.device) for axis in (0, 1))
        near = rows[:, None, :, None] * self.grid[1] + columns[None, :, None, :]
        near = near.flatten(2).flatten(0, 1)  # (windows, tokens of a region)
        others = torch.arange(image.shape[1], sum(part.shape[1] for part in parts), device=x.device)
        index = torch.cat([near, others.expand(near.shape[0], -1)], dim=1)
        return torch.cat(parts, dim=1).index_select(1, index.flatten()).unflatten(1, index.shape)

    def _positions(self, axis: int, device: torch.device) -> Tensor:
        """(windows, region) rows or columns of the region of each window."""
        first = torch.arange(self.windows[axis], device=device) * self.window[axis] - self._margin
        first = first.clamp(0, self.grid[axis] - self.region[axis])
        return first[:, None] + torch.arange(self.region[axis], device=device)

    # Cells

    def _members(self, axis: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(cells, tokens) 1 where a row or column belongs to a cell; each belongs to one."""
        cell = torch.arange(self.grid[axis], device=device) * self.cells[axis] // self.grid[axis]
        return (cell == torch.arange(self.cells[axis], device=device)[:, None]).to(dtype)

    def _means(self, image: Tensor) -> Tensor:
        """(B · H, h, w, D) -> (B · H, cells, D), by products, which sum in one order on every device."""
        exact = torch.promote_types(image.dtype, torch.float32)
        rows, columns = (self._members(axis, exact, image.device) for axis in (0, 1))
        rows, columns = ((x / x.sum(1, keepdim=True)).to(image.dtype) for x in (rows, columns))
        half = (rows @ image.flatten(2)).unflatten(2, image.shape[2:])  # (B · H, cell rows, w, D)
        return (columns @ half).flatten(1, 2)

    def _bias(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(windows, region and cells) log of the number of tokens of a key, `_NOTHING` for cells in the region."""
        inside = []
        for axis in (0, 1):
            members, positions = self._members(axis, dtype, device), self._positions(axis, device)
            inside.append(members[:, positions].sum(-1).T)  # (windows, cells) of rows or columns
        rows, columns = (self._members(axis, dtype, device).sum(1) for axis in (0, 1))
        within = inside[0][:, None, :, None] * inside[1][None, :, None, :]
        outside = (rows[:, None] * columns - within).flatten(2).flatten(0, 1)
        return F.pad(outside.log().clamp_min(_NOTHING), (math.prod(self.region), 0))


def _padded(channels: int) -> int:
    """Fused kernels need queries, keys and values of one width, a multiple of 8."""
    return -(-channels // 8) * 8


def _widen(x: Tensor, width: int, fill: float = 0.0) -> Tensor:
    """Further channels of one value."""
    return F.pad(x, (0, width - x.shape[-1]), value=fill)


@dataclass(frozen=True)
class FocalAttention(AttentionMethod):
    """Each window of queries attends to the tokens around it exactly, and to the rest as means of cells.

    A layer stays exact where a region and the cells together are no fewer keys than the tokens. See `focal_attention`.

    Attributes:
        window: side of a window of queries that share their keys, in tokens of the layer.
        margin: tokens beyond the window that they attend to exactly, on each side.
        num_cells: largest number of cells for the rest.
    """

    window: int = option(8, "side of a window of queries that share their keys, in tokens", low=1, high=64)
    margin: int = option(4, "tokens around the window that are attended to exactly", high=64)
    num_cells: int = option(64, "largest number of cells for the rest", low=1, high=4096)

    kind: ClassVar[str] = "focal"
    title: ClassVar[str] = "Near exactly, far in cells"
    source: ClassVar[str] = "arXiv 2107.00641"
    presets: ClassVar[Mapping[str, Preset]] = {"focal": Preset(min_tokens=1024)}
    candidates: ClassVar[tuple[Mapping[str, int], ...]] = (
        *({"window": 8, "margin": 4, "num_cells": count} for count in (64, 256)),
        *({"window": 4, "margin": 2, "num_cells": count} for count in (16, 64, 256)),
        {"window": 4, "margin": 4, "num_cells": 64},
        {"window": 4, "margin": 1, "num_cells": 16},
    )
    # The mean of keys that were rotated by position has lost what the rotation was for.
    supports_rotary: ClassVar[bool] = False

    @property
    def label(self) -> str:
        return f"focal {self.window}+{self.margin} {self.num_cells}"

    def why_exact(self, grid: Grid) -> str | None:
        """Why this is exact attention on `grid`, or None where it is not."""
        regions, tokens = self._regions(grid), math.prod(grid)
        if regions.num_queries * regions.num_keys < tokens * tokens:
            return None
        (height, width), cells = regions.region, math.prod(regions.cells)
        return f"a region of {height} x {width} and {cells} cells are no fewer keys than {tokens} tokens"

    def _regions(self, grid: Grid) -> _Regions:
        return _Regions(grid, self.window, self.margin, self.num_cells)

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        why = self.why_exact(call.grid)
        return exact(why) if why is not None else Route(self._run, layer.attention.name)

    def _run(self, layer: Layer, hidden_states: Tensor, call: Call) -> Tensor:
        query, key, value = layer.project(Selection(hidden_states, hidden_states))
        mixed = self._regions(call.grid).attend(query, key, value, layer.context, None, layer.attention)
        return layer.output(join_heads(mixed).to(query.dtype))

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        regions = self._regions(shape.grid)
        width = shape.num_heads * _padded(shape.head_dim + 2)
        core = 4 * width * regions.num_queries * (regions.num_keys + shape.context)
        text = 4 * shape.width * shape.context * (shape.tokens + shape.context)
        rows, columns = regions.cells
        means = 2 * 2 * width * rows * shape.grid[1] * (shape.grid[0] + columns)
        return shape.projection_flops(shape.tokens, shape.tokens) + core + text + means
