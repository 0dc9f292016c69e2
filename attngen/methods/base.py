"""What every attention method answers: is it exact here, which tokens it reads, how it mixes them, its cost."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from attngen.checks import Grid
from attngen.kernels.crossovers import Choice


class Attention(Protocol):
    """Exact attention over (B, H, N, D) through the backend in force.

    Attributes:
        kernel: which of attngen's own paths a method may take, see `attngen.kernels.dispatch`; None where the user
            chose an attention backend of diffusers, so that a method has to be made of calls of this.
    """

    @property
    def kernel(self) -> str | None: ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor: ...


class AgentScales(NamedTuple):
    """What `attngen.functional.agent_attention` does beside its tensors.

    Attributes:
        scale: of the aggregation.
        broadcast_scale: of the broadcast.
        shortcut: share of the values added.
        gain: factor of what comes through the agents.
        correction: what stands between the softmaxes, see `attngen.functional.agent_attention`.
    """

    scale: float
    broadcast_scale: float
    shortcut: float
    gain: float = 1.0
    correction: str | None = None


@dataclass(frozen=True)
class LayerShape:
    """Sizes that decide the cost of one attention layer for one picture.

    Attributes:
        grid: (height, width) of the layer's image tokens.
        channels: channels of the hidden states.
        width: heads times head size.
        num_heads: heads.
        context: text tokens that take part in joint attention, else 0.
        has_output: whether the layer projects its output (some leave that to the block).
        has_context_output: the same for the text.
    """

    grid: Grid
    channels: int
    width: int
    num_heads: int = 1
    context: int = 0
    has_output: bool = True
    has_context_output: bool = True

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def projection_flops(self, queries: int, keys: int) -> int:
        """Q and output projections of `queries` tokens, K and V of `keys`, and all of the text tokens."""
        image = queries * (1 + self.has_output) + 2 * keys
        text = self.context * (3 + self.has_context_output)
        return 2 * self.channels * self.width * (image + text)

    def core_flops(self, queries: int, keys: int) -> int:
        """Both products of softmax attention, image queries over image keys and text, and text queries over all."""
        return 4 * self.width * (queries + self.context) * (keys + self.context)

    def exact_flops(self) -> int:
        """The whole layer with softmax attention, in floating-point operations (two a multiply-add)."""
        return self.projection_flops(self.tokens, self.tokens) + self.core_flops(self.tokens, self.tokens)


class Selection(NamedTuple):
    """The tokens a method lets take part.

    Attributes:
        queries: (B, N', C), what becomes queries.
        keys: (B, L', C), what becomes keys and values.
        agents: (B, M, C) hidden states that become agents, or None.
        restore: maps the layer's output (B, N', C) back to (B, N, C), or None where N' = N.
        query_positions: (N',) or (B, N') which of the N tokens each query stands for, or None for all in order. Layers
            with rotary positions need it.
        key_positions: the same for the keys.
        agent_positions: the same for the agents.
    """

    queries: Tensor
    keys: Tensor
    agents: Tensor | None = None
    restore: Callable[[Tensor], Tensor] | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    agent_positions: Tensor | None = None


@dataclass(frozen=True)
class AttentionMethod(ABC):
    """Options of one attention method. Frozen and without state: the same object serves every layer and call.

    Attributes:
        kind: name in JSON.
        needs_metric: whether `select` reads its `metric`.
        supports_rotary: whether it fits layers that rotate queries and keys by position.
    """

    kind: ClassVar[str] = ""
    needs_metric: ClassVar[bool] = False
    supports_rotary: ClassVar[bool] = True

    @abstractmethod
    def why_exact(self, grid: Grid) -> str | None:
        """Why this method is exact softmax attention on `grid`, in a few words; None where it is not."""

    def select(self, x: Tensor, metric: Tensor, grid: Grid, draws: Tensor | None) -> Selection:
        """Choose tokens before the projections.

        Args:
            x: (B, N, C), the layer's input.
            metric: (B, N, C), what similarity is measured on: the block's input where known, else `x`.
            grid: (height, width), N = height · width.
            draws: (K,) random whole numbers for this forward call, or None for the deterministic choice.
        """
        return Selection(x, x)

    def pool_size(self, grid: Grid) -> Grid | None:
        """Rows and columns to which the queries are pooled to make agents, or None."""
        return None

    def tokens_at(self, grid: Grid) -> int:
        """Tokens that become queries on `grid`."""
        return math.prod(grid)

    def agent_scales(self, head_dim: int) -> AgentScales | None:
        """Where the whole layer is agent attention with pooled agents and nothing else: how. None otherwise."""
        return None

    def choose_kernel(
        self, query: Tensor, key: Tensor, value: Tensor, agents: Tensor | None, kernel: str
    ) -> Choice | None:
        """The path of `attngen.kernels.dispatch` that `attend` takes for such tensors, or None where it asks for none.

        Only sizes, dtype, device and `requires_grad` are read.
        """
        return None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grid: Grid | None,
        agents: Tensor | None,
        context: tuple[Tensor, Tensor] | None,
        attention: Attention,
    ) -> Tensor:
        """Mix values into image queries.

        Args:
            query: (B, H, N, D).
            key: (B, H, L, D), image keys.
            value: (B, H, L, D), image values.
            grid: (height, width) of the layer's tokens; None where the layer is only exact.
            agents: (B, H, M, D), or None.
            context: keys and values (B, H, T, D) of the text in joint attention, or None.
            attention: exact attention through the backend in force.

        Returns:
            (B, H, N, D).
        """
        key, value = with_context(key, value, context)
        return attention(query, key, value)

    @abstractmethod
    def flops(self, shape: LayerShape) -> int:
        """Floating-point operations (two a multiply-add) of the whole layer for one picture, where it is active."""

    def num_agents_at(self, grid: Grid) -> int | None:
        """Agents used on `grid`, or None for a method without agents."""
        size = self.pool_size(grid)
        return None if size is None else math.prod(size)

    @property
    def label(self) -> str:
        """The method in a few characters, for tables."""
        options = self.to_dict()
        if self.kind == "agent":
            made = "" if options.get("agents", "pooled") == "pooled" else f" {options['agents']}"
            return f"agent {options['num_agents']}{made}{'' if options.get('correction') is None else ' N'}"
        if self.kind == "focal":
            return f"focal {options['window']}+{options['margin']} {options['num_cells']}"
        short = {"softmax": "exact", "downsampled-kv": "kv", "token-merging": "merge"}.get(self.kind, self.kind)
        return f"{short} {options.get('factor', options.get('ratio', ''))}".strip()

    def to_dict(self) -> dict[str, Any]:
        """The method as JSON: `{"method": kind, option: value, …}`."""
        return {"method": self.kind, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}


def with_context(key: Tensor, value: Tensor, context: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Image keys and values, followed by the text's where there are any."""
    if context is None:
        return key, value
    return torch.cat([key, context[0]], dim=2), torch.cat([value, context[1]], dim=2)
