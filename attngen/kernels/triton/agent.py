"""Agent attention in fused Triton kernels, forward and backward.

The forward pass reads keys and values once, split along the keys, and queries and values once; nothing as large as
tokens times agents is stored. The backward pass computes both softmaxes again, from the inputs, the aggregated values
and the logarithms of the aggregation's sums. It has no atomic additions, so equal inputs have equal gradients.

Paper: Agent Attention, Han et al., ECCV 2024, arXiv 2312.08874; the split along the keys is that of Flash-Decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attngen.kernels.autocast import autocast_dtype
from attngen.kernels.reference import NO_BIASES, AgentScales, Biases, Convolution
from attngen.kernels.triton import common
from attngen.kernels.triton.agent_call import Inputs, Options, check, why_not

__all__ = ["agent_attention", "why_not"]


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
        biases: never expanded in memory; their gradients are, before the sum over the batch.
        convolution: of the values, added to the output; needs N = L, and so does a shortcut.

    Returns:
        (B, H, N, E), a view of a contiguous (B, N, H, E), so that joining the heads costs nothing. A query whose every
        agent has a bias of -inf, and an agent whose every key has one, receives zeros.

    Raises:
        ValueError: where `why_not` has a reason, shapes do not fit together, or a branch of the values does not fit.
    """
    dtype = autocast_dtype(query.device.type)
    if dtype is not None:
        query, key, value, agents = (_cast(x, dtype) for x in (query, key, value, agents))
    weight, weight_bias, grid = convolution or (None, None, (0, 0))
    *numbers, correction = scales
    tensors = (query, key, value, agents, *biases, weight, weight_bias)
    if correction is not None or torch.compiler.is_compiling():
        check(
            Inputs(*tensors), Options._make((*numbers, *grid)), correction
        )  # else where a plan for these shapes is made
    return _forward(common.records(tensors), *tensors, numbers, grid)[0].transpose(1, 2)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does for fused attention."""
    return tensor if tensor.dtype == torch.float64 or not tensor.is_floating_point() else tensor.to(dtype)


def _launch() -> Any:
    """The kernels, whose import needs Triton."""
    from attngen.kernels.triton import agent_launch

    return agent_launch


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    return _launch().forward(*arguments)


def _fake(query: Tensor, key: Tensor, value: Tensor, agents: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (batch, heads, tokens, _), num_agents, width = query.shape, agents.shape[2], value.shape[3]
    output, size = query.new_empty((batch, tokens, heads, width)), batch * heads * num_agents * (width + 1)
    return output, query.new_empty((size,), dtype=torch.float32)


def _run_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    return _launch().backward(*arguments)


def _fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    query, key, value, agents, *biases = rest[:6]
    aggregation, *of_biases = rest[-1]
    heads_last = [x.new_empty(x.transpose(1, 2).shape) if aggregation else None for x in (key, value)]
    bias_grads = [
        bias.new_empty(common.four_axes(bias.shape)) if bias is not None and need else None
        for bias, need in zip(biases, of_biases, strict=True)
    ]
    return query.new_empty(query.transpose(1, 2).shape), *heads_last, agents.new_empty(agents.shape), *bias_grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.numbers, ctx.grid = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    *inputs, weight, weight_bias, state = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_biases = needs[4], needs[5]
    gradients = _backward(
        torch.is_grad_enabled(), grad, *inputs, weight, state, ctx.numbers, ctx.grid,
        [any(needs[1:5]), *of_biases],
    )  # fmt: skip
    found = [x.transpose(1, 2) if need else None for x, need in zip(gradients[:3], needs, strict=False)]
    found.append(gradients[3] if needs[3] else None)
    biases = zip(gradients[4:], inputs[4:], of_biases, strict=True)
    found += [x.reshape(bias.shape) if need else None for x, bias, need in biases]
    found += _convolution_gradients(grad, inputs[2], weight, weight_bias, ctx.grid, needs[6:8])
    return *found, None, None


def _convolution_gradients(
    grad: Tensor,
    value: Tensor,
    weight: Tensor | None,
    weight_bias: Tensor | None,
    grid: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the weight and the bias of the convolution, by PyTorch; that of the values is in the kernel."""
    if weight is None or not any(needs):
        return [None, None]
    images = [x.flatten(2).transpose(1, 2).unflatten(2, tuple(grid)) for x in (grad, value.transpose(1, 2))]
    one, none = [1, 1], [0, 0]
    _, filters, offsets = torch.ops.aten.convolution_backward(
        images[0], images[1], weight.to(value.dtype), [len(weight)], one, one, one, False, none, len(weight),
        [False, needs[0], needs[1]],
    )  # fmt: skip
    return [
        filters.to(weight.dtype) if needs[0] else None,
        offsets.to(weight_bias.dtype) if needs[1] and weight_bias is not None else None,
    ]


def _refuse(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError("the Triton kernels of agent attention have no second derivatives; use kernel='reference'")


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor agents, "
    "Tensor? aggregation_bias, Tensor? broadcast_bias, Tensor? weight"
)
_NUMBERS = "float[] numbers, int[] grid"
"""Of `reference.AgentScales`, without the correction, and of `reference.Convolution`."""
_forward = common.Operator(
    "attngen::agent_attention",
    f"({_TENSORS}, Tensor? weight_bias, {_NUMBERS}) -> (Tensor, Tensor)",
    _run, _fake, _save, _differentiate,
)  # fmt: skip
_backward = common.Operator(
    "attngen::agent_attention_backward",
    f"(Tensor grad, {_TENSORS}, Tensor state, {_NUMBERS}, bool[] needs) -> ({', '.join(['Tensor'] * 6)})",
    _run_backward, _fake_backward, None, _refuse,
)  # fmt: skip
