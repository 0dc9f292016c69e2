"""What a call of the agent attention kernels is, and why some calls cannot take them. Imports without Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attngen.kernels.like import Like
from attngen.kernels.triton import common

MAX_HEAD_DIM, MAX_HEAD_BYTES = 160, 512
MAX_AGENTS = 64
"""More agents are bound by products instead of memory, and two calls of fused attention multiply as fast."""
MAX_BYTES = 16 * 1024
"""Of all agents of a head, padded: the backward pass keeps four such tiles in the 99 KB of the smaller GPUs."""


class Inputs(NamedTuple):
    """Tensors of a call, see `agent.agent_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    agents: Tensor
    aggregation_bias: Tensor | None = None
    broadcast_bias: Tensor | None = None
    weight: Tensor | None = None
    weight_bias: Tensor | None = None


class Options(NamedTuple):
    """Numbers of a call, see `reference.AgentScales` and `reference.Convolution`."""

    scale: float
    broadcast_scale: float
    shortcut: float = 0.0
    gain: float = 1.0
    height: int = 0
    width: int = 0


def why_not(
    query: Tensor | Like, key: Tensor | Like, value: Tensor | Like, agents: Tensor | Like, correction: str | None = None
) -> str | None:
    """Why these tensors cannot take the kernels (device, dtype, a size), or None if they can.

    Args:
        query: (B, H, N, D).
        key: (B, H, L, D).
        value: (B, H, L, E).
        agents: (B, H, M, D).
        correction: of `reference.AgentScales`.
    """
    if correction is not None:
        return f"the kernels have no {correction} correction"
    reason = common.why_no_kernels((query, key, value, agents))
    if reason is not None:
        return reason
    if query.dtype == torch.float32 and not common.interpreted() and not common.uses_tf32():
        return (
            "the kernels multiply float32 in TF32; allow it by torch.backends.cuda.matmul.fp32_precision = 'tf32', "
            "or use half precision"
        )
    if 0 in (*query.shape, *key.shape):
        return "there are no queries or no keys"
    for head_dim in (query.shape[-1], value.shape[-1]):
        reason = why_not_size(agents.shape[2], head_dim, query.dtype)
        if reason is not None:
            return reason
    return None


def why_not_size(num_agents: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take M agents in heads of size D, or None if they do."""
    widest = min(MAX_HEAD_DIM, MAX_HEAD_BYTES // dtype.itemsize)
    if not 1 <= head_dim <= widest:
        return f"the kernels take head sizes from 1 to {widest} in {dtype}, not {head_dim}"
    most = min(MAX_AGENTS, MAX_BYTES // (common.padded(head_dim) * dtype.itemsize))
    if not 1 <= num_agents <= most:
        return f"the kernels take from 1 to {most} agents for heads of {head_dim} in {dtype}, not {num_agents}"
    return None


def check(inputs: Inputs, options: Options, correction: str | None = None) -> None:
    """Raise ValueError where the kernels cannot run, shapes do not fit together, or a branch does not fit."""
    query, key, value, agents, *biases, weight, weight_bias = inputs
    reason = why_not(query, key, value, agents, correction)
    if reason is not None:
        raise ValueError(f"the Triton kernels cannot run here: {reason}; use kernel='sdpa'")
    (batch, heads, tokens, width), (keys, value_width), num_agents = query.shape, value.shape[2:], agents.shape[2]
    wanted = {
        "key": (key, (batch, heads, keys, width)),
        "value": (value, (batch, heads, keys, value_width)),
        "agents": (agents, (batch, heads, num_agents, width)),
        "weight of the convolution": (weight, (heads * value_width, 1, 3, 3)),
        "bias of the convolution": (weight_bias, (heads * value_width,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"the {name} has shape {tuple(tensor.shape)}, not {shape}")
    for bias, shape in zip(biases, [(num_agents, keys), (tokens, num_agents)], strict=True):
        whole = (batch, heads, *shape)
        axes = () if bias is None else bias.shape[::-1]
        if len(axes) > 4 or any(size not in (1, most) for size, most in zip(axes, whole[::-1], strict=False)):
            raise ValueError(f"a position bias of shape {tuple(axes[::-1])} does not broadcast to {whole}")
    _check_branches(tokens, keys, options, weight)


def _check_branches(tokens: int, keys: int, options: Options, weight: Tensor | None) -> None:
    if (options.shortcut != 0 or weight is not None) and tokens != keys:
        raise ValueError(
            f"a shortcut or a convolution of the values needs as many values as queries, "
            f"got {keys} values and {tokens} queries"
        )
    if weight is not None and options.height * options.width != keys:
        raise ValueError(f"the values do not fill the grid: {options.height} x {options.width} is not {keys}")
