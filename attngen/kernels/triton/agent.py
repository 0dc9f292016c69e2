"""Agent attention in fused Triton kernels, forward and backward, as operators that `torch.compile` leaves whole.

The forward pass reads keys and values once, split along the keys, and queries and values once; nothing as large as
tokens times agents is stored. The backward pass computes both softmaxes again, from the inputs, the aggregated values
and the logarithms of the aggregation's sums. It has no atomic additions, so equal inputs have equal gradients.

Paper: Agent Attention, Han et al., ECCV 2024, arXiv 2312.08874; the split along the keys is that of Flash-Decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attngen.kernels.autocast import autocast_dtype
from attngen.kernels.like import Like
from attngen.kernels.reference import NO_BIASES, AgentScales, Biases, Convolution
from attngen.kernels.triton import common

MAX_HEAD_DIM = 256
MAX_AGENTS = 256


def why_not(
    query: Tensor | Like, key: Tensor | Like, value: Tensor | Like, agents: Tensor | Like, correction: str | None = None
) -> str | None:
    """Why these tensors cannot take the kernels (device, dtype, a size), or None if they can. Shapes as below."""
    if correction is not None:
        return f"the kernels have no {correction} correction"
    reason = common.why_no_kernels((query, key, value, agents))
    if reason is not None:
        return reason
    for head_dim in (query.shape[-1], value.shape[-1]):
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            return f"the kernels take head sizes from 1 to {MAX_HEAD_DIM}, not {head_dim}"
    if not 1 <= agents.shape[2] <= MAX_AGENTS:
        return f"the kernels take from 1 to {MAX_AGENTS} agents, not {agents.shape[2]}"
    if 0 in (*query.shape, *key.shape):
        return "there are no queries or no keys"
    return None


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scales: AgentScales,
    biases: Biases = NO_BIASES,
    convolution: Convolution | None = None,
) -> Tensor:
    """The same function as `reference.agent_attention`, with sums in float32. First derivatives only.

    Under autocast the first four tensors are cast, the biases and the convolution are read as they are.

    Args:
        query: (B, H, N, D).
        key: (B, H, L, D).
        value: (B, H, L, E).
        agents: (B, H, M, D).
        scales: without a correction, which the kernels do not have.
        biases: never expanded in memory.
        convolution: of the values, added to the output; needs N = L, and so does a shortcut.

    Returns:
        (B, H, N, E), a view of a contiguous (B, N, H, E), so that joining the heads costs nothing.

    Raises:
        ValueError: where `why_not` has a reason, or a branch of the values does not fit the queries.
    """
    query, key, value, agents = _cast_like_autocast(query, key, value, agents)
    scale, broadcast_scale, shortcut, gain, correction = scales
    _check(query, key, value, agents, shortcut, convolution, correction)
    weight, weight_bias, grid = convolution or (None, None, (0, 0))
    inputs = (query, key, value, agents, *biases, weight, weight_bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    output, _, _ = _forward(
        query, key, value, agents, scale, broadcast_scale, *biases, shortcut, weight, weight_bias, *grid, keep, gain
    )
    return output.transpose(1, 2)


def _cast_like_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    shortcut: float,
    convolution: Convolution | None,
    correction: str | None,
) -> None:
    reason = why_not(query, key, value, agents, correction)
    if reason is not None:
        raise ValueError(f"the Triton kernels cannot run here: {reason}; use kernel='sdpa'")
    num_queries, num_values = query.shape[2], value.shape[2]
    if (shortcut != 0 or convolution is not None) and num_queries != num_values:
        raise ValueError(
            f"a shortcut or a convolution of the values needs as many values as queries, "
            f"got {num_values} values and {num_queries} queries"
        )
    if convolution is None:
        return
    height, width = convolution.grid
    if height * width != num_values:
        raise ValueError(f"the values do not fill the grid: {height} x {width} is not {num_values}")
    wanted = (value.shape[1] * value.shape[3], 1, 3, 3)
    if tuple(convolution.weight.shape) != wanted:
        raise ValueError(f"the weight of the convolution has shape {tuple(convolution.weight.shape)}, not {wanted}")


@torch.library.custom_op("attngen::agent_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scale: float,
    broadcast_scale: float,
    aggregation_bias: Tensor | None,
    broadcast_bias: Tensor | None,
    shortcut: float,
    weight: Tensor | None,
    weight_bias: Tensor | None,
    height: int,
    width: int,
    keep: bool,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, H, E) and, where `keep`, what gradients need: aggregated values (B, H, M, E) and log-sums (B, H, M)."""
    from attngen.kernels.triton import agent_launch as triton_agent_launch

    with common.on_device(query):
        return triton_agent_launch.forward(
            query,
            key,
            value,
            agents,
            scale,
            broadcast_scale,
            aggregation_bias,
            broadcast_bias,
            shortcut,
            weight,
            weight_bias,
            (height, width),
            keep,
            gain,
        )


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scale: float,
    broadcast_scale: float,
    aggregation_bias: Tensor | None,
    broadcast_bias: Tensor | None,
    shortcut: float,
    weight: Tensor | None,
    weight_bias: Tensor | None,
    height: int,
    width: int,
    keep: bool,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, num_queries, _ = query.shape
    aggregated = (batch, heads, agents.shape[2], value.shape[3]) if keep else (0,)
    output = query.new_empty((batch, num_queries, heads, value.shape[3]))
    wide = torch.float32
    return output, query.new_empty(aggregated, dtype=wide), query.new_empty(aggregated[:3], dtype=wide)


