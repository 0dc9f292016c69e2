"""Agent attention as two calls of `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attngen.kernels.reference import NO_BIASES, AgentScales, Biases, Convolution, add_branches, between


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scales: AgentScales,
    biases: Biases = NO_BIASES,
    convolution: Convolution | None = None,
) -> Tensor:
    """The same numbers as `reference.agent_attention`; neither softmax is stored. Shapes as in `attngen.functional`."""
    aggregated = F.scaled_dot_product_attention(
        agents, key, value, attn_mask=_mask(biases[0], agents, key), scale=scales.scale
    )
    aggregated = between(aggregated, agents, scales)
    output = F.scaled_dot_product_attention(
        query, agents, aggregated, attn_mask=_mask(biases[1], query, agents), scale=scales.broadcast_scale
    )
    return add_branches(output, value, scales.shortcut, convolution)


def _mask(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Expand without a copy: some backends accept only masks with both token axes at full size."""
    if bias is None:
        return None
    return bias.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
