"""What competes in a call: every kernel that may compute it, and softmax attention, on tensors like the call's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attngen.kernels import reference
from attngen.kernels.absorbed import Projection, absorbed_agent_attention
from attngen.kernels.paths import AGENT_PATHS
from attngen.kernels.reference import AgentScales
from attngen.kernels.triton import agent as triton_agent
from attngen.kernels.triton import linear as triton_linear
from attngen.tokens import agent_grid, pool_tokens, split_heads

SOFTMAX, PROJECTIONS, ABSORBED = "softmax", "projections", "absorbed"

_MOST_WORK = {"cpu": 1.5e9, "cuda": 2e13}
"""Floating-point operations of a call that is still measured as it is; of a CPU, for each thread."""


class Shape(NamedTuple):
    """Sizes and settings of one attention call: what its fastest kernel depends on.

    Attributes:
        method: "agent" or "linear".
        dtype: in which it computes, such as "bfloat16".
        batch: samples.
        heads: H.
        queries: N, of one sample.
        keys: L, text included.
        agents: M; 0 for linear attention.
        head_dim: D.
        training: whether gradients are recorded.
        bias: whether there are position biases.
        correction: see `attngen.functional.agent_attention`; "" for none.
        channels: C, where a kernel may absorb the layer's projections; else 0.
        kept: see `attngen.kernels.crossovers.AbsorbedSize`.
    """

    method: str
    dtype: str
    batch: int
    heads: int
    queries: int
    keys: int
    agents: int
    head_dim: int
    training: bool
    bias: bool = False
    correction: str = ""
    channels: int = 0
    kept: int = 0


class Candidate(NamedTuple):
    """One way to compute a call, or a part of it.

    Attributes:
        run: the forward.
        inputs: its arguments; gradients are taken by those that record them.
        share: of the call's work that `run` does; on a CPU time grows with heads and queries, so few are enough.
    """

    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    share: float = 1.0

    def __call__(self) -> None:
        """The forward, and the backward where an input records gradients."""
        leaves = [x for x in self.inputs if x.requires_grad]
        with torch.set_grad_enabled(bool(leaves)):
            output = self.run(*self.inputs)
            if leaves:
                torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)


def candidates(shape: Shape, device: torch.device) -> dict[str, Candidate]:
    """The kernels that can compute calls of this shape, and softmax attention.

    Where projections can be absorbed these are whole layers, `ABSORBED` is one more, and `PROJECTIONS` none. Layers of
    much work are measured in parts: `PROJECTIONS` is then what a layer adds to any of the kernels but `ABSORBED`.
    """
    found = _cores(shape, device)
    if not shape.channels:
        return found
    absorbed = {ABSORBED: _absorbed(shape, device)}
    if _parts(1, _work(shape) + _projecting(shape), shape, device) < 0.5:
        return {**found, PROJECTIONS: _projections(shape, device), **absorbed}
    draw, width = _Draw(shape, device), shape.heads * shape.head_dim
    inputs = (draw(shape.batch, shape.queries, shape.channels), *_weights(draw, shape.channels, width))

    def layer(core: Candidate, *inputs: Tensor) -> Tensor:
        x, query, key, value, out = inputs
        mixed = core.run(*(F.linear(x, weight) for weight in (query, key, value)), *core.inputs[3:])
        return F.linear(mixed.transpose(1, 2).flatten(2), out)

    whole = _cores(shape, device, most=math.inf)
    return {**{name: Candidate(partial(layer, core), inputs) for name, core in whole.items()}, **absorbed}


def _cores(shape: Shape, device: torch.device, most: float = 1.0) -> dict[str, Candidate]:
    """From queries, keys and values (B, N, H · D) to what is mixed of them, (B, H, N, D); of `most` times the work."""
    draw = _Draw(shape, device)
    samples, heads = _fitting_heads(shape, device, most)
    share = samples * heads / (shape.batch * shape.heads)
    width = heads * shape.head_dim
    query, key, value = (draw(samples, tokens, width) for tokens in (shape.queries, shape.keys, shape.keys))
    split = partial(split_heads, num_heads=heads)
    rows = _fitting_queries(shape, device, samples * heads, most)

    def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(split(query)[:, :, :rows], split(key), split(value))

    def kernel(path: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        query, key, value, *tables = inputs
        agents = split(_pooled(query, shape.agents))
        return path(split(query), split(key), split(value), agents, tables)

    paths = _agent_paths(shape, split(query), split(key)) if shape.agents else _linear_paths(split(query))
    tables = [draw(1, heads, shape.agents, tokens) for tokens in (shape.keys, shape.queries) if shape.bias]
    found = {
        name: Candidate(partial(kernel, path), (query, key, value, *tables), share) for name, path in paths.items()
    }
    return {**found, SOFTMAX: Candidate(softmax, (query, key, value), share * rows / shape.queries)}


def _agent_paths(shape: Shape, query: Tensor, key: Tensor) -> dict[str, Callable[..., Tensor]]:
    usual = shape.head_dim**-0.5
    shortcut = 0.1 if shape.kept == 1 and shape.queries == shape.keys else 0.0
    scales = AgentScales(usual, usual, shortcut, correction=shape.correction or None)

    def run(kernel: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        *heads, tables = inputs
        biases = (tables[0], tables[1].transpose(-1, -2)) if tables else (None, None)
        return kernel(*heads, scales, biases)

    names = ["sdpa", "matmul"]
    if triton_agent.why_not(query, key, key, query[:, :, : shape.agents], scales.correction) is None:
        names.append("triton")
    return {name: partial(run, AGENT_PATHS[name]) for name in names}


def _linear_paths(query: Tensor) -> dict[str, Callable[..., Tensor]]:
    def plain(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        return reference.linear_attention(F.relu(query.to(wide)), F.relu(key.to(wide)), value, 1e-6)

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        return triton_linear.linear_attention(query, key, value, "relu", 1e-6)

    paths: dict[str, Callable[..., Tensor]] = {"reference": plain}
    if triton_linear.why_not(query, query, query, "relu") is None:
        paths["triton"] = fused
    return paths


def _projections(shape: Shape, device: torch.device) -> Candidate:
    """Queries, keys, values and output of a layer."""
    draw, width = _Draw(shape, device), shape.heads * shape.head_dim
    tokens = shape.batch * shape.queries
    rows = int(min(tokens, max(256, _parts(tokens, _projecting(shape), shape, device))))
    weights = _weights(draw, shape.channels, width)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        query, key, value = (F.linear(x, weight) for weight in weights[:3])
        # Each has to be differentiated, as attention does.
        return F.linear(torch.addcmul(value, query, key) if shape.training else value, weights[3])

    return Candidate(run, (draw(1, rows, shape.channels), *weights), rows / tokens)


def _absorbed(shape: Shape, device: torch.device) -> Candidate:
    """A whole layer without projections of all tokens, but those that its shortcut or convolution keeps."""
    draw, width = _Draw(shape, device), shape.heads * shape.head_dim
    samples = int(min(shape.batch, max(1, _parts(shape.batch, _projecting(shape), shape, device))))
    weights = _weights(draw, shape.channels, width)
    tables = [draw(1, shape.heads, shape.agents, shape.queries) for _ in range(2) if shape.bias]

    def run(x: Tensor, *inputs: Tensor) -> Tensor:
        query, key, value, out = (Projection(weight) for weight in inputs[:4])
        aggregation, broadcast = inputs[4:] or (None, None)
        return absorbed_agent_attention(
            x,
            _pooled(x, shape.agents),
            query=query,
            key=key,
            value=value,
            out=out,
            num_heads=shape.heads,
            aggregation_bias=aggregation,
            broadcast_bias=None if broadcast is None else broadcast.transpose(-1, -2),
            shortcut=0.1 if shape.kept == 1 else 0.0,
            value_branch=torch.neg if shape.kept == 2 else None,
        )

    x = draw(samples, shape.queries, shape.channels)
    return Candidate(run, (x, *weights, *tables), samples / shape.batch)


def _weights(draw: _Draw, channels: int, width: int) -> list[Tensor]:
    """Of queries, keys, values (H · D, C) and output (C, H · D)."""
    return [draw(*size, std=channels**-0.5) for size in ((width, channels),) * 3 + ((channels, width),)]


def _pooled(x: Tensor, agents: int) -> Tensor:
    """(B, N, C) -> (B, M, C), as a layer pools its tokens where they are a square."""
    if not agents:
        return x[:, :0]
    tokens = x.shape[1]
    side = math.isqrt(tokens)
    grid = (side, side) if side * side == tokens else (tokens, 1)
    size = agent_grid(agents, grid)
    return pool_tokens(x, grid, size if math.prod(size) == agents else (agents, 1))


def _fitting_heads(shape: Shape, device: torch.device, most: float) -> tuple[int, int]:
    """(samples, heads of each) whose softmax attention is no more work than is measured; as many heads as threads."""
    number = shape.batch * shape.heads
    fitting = int(min(number, max(1, most * _parts(number, _work(shape), shape, device))))
    if fitting >= shape.heads:
        return fitting // shape.heads, shape.heads
    return 1, min(shape.heads, max(fitting, torch.get_num_threads()))


def _fitting_queries(shape: Shape, device: torch.device, heads: int, most: float) -> int:
    work = _work(shape) * heads / (shape.batch * shape.heads) / torch.get_num_threads()
    return int(min(shape.queries, max(256, most * _parts(shape.queries, work, shape, device))))


def _work(shape: Shape) -> float:
    """Floating-point operations of softmax attention."""
    return 4.0 * shape.batch * shape.heads * shape.queries * shape.keys * shape.head_dim


def _projecting(shape: Shape) -> float:
    """Of all four projections."""
    return 8.0 * shape.batch * shape.queries * shape.channels * shape.heads * shape.head_dim


def _parts(number: int, work: float, shape: Shape, device: torch.device) -> float:
    """How many of `number` equal parts of `work` are as much as is measured; may be more than there are."""
    most = _MOST_WORK[device.type] * (torch.get_num_threads() if device.type == "cpu" else 1)
    return number * most / (work * 3.5 if shape.training else work)


class _Draw:
    """Normal tensors from one seed; the global random state is untouched."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.dtype, self.training, self.device = getattr(torch, shape.dtype), shape.training, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *size: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(*size, generator=self.generator, device=self.device) * std
        return drawn.to(self.dtype).requires_grad_(self.training)
