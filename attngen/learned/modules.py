"""The learned weights of one layer, as modules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.layers.layer import CORE, PARTS, Layer
from attngen.layers.mediator import MediatorMixer
from attngen.methods.agent import AgentAttention
from attngen.tokens import depthwise_convolution, join_heads, split_heads

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
        out_bias: whether the output projection has one.
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
    """A child module that is not in its parents' parameters and state dict, and still moves with them.

    So a patched model saves, counts and freezes the same parameters as before, and `.to()`, `.half()` and offloading of
    whole models reach the learned weights.

    Args:
        content: the module; also an attribute.
    """

    content: Any

    def __init__(self, content: nn.Module) -> None:
        super().__init__()
        self.__dict__["content"] = content  # past nn.Module's registration of children

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HiddenModule:
        self.content._apply(fn, recurse)
        return self


def put_core(attn: nn.Module, hidden: HiddenModule) -> None:
    """Attach learned weights to a layer."""
    attn.add_module(CORE, hidden)


def hidden_core(attn: nn.Module) -> HiddenModule | None:
    """The learned weights attached to a layer, or None."""
    return attn._modules.get(CORE)  # type: ignore[return-value]


def drop_core(attn: nn.Module) -> HiddenModule | None:
    """Detach the learned weights of a layer and return them; None where there are none."""
    return attn._modules.pop(CORE, None)  # type: ignore[return-value]


def num_weights(attn: nn.Module) -> int:
    """Number of parameters attached to a layer."""
    hidden = hidden_core(attn)
    return 0 if hidden is None else sum(parameter.numel() for parameter in hidden.content.parameters())


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
            into = {n: nn.Linear(sizes.channels, sizes.width, bias=sizes.qkv_bias) for n in PARTS}
            out = nn.Linear(sizes.width, sizes.channels, bias=sizes.out_bias)
            self.projections = nn.ModuleDict({**into, "to_out": out})

    @abstractmethod
    def start(self, start: str, generator: torch.Generator) -> None:
        """Fill the weights such that the layer equals its method without training. Projections are filled by the host.

        Args:
            start: "plain" or "agent", see `LearnedMediators`.
            generator: of the random weights.
        """

    def copy_projections(self, layer: Layer) -> None:
        """Fill the own projections, where there are any, with the layer's.

        Raises:
            ValueError: if one of the layer's is not a plain linear layer.
        """
        if self.projections is None:
            return
        matrices = layer.matrices()
        if matrices is None:
            raise ValueError(
                f"own_projections=True needs plain nn.Linear projections (LoRA is fine) in {type(layer.attn).__name__},"
                f" got {', '.join(dict.fromkeys(type(m).__name__ for m in layer.projection_modules()))}"
            )
        with torch.no_grad():
            for module, (weight, bias) in zip(self.projections.values(), matrices, strict=True):
                linear: Any = module
                linear.weight.copy_(weight)
                if linear.bias is not None and bias is not None:
                    linear.bias.copy_(bias)


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
    """The weights of `LearnedMediators`: `MediatorMixer`, the logarithms of both softmax scales of each head, and maps.

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
            scales = AgentAttention().scales(self.sizes.head_dim)
            nn.init.constant_(self.log_broadcast, math.log(scales.broadcast_scale / scales.scale))
            with torch.no_grad():
                self.mixer.dwc.weight[:, :, 1, 1] = scales.shortcut

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors of queries and keys of each head, (H,) float32 each.

        Mediators are pooled queries, so a factor f of the queries makes f² of the broadcast's scores and f of the
        aggregation's; the keys' factor compensates for the latter.
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
    """The weights of `LearnedLinear`: maps of queries and keys, and a depth-wise convolution of the values."""

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


def hedgehog_features(x: Tensor) -> Tensor:
    """softmax(x) and softmax(-x) over the last axis, concatenated: (…, D) -> (…, 2 · D), in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.cat([F.softmax(wide, dim=-1), F.softmax(-wide, dim=-1)], dim=-1).to(x.dtype)
