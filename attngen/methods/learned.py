"""Methods with weights of their own, for models that were trained with softmax attention: distil the weights, keep the
model.

`LearnedMediators` is agent attention with learned position biases, scales and a depth-wise convolution (arXiv
2312.08874, 2408.05710). `LearnedLinear` is linear attention with learned features: LinFusion's generalised linear
attention (arXiv 2409.02097), or small maps within the heads (Hedgehog, arXiv 2402.04347). The methods are options; the
weights are in a `LearnedCore` of each layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attngen.kernels import dispatch
from attngen.kernels.dispatch import Choice
from attngen.methods._checks import Grid, check_count, check_number
from attngen.methods.agent import AgentAttention, agent_flops, agent_grid
from attngen.methods.base import AttentionMethod, LayerShape
from attngen.methods.linear import FEATURE_MAPS, FeatureMap
from attngen.methods.mediator import (
    CONVOLUTIONS,
    MediatorMixer,
    convolve_tokens,
    depthwise_convolution,
    join_heads,
    split_heads,
)

STARTS = ("plain", "agent")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
MAPS = ("input", "heads", "none")
MEDIATOR_MAPS = ("heads", "none")
HEDGEHOG = "hedgehog"


class LayerSizes(NamedTuple):
    """Sizes of a layer that decide the shapes of its learned weights.

    Attributes:
        channels: of the hidden states.
        width: heads times head size.
        num_heads: heads.
        grid: (height, width) of the tokens that position biases are stored for.
        num_mediators: mediators that they are stored for; 0 for linear attention.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        out_bias: whether that of the output has.
    """

    channels: int
    width: int
    num_heads: int
    grid: Grid
    num_mediators: int = 0
    qkv_bias: bool = False
    out_bias: bool = True

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


class HiddenModule(nn.Module):
    """A child module that its parents' parameters and state dict do not show, and that moves with them all the same.

    So a patched model saves, counts and freezes what it did before, and `.to()`, `.half()` and offloading of whole
    models reach the learned weights.

    Args:
        content: the module; `.content` gives it back.
    """

    content: Any

    def __init__(self, content: nn.Module) -> None:
        super().__init__()
        self.__dict__["content"] = content  # past nn.Module's registration of children

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HiddenModule:
        self.content._apply(fn, recurse)
        return self


class LearnedCore(nn.Module, ABC):
    """The learned weights of one layer.

    Attributes:
        projections: the layer's own query, key, value and output projections, or None to use the model's.
    """

    def __init__(self, sizes: LayerSizes, own_projections: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.projections: nn.ModuleDict | None = None
        if own_projections:
            into = {n: nn.Linear(sizes.channels, sizes.width, bias=sizes.qkv_bias) for n in PROJECTIONS[:3]}
            out = nn.Linear(sizes.width, sizes.channels, bias=sizes.out_bias)
            self.projections = nn.ModuleDict({**into, "to_out": out})

    @abstractmethod
    def start(self, start: str, generator: torch.Generator) -> None:
        """Fill the weights such that the layer is its method without learning. Projections are filled by the host.

        Args:
            start: "plain" or "agent", see `LearnedMediators`.
            generator: of the random weights.
        """


class HeadMap(nn.Module):
    """x -> x + x W + b within each head, (B, H, N, D); it starts as the identity."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, head_dim))

    def start(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.weight.to(x.dtype) + self.bias.to(x.dtype)


class MediatorCore(LearnedCore):
    """What `LearnedMediators` learns: `MediatorMixer`, the logarithm of both softmaxes' scales for each head, and maps.

    Attributes:
        query_map: of queries, and so of mediators, or None.
        key_map: of keys, or None.
    """

    def __init__(self, sizes: LayerSizes, convolution: str, maps: str, own_projections: bool) -> None:
        super().__init__(sizes, own_projections)
        self.mixer = MediatorMixer(
            sizes.num_heads, sizes.head_dim, sizes.num_mediators, sizes.grid, convolution=convolution
        )
        self.log_aggregation = nn.Parameter(torch.zeros(sizes.num_heads))
        self.log_broadcast = nn.Parameter(torch.zeros(sizes.num_heads))
        self.query_map = HeadMap(sizes.num_heads, sizes.head_dim) if maps == "heads" else None
        self.key_map = HeadMap(sizes.num_heads, sizes.head_dim) if maps == "heads" else None

    def start(self, start: str, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if not name.startswith("projections."):
                nn.init.zeros_(parameter)
        if start == "agent":
            scales = AgentAttention().agent_scales(self.sizes.head_dim)
            assert scales is not None
            nn.init.constant_(self.log_broadcast, math.log(scales.broadcast_scale / scales.scale))
            with torch.no_grad():
                self.mixer.dwc.weight[:, :, 1, 1] = scales.shortcut

    def factors(self) -> tuple[Tensor, Tensor]:
        """What queries and keys of each head are multiplied by, (H,) float32 each.

        Mediators are pooled queries, so a factor f of the queries makes f² of the broadcast's scores and f of the
        aggregation's; the keys' factor mends the latter.
        """
        broadcast, aggregation = self.log_broadcast.float(), self.log_aggregation.float()
        return (broadcast / 2).exp(), (aggregation - broadcast / 2).exp()

    def mapped(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, N, H · D) multiplied by their factors and mapped."""
        maps, factors = (self.query_map, self.key_map), self.factors()
        return tuple(  # type: ignore[return-value]
            self._mapped(x, head_map, factor) for x, head_map, factor in zip((query, key), maps, factors, strict=True)
        )

    def _mapped(self, x: Tensor, head_map: HeadMap | None, factor: Tensor) -> Tensor:
        x = x * factor.repeat_interleave(self.sizes.head_dim).to(x.dtype)
        return x if head_map is None else join_heads(head_map(split_heads(x, self.sizes.num_heads)))


class LinearCore(LearnedCore):
    """What `LearnedLinear` learns: maps of queries and keys, and a depth-wise convolution of the values."""

    def __init__(self, sizes: LayerSizes, maps: str, reduction: int, convolution: bool, own_projections: bool) -> None:
        super().__init__(sizes, own_projections)
        self.query_map: nn.Module | None = None
        self.key_map: nn.Module | None = None
        if maps == "input":
            self.query_map, self.key_map = (
                _bottleneck(sizes.channels, max(1, sizes.channels // reduction)) for _ in range(2)
            )
        elif maps == "heads":
            self.query_map, self.key_map = (HeadMap(sizes.num_heads, sizes.head_dim) for _ in range(2))
        self.dwc = depthwise_convolution(sizes.width) if convolution else None

    def start(self, start: str, generator: torch.Generator) -> None:
        for branch in (self.query_map, self.key_map):
            if isinstance(branch, HeadMap):
                branch.start()
            elif isinstance(branch, nn.Sequential):
                _start_bottleneck(branch, generator)
        if self.dwc is not None:
            for parameter in self.dwc.parameters():
                nn.init.zeros_(parameter)


def _bottleneck(channels: int, hidden: int) -> nn.Sequential:
    """LinFusion's branch; its places in the sequence are those of the published weights."""
    return nn.Sequential(nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(), nn.Linear(hidden, channels))


def _start_bottleneck(branch: nn.Sequential, generator: torch.Generator) -> None:
    parts: list[Any] = [module for module in branch if not isinstance(module, nn.LeakyReLU)]
    first, norm, last = parts
    nn.init.normal_(first.weight, std=first.weight.shape[1] ** -0.5, generator=generator)
    nn.init.ones_(norm.weight)
    for tensor in (first.bias, norm.bias, last.weight, last.bias):  # the branch starts at zero
        nn.init.zeros_(tensor)


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


def hedgehog_features(x: Tensor) -> Tensor:
    """softmax(x) and softmax(-x) over the last axis, side by side: (…, D) -> (…, 2 · D), in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.cat([F.softmax(wide, dim=-1), F.softmax(-wide, dim=-1)], dim=-1).to(x.dtype)


LEARNED_METHODS: Mapping[str, type[LearnedMethod]] = {cls.kind: cls for cls in (LearnedMediators, LearnedLinear)}


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
