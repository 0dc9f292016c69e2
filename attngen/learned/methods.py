"""Methods with weights of their own, for models that were trained with softmax attention: distil the weights, keep the
model.

`LearnedMediators` is agent attention with learned position biases, scales and a depth-wise convolution (arXiv
2312.08874, 2408.05710). `LearnedLinear` is linear attention with learned features: LinFusion's generalised linear
attention (arXiv 2409.02097), or small maps within the heads (Hedgehog, arXiv 2402.04347). The methods are options; the
weights are in a `LearnedCore` of each layer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attngen.checks import Grid, check_count, check_number
from attngen.kernels import dispatch
from attngen.kernels.crossovers import Choice
from attngen.layers.mediator import CONVOLUTIONS
from attngen.learned.modules import HEDGEHOG, LayerSizes, LearnedCore, LinearCore, MediatorCore, hedgehog_features
from attngen.methods.agent import agent_flops
from attngen.methods.base import AttentionMethod, LayerShape
from attngen.methods.linear import FEATURE_MAPS, FeatureMap
from attngen.tokens import agent_grid, convolve_tokens, join_heads, split_heads

STARTS = ("plain", "agent")
MAPS = ("input", "heads", "none")
MEDIATOR_MAPS = ("heads", "none")


@dataclass(frozen=True)
class LearnedMethod(AttentionMethod):
    """An attention method whose weights beside each layer are loaded from a file; see `attngen.LearnedLayers`."""

    supports_rotary: ClassVar[bool] = False

    @abstractmethod
    def make_core(self, sizes: LayerSizes) -> LearnedCore:
        """The module for a layer's weights, with any numbers in it."""

    @abstractmethod
    def stored_mediators(self) -> int:
        """`LayerSizes.num_mediators` of new weights."""

    @abstractmethod
    def mix(
        self, core: Any, query: Tensor, key: Tensor, value: Tensor, grid: Grid, kernel: str, **beside: Any
    ) -> Tensor:
        """Mix values into queries, (B, N, H · D) each, after the projections and norms of the layer."""

    @abstractmethod
    def choose_path(self, query: Tensor, key: Tensor, value: Tensor, agents: Tensor | None, kernel: str) -> Choice:
        """The path that `mix` takes for tensors (B, H, N, D)."""


