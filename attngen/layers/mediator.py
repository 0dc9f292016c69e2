"""Mediator attention: agent attention with learned position biases and a depth-wise convolution of the values.

Paper: Attention Mediators, Pu et al., ECCV 2024, arXiv 2408.05710 (the learned layer of arXiv 2312.08874). The bias
tables live on the grid they were trained on and are interpolated, so one set of weights serves any number of mediators
and any image shape.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Results of some of torch's methods have no types.

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.kernels import dispatch
from attngen.kernels.dispatch import AUTO
from attngen.kernels.reference import AgentScales, Convolution
from attngen.tokens import agent_grid, convolve_tokens, depthwise_convolution, join_heads, pool_tokens, split_heads

CONVOLUTIONS = ("values", "input")


class PositionBias(nn.Module):
    """Learned bias between mediators and tokens: a coarse map, a row term and a column term for each mediator.

    bias[h, m, y, x] = map[h, m] resized to the token grid + row[h, m, y] + column[h, m, x]

    Args:
        num_heads: attention heads H.
        mediators: (rows, columns) of the mediators the tables are stored for.
        grid: (height, width) of the tokens the tables are stored for.
        map_size: side of the coarse map, 7 in the paper.
    """

    def __init__(self, num_heads: int, mediators: Grid, grid: Grid, map_size: int = 7) -> None:
        super().__init__()
        self.mediators, self.grid = mediators, grid
        shape = (num_heads, math.prod(mediators))
        self.map = nn.Parameter(torch.zeros(*shape, map_size, map_size))
        self.row = nn.Parameter(torch.zeros(*shape, grid[0]))
        self.column = nn.Parameter(torch.zeros(*shape, grid[1]))

    def reset_parameters(self, std: float = 0.02) -> None:
        for table in (self.map, self.row, self.column):
            nn.init.trunc_normal_(table, std=std)

    def forward(self, mediators: Grid, grid: Grid) -> Tensor:
        """The bias for `mediators` (rows, columns) on a token `grid`: (1, H, M, N).

        At the stored sizes it is the stored table; between them it is linear interpolation (area-weighted where it
        shrinks), so neighbouring counts and shapes have neighbouring biases.
        """
        image = _resize(self._for_mediators(self.map, mediators), grid)
        row = _resize(self._for_mediators(self.row, mediators).unsqueeze(-1), (grid[0], 1))
        column = _resize(self._for_mediators(self.column, mediators).unsqueeze(-2), (1, grid[1]))
        return (image + row + column).flatten(2).unsqueeze(0)

    def _for_mediators(self, table: Tensor, mediators: Grid) -> Tensor:
        """(H, M₀, …) stored for `self.mediators` -> (H, M, …)."""
        if tuple(mediators) == tuple(self.mediators):
            return table
        rest = table.shape[2:]
        by_grid = table.flatten(2).transpose(1, 2).unflatten(2, self.mediators)
        return _resize(by_grid, mediators, antialias=True).flatten(2).transpose(1, 2).unflatten(2, rest)


def _resize(x: Tensor, size: Grid, antialias: bool = False) -> Tensor:
    """Bilinear over the last two axes; the coarse map is small, so only shrinking mediators needs antialiasing."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=antialias)


