"""`Route`: which code computes a layer, decided once. The processor runs it, the report prints it, the trace counts it.

`agent_route` is the one place that decides whether agent attention absorbs the layer's projections or projects first:
for training-free agents, for learned mediators, and for the mediators of a SiT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from attngen.checks import Grid
from attngen.kernels import dispatch, measured
from attngen.kernels.absorbed import Projection, absorbed_agent_attention
from attngen.kernels.crossovers import AbsorbedSize
from attngen.kernels.dispatch import CHOOSING
from attngen.kernels.like import Like
from attngen.kernels.reference import AgentScales
from attngen.layers.call import Call
from attngen.layers.layer import Layer
from attngen.layers.mediator import MediatorMixer
from attngen.tokens import convolve_tokens, pool_tokens

EXACT = "exact"

Run = Callable[[Layer, Tensor, Call], Tensor]
"""(layer, (B, N, C) hidden states, call) -> (B, N, C), output projection and its dropout included."""


Mapped = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Route(NamedTuple):
    """How a layer is computed in a call.

    Attributes:
        run: computes it, or None where the layer's own processor does.
        kernel: name of what computes it: `EXACT`, a path of `attngen.kernels.dispatch`, or an attention backend.
        why: why it is exact, or why the kernel is not the one asked for; None otherwise.
        agents: number of agents, or None for a method without.
        speedup: how many times faster than the best softmax attention its attention was measured to be at sizes like
            these, without projections where they are computed; None where that was not measured.
        vain: why it saves nothing on this machine, as was measured here; None otherwise.
    """

    run: Run | None
    kernel: str = EXACT
    why: str | None = None
    agents: int | None = None
    speedup: float | None = None
    vain: str | None = None


def exact(why: str) -> Route:
    """The layer's own processor computes it, because of `why`."""
    return Route(None, EXACT, why)


class Agents(NamedTuple):
    """How the agents of a layer attend; mediators are agents with learned biases and a convolution.

    Attributes:
        cells: (rows, columns) of the agents.
        scales: of the softmaxes, shortcut and gain; None for D**-0.5 and neither.
        mixer: learned position biases and convolution, or None.
        fold: maps the layer's query, key, value and output matrices to those that the agents see, or None.
    """

    cells: Grid
    scales: AgentScales | None = None
    mixer: MediatorMixer | None = None
    fold: Callable[[list[Projection]], list[Projection]] | None = None

    @property
    def kept_projections(self) -> int:
        """Products of all tokens by C × C weights that stay when the projections are absorbed."""
        if self.mixer is not None:
            return 2 if self.mixer.convolution == "values" else 1
        return 1 if self.scales is not None and self.scales.shortcut else 0


def agent_route(
    layer: Layer, like: Like, agents: Agents, projected: Callable[..., Tensor], absorbs: bool = True
) -> Route:
    """The route of agent attention.

    Args:
        layer: the layer.
        like: of its input (B, N, C).
        agents: how they attend.
        projected: (layer, hidden states, call, kernel=…) -> output, with the projections computed; its `kernel` is None
            where the attention backend that the user chose has to compute it.
        absorbs: whether the agents are pooled, so that a kernel may absorb the projections.
    """
    number = math.prod(agents.cells)
    why = _why_not_absorbed(layer, agents) if absorbs else "agents that are not pooled need projections"
    if why is None and layer.wanted == "absorbed":
        return Route(partial(_absorbed, agents=agents), "absorbed", None, number)
    # Position biases fit no attention backend, so attngen's paths run whatever the user chose for exact layers.
    kernel = layer.wanted if agents.mixer is not None else layer.kernel
    if kernel is None:
        return Route(partial(projected, kernel=None), layer.attention.name, None, number)
    batch, tokens, _ = like.shape
    queries = like.sized(batch, layer.heads, tokens, layer.head_dim)
    keys = like.sized(batch, layer.heads, tokens + layer.context_tokens, layer.head_dim)
    pooled = like.sized(batch, layer.heads, number, layer.head_dim)
    biases = (None, None) if agents.mixer is None else (like.sized(1, 1, 1, 1),) * 2
    correction = None if agents.scales is None else agents.scales.correction
    size = None
    if why is None:
        size = AbsorbedSize(number, layer.head_dim, layer.heads, layer.channels, tokens, agents.kept_projections)
    choice = dispatch.choose_agent_kernel(queries, keys, keys, pooled, biases, kernel, correction, size)
    vain = None
    if choice.is_in_vain and agents.mixer is None and not measured.is_shared_job():
        vain = f"{number} agents are not faster than softmax here: {choice.speedup:.2f} times its speed"
    if choice.kernel == "absorbed":
        return Route(partial(_absorbed, agents=agents), choice.kernel, None, number, choice.speedup, vain)
    reason = why if kernel == "absorbed" else choice.reason
    return Route(partial(projected, kernel=choice.kernel), choice.kernel, reason, number, choice.speedup, vain)


