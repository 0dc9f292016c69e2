"""The candidates of `benchmarks.layer`: every way to compute one attention layer that is here, as plain functions.

The core maps queries, keys and values (B, N, C) to (B, N, C), the layout that projections give and take. The block maps
hidden states (B, N, C) to (B, N, C), projections included. Pooling of the agents, position biases and the convolution
count as part of both.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attngen.functional import (
    agent_attention,
    agent_grid,
    focal_attention,
    linear_attention,
    pool_tokens,
    tile_attention,
)
from attngen.kernels.absorbed import Projection, absorbed_agent_attention
from attngen.kernels.dispatch import choose_agent_kernel
from attngen.layers.mediator import MediatorMixer
from attngen.methods import FocalAttention, TileAttention
from attngen.methods.base import LayerShape
from attngen.tokens import convolve_tokens, join_heads, split_heads
from benchmarks.shapes import Shape

VARIANTS = ("plain", "shortcut", "values", "input")
"""Agents without anything; with Stable Diffusion's scale and share of the values; mediators with both position biases
and a convolution of the values, or of the layer's input (blocks only)."""

AGENT_PATHS = ("einsum", "sdpa", "matmul", "triton", "absorbed")  # the last only with projections
SOFTMAX_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SHORTCUT, EXPONENT = 0.075, 0.3

