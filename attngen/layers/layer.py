"""`Layer`: a diffusers attention module, read in one place.

Projections (fused or not, LoRA, quantised weights, learned ones), norms of queries and keys, heads, and exact attention
through the backend in force. Hosts make one for each call; it holds no weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.kernels.absorbed import Projection
from attngen.kernels.dispatch import AUTO
from attngen.kernels.like import Like
from attngen.layers.projections import effective_projection, is_one_matrix
from attngen.tokens import join_heads, pool_tokens, split_heads

CORE = "attngen_core"
"""Child module of an attention module that holds its learned weights, hidden from parameters and state dict."""

PARTS = ("to_q", "to_k", "to_v")

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, (B, H, ·, D) each."""


class Attention(Protocol):
    """Exact attention over (B, H, N, D) through the backend in force.

    Attributes:
        name: of what computes it: "sdpa", or the attention backend that the user chose.
        kernel: which of attngen's own kernels a method may use, see `attngen.kernels.dispatch`; None where the user
            chose an attention backend of diffusers, so that a method has to be made of calls of this.
    """

    @property
    def name(self) -> str: ...

    @property
    def kernel(self) -> str | None: ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor: ...


# Compared and hashed by identity: a compiler of torch 2.10 hashes what is called before its fields are there.
@dataclass(frozen=True, eq=False)
class FusedAttention:
    """`Attention` by torch's own scaled dot product.

    Attributes:
        kernel: which of attngen's kernels a method may use.
    """

    kernel: str = AUTO

    @property
    def name(self) -> str:
        return "sdpa"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