def _why_not_absorbed(layer: Layer, agents: Agents) -> str | None:
    """The reason why the layer has to compute its projections; None where they can be absorbed."""
    if layer.context_tokens:
        return "text takes part in the layer"
    if agents.scales is not None and agents.scales.correction is not None:
        return f"a {agents.scales.correction} correction needs projections"
    if layer.kernel is None and agents.mixer is None:
        return "an attention backend was chosen"
    if layer.wanted not in (*CHOOSING, "absorbed"):
        return f"the kernel {layer.wanted!r} was asked for"
    return layer.why_not_matrices()


def _absorbed(layer: Layer, hidden_states: Tensor, call: Call, *, agents: Agents) -> Tensor:
    """The layer by `absorbed_agent_attention`."""
    projections, mixer, cells, grid = layer.matrices(), agents.mixer, agents.cells, call.grid
    assert projections is not None, "the route has checked that"
    query, key, value, out = projections if agents.fold is None else agents.fold(projections)
    options: dict[str, Any] = {}
    if agents.scales is not None:
        options = agents.scales._asdict()
        del options["correction"]
    if mixer is not None:
        dwc = mixer.dwc
        options["aggregation_bias"] = mixer.aggregation_bias(cells, grid)
        options["broadcast_bias"] = mixer.broadcast_bias(cells, grid).transpose(-1, -2)
        branch = "value_branch" if mixer.convolution == "values" else "input_branch"

        def convolve(tokens: Tensor) -> Tensor:
            return convolve_tokens(dwc, tokens, grid)

        options[branch] = convolve
    output = absorbed_agent_attention(
        hidden_states,
        pool_tokens(hidden_states, grid, cells),
        query=query,
        key=key,
        value=value,
        out=out,
        num_heads=layer.heads,
        **options,
    )
    return layer.dropout(output)


def mediator_route(layer: Layer, like: Like, agents: Agents, mapped: Mapped | None = None) -> Route:
    """The route of attention through learned mediators (arXiv 2408.05710): those of a SiT, or attached to a layer.

    Args:
        layer: the layer.
        like: of its input (B, N, C).
        agents: with a mixer.
        mapped: maps queries and keys (B, N, H · D) before they meet, or None.

    Raises:
        ValueError: for an unknown kernel, which a SiT is given with each call.
    """
    dispatch.check_kernel(layer.wanted)
    return agent_route(layer, like, agents, partial(_mixed, agents=agents, mapped=mapped))


def _mixed(
    layer: Layer, hidden_states: Tensor, call: Call, *, kernel: str, agents: Agents, mapped: Mapped | None
) -> Tensor:
    """The layer by its projections and the mixer."""
    mixer = agents.mixer
    assert mixer is not None
    query, key, value = layer.project_flat(hidden_states, hidden_states)
    query, key = layer.normed(query, "norm_q"), layer.normed(key, "norm_k")
    if mapped is not None:
        query, key = mapped(query, key)
    convolved = None
    if mixer.convolution == "input":
        convolved = layer.project_values_linearly(convolve_tokens(mixer.dwc, hidden_states, call.grid))
    mixed = mixer(query, key, value, call.grid, agents.cells, convolved=convolved, kernel=kernel)
    return layer.output(mixed.to(query.dtype))