class MediatorMixer(nn.Module):
    """The learned parts of a mediator layer but its projections: two position biases, a 3 x 3 depth-wise convolution.

    Args:
        num_heads: attention heads.
        head_dim: size of a head.
        num_mediators: mediators it is trained with: a count, which is brought down to what the grid holds, or (rows,
            columns), also more than there are tokens (the pooled tokens then repeat, as in the published code).
        grid: (height, width) of the tokens it is trained on.
        map_size: see `PositionBias`.
        convolution: of the layer's "values", as published, or of its "input", and then projected like the
            values; few mediators then need no projection of all tokens.

    Raises:
        ValueError: for another `convolution`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_mediators: int | Grid,
        grid: Grid,
        map_size: int = 7,
        convolution: str = "values",
    ) -> None:
        super().__init__()
        if convolution not in CONVOLUTIONS:
            raise ValueError(f"unknown convolution {convolution!r}; known: {', '.join(CONVOLUTIONS)}")
        self.convolution = convolution
        if isinstance(num_mediators, int):
            mediators, count = agent_grid(num_mediators, grid), num_mediators
        else:
            mediators = num_mediators[0], num_mediators[1]
            count = math.prod(mediators)
        self.num_heads, self.num_mediators, self.mediators, self.grid = num_heads, count, mediators, grid
        self.aggregation_bias = PositionBias(num_heads, mediators, grid, map_size)
        self.broadcast_bias = PositionBias(num_heads, mediators, grid, map_size)
        self.dwc = depthwise_convolution(num_heads * head_dim)

    def reset_parameters(self) -> None:
        """Small random biases and a convolution that starts at zero, so that it is a residual branch."""
        self.aggregation_bias.reset_parameters()
        self.broadcast_bias.reset_parameters()
        for parameter in self.dwc.parameters():
            nn.init.zeros_(parameter)

    def mediator_grid(self, num_mediators: int | Grid | None, grid: Grid) -> Grid:
        """Rows and columns for a count (or those given) on `grid`; for None the trained ones, where they fit.

        Raises:
            ValueError: if there would be more mediators than tokens along an axis, unless it is trained so.
        """
        if isinstance(num_mediators, int):
            return agent_grid(num_mediators, grid)
        if num_mediators is None:
            return self.mediators if tuple(grid) == tuple(self.grid) else agent_grid(self.num_mediators, grid)
        rows, columns = num_mediators
        fits = 1 <= rows <= grid[0] and 1 <= columns <= grid[1]
        if not fits and (rows, columns) != self.mediators:
            raise ValueError(f"{rows} x {columns} mediators do not fit a grid of {grid[0]} x {grid[1]} tokens")
        return rows, columns

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: Grid,
        num_mediators: int | Grid | None = None,
        *,
        convolved: Tensor | None = None,
        kernel: str = AUTO,
    ) -> Tensor:
        """softmax(Q Pᵀ/√D + B₂) softmax(P Kᵀ/√D + B₁) V + conv₃ₓ₃(V), P = pooled Q (eq. 4 to 6, arXiv 2408.05710).

        Args:
            query: (B, N, H · D).
            key: (B, N, H · D).
            value: (B, N, H · D).
            grid: (height, width) of the tokens.
            num_mediators: a count, (rows, columns), or None for the trained count.
            convolved: (B, N, H · D), the projected convolution of the input, for a convolution of the input.
            kernel: see `attngen.kernels.dispatch`.

        Returns:
            (B, N, H · D).
        """
        mediators = self.mediator_grid(num_mediators, grid)
        pooled = pool_tokens(query, grid, mediators)
        fused = self._fusible_convolution(grid) if convolved is None else None
        if convolved is None and fused is None:
            convolved = convolve_tokens(self.dwc, value, grid)
        scale = (query.shape[-1] // self.num_heads) ** -0.5
        query, key, value, agents = (split_heads(x, self.num_heads) for x in (query, key, value, pooled))
        biases = (
            self.aggregation_bias(mediators, grid).to(query.dtype),
            self.broadcast_bias(mediators, grid).transpose(-1, -2).to(query.dtype),
        )
        mixed = dispatch.agent_attention(query, key, value, agents, AgentScales(scale, scale), biases, fused, kernel)
        return join_heads(mixed) if convolved is None else join_heads(mixed) + convolved

    def _fusible_convolution(self, grid: Grid) -> Convolution | None:
        """The convolution as weights, or None where the module may do more (adapters, hooks)."""
        dwc = self.dwc
        is_plain = type(dwc) is nn.Conv2d and not (dwc._forward_hooks or dwc._forward_pre_hooks)
        return (
            Convolution(dwc.weight, dwc.bias, (grid[0], grid[1])) if is_plain and "forward" not in vars(dwc) else None
        )
