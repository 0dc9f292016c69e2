"""Sparse tiles: the tiles of keys that matter to a tile of queries token by token, every other tile as one mean key.

Training-free, of the kind of piecewise sparse attention (PISA, arXiv 2602.01077), with another score for the choice and
a gain in front of the first-order term: as published it enlarges the error of a UNet, fitted it lowers it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Results of some of torch's methods have no types.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attngen.checks import Grid, check_count, check_fraction, check_heads, check_image, check_number
from attngen.kernels import flex
from attngen.kernels.gathered import NOTHING, gathered_attention, gathered_by, padded
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer, Selection
from attngen.layers.route import Route, exact
from attngen.methods.base import AttentionMethod, LayerShape, option, with_context
from attngen.methods.tiling import Tiles
from attngen.tokens import join_heads

SPREAD = 3.0
"""Standard deviations of the logits within a tile of keys that its score adds; 3 was best or equal best of 0 to 3."""

Context = tuple[Tensor, Tensor]


def tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    *,
    tile: int = 8,
    key_tile: int = 4,
    density: float = 0.125,
    gain: float | Tensor = 0.0,
    context: Context | None = None,
    scale: float | None = None,
    frames: int = 1,
) -> Tensor:
    """Softmax attention of each tile of queries to its most important tiles of keys exactly, to all others as means.

    The grid is cut into tiles with sides of nearly one length: of queries at most `tile` long, of keys at most
    `key_tile`. A tile of queries i chooses the round(density · tiles), at least one, tiles of keys j of n_j tokens with
    the largest score

        s q̄_i · k̄_j + log n_j + 3 s sqrt(Σ_d mean_i(q_d²) var_j(k_d)),

    means and variances over the tile's tokens. Of a query's logits, a token of a chosen tile adds q · k · s, and any
    other tile one of q · k̄_j · s + log n_j with the value v̄_j. A gain g adds g · s · r · q · H / N, with r the weight
    of all means together and H = Σ_t (k_t - k̄_j(t)) v_tᵀ over all N tokens: with g = 1 the first-order term of PISA.

    Args:
        query: (B, H, N, D), image tokens in row-major order, rotated where the layer rotates.
        key: (B, H, N, D).
        value: (B, H, N, E).
        grid: (height, width) or (frames, height, width), N in all.
        tile: longest side of a tile of queries, in tokens.
        key_tile: longest side of a tile of keys.
        density: share of the tiles of keys that are attended to token by token; 1 is softmax attention.
        gain: g, one for all heads or (H,).
        context: keys and values (B, H, T, ·) that every query attends to exactly, such as those of a text.
        scale: s; D**-0.5 if None.
        frames: of a video, most frames in a tile.

    Returns:
        (B, H, N, E) in the dtype of `value`. The choice itself has no gradient.

    Raises:
        ValueError: for a wrong rank, head size, batch or dtype, tokens that do not fill the grid, a count below 1, a
            density outside of [0, 1], a gain of another shape, or a scale of 0.
    """
    check_heads(query, key, value)
    check_image(query, key, grid)
    if context is not None:
        check_heads(query, *context)
    for name, size in (("tile", tile), ("key_tile", key_tile), ("frames", frames)):
        check_count(name, size)
    check_fraction("density", density, below_one=False)
    if isinstance(gain, Tensor) and gain.shape not in ((), query.shape[1:2]):
        raise ValueError(f"gain has shape {tuple(gain.shape)}, but there are {query.shape[1]} heads")
    if scale == 0:
        raise ValueError("scale must not be 0, because the weight of a mean is a part of its logit")
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    cut = Cut.of(grid, tile, key_tile, density, frames)
    if cut.chosen == cut.keys.count:
        return F.scaled_dot_product_attention(query, *with_context(key, value, context), scale=scale)
    return cut.attend(query, key, value, context, scale, gain)


@dataclass(frozen=True)
class Cut:
    """How a grid is cut for attention.

    Attributes:
        queries: their tiles.
        keys: their tiles.
        chosen: tiles of keys that a tile of queries attends to token by token.
    """

    queries: Tiles
    keys: Tiles
    chosen: int

    @classmethod
    def of(cls, grid: Grid, tile: int, key_tile: int, density: float, frames: int) -> Cut:
        """Of `grid`; arguments as of `tile_attention`."""
        time = (frames,) * (len(grid) - 2)
        keys = Tiles.of(grid, (*time, key_tile, key_tile))
        return cls(Tiles.of(grid, (*time, tile, tile)), keys, min(keys.count, max(1, round(density * keys.count))))

    @property
    def num_keys(self) -> int:
        """Keys of a query: the chosen tiles' tokens, with empty slots, and the other tiles' means."""
        return self.chosen * self.keys.slots + self.keys.count - self.chosen

    @property
    def num_queries(self) -> int:
        """Queries of all tiles, with empty slots."""
        return self.queries.count * self.queries.slots

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: Context | None,
        scale: float,
        gain: float | Tensor = 0.0,
        attention: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """See `tile_attention`; by `attention`, which needs to support neither biases nor masks, where that is given.

        Without it by fused attention over chunks of gathered keys on a CPU, by `flex_attention` on a GPU.
        """
        batch, size, fitted = query.shape[0], value.shape[3], isinstance(gain, Tensor) or gain != 0
        text_key, text_value = context or (key[:, :, :0], value[:, :, :0])
        # Fused kernels need one width; a channel of the values that is 1 in means adds up their weights.
        width = max(query.shape[3], size) if not fitted else padded(max(query.shape[3], size + 1))
        table_key, keys, mean_key = self.keys.table(key, text_key, width)
        table_value, values, mean_value = self.keys.table(value, text_value, width)
        queries = self.queries.cut(query)
        with torch.no_grad():
            order = self._order(queries, keys, mean_key, scale)
        if attention is None and query.device.type == "cuda":
            tiled = (keys, mean_key.to(key.dtype)), (values, mean_value.to(value.dtype)), (text_key, text_value)
            mixed, share = flex.tile_attention(queries, *tiled, order, self.chosen, self.keys.filled(key.device), scale)
        else:
            first = self.keys.count * self.keys.slots
            if fitted:
                table_value[:, first : first + self.keys.count, size] = 1
            queries = F.pad(queries, (0, width - queries.shape[3])) if width > queries.shape[3] else queries
            run = gathered_attention if attention is None else partial(gathered_by, attention)
            mixed = run(queries, table_key, table_value, *self._rows(order, text_key.shape[2]), scale)
            mixed, share = mixed[..., :size], mixed[..., size : size + 1]
        output = self.queries.join(mixed, batch)
        if not fitted:
            return output
        slope = self._slope(keys, values, mean_key) * (scale / query.shape[2])
        term = (query @ slope.to(query.dtype).unflatten(0, (batch, -1))) * self.queries.join(share, batch)
        return output + term * (gain.view(-1, 1, 1).to(term.dtype) if isinstance(gain, Tensor) else gain)

    def _order(self, queries: Tensor, keys: Tensor, mean_key: Tensor, scale: float) -> Tensor:
        """(G, tiles, tiles of keys): tiles of keys by falling score; among equals by number."""
        score = self.queries.means(queries) @ mean_key.transpose(1, 2) * scale
        score += self.keys.tokens(keys.device).log().to(score.dtype)
        variance = (self.keys.means(keys, squares=True) - mean_key.square()).clamp_min(0)
        spread = self.queries.means(queries, squares=True) @ variance.transpose(1, 2)
        score += spread.sqrt_() * (SPREAD * scale)
        return score.argsort(dim=-1, descending=True, stable=True)

    def _rows(self, order: Tensor, texts: int) -> tuple[Tensor, Tensor]:
        """(G, tiles, L) rows of the table for each tile of queries, and (G or 1, tiles or 1, L) their bias.

        Sorted by score, the first tiles give rows of tokens and the others rows of means, so that every tile of queries
        has as many rows, and one softmax without a mask is over both.
        """
        device, slots, count = order.device, self.keys.count * self.keys.slots, self.keys.count
        token = order[..., : self.chosen, None] * self.keys.slots + torch.arange(self.keys.slots, device=device)
        text = torch.arange(slots + count, slots + count + texts, device=device).expand(*order.shape[:2], -1)
        rows = torch.cat([token.flatten(2), order[..., self.chosen :] + slots, text], dim=2)
        empty = torch.where(self.keys.filled(device).flatten(), 0.0, NOTHING).double()
        bias = F.pad(torch.cat([empty, self.keys.tokens(device).log()]), (0, texts))
        return rows, bias[rows[:1, :1] if self.keys.even else rows]

    def _slope(self, keys: Tensor, values: Tensor, mean_key: Tensor) -> Tensor:
        """(G, D, E): H = Σ_t (k_t - k̄_j(t)) v_tᵀ."""
        offset = keys.to(mean_key.dtype) - mean_key[:, :, None]
        if not self.keys.even:
            offset = offset * self.keys.filled(keys.device)[..., None]
        return offset.flatten(1, 2).transpose(1, 2) @ values.to(mean_key.dtype).flatten(1, 2)


@dataclass(frozen=True)
class TileAttention(AttentionMethod):
    """Each tile of queries attends to its most important tiles of keys exactly, and to the rest as means of tiles.

    A layer stays exact where that is no fewer keys than the tokens. See `tile_attention`.

    Attributes:
        tile: longest side of a tile of queries, in tokens of the layer.
        key_tile: longest side of a tile of keys. With 4 a mean stands for fewer tokens, with 8 there are fewer means,
            which pays with densities below 0.1 from 4,096 tokens on.
        density: share of the tiles of keys that are attended to token by token.
        gain: factor of the first-order term of the means; 1 is that of arXiv 2602.01077, and 0 leaves it out.
        frames: of a video, most frames in a tile.
        head_gains: gains of the heads in place of `gain`, such as calibration finds; empty for one gain.
    """

    tile: int = option(8, "longest side of a tile of queries, in tokens", low=1, high=64)
    key_tile: int = option(4, "longest side of a tile of keys, in tokens", low=1, high=64)
    density: float = option(0.125, "share of the tiles of keys that are attended to token by token", step=0.005)
    gain: float = option(0.0, "factor of the first-order term of the means", high=2, step=0.05)
    frames: int = option(1, "most frames in a tile, in videos", low=1, high=64)
    head_gains: tuple[float, ...] = ()

    kind: ClassVar[str] = "tiles"
    title: ClassVar[str] = "Important tiles exactly, the rest as means"
    source: ClassVar[str] = "arXiv 2602.01077"
    candidates: ClassVar[tuple[Mapping[str, Any], ...]] = tuple(
        {"key_tile": key_tile, "density": density} for key_tile in (4, 8) for density in (0.06, 0.125, 0.25)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("density", self.density, below_one=False)
        object.__setattr__(self, "head_gains", tuple(self.head_gains))  # a list in JSON
        for gain in self.head_gains:
            check_number("head_gains", gain)

    @property
    def label(self) -> str:
        return f"tiles {self.tile}/{self.key_tile} {self.density:g}"

    def why_exact(self, grid: Grid) -> str | None:
        """Why this is exact attention on `grid`, or None where it is not."""
        cut, tokens = self._cut(grid), math.prod(grid)
        if cut.chosen == cut.keys.count:
            return f"a density of {self.density:g} keeps all {cut.chosen} tiles"
        if cut.num_queries * cut.num_keys < tokens * tokens:
            return None
        return f"{cut.chosen} tiles and means of {cut.keys.count - cut.chosen} are no fewer keys than {tokens} tokens"

    def _cut(self, grid: Grid) -> Cut:
        return Cut.of(grid, self.tile, self.key_tile, self.density, self.frames)

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        why = self.why_exact(call.grid)
        if why is None and self.head_gains and len(self.head_gains) != layer.heads:
            why = f"{len(self.head_gains)} head_gains do not fit {layer.heads} heads"
        if why is not None:
            return exact(why)
        own = layer.kernel is not None
        return Route(partial(self._run, own=own), "flex" if own and like.is_cuda else layer.attention.name)

    def _run(self, layer: Layer, hidden_states: Tensor, call: Call, *, own: bool) -> Tensor:
        query, key, value = layer.project(Selection(hidden_states, hidden_states))
        gain = query.new_tensor(self.head_gains) if self.head_gains else self.gain
        attention = None if own else layer.attention
        scale = float(layer.head_dim**-0.5)
        mixed = self._cut(call.grid).attend(query, key, value, layer.context, scale, gain, attention)
        return layer.output(join_heads(mixed).to(query.dtype))

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        cut = self._cut(shape.grid)
        core = 4 * shape.width * cut.num_queries * (cut.num_keys + shape.context)
        text = 4 * shape.width * shape.context * (shape.tokens + shape.context)
        routing = shape.width * (4 * cut.queries.count * cut.keys.count + 10 * shape.tokens)
        first_order = 4 * shape.tokens * shape.width * shape.head_dim if self.gain or any(self.head_gains) else 0
        return shape.projection_flops(shape.tokens, shape.tokens) + core + text + routing + first_order
