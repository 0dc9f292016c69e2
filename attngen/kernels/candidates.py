"""What competes in a call: every kernel that may compute it, and softmax attention, on tensors like the call's."""

from __future__ import annotations

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
    """The kernels that can compute calls of this shape, softmax attention, and for whole layers two candidates more.

    `PROJECTIONS` is what a layer adds to any of the kernels but `ABSORBED`, which computes the layer as a whole.
    """
    found = _cores(shape, device)
    if shape.channels:
        found |= {PROJECTIONS: _projections(shape, device), ABSORBED: _absorbed(shape, device)}
    return found


def _cores(shape: Shape, device: torch.device) -> dict[str, Candidate]:
    """From queries, keys and values (B, H, ·, D) to what is mixed of them."""
    draw = _Draw(shape, device)
    samples, heads = _fitting_heads(shape, device)
    share = samples * heads / (shape.batch * shape.heads)
    query, key, value = (
        draw(samples, tokens, shape.heads * shape.head_dim) for tokens in (shape.queries, shape.keys, shape.keys)
    )
    split = partial(_split, heads=shape.heads, first=heads)
    rows = _fitting_queries(shape, device, samples * heads)

    def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(split(query)[:, :, :rows], split(key), split(value))

    def kernel(path: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        query, key, value, *tables = inputs
        heads = split(query)
        return path(heads, split(key), split(value), _pooled(heads, shape.agents), tables)

    paths = _agent_paths(shape, split(query), split(key)) if shape.agents else _linear_paths(split(query))
    tables = [draw(1, heads, shape.agents, tokens) for tokens in (shape.keys, shape.queries) if shape.bias]
    found = {
        name: Candidate(partial(kernel, path), (query, key, value, *tables), share) for name, path in paths.items()
    }
    return {**found, SOFTMAX: Candidate(softmax, (query, key, value), share * rows / shape.queries)}


def _agent_paths(shape: Shape, query: Tensor, key: Tensor) -> dict[str, Callable[..., Tensor]]:
    usual = shape.head_dim**-0.5
    scales = AgentScales(usual, usual, correction=shape.correction or None)

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
    rows = _fitting(tokens, 8 * shape.channels * width * tokens, shape, device, at_least=256)
    weights = _weights(draw, shape.channels, width)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        query, key, value = (F.linear(x, weight) for weight in weights[:3])
        # Each has to be differentiated, as attention does.
        return F.linear(torch.addcmul(value, query, key) if shape.training else value, weights[3])

    return Candidate(run, (draw(1, rows, shape.channels), *weights), rows / tokens)


def _absorbed(shape: Shape, device: torch.device) -> Candidate:
    """A whole layer without projections of all tokens, but those that its shortcut or convolution keeps."""
    draw, width = _Draw(shape, device), shape.heads * shape.head_dim
    tokens = shape.batch * shape.queries
    samples = _fitting(shape.batch, 8 * shape.channels * width * tokens, shape, device)
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
    """(..., N, C) -> (..., M, C), means of as many tokens each."""
    tokens = x.shape[-2] // agents * agents if agents else 0
    return x[..., :tokens, :].unflatten(-2, (agents, -1)).mean(dim=-2) if agents else x[..., :0, :]


def _split(x: Tensor, heads: int, first: int) -> Tensor:
    """(B, N, H · D) -> (B, the first heads, N, D), as strided as in a layer."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)[:, :first]


def _fitting_heads(shape: Shape, device: torch.device) -> tuple[int, int]:
    """(samples, heads of each) whose softmax attention is no more work than is measured; as many heads as threads."""
    work = _work(shape)
    fitting = _fitting(shape.batch * shape.heads, work, shape, device)
    if fitting >= shape.heads:
        return fitting // shape.heads, shape.heads
    return 1, min(shape.heads, max(fitting, torch.get_num_threads()))


def _fitting_queries(shape: Shape, device: torch.device, heads: int) -> int:
    work = _work(shape) * heads / (shape.batch * shape.heads)
    return _fitting(shape.queries, work / torch.get_num_threads(), shape, device, at_least=256)


def _work(shape: Shape) -> float:
    return 4.0 * shape.batch * shape.heads * shape.queries * shape.keys * shape.head_dim


def _fitting(number: int, work: float, shape: Shape, device: torch.device, at_least: int = 1) -> int:
    """How many of `number` equal parts of `work` are no more than is measured."""
    most = _MOST_WORK[device.type] * (torch.get_num_threads() if device.type == "cpu" else 1)
    work = work * 3.5 if shape.training else work
    return min(number, max(at_least, int(number * most / work)))


class _Draw:
    """Normal tensors from one seed; the global random state is untouched."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.dtype, self.training, self.device = getattr(torch, shape.dtype), shape.training, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *size: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(*size, generator=self.generator, device=self.device) * std
        return drawn.to(self.dtype).requires_grad_(self.training)
