"""Agent attention as two calls of `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attngen.kernels.reference import Convolution, add_branches, between


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scale: float,
    broadcast_scale: float,
    aggregation_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    shortcut: float = 0.0,
    convolution: Convolution | None = None,
    gain: float = 1.0,
    correction: str | None = None,
) -> Tensor:
    """The same numbers as `reference.agent_attention`; neither softmax is stored. Shapes as in `attngen.functional`."""
    aggregated = F.scaled_dot_product_attention(
        agents, key, value, attn_mask=_mask(aggregation_bias, agents, key), scale=scale
    )
    aggregated = between(aggregated, agents, broadcast_scale, gain, correction)
    output = F.scaled_dot_product_attention(
        query, agents, aggregated, attn_mask=_mask(broadcast_bias, query, agents), scale=broadcast_scale
    )
    return add_branches(output, value, shortcut, convolution)


def _mask(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Expand without a copy: some backends accept only masks with both token axes at full size."""
    if bias is None:
        return None
    return bias.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
