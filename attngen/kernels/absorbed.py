"""Agent attention with its four projections absorbed: from hidden states to hidden states, no N × C projection between.

With few agents the projections of all tokens cost more than the attention. They can be moved to the agents, because
there is no nonlinearity between a projection and the product that follows it, so X is read by two products of 2·H·M and
H·M columns, and the result is written by one:

    P Kᵀ = (P W_k) Xᵀ        Q Pᵀ = X (P W_q)ᵀ        W₁ V = (W₁ X) W_vᵀ        (W₂ A) W_oᵀ = W₂ (A W_oᵀ)

It is the same function as projections and `attngen.functional.agent_attention` wherever nothing is applied in between:
not with rotary embeddings or normalised queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attngen.checks import check_bias
from attngen.kernels.autocast import autocast_dtype


class Projection(NamedTuple):
    """A linear map x Wᵀ + b.

    Attributes:
        weight: W, (outputs, inputs).
        bias: b, (outputs,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None


def absorbed_agent_attention(
    x: Tensor,
    agents: Tensor,
    *,
    query: Projection,
    key: Projection,
    value: Projection,
    out: Projection,
    num_heads: int,
    scale: float | None = None,
    broadcast_scale: float | None = None,
    aggregation_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    shortcut: float = 0.0,
    gain: float = 1.0,
    value_branch: Callable[[Tensor], Tensor] | None = None,
    input_branch: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The whole layer of `agent_attention`, input to output, without its projections of all tokens.

    With Q = X W_qᵀ + b_q, K and V alike, and P = agents W_qᵀ + b_q, by head:

        O = gain · softmax(Q Pᵀ · s₂ + B₂) · softmax(P Kᵀ · s₁ + B₁) · V + shortcut · V + value_branch(V)
        result = O W_oᵀ + b_o + input_branch(X) (W_o W_v)ᵀ

    Equations 3 to 6 of arXiv 2312.08874 and 4 to 6 of arXiv 2408.05710 (whose agents are pooled queries: pooled `x` has
    them as its projection). About 4·H·M·C multiply-adds a token and 5·M·C² a sample, where the layer written out has
    4·C² + 4·M·C a token; a `shortcut` or `input_branch` adds C² a token, a `value_branch` 2·C².

    Training keeps `x` and two numbers a token, head and agent, and no projection; it has first derivatives only. Where
    `x` is in half precision, the logits and all that has the size of the agents are float32.

    Args:
        x: (B, N, C).
        agents: (B, M, C), hidden states that become agents as tokens become queries.
        query: W_q (H · D, C) and b_q.
        key: W_k (H · D, C) and b_k, which changes nothing: softmax ignores what all keys share. Its gradient is zero.
        value: W_v (H · E, C) and b_v.
        out: W_o (C', H · E) and b_o.
        num_heads: H.
        scale: s₁, of the aggregation; D**-0.5 if None.
        broadcast_scale: s₂, of the broadcast; `scale` if None.
        aggregation_bias: B₁, broadcastable to (B, H, M, N).
        broadcast_bias: B₂, broadcastable to (B, H, N, M).
        shortcut: share of the values added to the output.
        gain: factor of what comes through the agents.
        value_branch: maps the values (B, N, H · E) to what is added to O. Values and output are then projected for all
            tokens; queries and keys are not.
        input_branch: maps `x` to (B, N, C), which passes W_v (without b_v, so that zero adds nothing) and W_o. With a
            depth-wise convolution it has the weights of a convolution of the values, at half the projections.

    Returns:
        (B, N, C') in the dtype of `x`, or of autocast.

    Raises:
        ValueError: for a wrong rank, batch, number of channels, dtype (a projection has that of `x` or float32) or bias
            shape, or a number of heads that does not divide a width.
    """
    _check(x, agents, query, key, value, out, num_heads)
    (batch, num_tokens, _), num_agents = x.shape, agents.shape[1]
    check_bias("aggregation_bias", aggregation_bias, (batch, num_heads, num_agents, num_tokens))
    check_bias("broadcast_bias", broadcast_bias, (batch, num_heads, num_tokens, num_agents))
    scale = float((query.weight.shape[0] // num_heads) ** -0.5) if scale is None else scale
    broadcast_scale = scale if broadcast_scale is None else broadcast_scale
    result_dtype = _autocast_dtype(x) or x.dtype
    # A CPU without units for float16 takes several times longer for such products than for float32.
    dtype = torch.float32 if result_dtype == torch.float16 and x.device.type == "cpu" else result_dtype

    # Branches may be modules, so they run under the caller's autocast.
    values, beside, source, share = None, None, None, 1.0
    if value_branch is not None:
        values = F.linear(x.to(dtype), value.weight.to(dtype), _cast(value.bias, dtype)).to(result_dtype)
        beside = value_branch(values)
    if input_branch is not None:
        source = input_branch(x)
    if shortcut != 0:
        if values is not None and beside is not None:
            beside = torch.add(beside, values, alpha=shortcut)
        elif source is not None:
            source = torch.add(source, x, alpha=shortcut)
        else:
            source, share = x, shortcut

    with _without_autocast(x):
        x, agents = x.to(dtype), agents.to(dtype)
        projected = None if beside is None else F.linear(beside.to(dtype), out.weight.to(dtype))
        if source is not None:
            passed = _through_both(source.to(dtype), value.weight.to(dtype), out.weight.to(dtype), share)
            projected = passed if projected is None else projected + passed
        weights, rows, constant = _mix(
            x,
            agents,
            *(_small(projection, dtype, x) for projection in (query, key, value, out)),
            num_heads=num_heads,
            scales=(scale, broadcast_scale),
            aggregation_bias=aggregation_bias,
            broadcast_bias=None if broadcast_bias is None else broadcast_bias.transpose(-1, -2),
            constant_share=shortcut if values is None else 0.0,
            gain=gain,
        )
        output = _WeighRows.apply(weights, rows, constant, num_heads)
        output = output if projected is None else projected + output
    return output.to(result_dtype)


def _check(
    x: Tensor, agents: Tensor, query: Projection, key: Projection, value: Projection, out: Projection, num_heads: int
) -> None:
    for name, tensor in {"x": x, "agents": agents}.items():
        if tensor.ndim != 3:
            raise ValueError(f"{name} must have 3 dimensions (batch, tokens, channels), got {tuple(tensor.shape)}")
    if agents.shape[0] != x.shape[0] or agents.shape[2] != x.shape[2]:
        raise ValueError(f"agents have (batch, channels) = {tuple(agents.shape[::2])}, but x has {tuple(x.shape[::2])}")
    if agents.dtype != x.dtype:
        raise ValueError(f"agents have dtype {agents.dtype}, but x has {x.dtype}")
    for name, projection in {"query": query, "key": key, "value": value, "out": out}.items():
        weight, bias = projection
        if weight.ndim != 2:
            raise ValueError(
                f"the weight of {name} must have 2 dimensions (outputs, inputs), got {tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"the bias of {name} has shape {tuple(bias.shape)}, but its weight {tuple(weight.shape)}")
        if weight.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} has dtype {weight.dtype}, but x has {x.dtype}")
        width = weight.shape[1] if name == "out" else weight.shape[0]
        if width % num_heads != 0:
            raise ValueError(f"{num_heads} heads do not divide the width {width} of {name}")
        if name != "out" and weight.shape[1] != x.shape[2]:
            raise ValueError(f"{name} reads {weight.shape[1]} channels, but x has {x.shape[2]}")
    if key.weight.shape[0] != query.weight.shape[0]:
        raise ValueError(f"key has width {key.weight.shape[0]}, but query has {query.weight.shape[0]}")
    if out.weight.shape[1] != value.weight.shape[0]:
        raise ValueError(f"out reads {out.weight.shape[1]} channels, but value has width {value.weight.shape[0]}")


def _mix(
    x: Tensor,
    agents: Tensor,
    query: Projection,
    key: Projection,
    value: Projection,
    out: Projection,
    *,
    num_heads: int,
    scales: tuple[float, float],
    aggregation_bias: Tensor | None,
    broadcast_bias: Tensor | None,
    constant_share: float,
    gain: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens' weights W₂ᵀ (B, H · M, N), the rows A W_oᵀ (B, H · M, C') they weigh, and a constant for every token.

    Both position biases broadcast to (B, H, M, N). The last, (C',) or None, is b_o and `constant_share` of b_v W_oᵀ.
    """
    batch, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    query_weight, key_weight, value_weight = (p.weight.unflatten(0, (num_heads, -1)) for p in (query, key, value))
    out_weight = out.weight.unflatten(1, (num_heads, -1)).permute(1, 2, 0)  # (H, E, C')

    pooled = _wide_bmm(agents.flatten(0, 1).unsqueeze(0).to(wide), query.weight.T.unsqueeze(0)).squeeze(0)
    pooled = pooled.unflatten(1, (num_heads, -1)).transpose(0, 1)  # (H, B · M, D)
    offset = None
    if query.bias is not None:
        query_bias = query.bias.to(wide).unflatten(0, (num_heads, 1, -1))
        pooled = pooled + query_bias
        offset = _by_picture((pooled * query_bias).sum(-1, keepdim=True) * scales[1], batch)
    reads = _by_picture(_wide_bmm(pooled * scales[0], key_weight), batch)
    writes = _by_picture(_wide_bmm(pooled * scales[1], query_weight), batch)
    gathered, weights = _AgentSoftmaxes.apply(
        x, torch.stack([reads, writes], dim=1), offset, aggregation_bias, broadcast_bias, key.bias
    )
    gathered = gathered.to(wide).transpose(0, 1).flatten(1, 2)  # (H, B · M, C)
    gathered = _wide_bmm(gathered, value_weight.transpose(1, 2))
    constant = None if out.bias is None else out.bias.to(wide)
    if value.bias is not None:
        value_bias = value.bias.to(wide)
        gathered = gathered + value_bias.unflatten(0, (num_heads, 1, -1))
        if constant_share != 0:
            shared = constant_share * (out.weight.to(wide) @ value_bias)
            constant = shared if constant is None else constant + shared
    if gain != 1:
        gathered = gathered * gain
    rows = _by_picture(_wide_bmm(gathered, out_weight), batch).flatten(1, 2)
    return weights, rows, constant


class _AgentSoftmaxes(torch.autograd.Function):
    """Both softmaxes of all heads over one product X · coefficientsᵀ, and the first one applied: W₁ X and W₂ᵀ.

    Written by hand to keep `x` and the softmaxes in the dtype of `x` and nothing else, and to make the gradient of `x`
    in one product. The logits are (B, 2, H, M, N), so that both softmaxes run over or along contiguous tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coefficients: Tensor,
        offset: Tensor | None,
        aggregation_bias: Tensor | None,
        broadcast_bias: Tensor | None,
        key_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, _, num_heads, num_agents, channels = coefficients.shape
        logits = _wide_bmm(coefficients.flatten(1, 3), x.transpose(1, 2))
        reading, writing = logits.unflatten(1, (2, num_heads, num_agents)).unbind(1)
        if aggregation_bias is not None:
            reading = reading.add_(aggregation_bias)
        if offset is not None:
            writing = writing.add_(offset)
        if broadcast_bias is not None:
            writing = writing.add_(broadcast_bias)
        reading = reading.softmax(dim=-1).to(x.dtype).flatten(1, 2)
        writing = writing.softmax(dim=-2).to(x.dtype).flatten(1, 2)
        ctx.save_for_backward(x, coefficients, reading, writing)
        added = (offset, aggregation_bias, broadcast_bias, key_bias)
        ctx.added = [None if t is None else (t.shape, t.dtype) for t in added]
        gathered = torch.bmm(reading, x).view(batch, num_heads, num_agents, channels)
        return gathered, writing

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gathered_grad: Tensor, weights_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, coefficients, reading, writing = ctx.saved_tensors
        wide, by_head = coefficients.dtype, coefficients.shape[2:4]
        gathered_grad = gathered_grad.flatten(1, 2)
        reading_grad = _softmax_grad(torch.bmm(gathered_grad, x.transpose(1, 2)), reading, by_head, -1, wide)
        writing_grad = _softmax_grad(weights_grad, writing, by_head, -2, wide)
        logits_grad = torch.stack([reading_grad, writing_grad], dim=1).flatten(1, 3)

        x_grad = coefficients_grad = None
        if ctx.needs_input_grad[0]:
            columns = torch.cat([logits_grad.to(x.dtype), reading], dim=1)
            rows = torch.cat([coefficients.flatten(1, 3).to(x.dtype), gathered_grad], dim=1)
            x_grad = torch.bmm(columns.transpose(1, 2), rows)
        if ctx.needs_input_grad[1]:
            coefficients_grad = _wide_bmm(logits_grad, x).view(coefficients.shape)
        grads: list[Tensor | None] = []
        for grad, added, needed in zip(
            (writing_grad, reading_grad, writing_grad, None), ctx.added, ctx.needs_input_grad[2:], strict=True
        ):
            if not needed:
                grads.append(None)
            elif grad is None:
                grads.append(x.new_zeros(added[0], dtype=added[1]))
            else:
                grads.append(grad.sum_to_size(added[0]).to(added[1]))
        return x_grad, coefficients_grad, *grads


class _WeighRows(torch.autograd.Function):
    """Rows (B, H · M, C') summed with softmaxes W₂ᵀ (B, H · M, N) as weights, plus a constant (C',): (B, N, C').

    The constant is added to the rows, which is free, because the weights of each head sum to one. The gradient of the
    weights leaves out what all rows of a head share: a softmax ignores it, and in half precision it would swamp the
    rest.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Tensor, constant: Tensor | None, num_heads: int) -> Tensor:
        ctx.save_for_backward(weights, rows)
        ctx.num_heads = num_heads
        if constant is not None:
            rows = rows + constant / num_heads
        return torch.bmm(weights.transpose(1, 2), rows.to(weights.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        weights, rows = ctx.saved_tensors
        weights_grad = rows_grad = constant_grad = None
        if ctx.needs_input_grad[0]:
            by_head = rows.unflatten(1, (ctx.num_heads, -1))
            differing = (by_head - by_head.mean(dim=2, keepdim=True)).flatten(1, 2).to(weights.dtype)
            weights_grad = torch.bmm(differing, grad.transpose(1, 2))
        if ctx.needs_input_grad[1]:
            rows_grad = torch.bmm(weights, grad).to(rows.dtype)
        if ctx.needs_input_grad[2]:
            constant_grad = grad.sum(dim=(0, 1), dtype=rows.dtype)
        return weights_grad, rows_grad, constant_grad, None


def _softmax_grad(grad: Tensor, weights: Tensor, by_head: torch.Size, dim: int, wide: torch.dtype) -> Tensor:
    """The gradient (B, H, M, N) of the logits of `weights` (B, H · M, N) along `dim`."""
    grad, weights = (t.to(wide).unflatten(1, by_head) for t in (grad, weights))
    return torch._softmax_backward_data(grad, weights, dim, wide)


class _WideBmm(torch.autograd.Function):
    """The product of float32 by half precision on CUDA, in float32 and without rounding the float32 side.

    It is split into two half precision parts, its rows scaled to at most one so that both are in range.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        size = a.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(b.dtype).tiny)
        high = (a / size).to(b.dtype)
        low = (a / size - high).to(b.dtype)
        product = torch.bmm(torch.cat([high, low], dim=1), b, out_dtype=a.dtype)
        return size * (product[:, : a.shape[1]] + product[:, a.shape[1] :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        a_grad = _WideBmm.apply(grad, b.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        b_grad = torch.bmm(a.transpose(1, 2).to(b.dtype), grad.to(b.dtype)) if ctx.needs_input_grad[1] else None
        return a_grad, b_grad


def _wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """a b in the dtype of `a`, float32 where `b` is in half precision."""
    if a.dtype == b.dtype:
        return torch.bmm(a, b)
    return _WideBmm.apply(a, b) if _multiplies_wide(b) else torch.bmm(a, b.to(a.dtype))


def _multiplies_wide(x: Tensor) -> bool:
    """Whether half precision products can give float32."""
    return x.is_cuda and torch.version.hip is None


def _small(projection: Projection, dtype: torch.dtype, x: Tensor) -> Projection:
    """The projection in a dtype for the products of agents: converted once, where they cannot convert it themselves."""
    if projection.weight.dtype == dtype and _multiplies_wide(x):
        return projection
    wide = torch.promote_types(dtype, torch.float32)
    return Projection(projection.weight.to(wide), projection.bias)


def _by_picture(x: Tensor, batch: int) -> Tensor:
    """(H, B · M, C) -> (B, H, M, C)."""
    return x.unflatten(1, (batch, -1)).transpose(0, 1)


def _through_both(x: Tensor, value: Tensor, out: Tensor, share: float) -> Tensor:
    """share · x W_vᵀ W_oᵀ, in the cheaper order."""
    tokens, channels, width, outputs = x.shape[:-1].numel(), x.shape[-1], value.shape[0], out.shape[0]
    if channels * width * outputs + tokens * channels * outputs < tokens * width * (channels + outputs):
        return F.linear(x, out @ value if share == 1 else share * (out @ value))
    return F.linear(F.linear(x, value if share == 1 else share * value), out)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    return None if x.dtype == torch.float64 else autocast_dtype(x.device.type)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if _autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
