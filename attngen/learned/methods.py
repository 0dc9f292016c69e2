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
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.kernels import dispatch
from attngen.kernels.absorbed import Projection
from attngen.kernels.autocast import autocast_dtype
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer
from attngen.layers.route import AbsorbedSize, Agents, Route, Run, exact, mediator_route
from attngen.learned.modules import (
    HEDGEHOG,
    HeadMap,
    LayerSizes,
    LearnedCore,
    LinearCore,
    MediatorCore,
    hedgehog_features,
)
from attngen.methods.agent import agent_flops
from attngen.methods.base import AttentionMethod, LayerShape, option
from attngen.methods.linear import FEATURE_MAPS
from attngen.tokens import agent_grid, convolve_tokens, join_heads, split_heads


@dataclass(frozen=True)
class LearnedMethod(AttentionMethod):
    """An attention method with weights for each layer, loaded from a file; see `attngen.LearnedLayers`."""

    supports_rotary: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = True

    @abstractmethod
    def make_core(self, sizes: LayerSizes) -> LearnedCore:
        """The module for a layer's weights, uninitialised."""

    @property
    @abstractmethod
    def stored_mediators(self) -> int:
        """`LayerSizes.num_mediators` of new weights."""

    def why_exact(self, grid: Grid) -> str | None:
        """Why this is exact attention on `grid`, or None where it is not."""
        return None


@dataclass(frozen=True)
class LearnedMediators(LearnedMethod):
    """Mediator attention with learned weights, attached to a model whose own weights stay frozen.

        softmax(Q Pᵀ s₂ + B₂) softmax(P Kᵀ s₁ + B₁) V + conv₃ₓ₃(V),  P = pooled Q

    Q and K pass a learned matrix within each head. B₁ and B₂ are interpolated, so any number of mediators and any
    image shape works. s₁ and s₂ are learned for each head. The convolution's centre is the training-free method's
    shortcut, for each channel. New weights start as agent attention without biases and convolution ("plain"), or as
    `AgentAttention` with its scales ("agent").

    Attributes:
        num_mediators: most mediators a layer uses.
        convolution: of the "values", or of the layer's "input", which needs no projection of all tokens (and leaves
            out the values' bias).
        maps: "heads": a matrix and a bias within each head after the projections of queries and keys, which absorbed
            projections include; or "none".
        own_projections: whether each layer has its own projections instead of the model's.
    """

    num_mediators: int = option(16, "most mediators a layer uses", low=1, high=4096, shown=True)
    convolution: Literal["values", "input"] = option("values", "what the 3 x 3 convolution is applied to")
    maps: Literal["heads", "none"] = option("heads", "learned matrices after the projections")
    own_projections: bool = option(False, "projections of its own instead of the model's")

    kind: ClassVar[str] = "learned-mediator"
    title: ClassVar[str] = "Learned mediators"
    source: ClassVar[str] = "arXiv 2408.05710"

    def why_exact(self, grid: Grid) -> str | None:
        mediators, tokens = math.prod(self.cells(grid)), math.prod(grid)
        return f"{mediators} mediators are too many for {tokens} tokens" if 2 * mediators >= tokens else None

    def cells(self, grid: Grid) -> Grid:
        """Rows and columns of the mediators on `grid`."""
        return agent_grid(self.num_mediators, grid)

    def make_core(self, sizes: LayerSizes) -> MediatorCore:
        return MediatorCore(sizes, self.convolution, self.maps, self.own_projections)

    @property
    def stored_mediators(self) -> int:
        return self.num_mediators

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        why = self.why_exact(call.grid)
        if why is not None:
            return exact(why)
        core: MediatorCore = layer.core
        agents = Agents(self.cells(call.grid), mixer=core.mixer, fold=partial(_fold, core))
        route = mediator_route(layer, like, agents, core.mapped)
        assert route.run is not None
        return route._replace(run=partial(_with_core, run=route.run))

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        agents = math.prod(self.cells(shape.grid))
        convolution, mapped = 18 * shape.tokens * shape.width, 4 * shape.width * shape.head_dim
        if kernel == "absorbed":
            kept = 2 if self.convolution == "values" else 1
            sizes = AbsorbedSize(agents, shape.head_dim, shape.num_heads, shape.channels, shape.tokens, kept)
            return sizes.flops + convolution + (shape.channels * mapped if self.maps == "heads" else 0)
        projections = shape.projection_flops(shape.tokens, shape.tokens)
        if self.convolution == "input":  # the projection of the values once more
            projections += 2 * shape.tokens * shape.channels * shape.width
        scales = 2 * shape.tokens * shape.width
        added = convolution + scales + (shape.tokens * mapped if self.maps == "heads" else 0)
        return projections + agent_flops(shape, agents, shape.tokens) + added


