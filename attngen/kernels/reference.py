"""The formulas written out: materialised scores, sums in float32. Everything faster is tested against this."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Convolution(NamedTuple):
    """A 3 x 3 depth-wise convolution of the values on their grid, which learned agent attention adds to its output.

    Attributes:
        weight: (H · E, 1, 3, 3).
        bias: (H · E,), or None.
        grid: (height, width) of the tokens.
    """

    weight: Tensor
    bias: Tensor | None
    grid: tuple[int, int]

    def __call__(self, value: Tensor) -> Tensor:
        """Convolve (B, H, N, E), zero beyond the edges; returns (B, H, N, E)."""
        return self.on_tokens(value.transpose(1, 2).flatten(2)).unflatten(2, value.shape[1::2]).transpose(1, 2)

    def on_tokens(self, tokens: Tensor) -> Tensor:
        """The same for (B, N, H · E)."""
        image = tokens.transpose(1, 2).unflatten(2, self.grid)
        convolved = F.conv2d(image, self.weight, self.bias, padding=1, groups=len(self.weight))
        return convolved.flatten(2).transpose(1, 2)


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
    shortcut: float = 0.0,
    convolution: Convolution | None = None,
) -> Tensor:
    """Aggregation: agents read the keys; broadcast: queries read the agents. Shapes as in `attngen.functional`."""
    aggregated = softmax_attention(agents, key, value, scale, aggregation_bias)
    output = softmax_attention(query, agents, aggregated, broadcast_scale, broadcast_bias)
    return add_branches(output, value, shortcut, convolution)


def add_branches(output: Tensor, value: Tensor, shortcut: float, convolution: Convolution | None) -> Tensor:
    """`output` + `shortcut` · `value` + `convolution`(`value`), (B, H, N, E) each."""
    if shortcut != 0:
        output = torch.add(output, value, alpha=shortcut)
    return output if convolution is None else output + convolution(value)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """query · (keyᵀ value / L) / (query · mean(key) + eps) for features `query`, `key` that are already mapped."""
    wide = torch.promote_types(value.dtype, torch.float32)
    query, key, wide_value = query.to(wide), key.to(wide), value.to(wide)
    # Dividing by the number of keys keeps both sums of order one at any resolution.
    summary = (key / key.shape[-2]).transpose(-1, -2) @ wide_value
    normaliser = query @ key.mean(dim=-2).unsqueeze(-1) + eps
    return (query @ summary / normaliser).to(value.dtype)
