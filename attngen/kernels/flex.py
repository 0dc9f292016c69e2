"""Attention to sparse tiles by torch's `flex_attention`, for GPUs: one call for tokens, one for means, merged.

Uncompiled, `flex_attention` writes all scores, so outside of `torch.compile` it is compiled here, once for each shape.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Results of some of torch's methods have no types.

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

Pair = tuple[Tensor, Tensor]


def tile_attention(
    query: Tensor,
    key: Pair,
    value: Pair,
    context: Pair,
    order: Tensor,
    chosen: int,
    filled: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention to the tokens of chosen tiles, to the means of all other tiles, and to a text.

    Args:
        query: (G, P, n, D), queries by tile, G heads of all samples.
        key: (G, T, m, D) by tile, and (G, T, D) their means.
        value: the same of the values.
        context: (B, H, L, D) keys and values of the text.
        order: (G, P, T) tiles of keys, those that are chosen first.
        chosen: their number.
        filled: (T, m) whether a slot of a tile has a token.
        scale: of the scores.

    Returns:
        (G, P, n, E), and (G, P, n, 1) the weight of all means together.
    """
    size, heads = query.shape[2], context[0].shape[:2]
    side, key_side = _side(size), _side(key[0].shape[2])
    queries = F.pad(query, (0, 0, 0, side - size)).flatten(1, 2).unflatten(0, heads)
    order = order.unflatten(0, heads)
    is_near = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[..., :chosen], True)
    keys, values = (_table(x[0], text, key_side) for x, text in zip((key, value), context, strict=True))
    blocks = keys.shape[2] // key_side
    text = torch.arange(order.shape[-1], blocks, device=order.device).expand(*order.shape[:3], -1)
    index = torch.cat([order[..., :chosen], text, order[..., chosen:]], dim=-1)
    near = F.pad(is_near, (0, text.shape[-1]), value=True)
    real = F.pad(filled, (0, key_side - filled.shape[1])).flatten()
    real = F.pad(
        F.pad(real, (0, context[0].shape[2]), value=True), (0, keys.shape[2] - len(real) - context[0].shape[2])
    )

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return near[b, h, q // side, k // key_side] & real[k]

    mask = BlockMask.from_kv_blocks(
        torch.full(order.shape[:3], chosen + text.shape[-1], dtype=torch.int32, device=order.device),
        index.to(torch.int32),
        BLOCK_SIZE=(side, key_side),
        mask_mod=seen,
        seq_lengths=(queries.shape[2], keys.shape[2]),
    )
    log_count = filled.sum(1).log()

    def weighted(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(is_near[b, h, q // side, k], -float("inf"), score + log_count[k])

    exact, exact_lse = _attend(queries, keys, values, scale, (side, key_side), block_mask=mask)
    mean_key, mean_value = (x[1].unflatten(0, heads) for x in (key, value))
    coarse, coarse_lse = _attend(queries, mean_key, mean_value, scale, None, score_mod=weighted)
    share = (coarse_lse - exact_lse).sigmoid()[..., None]
    output = torch.lerp(exact, coarse, share.to(exact.dtype))
    output, share = (x.flatten(0, 1).unflatten(1, (-1, side))[:, :, :size] for x in (output, share.to(exact.dtype)))
    return output, share


def _side(tokens: int) -> int:
    """The power of two that holds a tile, at least 16: what the kernels can multiply."""
    return max(16, 1 << (tokens - 1).bit_length())


def _table(tiles: Tensor, text: Tensor, side: int) -> Tensor:
    """(G, T, m, D) and (B, H, L, D) -> (B, H, (T + ⌈L / side⌉) · side, D)."""
    table = F.pad(tiles, (0, 0, 0, side - tiles.shape[2])).flatten(1, 2).unflatten(0, text.shape[:2])
    return torch.cat([table, F.pad(text, (0, 0, 0, -text.shape[2] % side))], dim=2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, block: tuple[int, int] | None, **mods: Any
) -> tuple[Tensor, Tensor]:
    """Output and the logarithm of its sum of weights."""
    options: dict[str, Any] = {}
    if block is not None:  # default blocks are larger than a tile
        options = {"kernel_options": {"fwd_BLOCK_M": min(64, block[0]), "fwd_BLOCK_N": min(64, block[1])}}
    output, aux = _compiled(query.device.type)(
        query, key, value, scale=scale, return_aux=AuxRequest(lse=True), **mods, **options
    )
    return output, aux.lse


@functools.cache
def _for_device(kind: str) -> Callable[..., Any]:
    return flex_attention if kind == "cpu" else torch.compile(flex_attention, dynamic=False)


def _compiled(kind: str) -> Callable[..., Any]:
    return flex_attention if torch.compiler.is_compiling() else _for_device(kind)
