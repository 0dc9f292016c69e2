"""The choice between kernels that compute the same formula, by shape, dtype, device, gradient and bias.

The choice is looked up in `crossovers.json`, measured by `python -m benchmarks.crossovers`; for a device or size that
is not in it, it is measured at the first such call, see `attngen.kernels.measured`. Where neither is possible two fused
attention calls run, and no speed is claimed. The argument `kernel` overrides the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attngen.checks import check_choice
from attngen.kernels import crossovers, measured, reference
from attngen.kernels.autocast import autocast_dtype
from attngen.kernels.candidates import ABSORBED, Shape
from attngen.kernels.crossovers import AbsorbedCost, AbsorbedSize, Choice, call_kind, device_key, layer_kind
from attngen.kernels.like import Like
from attngen.kernels.paths import AGENT_PATHS
from attngen.kernels.reference import NO_BIASES, AgentScales, Biases, Convolution
from attngen.kernels.triton import agent as triton_agent
from attngen.kernels.triton import linear as triton_linear

Kernel = Literal["auto", "table", "reference", "sdpa", "matmul", "triton", "absorbed"]

AUTO: Kernel = "auto"
TABLE: Kernel = "table"
"""As "auto", but nothing is measured: for an unknown device or size the nearest committed measurement counts."""
CHOOSING = (AUTO, TABLE)
AGENT_KERNELS = ("reference", "sdpa", "matmul", "triton")
LINEAR_KERNELS = ("reference", "triton")
LAYER_KERNELS = (ABSORBED,)
"""Kernels of a whole layer, projections included; see `attngen.kernels.absorbed`."""
KERNELS = (*CHOOSING, *AGENT_KERNELS, *LAYER_KERNELS)


class Problem(NamedTuple):
    """The sizes that decide between the kernels of one attention call.

    Attributes:
        device: "cpu" or a CUDA device's capability, such as "cuda-9.0"; see `device_key`.
        dtype: "float32" or "bfloat16".
        batch_heads: samples times heads.
        tokens: queries or keys, whichever are more.
        agents: M, or 0 for linear attention.
        head_dim: D.
        training: whether gradients are recorded.
        bias: whether there are position biases.
    """

    device: str
    dtype: str
    batch_heads: int
    tokens: int
    agents: int
    head_dim: int
    training: bool = False
    bias: bool = False


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scales: AgentScales,
    biases: Biases = NO_BIASES,
    convolution: Convolution | None = None,
    kernel: str = AUTO,
) -> Tensor:
    """`reference.agent_attention` by `kernel`, one that `choose_agent_kernel` gave; "auto" chooses here."""
    if kernel in CHOOSING:
        kernel = choose_agent_kernel(query, key, value, agents, biases, kernel, scales.correction).kernel
    return AGENT_PATHS[kernel](query, key, value, agents, scales, biases, convolution)


def choose_agent_kernel(
    query: Tensor | Like,
    key: Tensor | Like,
    value: Tensor | Like,
    agents: Tensor | Like,
    biases: Sequence[Tensor | Like | None] = (None, None),
    kernel: str = AUTO,
    correction: str | None = None,
    absorbed: AbsorbedSize | None = None,
) -> Choice:
    """The kernel for these tensors, or for tensors like these.

    Args:
        query: (B, H, N, D), as the next three are in `agent_attention`.
        key: (B, H, L, D).
        value: (B, H, L, E).
        agents: (B, H, M, D).
        biases: position biases.
        kernel: the one asked for, from `KERNELS`.
        correction: between the softmaxes.
        absorbed: sizes of the layer, where its projections can be absorbed too; the choice may be "absorbed" then.
    """
    tensors = [query, key, value, agents, *(bias for bias in biases if bias is not None)]
    trains, bias, dtype = _records(tensors), len(tensors) > 4, _exact_dtype(query)
    (batch, heads, queries, head_dim), keys, number = query.shape, key.shape[2], agents.shape[2]
    kind, tokens = device_key(query.device), max(queries, keys)
    problem = Problem(kind, _tabled(dtype, kind), batch * heads, tokens, number, head_dim, trains, bias)

    def tabled() -> Choice:
        cost = None if absorbed is None else absorbed_cost(query)
        if kernel in CHOOSING and absorbed is not None and cost is not None and absorbed.gain(cost) > 1:
            return Choice(ABSORBED)
        why_not = partial(triton_agent.why_not, query, key, value, agents, correction)
        choice = choose_for_agents(problem, kernel, why_not)
        return choice if correction is None else choice._replace(speedup=None)  # the table has none

    if kernel != AUTO:
        return tabled()
    if correction is None and _is_known("agent", problem, query.device):
        if absorbed is None or absorbed_cost(query) is not None:
            return tabled()
    layer = (0, 0) if absorbed is None else (absorbed.channels, absorbed.kept_projections)
    sizes = batch, heads, queries, keys, number, head_dim
    shape = Shape("agent", dtype, *sizes, trains, bias, correction or "", *layer)
    return measured.find(shape, query.device, tabled)


def choose_for_agents(
    problem: Problem, kernel: str = AUTO, why_not_triton: Callable[[], str | None] = lambda: None
) -> Choice:
    """The kernel for agent attention of given sizes by the committed measurements.

    Args:
        problem: the sizes.
        kernel: the one asked for, from `KERNELS`.
        why_not_triton: called where the Triton kernels are an option; returns the reason why they cannot run, or None.
    """
    found = _look_up("agent", problem) or Choice("sdpa")
    return _settle(found, kernel, AGENT_KERNELS, "sdpa", why_not_triton)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: str,
    features: Callable[[Tensor], Tensor],
    eps: float,
    kernel: str = AUTO,
) -> Tensor:
    """Linear attention by `kernel`, one that `choose_linear_kernel` gave; "auto" chooses here.

    Args:
        query: (B, H, N, D).
        key: (B, H, L, D).
        value: (B, H, L, E).
        feature_map: name of `features`; "" for a function without a name.
        features: the feature map.
        eps: see `attngen.functional.linear_attention`.
        kernel: the kernel.
    """
    if kernel in CHOOSING:
        kernel = choose_linear_kernel(query, key, value, feature_map, kernel).kernel
    if kernel == "triton":
        return triton_linear.linear_attention(query, key, value, feature_map, eps)
    wide = torch.promote_types(query.dtype, torch.float32)
    return reference.linear_attention(features(query.to(wide)), features(key.to(wide)), value, eps)


def choose_linear_kernel(
    query: Tensor | Like, key: Tensor | Like, value: Tensor | Like, feature_map: str, kernel: str = AUTO
) -> Choice:
    """The kernel for these tensors, or for tensors like these."""
    batch, heads, queries, head_dim = query.shape
    trains, tokens = _records((query, key, value)), max(queries, key.shape[2])
    dtype, kind = _exact_dtype(query), device_key(query.device)
    problem = Problem(kind, _tabled(dtype, kind), batch * heads, tokens, 0, head_dim, trains)
    why_not = partial(triton_linear.why_not, query, key, value, feature_map)
    tabled = partial(choose_for_linear, problem, kernel, why_not)
    # Without the Triton kernels there is nothing to choose.
    if kernel != AUTO or _is_known("linear", problem, query.device) or why_not() is not None:
        return tabled()
    shape = Shape("linear", dtype, batch, heads, queries, key.shape[2], 0, head_dim, trains)
    return measured.find(shape, query.device, tabled)


def choose_for_linear(
    problem: Problem, kernel: str = AUTO, why_not_triton: Callable[[], str | None] = lambda: None
) -> Choice:
    """The kernel for linear attention of given sizes. Arguments as for `choose_for_agents`."""
    found = _look_up("linear", problem) or Choice("reference")
    return _settle(found, kernel, LINEAR_KERNELS, "reference", why_not_triton)


def absorbed_cost(like: Tensor | Like) -> AbsorbedCost | None:
    """The measured cost of the absorbed kernel for a layer with such an input, or None where there is none."""
    kind = device_key(like.device)
    trains = _records((like,))
    cost = crossovers.absorbed_cost(kind, layer_kind(_tabled(_exact_dtype(like), kind), trains))
    return None if cost is None else AbsorbedCost(*cost)


def check_kernel(kernel: str, known: Sequence[str] = KERNELS) -> None:
    """Raise ValueError for a kernel that is not among the `known`, listing them."""
    check_choice("kernel", kernel, known)


def _settle(
    found: Choice, wanted: str, known: Sequence[str], default: str, why_not_triton: Callable[[], str | None]
) -> Choice:
    """The kernel that runs, given the fastest one, the one asked for, and whether the Triton kernels can run."""
    named = wanted in known
    kernel = wanted if named else found.kernel
    reason = why_not_triton() if kernel == "triton" else None
    if reason is not None:
        kernel = default if found.kernel == "triton" else found.kernel
    elif not named and wanted not in (*CHOOSING, *LAYER_KERNELS):
        reason = f"there is no such path; there is {' and '.join(known)}"
    asked = None if wanted in CHOOSING else reason
    return Choice(kernel, found.speedup if kernel == found.kernel else None, asked)


def _look_up(method: str, problem: Problem) -> Choice | None:
    kind = call_kind(method, problem.dtype, problem.training, problem.bias)
    axes = crossovers.axes(problem.device, kind)
    if not axes:
        return None
    cell = crossovers.cell(
        problem.device, kind, *[_nearest(size, axis) for size, axis in zip(_sizes(problem), axes, strict=True)]
    )
    return None if cell is None else Choice(*cell)


def _is_known(method: str, problem: Problem, device: torch.device) -> bool:
    """Whether the table was measured on this device, at sizes that are at most twice or half of these."""
    if not crossovers.is_known(device) or _look_up(method, problem) is None:
        return False
    axes = crossovers.axes(problem.device, call_kind(method, problem.dtype, problem.training, problem.bias))
    sizes = _sizes(problem)
    return bool(axes) and all(a[0] <= 2 * n and n <= 2 * a[-1] for n, a in zip(sizes, axes, strict=True))


def _sizes(problem: Problem) -> list[int]:
    """Along the axes of the table."""
    return [problem.batch_heads, problem.head_dim, problem.tokens, *([problem.agents] if problem.agents else [])]


def _nearest(size: int, axis: Iterable[int]) -> int:
    """In whole numbers only, so that torch.compile can trace it with a size that it keeps symbolic."""
    chosen = None
    for value in axis:
        if chosen is None or size * size > chosen * value:
            chosen = value
    assert chosen is not None
    return chosen


def _tabled(dtype: str, device: str) -> str:
    """The dtype of the table in which kernels rank as in `dtype`."""
    if dtype == "float16":
        return "float32" if device == "cpu" else "bfloat16"  # CPUs compute float16 in float32
    return "float32" if dtype == "float64" else dtype


def _exact_dtype(x: Tensor | Like) -> str:
    """The dtype that attention over `x` runs in."""
    wanted = None if x.dtype == torch.float64 else autocast_dtype(x.device.type)
    return str(wanted or x.dtype).removeprefix("torch.")


def _records(tensors: Iterable[Tensor | Like]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
