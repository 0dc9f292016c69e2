"""The formulas written out: materialised scores, sums in float32. Everything faster is tested against this."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 0.03
"""Added to the eigenvalues, 0 to 1, that the Nyström correction divides by: noise is amplified 34 times at most."""


class AgentScales(NamedTuple):
    """Scalars of agent attention, see `attngen.functional.agent_attention`.

    Attributes:
        scale: of the aggregation's scores.
        broadcast_scale: of the broadcast's scores.
        shortcut: share of the values added to the output.
        gain: factor of what comes through the agents.
        correction: matrix applied between the two softmaxes: "nystrom", or None.
    """

    scale: float
    broadcast_scale: float
    shortcut: float = 0.0
    gain: float = 1.0
    correction: str | None = None


Biases = tuple[Tensor | None, Tensor | None]
"""Position biases, broadcastable to (B, H, M, L) of the aggregation and (B, H, N, M) of the broadcast, or None each."""

NO_BIASES: Biases = (None, None)


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

    def on_heads(self, value: Tensor) -> Tensor:
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
    scales: AgentScales,
    biases: Biases = NO_BIASES,
    convolution: Convolution | None = None,
) -> Tensor:
    """Aggregation: agents read the keys; broadcast: queries read the agents. Shapes as in `attngen.functional`."""
    aggregated = softmax_attention(agents, key, value, scales.scale, biases[0])
    aggregated = between(aggregated, agents, scales)
    output = softmax_attention(query, agents, aggregated, scales.broadcast_scale, biases[1])
    return add_branches(output, value, scales.shortcut, convolution)


def between(aggregated: Tensor, agents: Tensor, scales: AgentScales) -> Tensor:
    """Correction and gain, applied to the M aggregated values before the broadcast, where they cost next to nothing.

    Args:
        aggregated: (B, H, M, E).
        agents: (B, H, M, D).
        scales: a factor of these values is a factor of the broadcast's output.
    """
    if scales.correction is not None:
        aggregated = nystrom_correction(aggregated, agents, scales.broadcast_scale)
    return aggregated if scales.gain == 1 else aggregated * scales.gain


def nystrom_correction(aggregated: Tensor, agents: Tensor, broadcast_scale: float) -> Tensor:
    """(1 + r) (S + r I)⁻¹ · aggregated with S = softmax(agents agentsᵀ · broadcast_scale) and r = `RIDGE`.

    The pseudo-inverse between the two softmaxes of Nyströmformer (arXiv 2102.03902, equation 13), for queries and keys
    that share their landmarks. With it a query that equals an agent receives that agent's value, instead of a mixture.
    S is a positive semi-definite matrix with scaled rows, so its eigenvalues are in [0, 1] and S + r I has an inverse
    even where agents are equal; one linear system is solved in float32, not a chain of products. The factor leaves
    constant values unchanged.

    Args:
        aggregated: (B, H, M, E).
        agents: (B, H, M, D).
        broadcast_scale: of the broadcast's scores.

    Returns:
        (B, H, M, E) in the dtype of `aggregated`.
    """
    wide = torch.promote_types(agents.dtype, torch.float32)
    agents = agents.to(wide)
    with torch.autocast(agents.device.type, enabled=False):
        mixing = (agents @ agents.transpose(-1, -2) * broadcast_scale).softmax(dim=-1)
        ridge = RIDGE * torch.eye(mixing.shape[-1], dtype=wide, device=mixing.device)
        solved = torch.linalg.solve(mixing + ridge, aggregated.to(wide))
    return (solved * (1 + RIDGE)).to(aggregated.dtype)


def add_branches(output: Tensor, value: Tensor, shortcut: float, convolution: Convolution | None) -> Tensor:
    """`output` + `shortcut` · `value` + `convolution`(`value`), (B, H, N, E) each."""
    if shortcut != 0:
        output = torch.add(output, value, alpha=shortcut)
    return output if convolution is None else output + convolution.on_heads(value)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """query · (keyᵀ value / L) / (query · mean(key) + eps) for features `query`, `key` that are already mapped."""
    wide = torch.promote_types(value.dtype, torch.float32)
    query, key, wide_value = query.to(wide), key.to(wide), value.to(wide)
    # Dividing by the number of keys keeps both sums of order one at any resolution.
    summary = (key / key.shape[-2]).transpose(-1, -2) @ wide_value
    normaliser = query @ key.mean(dim=-2).unsqueeze(-1) + eps
    return (query @ summary / normaliser).to(value.dtype)