class Selection(NamedTuple):
    """The tokens that take part in a layer.

    Attributes:
        queries: (B, N', C), what becomes queries.
        keys: (B, L', C), what becomes keys and values.
        agents: (B, M, C), what becomes agents, or None.
        restore: maps the layer's output (B, N', C) back to (B, N, C), or None where N' = N.
        query_positions: (N',) or (B, N') which of the N tokens each query represents, or None for row-major order.
            Layers with rotary positions need it.
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


class Layer:
    """One attention module in one call.

    Args:
        attn: the module, with the names of diffusers: `heads`, `inner_dim`, `to_q`, `to_k`, `to_v` (or
            `fused_projections` and `to_qkv`), `to_out`, and `norm_q`, `norm_k` where queries and keys are normalised.
        attention: exact attention through the backend in force.
        wanted: the kernel asked for, see `attngen.kernels.dispatch`.

    Attributes:
        context: keys and values (B, H, T, D) of the text that image queries attend to as well, or None.
        context_tokens: T, known in a report too.
        core: learned weights attached to the module, or None.
        rotary: whether queries and keys are rotated by position.
    """

    rotary: bool = False
    context: tuple[Tensor, Tensor] | None = None
    context_tokens: int = 0

    def __init__(self, attn: Any, attention: Attention, wanted: str = AUTO) -> None:
        self.attn, self.attention, self.wanted = attn, attention, wanted
        hidden = attn._modules.get(CORE)
        self.core: Any = None if hidden is None else hidden.content

    @property
    def kernel(self) -> str | None:
        """The kernel asked for, or None where the user chose an attention backend."""
        return self.attention.kernel

    @property
    def heads(self) -> int:
        return self.attn.heads

    @property
    def width(self) -> int:
        """Heads times head size."""
        return self.attn.inner_dim

    @property
    def head_dim(self) -> int:
        return self.attn.inner_dim // self.attn.heads

    @property
    def channels(self) -> int:
        """Channels of the hidden states."""
        return getattr(self.attn, "query_dim", None) or self.attn.inner_dim

    def like(self, hidden_states: Tensor | Like) -> Like:
        """The choice of a kernel depends on this: shape, dtype and device of (B, N, C), and whether gradients flow."""
        trains = False
        if torch.is_grad_enabled() and not hidden_states.requires_grad:
            modules: list[nn.Module] = [self.attn] if self.core is None else [self.attn, self.core]
            trains = any(p.requires_grad for module in modules for p in module.parameters())
        return Like(
            tuple(hidden_states.shape),
            hidden_states.dtype,
            hidden_states.device,
            torch.is_grad_enabled() and (hidden_states.requires_grad or trains),
        )

    # Projections, by calling modules, never by their weights: LoRA and quantisation are in the modules

    def project(self, selection: Selection) -> Heads:
        """Queries (B, H, N', D), keys and values (B, H, L', D), normalised where the layer does that."""
        query, key, value = self.project_flat(selection.queries, selection.keys)
        return self.to_heads(query, "norm_q"), self.to_heads(key, "norm_k"), split_heads(value, self.heads)

    def project_flat(self, queries: Tensor, keys: Tensor, values: Tensor | None = None) -> Heads:
        """Queries, keys and values (B, ·, H · D) before heads and norms; `values` are projected from `keys` if None."""
        values = keys if values is None else values
        own = self._own
        if own is not None or not self._is_fused:
            place: Any = own or self.attn._modules
            return place["to_q"](queries), place["to_k"](keys), place["to_v"](values)
        if queries is keys and values is keys:
            query, key, value = self.attn.to_qkv(keys).chunk(3, dim=-1)
            return query, key, value
        query, key, value = (self._fused_part(x, i) for i, x in enumerate((queries, keys, values)))
        return query, key, value

    def project_queries(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Queries (B, H, M, D) of (B, M, C) tokens alone, at `positions` as in `Selection`."""
        own: Any = self._own or self.attn._modules
        flat = self._fused_part(tokens, 0) if self._own is None and self._is_fused else own["to_q"](tokens)
        return self.to_heads(flat, "norm_q")

    def project_values_linearly(self, tokens: Tensor) -> Tensor:
        """Values (B, N, H · D) without their bias: a linear map, so zero stays zero."""
        own: Any = self._own
        module = own["to_v"] if own is not None else self.attn.to_qkv if self._is_fused else self.attn.to_v
        projection = effective_projection(module)
        if projection is not None:
            weight = projection.weight
            if own is None and self._is_fused:
                weight = weight.chunk(3, dim=0)[2]
            return F.linear(tokens, weight.to(tokens.dtype))
        nothing = torch.zeros_like(tokens[:1, :1])
        if own is None and self._is_fused:
            return self._fused_part(tokens, 2) - self._fused_part(nothing, 2)
        return module(tokens) - module(nothing)

    def pool_queries(self, query: Tensor, grid: Grid, size: Grid) -> Tensor:
        """Agents (B, H, M, D): the mean query of each cell."""
        return split_heads(pool_tokens(join_heads(query), grid, size), self.heads)

    def output(self, mixed: Tensor) -> Tensor:
        """(B, N, H · D) through the output projection and its dropout."""
        own: Any = self._own
        projected = self.attn.to_out[0](mixed) if own is None else own["to_out"](mixed)
        return self.attn.to_out[1](projected)

    def dropout(self, projected: Tensor) -> Tensor:
        """The dropout after the output projection, for a kernel that computed the projection itself."""
        return self.attn.to_out[1](projected)

    def to_heads(self, x: Tensor, norm: str) -> Tensor:
        """(B, N, H · D) -> (B, H, N, D), normalised where the layer has that norm, in the dtype of `x`."""
        heads = split_heads(x, self.heads)
        module: nn.Module | None = getattr(self.attn, norm, None)
        # Under autocast a norm may return float32, and queries, keys and values must agree.
        return heads if module is None else module(heads).to(x.dtype)

    def normed(self, x: Tensor, norm: str) -> Tensor:
        """(B, N, H · D), each head normalised where the layer has that norm."""
        return x if getattr(self.attn, norm, None) is None else join_heads(self.to_heads(x, norm))

    def _fused_part(self, tokens: Tensor, part: int) -> Tensor:
        return self.attn.to_qkv(tokens).chunk(3, dim=-1)[part]

    @property
    def _is_fused(self) -> bool:
        return getattr(self.attn, "fused_projections", False)

    @property
    def _own(self) -> nn.ModuleDict | None:
        return None if self.core is None else self.core.projections

    # Projections as matrices

    def why_not_matrices(self) -> str | None:
        """Why a kernel cannot absorb the projections, or None where it can: nothing between them and the products."""
        if getattr(self.attn, "norm_q", None) is not None or getattr(self.attn, "norm_k", None) is not None:
            return "queries and keys are normalised"
        if not all(is_one_matrix(module) for module in self.projection_modules()):
            return "a projection is not a plain linear layer"
        return None

    def matrices(self) -> list[Projection] | None:
        """Query, key, value and output projections as matrices, or None where one does more than multiply."""
        found = [effective_projection(module) for module in self.projection_modules()]
        projections = [projection for projection in found if projection is not None]
        if len(projections) < len(found):
            return None
        if len(projections) == 4:
            return projections
        fused, out = projections
        biases = (None, None, None) if fused.bias is None else fused.bias.chunk(3)
        return [*(Projection(*parts) for parts in zip(fused.weight.chunk(3), biases, strict=True)), out]

    def projection_modules(self) -> list[nn.Module]:
        """Modules that project queries, keys and values (or all at once) and the output."""
        own: Any = self._own
        if own is not None:
            return [own[name] for name in (*PARTS, "to_out")]
        attn = self.attn
        return [attn.to_qkv, attn.to_out[0]] if self._is_fused else [attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]]