@dataclass(frozen=True)
class LearnedMediators(LearnedMethod):
    """Mediator attention learned beside frozen weights.

        softmax(Q Pᵀ s₂ + B₂) softmax(P Kᵀ s₁ + B₁) V + conv₃ₓ₃(V),  P = pooled Q

    Q and K pass a learned matrix within each head. B₁ and B₂ are interpolated, so any number of mediators and any
    picture shape works. s₁ and s₂ are learned for each head. The convolution's centre is the training-free method's
    shortcut, for each channel. New weights start as agent attention without biases and convolution ("plain"), or as
    `AgentAttention` with its scales ("agent").

    Attributes:
        num_mediators: most mediators a layer uses.
        convolution: of the "values", or of the layer's "input", which needs no projection of all tokens (and leaves
            out the values' bias).
        maps: "heads": a matrix and a bias within each head after the projections of queries and keys, which absorbed
            projections take in; or "none".
        own_projections: whether each layer has projections of its own instead of the model's.
    """

    num_mediators: int = 16
    convolution: str = "values"
    maps: str = "heads"
    own_projections: bool = False

    kind: ClassVar[str] = "learned-mediator"

    def __post_init__(self) -> None:
        check_count("num_mediators", self.num_mediators)
        if self.convolution not in CONVOLUTIONS:
            raise ValueError(f"unknown convolution {self.convolution!r}; known: {', '.join(CONVOLUTIONS)}")
        if self.maps not in MEDIATOR_MAPS:
            raise ValueError(f"unknown maps {self.maps!r}; known: {', '.join(MEDIATOR_MAPS)}")
        _check_bool("own_projections", self.own_projections)

    def why_exact(self, grid: Grid) -> str | None:
        mediators, tokens = math.prod(self.pool_size(grid)), math.prod(grid)
        return f"{mediators} mediators are too many for {tokens} tokens" if 2 * mediators >= tokens else None

    def pool_size(self, grid: Grid) -> Grid:
        return agent_grid(self.num_mediators, grid)

    def make_core(self, sizes: LayerSizes) -> MediatorCore:
        return MediatorCore(sizes, self.convolution, self.maps, self.own_projections)

    def stored_mediators(self) -> int:
        return self.num_mediators

    def mix(
        self, core: MediatorCore, query: Tensor, key: Tensor, value: Tensor, grid: Grid, kernel: str, **beside: Any
    ) -> Tensor:
        query, key = core.mapped(query, key)
        return core.mixer(query, key, value, grid, self.pool_size(grid), kernel=kernel, **beside)

    def choose_path(self, query: Tensor, key: Tensor, value: Tensor, agents: Tensor | None, kernel: str) -> Choice:
        assert agents is not None
        bias = query.detach()[:1, :1, :1, :1]
        return dispatch.choose_agent_kernel(query, key, value, agents, (bias, bias), kernel)

    def flops(self, shape: LayerShape) -> int:
        agents = math.prod(self.pool_size(shape.grid))
        projections = shape.projection_flops(shape.tokens, shape.tokens)
        if self.convolution == "input":  # the projection of the values once more
            projections += 2 * shape.tokens * shape.channels * shape.width
        return projections + agent_flops(shape, agents, shape.tokens) + self.beside_flops(shape)

    def absorbed_flops(self, shape: LayerShape) -> int:
        """What comes to the absorbed layer: the convolution, and maps of the projections' weights."""
        maps = 4 * shape.channels * shape.width * (shape.width // shape.num_heads) if self.maps == "heads" else 0
        return 18 * shape.tokens * shape.width + maps

    def beside_flops(self, shape: LayerShape) -> int:
        """The convolution, scales and maps."""
        maps = 4 * shape.tokens * shape.width * (shape.width // shape.num_heads) if self.maps == "heads" else 0
        return 20 * shape.tokens * shape.width + maps


@dataclass(frozen=True)
class LearnedLinear(LearnedMethod):
    """Linear attention with learned maps in front of the feature map, beside frozen weights.

        O = φ(q) (φ(k)ᵀ v / N) / (φ(q) · mean φ(k) + eps) [+ conv₃ₓ₃(v)]

    New weights start as linear attention with the feature map alone: maps and convolution add nothing.

    Attributes:
        feature_map: "elu", "relu", "focused" or "identity", see `attngen.functional.linear_attention`, or "hedgehog":
            the softmax over a head's channels of y and of -y, side by side.
        maps: "input": q = W_q (x + F(x)) with F a two-layer network, k alike (LinFusion); "heads": a matrix within
            each head after the projection; "none".
        reduction: channels over hidden channels of F.
        convolution: whether a depth-wise convolution of the values is added.
        eps: added to the denominator.
        own_projections: whether each layer has projections of its own instead of the model's.
    """

    feature_map: str = HEDGEHOG
    maps: str = "heads"
    reduction: int = 4
    convolution: bool = True
    eps: float = 1e-4
    own_projections: bool = False

    kind: ClassVar[str] = "learned-linear"

    def __post_init__(self) -> None:
        known = (*FEATURE_MAPS, HEDGEHOG)
        if self.feature_map not in known:
            raise ValueError(f"unknown feature_map {self.feature_map!r}; known: {', '.join(known)}")
        if self.maps not in MAPS:
            raise ValueError(f"unknown maps {self.maps!r}; known: {', '.join(MAPS)}")
        check_count("reduction", self.reduction)
        check_number("eps", self.eps)
        _check_bool("convolution", self.convolution)
        _check_bool("own_projections", self.own_projections)
        if self.maps == "none" and not self.convolution and not self.own_projections:
            raise ValueError("without maps, convolution and own_projections there is nothing to learn")

    def why_exact(self, grid: Grid) -> str | None:
        return None

    def make_core(self, sizes: LayerSizes) -> LinearCore:
        return LinearCore(sizes, self.maps, self.reduction, self.convolution, self.own_projections)

    def stored_mediators(self) -> int:
        return 0

    def mix(
        self, core: LinearCore, query: Tensor, key: Tensor, value: Tensor, grid: Grid, kernel: str, **beside: Any
    ) -> Tensor:
        queries, keys, values = (split_heads(x, core.sizes.num_heads) for x in (query, key, value))
        if self.maps == "heads":
            assert core.query_map is not None and core.key_map is not None
            queries, keys = core.query_map(queries), core.key_map(keys)
        name, features = self._features()
        if self.feature_map == HEDGEHOG:
            queries, keys = hedgehog_features(queries), hedgehog_features(keys)
        mixed = join_heads(dispatch.linear_attention(queries, keys, values, name, features, self.eps, kernel))
        return mixed if core.dwc is None else mixed + convolve_tokens(core.dwc, value, grid)

    def _features(self) -> tuple[str, FeatureMap]:
        name = "identity" if self.feature_map == HEDGEHOG else self.feature_map
        return name, FEATURE_MAPS[name]

    def choose_path(self, query: Tensor, key: Tensor, value: Tensor, agents: Tensor | None, kernel: str) -> Choice:
        if self.feature_map == HEDGEHOG:
            query, key = (torch.cat([x, x], dim=-1) for x in (query, key))
        return dispatch.choose_linear_kernel(query, key, value, self._features()[0], kernel)

    def flops(self, shape: LayerShape) -> int:
        tokens, width, head_dim = shape.tokens, shape.width, shape.width // shape.num_heads
        features = 2 * head_dim if self.feature_map == HEDGEHOG else head_dim
        core = 4 * tokens * width * features + 3 * tokens * width
        if self.maps == "input":
            core += 8 * tokens * shape.channels * max(1, shape.channels // self.reduction)
        elif self.maps == "heads":
            core += 4 * tokens * width * head_dim
        if self.convolution:
            core += 18 * tokens * width
        return shape.projection_flops(tokens, tokens) + core


LEARNED_METHODS: Mapping[str, type[LearnedMethod]] = {cls.kind: cls for cls in (LearnedMediators, LearnedLinear)}


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