SPARSE: Mapping[str, FocalAttention | TileAttention] = {
    **{
        f"tiles {key_tile} {density:g}{' gain' if gain else ''}": TileAttention(8, key_tile, density, gain)
        for key_tile, gain in ((8, 0.0), (8, 0.5), (4, 0.0))
        for density in (0.05, 0.1, 0.2, 0.3)
    },
    "focal": FocalAttention(),
}
"""Attention to chosen and near keys, by name: side of a tile of keys, density, and whether there is a gain."""

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to compute the layer.

    Attributes:
        name: kind, variant, agents and path in one.
        kind: "softmax", "agents", "linear" or "sparse".
        variant: of `VARIANTS` for agents.
        agents: their number, or None.
        path: the code that runs.
        function: tensors of an input set -> output.
        flops: of the forward for one picture.
        matrix_bytes: what it writes beside tensors of N x C, for one picture.
        units: tensors of N x C that have to be read or written at least, or None where that says little.
        bias_bytes: position biases that have to be read beside them, once for all pictures.
    """

    name: str
    kind: str
    variant: str | None
    agents: int | None
    path: str
    function: Callable[..., Tensor]
    flops: int
    matrix_bytes: int = 0
    units: float | None = None
    bias_bytes: int = 0


@dataclass
class Layer:
    """The weights of one layer, shared by all of its candidates.

    Attributes:
        shape: what it is of.
        projections: query, key, value and output.
        mixers: by number of mediators, their biases and convolution.
    """

    shape: Shape
    projections: tuple[Projection, Projection, Projection, Projection]
    mixers: dict[int, MediatorMixer]

    @classmethod
    def random(cls, shape: Shape, agents: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0) -> Layer:
        """Weights of the size that keeps activations near one, in `dtype`."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int, std: float) -> Tensor:
            return (torch.randn(*size, generator=generator) * std).to(device=device, dtype=dtype).requires_grad_()

        width = shape.channels
        projections = []
        for output in (False, False, False, True):
            bias = draw(width, std=0.1) if shape.bias or output else None
            projections.append(Projection(draw(width, width, std=width**-0.5), bias))
        mixers = {}
        for count in agents:
            mixer = _new_mixer(shape, count)
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            mixers[count] = mixer.to(device=device, dtype=dtype)
        return cls(shape, tuple(projections), mixers)  # type: ignore[arg-type]

    def parameters(self) -> list[Tensor]:
        """All projections' weights and biases."""
        return [tensor for projection in self.projections for tensor in projection if tensor is not None]

    def to(self, dtype: torch.dtype) -> Layer:
        """A copy in another dtype, without gradients."""
        projections = tuple(
            Projection(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
            for weight, bias in self.projections
        )
        mixers = {}
        for count, mixer in self.mixers.items():
            copied = _new_mixer(self.shape, count)
            copied.load_state_dict(mixer.state_dict())
            mixers[count] = copied.to(device=self.projections[0].weight.device, dtype=dtype)
        return Layer(self.shape, projections, mixers)  # type: ignore[arg-type]


def _new_mixer(shape: Shape, count: int) -> MediatorMixer:
    """A mixer whose weights are to be overwritten; convolutions draw theirs from the global random state."""
    with torch.random.fork_rng(devices=[]):
        return MediatorMixer(shape.heads, shape.head_dim, count, shape.grid)


def candidates(
    layer: Layer,
    block: bool,
    agents: Sequence[int],
    variants: Sequence[str],
    device: str,
    flex: bool,
    sparse: bool = False,
) -> tuple[list[Candidate], dict[str, str]]:
    """Every candidate that is here for a layer, and by name those that are not, with the reason."""
    missing: dict[str, str] = {}
    found = _softmax(layer, block, device, flex, missing)
    for count in agents:
        for variant in variants:
            found += _agents(layer, block, count, variant, device, missing)
    found += _linear(layer, block, device, missing)
    return found + (_sparse(layer, block, missing) if sparse else []), missing


def leaves(candidate: Candidate, layer: Layer, block: bool) -> list[Tensor]:
    """What the candidate's backward has to differentiate by, beside its inputs."""
    tensors = layer.parameters() if block else []
    if candidate.variant in ("values", "input") and candidate.agents is not None:
        tensors = tensors + list(layer.mixers[candidate.agents].parameters())
    return tensors


def oracle(candidate: Candidate, layer: Layer, block: bool) -> Callable[..., Tensor]:
    """The candidate's formula written out, for float64. `layer` has that dtype."""
    if candidate.kind == "softmax":
        core = _written_out_softmax(layer.shape)
    elif candidate.kind == "sparse":
        core = _sparse_core(layer.shape, SPARSE[candidate.name])
    elif candidate.kind == "linear":
        core = _linear_core(layer.shape, {"kernel": "reference"})
    else:
        assert candidate.variant is not None and candidate.agents is not None
        core = _einsum_core(layer, candidate.agents, candidate.variant)
    if not block:
        return core
    mixer = layer.mixers[candidate.agents] if candidate.variant == "input" and candidate.agents else None
    return _with_projections(layer, core, mixer)


def _softmax(layer: Layer, block: bool, device: str, flex: bool, missing: dict[str, str]) -> list[Candidate]:
    shape, found = layer.shape, []

    def add(path: str, attention: Callable[..., Tensor], matrix_units: float = 0.0) -> None:
        core = _heads_core(shape, attention)
        function = _with_projections(layer, core, None) if block else core
        size = layer.projections[0].weight.element_size()
        flops = 4 * shape.tokens**2 * shape.channels + _projection_flops(shape, block)
        matrix = int(matrix_units * shape.heads * shape.tokens**2 * size)
        found.append(Candidate(f"softmax {path}", "softmax", None, None, path, function, flops, matrix))

    on_cpu = torch.device(device).type == "cpu"
    for path, backend in SOFTMAX_BACKENDS.items():
        if on_cpu and path in ("cudnn", "efficient"):
            missing[f"softmax {path}"] = "torch has it on CUDA only"
            continue
        add(path, _backend(backend), 3.0 if path == "math" else 0.0)
    if importlib.util.find_spec("xformers") is None:
        missing["softmax xformers"] = "xformers is not installed"
    elif on_cpu:
        missing["softmax xformers"] = "xformers runs on CUDA only"
    else:
        add("xformers", _xformers)
    if flex:
        add("flex", _flex())
    else:
        missing["softmax flex"] = "FlexAttention was not asked for (--flex; it compiles for about half a minute)"
    return found


def _agents(
    layer: Layer, block: bool, count: int, variant: str, device: str, missing: dict[str, str]
) -> list[Candidate]:
    shape, found = layer.shape, []
    pooled = math.prod(agent_grid(count, shape.grid))
    size = layer.projections[0].weight.element_size()
    extra = {"plain": 0, "shortcut": 1, "values": 1, "input": 1}[variant]
    biases = 2 * shape.heads * pooled * shape.tokens * size if variant in ("values", "input") else 0
    if variant == "input" and not block:
        return []  # a core does not see the input of its layer
    for path in AGENT_PATHS if block else AGENT_PATHS[:-1]:  # nor the projections to absorb
        name = f"agents {variant} {count} {path}"
        reason = _why_not(path, count, shape, device)
        if reason is not None:
            missing[name] = reason
            continue
        flops = 8 * shape.tokens * pooled * shape.channels + _projection_flops(shape, block)
        if path == "absorbed":
            function = _absorbed(layer, count, variant)
            kept = {"plain": 0, "shortcut": 1, "values": 2, "input": 1}[variant]
            flops = shape.tokens * shape.channels * (8 * shape.heads * pooled + 2 * kept * shape.channels)
        else:
            core = _einsum_core(layer, count, variant) if path == "einsum" else _core(layer, count, variant, path)
            mixer = layer.mixers[count] if variant == "input" else None
            function = _with_projections(layer, core, mixer) if block else core
        matrix = int(4 * shape.heads * shape.tokens * pooled * max(size, 4)) if path != "triton" else 0
        # Queries are read for the agents and again for the broadcast; values again by a shortcut or a convolution.
        units = None if block else 5.0 + extra
        found.append(Candidate(name, "agents", variant, count, path, function, flops, matrix, units, biases))
    return found


def _linear(layer: Layer, block: bool, device: str, missing: dict[str, str]) -> list[Candidate]:
    shape, found = layer.shape, []
    for path in ("reference", "triton"):
        name = f"linear {path}"
        if path == "triton" and (reason := _no_triton(device)):
            missing[name] = reason
        else:
            core = _linear_core(shape, {"kernel": path})
            function = _with_projections(layer, core, None) if block else core
            flops = 4 * shape.tokens * shape.channels * shape.head_dim + _projection_flops(shape, block)
            units = None if block else 4.0
            found.append(Candidate(name, "linear", None, None, path, function, flops, 0, units))
    return found


def _sparse(layer: Layer, block: bool, missing: dict[str, str]) -> list[Candidate]:
    shape, found = layer.shape, []
    sizes = LayerShape(shape.grid, shape.channels, shape.channels, shape.heads)
    for name, method in SPARSE.items():
        reason = method.why_exact(shape.grid)
        if reason is not None:
            missing[name] = reason
            continue
        core = _sparse_core(shape, method)
        flops = method.flops(sizes) - (0 if block else sizes.projection_flops(shape.tokens, shape.tokens))
        function = _with_projections(layer, core, None) if block else core
        found.append(Candidate(name, "sparse", None, None, "sparse", function, flops))
    return found


def _sparse_core(shape: Shape, method: FocalAttention | TileAttention) -> Callable[..., Tensor]:
    options = {name: value for name, value in method.to_dict().items() if name not in ("method", "head_gains")}
    function = tile_attention if isinstance(method, TileAttention) else focal_attention
    return _heads_core(shape, lambda query, key, value: function(query, key, value, shape.grid, **options))


def _why_not(path: str, count: int, shape: Shape, device: str) -> str | None:
    if 2 * count > shape.tokens:
        return f"{count} agents are too many for {shape.tokens} tokens"
    return _no_triton(device) if path == "triton" else None


def _no_triton(device: str) -> str | None:
    if torch.device(device).type == "cpu":
        return "Triton kernels need a GPU"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def _projection_flops(shape: Shape, block: bool) -> int:
    return 8 * shape.tokens * shape.channels**2 if block else 0


def _heads_core(shape: Shape, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return join_heads(attention(*(split_heads(x, shape.heads) for x in (query, key, value))))

    return core


def _backend(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return attention


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = compiled(query, key, value)
        assert isinstance(output, Tensor)
        return output

    return attention


def _written_out_softmax(shape: Shape) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = torch.einsum("bhnd,bhmd->bhnm", query * shape.head_dim**-0.5, key)
        return torch.einsum("bhnm,bhmd->bhnd", logits.softmax(dim=-1), value)

    return _heads_core(shape, attention)


def _einsum_core(layer: Layer, count: int, variant: str) -> Callable[..., Tensor]:
    """Agents as research code writes them: two einsums and a softmax each, biases repeated for the batch."""
    shape = layer.shape
    mediators = agent_grid(count, shape.grid)
    scale = shape.head_dim**-0.5
    second_scale = scale**EXPONENT if variant == "shortcut" else scale
    mixer = _mixer(layer, count, variant)

    def core(query: Tensor, key: Tensor, value: Tensor, convolved: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(x, shape.heads) for x in (query, key, value))
        agents = split_heads(pool_tokens(query, shape.grid, mediators), shape.heads)
        first = torch.einsum("bhmd,bhnd->bhmn", agents * scale, k)
        second = torch.einsum("bhnd,bhmd->bhnm", q * second_scale, agents)
        if mixer is not None:
            first = first + mixer.aggregation_bias(mediators, shape.grid).repeat(len(query), 1, 1, 1)
            second = second + mixer.broadcast_bias(mediators, shape.grid).transpose(2, 3).repeat(len(query), 1, 1, 1)
        aggregated = torch.einsum("bhmn,bhnd->bhmd", first.softmax(dim=-1), v)
        output = join_heads(torch.einsum("bhnm,bhmd->bhnd", second.softmax(dim=-1), aggregated))
        if variant == "shortcut":
            return output + SHORTCUT * value
        if mixer is not None and convolved is None:
            convolved = convolve_tokens(mixer.dwc, value, shape.grid)
        return output if convolved is None else output + convolved

    return core


def _core(layer: Layer, count: int, variant: str, path: str) -> Callable[..., Tensor]:
    """Agents by `attngen.functional.agent_attention`, mediators by their mixer, which fuses more."""
    shape = layer.shape
    mediators = agent_grid(count, shape.grid)
    mixer = _mixer(layer, count, variant)
    options: dict[str, Any] = {"kernel": path}
    if variant == "shortcut":
        options |= {"broadcast_scale": (shape.head_dim**-0.5) ** EXPONENT, "shortcut": SHORTCUT}

    def core(query: Tensor, key: Tensor, value: Tensor, convolved: Tensor | None = None) -> Tensor:
        if mixer is not None:
            _insist(path, [split_heads(x, shape.heads) for x in (query, key, value)])
            return mixer(query, key, value, shape.grid, mediators, convolved=convolved, kernel=path)
        pooled = pool_tokens(query, shape.grid, mediators)
        return join_heads(
            agent_attention(*(split_heads(x, shape.heads) for x in (query, key, value, pooled)), **options)
        )

    return core


def _mixer(layer: Layer, count: int, variant: str) -> MediatorMixer | None:
    return layer.mixers[count] if variant in ("values", "input") else None


def _insist(path: str, heads: Sequence[Tensor]) -> None:
    """ValueError where a mixer would take another path than this one; `agent_attention` says so itself."""
    if path == "triton":
        query, key, value = heads
        choice = choose_agent_kernel(query, key, value, query[:, :, :1], (None, None), path)
        if choice.reason is not None:
            raise ValueError(choice.reason)


def _linear_core(shape: Shape, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    return _heads_core(shape, lambda query, key, value: linear_attention(query, key, value, **options))


def _with_projections(
    layer: Layer, core: Callable[..., Tensor], mixer: MediatorMixer | None
) -> Callable[[Tensor], Tensor]:
    """The core between the layer's projections; with a `mixer` the convolution of the input beside it."""
    query, key, value, out = layer.projections

    def block(x: Tensor) -> Tensor:
        heads = (F.linear(x, *query), F.linear(x, *key), F.linear(x, *value))
        if mixer is None:
            return F.linear(core(*heads), *out)
        convolved = F.linear(convolve_tokens(mixer.dwc, x, layer.shape.grid), value.weight)
        return F.linear(core(*heads, convolved), *out)

    return block


def _absorbed(layer: Layer, count: int, variant: str) -> Callable[[Tensor], Tensor]:
    shape = layer.shape
    mediators = agent_grid(count, shape.grid)
    query, key, value, out = layer.projections
    mixer = _mixer(layer, count, variant)
    options: dict[str, Any] = {}
    if variant == "shortcut":
        options = {"broadcast_scale": (shape.head_dim**-0.5) ** EXPONENT, "shortcut": SHORTCUT}
    elif mixer is not None:
        conv: nn.Conv2d = mixer.dwc
        options[f"{'value' if variant == 'values' else 'input'}_branch"] = lambda x: convolve_tokens(
            conv, x, shape.grid
        )

    def block(x: Tensor) -> Tensor:
        biases = {}
        if mixer is not None:
            biases["aggregation_bias"] = mixer.aggregation_bias(mediators, shape.grid)
            biases["broadcast_bias"] = mixer.broadcast_bias(mediators, shape.grid).transpose(-1, -2)
        return absorbed_agent_attention(
            x,
            pool_tokens(x, shape.grid, mediators),
            query=query,
            key=key,
            value=value,
            out=out,
            num_heads=shape.heads,
            **biases,
            **options,
        )

    return block