@dataclass(frozen=True)
class LearnedLinear(LearnedMethod):
    """Linear attention with learned maps before the feature map, attached to a model whose own weights stay frozen.

        O = φ(q) (φ(k)ᵀ v / N) / (φ(q) · mean φ(k) + eps) [+ conv₃ₓ₃(v)]

    New weights start as linear attention with the feature map alone: maps and convolution add nothing.

    Attributes:
        feature_map: "elu", "relu", "focused" or "identity", see `attngen.functional.linear_attention`, or "hedgehog":
            the softmax over a head's channels of y and of -y, concatenated.
        maps: "input": q = W_q (x + F(x)) with F a two-layer network, k alike (LinFusion); "heads": a matrix within
            each head after the projection; "none".
        reduction: channels over hidden channels of F.
        convolution: whether a depth-wise convolution of the values is added.
        eps: added to the denominator.
        own_projections: whether each layer has its own projections instead of the model's.
    """

    feature_map: Literal["elu", "relu", "focused", "identity", "hedgehog"] = option("hedgehog", "replaces the softmax")
    maps: Literal["input", "heads", "none"] = option("heads", "learned maps before the feature map")
    reduction: int = option(4, "channels over hidden channels of the maps of the input", low=1, high=64)
    convolution: bool = option(True, "add a 3 x 3 convolution of the values")
    eps: float = option(1e-4, "added to the denominator")
    own_projections: bool = option(False, "projections of its own instead of the model's")

    kind: ClassVar[str] = "learned-linear"
    title: ClassVar[str] = "Learned linear"
    source: ClassVar[str] = "arXiv 2409.02097"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.maps == "none" and not self.convolution and not self.own_projections:
            raise ValueError("without maps, convolution and own_projections there is nothing to learn")

    def make_core(self, sizes: LayerSizes) -> LinearCore:
        return LinearCore(sizes, self.maps, self.reduction, self.convolution, self.own_projections)

    @property
    def stored_mediators(self) -> int:
        return 0

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        batch, tokens, _ = like.shape
        features = layer.head_dim * (2 if self.feature_map == HEDGEHOG else 1)
        mapped = like.sized(batch, layer.heads, tokens, features)
        values = like.sized(batch, layer.heads, tokens, layer.head_dim)
        choice = dispatch.choose_linear_kernel(mapped, mapped, values, self._feature_map, layer.wanted)
        run = partial(_with_core, run=partial(self._run, kernel=choice.kernel))
        return Route(run, choice.kernel, choice.reason, None, choice.speedup)

    def _run(self, layer: Layer, hidden_states: Tensor, call: Call, *, kernel: str) -> Tensor:
        core: LinearCore = layer.core
        for_query = for_key = hidden_states
        if isinstance(core.query_map, nn.Sequential) and isinstance(core.key_map, nn.Sequential):
            for_query = hidden_states + core.query_map(hidden_states)
            for_key = hidden_states + core.key_map(hidden_states)
        query, key, value = layer.project_flat(for_query, for_key, hidden_states)
        queries, keys = layer.to_heads(query, "norm_q"), layer.to_heads(key, "norm_k")
        if isinstance(core.query_map, HeadMap) and isinstance(core.key_map, HeadMap):
            queries, keys = core.query_map(queries), core.key_map(keys)
        if self.feature_map == HEDGEHOG:
            queries, keys = hedgehog_features(queries), hedgehog_features(keys)
        name = self._feature_map
        values = split_heads(value, layer.heads)
        mixed = dispatch.linear_attention(queries, keys, values, name, FEATURE_MAPS[name], self.eps, kernel)
        mixed = join_heads(mixed)
        if core.dwc is not None:
            mixed = mixed + convolve_tokens(core.dwc, value, call.grid)
        return layer.output(mixed.to(query.dtype))

    @property
    def _feature_map(self) -> str:
        return "identity" if self.feature_map == HEDGEHOG else self.feature_map

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        tokens, width, head_dim = shape.tokens, shape.width, shape.head_dim
        features = 2 * head_dim if self.feature_map == HEDGEHOG else head_dim
        core = 4 * tokens * width * features + 3 * tokens * width
        if self.maps == "input":
            core += 8 * tokens * shape.channels * max(1, shape.channels // self.reduction)
        elif self.maps == "heads":
            core += 4 * tokens * width * head_dim
        if self.convolution:
            core += 18 * tokens * width
        return shape.projection_flops(tokens, tokens) + core


def _with_core(layer: Layer, hidden_states: Tensor, call: Call, *, run: Run) -> Tensor:
    """`run`, with the layer's weights where its input is; they follow once where offloading moved the layer alone."""
    core: LearnedCore = layer.core
    parameter = next(core.parameters())
    if parameter.device != hidden_states.device:
        core.to(hidden_states.device)
    if parameter.dtype != hidden_states.dtype and not parameter.requires_grad:
        if autocast_dtype(hidden_states.device.type) is None:
            core.to(hidden_states.dtype)
    return run(layer, hidden_states, call)


def _fold(core: MediatorCore, projections: list[Projection]) -> list[Projection]:
    """The layer's matrices with the learned factors and maps of queries and keys multiplied in."""
    query, key, value, out = projections
    query_factor, key_factor = core.factors()
    return [_folded(query, query_factor, core.query_map), _folded(key, key_factor, core.key_map), value, out]


def _folded(projection: Projection, factor: Tensor, head_map: HeadMap | None) -> Projection:
    """The projection and what comes after it as one: outputs of each head multiplied by a factor (H,), then mapped."""
    weight, bias = projection
    wide = torch.promote_types(weight.dtype, torch.float32)
    by_head = weight.to(wide).unflatten(0, (len(factor), -1)) * factor[:, None, None]
    biases = None if bias is None else bias.to(wide).unflatten(0, (len(factor), 1, -1)) * factor[:, None, None]
    if head_map is not None:
        matrix = head_map.weight.to(wide)
        by_head = by_head + matrix.transpose(1, 2) @ by_head
        biases = head_map.bias.to(wide) if biases is None else head_map(biases)
    folded = None if biases is None else biases.flatten().to(weight.dtype)
    return Projection(by_head.flatten(0, 1).to(weight.dtype), folded)


LEARNED_METHODS: Mapping[str, type[LearnedMethod]] = {cls.kind: cls for cls in (LearnedMediators, LearnedLinear)}
