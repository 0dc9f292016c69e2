"""The formulas written out: materialised scores, sums in float32. Everything faster is tested against this."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(query keyᵀ · scale + bias) · value, in float32 at least, returned in the dtype of `value`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ value.to(wide)).to(value.dtype)


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scale: float,
    broadcast_scale: float,
    aggregation_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
) -> Tensor:
    """Aggregation: agents read the keys; broadcast: queries read the agents. Shapes as in `attngen.functional`."""
    aggregated = softmax_attention(agents, key, value, scale, aggregation_bias)
    return softmax_attention(query, agents, aggregated, broadcast_scale, broadcast_bias)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """query · (keyᵀ value / L) / (query · mean(key) + eps) for features `query`, `key` that are already mapped."""
    wide = torch.promote_types(value.dtype, torch.float32)
    query, key, wide_value = query.to(wide), key.to(wide), value.to(wide)
    # Dividing by the number of keys keeps both sums of order one at any resolution.
    summary = (key / key.shape[-2]).transpose(-1, -2) @ wide_value
    normaliser = query @ key.mean(dim=-2).unsqueeze(-1) + eps
    return (query @ summary / normaliser).to(value.dtype)