@torch.library.custom_op("attngen::agent_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    aggregated: Tensor,
    lse: Tensor,
    scale: float,
    broadcast_scale: float,
    aggregation_bias: Tensor | None,
    broadcast_bias: Tensor | None,
    shortcut: float,
    weight: Tensor | None,
    height: int,
    width: int,
    needs_aggregation: bool,
    needs_aggregation_bias: bool,
    needs_broadcast_bias: bool,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value (heads after tokens), agents and both biases; empty where not needed.

    Those of the biases have four axes, agents before tokens.
    """
    from attngen.kernels.triton import agent_launch as triton_agent_launch

    with common.on_device(query):
        return triton_agent_launch.backward(
            grad,
            query,
            key,
            value,
            agents,
            aggregated,
            lse,
            scale,
            broadcast_scale,
            aggregation_bias,
            broadcast_bias,
            shortcut,
            weight,
            (height, width),
            (needs_aggregation, needs_aggregation_bias, needs_broadcast_bias),
            gain,
        )


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    aggregated: Tensor,
    lse: Tensor,
    scale: float,
    broadcast_scale: float,
    aggregation_bias: Tensor | None,
    broadcast_bias: Tensor | None,
    shortcut: float,
    weight: Tensor | None,
    height: int,
    width: int,
    needs_aggregation: bool,
    needs_aggregation_bias: bool,
    needs_broadcast_bias: bool,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def heads_last(tensor: Tensor, needed: bool) -> Tensor:
        batch, heads, tokens, width = tensor.shape
        return tensor.new_empty((batch, tokens, heads, width)) if needed else missing()

    def agents_first(bias: Tensor | None, needed: bool, swapped: bool) -> Tensor:
        if bias is None or not needed:
            return missing()
        batch, heads, rows, columns = common.four_axes(bias.shape)
        return bias.new_empty((batch, heads, columns, rows) if swapped else (batch, heads, rows, columns))

    def missing() -> Tensor:
        return query.new_empty((0,), dtype=torch.float32)

    return (
        heads_last(query, True),
        heads_last(key, needs_aggregation),
        heads_last(value, needs_aggregation),
        agents.new_empty(agents.shape),
        agents_first(aggregation_bias, needs_aggregation_bias, False),
        agents_first(broadcast_bias, needs_broadcast_bias, True),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, agents, *scales, aggregation_bias, broadcast_bias, shortcut, weight, weight_bias = inputs[:11]
    height, width, keep, gain = inputs[11:]
    ctx.scales, ctx.shortcut, ctx.grid, ctx.keep, ctx.gain = scales, shortcut, (height, width), keep, gain
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        query, key, value, agents, *output[1:], aggregation_bias, broadcast_bias, weight, weight_bias
    )  # fmt: skip


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 15
    if not ctx.keep:
        raise RuntimeError("attngen::agent_attention was called with keep=False, which has no gradient")
    *tensors, aggregation_bias, broadcast_bias, weight, weight_bias = ctx.saved_tensors
    needs = ctx.needs_input_grad
    gradients = _backward(
        grad,
        *tensors,
        *ctx.scales,
        aggregation_bias,
        broadcast_bias,
        ctx.shortcut,
        weight,
        *ctx.grid,
        any(needs[1:4]) or needs[6],
        needs[6],
        needs[7],
        ctx.gain,
    )
    query, key, value = (x.transpose(1, 2) if need else None for x, need in zip(gradients[:3], needs[:3], strict=True))
    agents = gradients[3] if needs[3] else None
    first_bias = gradients[4].reshape(aggregation_bias.shape) if needs[6] else None
    second_bias = gradients[5].transpose(2, 3).reshape(broadcast_bias.shape) if needs[7] else None
    filters, offsets = _convolution_gradients(grad, tensors[2], weight, weight_bias, ctx.grid, (needs[9], needs[10]))
    scales = (None, None)
    return (query, key, value, agents, *scales, first_bias, second_bias, None, filters, offsets, *(None,) * 4)


def _convolution_gradients(
    grad: Tensor,
    value: Tensor,
    weight: Tensor | None,
    weight_bias: Tensor | None,
    grid: tuple[int, int],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the weight and the bias of the convolution, by PyTorch; that of the values is in the kernel."""
    if weight is None or not any(needs):
        return None, None
    images = [x.flatten(2).transpose(1, 2).unflatten(2, grid) for x in (grad, value.transpose(1, 2))]
    one, none = [1, 1], [0, 0]
    _, filters, offsets = torch.ops.aten.convolution_backward(
        images[0], images[1], weight.to(value.dtype), [len(weight)], one, one, one, False, none, len(weight),
        [False, needs[0], needs[1]],
    )  # fmt: skip
    filters = filters.to(weight.dtype) if needs[0] else None
    offsets = offsets.to(weight_bias.dtype) if needs[1] and weight_bias is not None else None
    return filters, offsets


def _refuse(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError("the Triton kernels of agent attention have no second derivatives; use kernel='reference'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
