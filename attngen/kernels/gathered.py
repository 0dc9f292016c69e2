"""Softmax attention of groups of queries to rows of a table that each group chooses, in chunks that stay in cache.

The queries of a window or a tile share their keys, so the keys of one group are gathered once and read by all of its
queries. Gathering everything at once writes and reads many times the memory of keys and values; a chunk at a time it
stays in the second-level cache.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Results of some of torch's methods have no types.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attngen.kernels.autocast import autocast_dtype

CHUNK = 1 << 21
"""Bytes of gathered keys and values at a time: what stays in the second-level cache of a core."""

EVEN = 16
"""Numbers of keys that are multiples of this are up to 1.8 times faster on a CPU than those just below."""

NOTHING = -50.0
"""Bias of a row without weight, in place of -inf, which not all fused kernels take."""


def gathered_attention(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(q · K[rows]ᵀ · s + bias) · V[rows] of each group of queries, through fused attention on a CPU.

    An operator, so `torch.compile` leaves its loop whole. First derivatives only. Under autocast the first three
    tensors are cast.

    Args:
        query: (G, P, n, D), P groups of n queries for each of G heads and samples.
        key: (G, R, D), a table of rows.
        value: (G, R, E).
        rows: (G or 1, P, L) whole numbers below R, the rows of each group; 1 where all heads share them.
        bias: (G or 1, P or 1, L), added to the logits of each query of a group; no gradient.
        scale: s.

    Returns:
        (G, P, n, E) in the dtype of `value`.
    """
    dtype = None if query.dtype == torch.float64 else autocast_dtype(query.device.type)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bias = bias.to(torch.promote_types(query.dtype, torch.float32))
    return _forward(query, key, value, rows, bias, scale)


def gathered_by(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    bias: Tensor,
    scale: float,
) -> Tensor:
    """`gathered_attention` by one call of `attention`, which needs to support neither biases nor masks.

    The bias is a channel of the keys instead, against ones in the queries. All fused attention kernels can run that,
    and queries, keys and values get one width, a multiple of 8. Everything is gathered at once.

    Args:
        attention: (G, P, n, D), (G, P, L, D), (G, P, L, D) and `scale=` -> (G, P, n, D).
        query: as of `gathered_attention`, like the others.
        key: see there.
        value: see there.
        rows: see there.
        bias: see there.
        scale: s, not 0.
    """
    size, width = query.shape[-1], padded(max(query.shape[-1] + 2, value.shape[-1]))
    keys, values = (_gather(F.pad(x, (0, width - x.shape[-1])), rows) for x in (key, value))
    # In two parts, for half precision: the second channel has the rounding error of the first.
    largest = torch.finfo(keys.dtype).max
    bias = (bias.to(torch.promote_types(keys.dtype, torch.float32)) / scale).clamp(-largest, largest)
    coarse = bias.to(keys.dtype)
    keys[..., size] = coarse
    keys[..., size + 1] = (bias - coarse).to(keys.dtype)
    mixed = attention(F.pad(query, (0, width - size), value=1.0), keys, values, scale=scale)
    return mixed[..., : value.shape[-1]]


def padded(channels: int) -> int:
    """Fused kernels need queries, keys and values of one width, a multiple of 8."""
    return -(-channels // 8) * 8


def _gather(table: Tensor, rows: Tensor) -> Tensor:
    """(G, R, D) by (G or 1, P, L) -> (G, P, L, D)."""
    if len(rows) == 1:
        return table.index_select(1, rows.flatten()).unflatten(1, rows.shape[1:])
    return table.gather(1, rows.flatten(1)[..., None].expand(-1, -1, table.shape[-1])).unflatten(1, rows.shape[1:])


def _chunks(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Head, groups and their rows (S · L,) of each chunk."""
    number = query.shape[1]
    most = max(1, CHUNK // (rows.shape[2] * (key.shape[2] + value.shape[2]) * key.element_size()))
    step = -(-number // -(-number // most))  # chunks of one size
    for head in range(query.shape[0]):
        for start in range(0, number, step):
            groups = slice(start, start + step)
            yield head, groups, rows[head % len(rows), groups].flatten()


def _of(bias: Tensor, head: int, groups: slice) -> Tensor:
    """(S or 1, 1, L) the bias of a chunk."""
    bias = bias[head % len(bias)]
    return (bias if len(bias) == 1 else bias[groups])[:, None]


@torch.library.custom_op("attngen::gathered_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, bias: Tensor, scale: float) -> Tensor:
    output, buffers = query.new_empty(*query.shape[:3], value.shape[2]), None
    missing = -rows.shape[2] % EVEN
    if missing:
        rows, bias = F.pad(rows, (0, missing)), F.pad(bias, (0, missing), value=-float("inf"))
    length = rows.shape[2]
    for head, groups, index in _chunks(query, key, value, rows):
        part = query[head, groups]
        if buffers is None:  # the first chunk is as large as any; one memory for all stays in cache
            buffers = [x.new_empty(len(index), x.shape[2]) for x in (key, value)]
        keys, values = (
            torch.index_select(x[head], 0, index, out=buffer[: len(index)]).view(len(part), 1, length, -1)
            for x, buffer in zip((key, value), buffers, strict=True)
        )
        # A bias expanded without a copy is free, unlike one of the full size.
        mask = _of(bias, head, groups)[:, None].expand(len(part), 1, part.shape[1], length)
        output[head, groups] = F.scaled_dot_product_attention(part[:, None], keys, values, mask, scale=scale)[:, 0]
    return output


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, bias: Tensor, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[2])


@torch.library.custom_op("attngen::gathered_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the softmax is computed again."""
    wide, length = torch.promote_types(query.dtype, torch.float32), rows.shape[2]
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (key, value))
    for head, groups, index in _chunks(query, key, value, rows):
        part, given = query[head, groups].to(wide), grad[head, groups].to(wide)
        keys, values = (x[head].index_select(0, index).view(len(part), length, -1).to(wide) for x in (key, value))
        weight = torch.baddbmm(_of(bias, head, groups), part, keys.transpose(1, 2), alpha=scale).softmax(-1)
        grad_value[head].index_add_(0, index, (weight.transpose(1, 2) @ given).flatten(0, 1))
        toward = given @ values.transpose(1, 2)
        slope = weight * (toward - (weight * toward).sum(-1, keepdim=True)) * scale
        grad_query[head, groups] = (slope @ keys).to(query.dtype)
        grad_key[head].index_add_(0, index, (slope.transpose(1, 2) @ part).flatten(0, 1))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.attngen.gathered_attention)
def _flops(query: Any, key: Any, value: Any, rows: Any, *others: Any, **named: Any) -> int:
    """Floating-point operations of both products, by shapes, for torch's counter."""
    return 2 * math.prod(query[:3]) * rows[2] * (key[2] + value[2])
