"""Which of the paths that compute the same formula runs: chosen by shape, dtype, device, gradient and bias.

The choice is looked up in `crossovers.json`, measured by `python -m benchmarks.crossovers`. On a device that is not in
it, two fused attention calls run, and nothing is claimed about speed. Override it with the argument `kernel` of the
functions and of `attngen.apply`, or for the whole process with the environment variable `ATTNGEN_KERNEL`;
`ATTNGEN_CROSSOVERS` names another file of measurements.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attngen.kernels import matmul, reference, sdpa, triton_agent, triton_linear
from attngen.kernels.autocast import autocast_dtype
from attngen.kernels.reference import Convolution

AUTO = "auto"
AGENT_KERNELS = ("reference", "sdpa", "matmul", "triton")
LINEAR_KERNELS = ("reference", "triton")
LAYER_KERNELS = ("absorbed",)
"""Paths of a whole layer, projections and all; see `attngen.kernels.absorbed`."""
KERNELS = (AUTO, *AGENT_KERNELS, *LAYER_KERNELS)

TOLERANCE = 0.98
"""A path with less than this share of softmax attention's speed is called slower than it."""

_ENVIRONMENT, _TABLE_ENVIRONMENT = "ATTNGEN_KERNEL", "ATTNGEN_CROSSOVERS"


class Problem(NamedTuple):
    """What decides between the paths of one attention call.

    Attributes:
        device: "cpu" or a CUDA device's capability, such as "cuda-9.0"; see `device_key`.
        dtype: "float32" or "bfloat16".
        batch_heads: pictures times heads.
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


class Choice(NamedTuple):
    """A path and what is known about it.

    Attributes:
        kernel: its name.
        speedup: how many times faster than the best softmax attention, or None where that was not measured.
        reason: why the path that was asked for does not run, or None.
    """

    kernel: str
    speedup: float | None = None
    reason: str | None = None

    @property
    def is_slower(self) -> bool:
        """Whether softmax attention was measured to be faster."""
        return self.speedup is not None and self.speedup < TOLERANCE


class AbsorbedCost(NamedTuple):
    """Multiply-adds of the absorbed path, in units of those of full projections; see `attngen.kernels.absorbed`.

    Attributes:
        narrow: of the products with as many columns as all agents together.
        own: of the agents' own projections.
        kept: of the projections that stay.
    """

    narrow: float = 1.25
    own: float = 3.0
    kept: float = 1.0


class Crossovers:
    """Measurements of one device: for each kind of call, the fastest path on a grid of sizes.

    Sizes between those measured take the nearest one on a logarithmic scale, axis by axis.

    Args:
        content: the device's part of the file.

    Raises:
        ValueError: if the content is not of the known form.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        try:
            self.machine: dict[str, Any] = content["machine"]
            self._cells: dict[str, dict[tuple[int, ...], Choice]] = {}
            self._axes: dict[str, tuple[tuple[int, ...], ...]] = {}
            for kind, rows in content["calls"].items():
                cells = {tuple(int(size) for size in sizes): Choice(str(k), float(s)) for *sizes, k, s in rows}
                self._cells[kind] = cells
                self._axes[kind] = tuple(tuple(sorted(set(values))) for values in zip(*cells, strict=True))
            self.absorbed = {kind: AbsorbedCost(**cost) for kind, cost in content["absorbed"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"these are not measurements of crossovers: {error!r}") from error

    def axes(self, kind: str) -> tuple[tuple[int, ...], ...]:
        """The sizes measured for a kind of call, axis by axis; empty where none were."""
        return self._axes.get(kind, ())

    def cell(self, kind: str, sizes: tuple[int, ...]) -> Choice | None:
        """What was measured to be fastest at a point of the grid, or None where nothing was measured there."""
        return self._cells[kind].get(sizes)


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scale: float,
    broadcast_scale: float,
    aggregation_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    shortcut: float = 0.0,
    convolution: Convolution | None = None,
    gain: float = 1.0,
    correction: str | None = None,
    kernel: str = AUTO,
) -> Tensor:
    """`reference.agent_attention` by the fastest path, or by `kernel` wherever that one runs."""
    biases = (aggregation_bias, broadcast_bias)
    choice = choose_agent_kernel(query, key, value, agents, biases, kernel, correction)
    path = _AGENT_PATHS[choice.kernel]
    return path(query, key, value, agents, scale, broadcast_scale, *biases, shortcut, convolution, gain, correction)


def choose_agent_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    biases: Sequence[Tensor | None] = (None, None),
    kernel: str = AUTO,
    correction: str | None = None,
) -> Choice:
    """The path that `agent_attention` takes for these tensors."""
    tensors = [query, key, value, agents, *(bias for bias in biases if bias is not None)]
    problem = Problem(
        device_key(query.device),
        _computing_dtype(query),
        query.shape[0] * query.shape[1],
        max(query.shape[2], key.shape[2]),
        agents.shape[2],
        query.shape[3],
        _records(tensors),
        len(tensors) > 4,
    )
    return choose_for_agents(problem, kernel, lambda: triton_agent.why_not(query, key, value, agents, correction))


def choose_for_agents(
    problem: Problem, kernel: str = AUTO, why_not_triton: Callable[[], str | None] = lambda: None
) -> Choice:
    """The path for agent attention of given sizes.

    Args:
        problem: the sizes.
        kernel: the path wanted, from `KERNELS`.
        why_not_triton: asked where the Triton kernels come into question; says why they cannot run, or None.
    """
    found = _look_up("agent", problem) or Choice("sdpa")
    return _settle(found, wanted_kernel(kernel), AGENT_KERNELS, "sdpa", why_not_triton)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: str,
    features: Callable[[Tensor], Tensor],
    eps: float,
    kernel: str = AUTO,
) -> Tensor:
    """Linear attention by the fastest path, or by `kernel` wherever that one runs.

    Args:
        query: (B, H, N, D).
        key: (B, H, L, D).
        value: (B, H, L, E).
        feature_map: name of `features`; "" for one that only it knows.
        features: the feature map.
        eps: see `attngen.functional.linear_attention`.
        kernel: the path wanted.
    """
    choice = choose_linear_kernel(query, key, value, feature_map, kernel)
    if choice.kernel == "triton":
        return triton_linear.linear_attention(query, key, value, feature_map, eps)
    wide = torch.promote_types(query.dtype, torch.float32)
    return reference.linear_attention(features(query.to(wide)), features(key.to(wide)), value, eps)


def choose_linear_kernel(query: Tensor, key: Tensor, value: Tensor, feature_map: str, kernel: str = AUTO) -> Choice:
    """The path that `linear_attention` takes for these tensors."""
    problem = Problem(
        device_key(query.device),
        _computing_dtype(query),
        query.shape[0] * query.shape[1],
        max(query.shape[2], key.shape[2]),
        0,
        query.shape[3],
        _records((query, key, value)),
    )
    return choose_for_linear(problem, kernel, lambda: triton_linear.why_not(query, key, value, feature_map))


def choose_for_linear(
    problem: Problem, kernel: str = AUTO, why_not_triton: Callable[[], str | None] = lambda: None
) -> Choice:
    """The path for linear attention of given sizes. Arguments as for `choose_for_agents`."""
    found = _look_up("linear", problem) or Choice("reference")
    return _settle(found, wanted_kernel(kernel), LINEAR_KERNELS, "reference", why_not_triton)


def absorbed_cost(x: Tensor, weight: Tensor) -> AbsorbedCost | None:
    """What the absorbed path of a layer with this input and projection costs, or None where it was not measured."""
    cost = _absorbed_cost(device_key(x.device), layer_kind(_computing_dtype(x), _records((x, weight))))
    return None if cost is None else AbsorbedCost(*cost)


def wanted_kernel(kernel: str) -> str:
    """`kernel`, or the environment's where it is "auto".

    Raises:
        ValueError: for an unknown name, from either.
    """
    if kernel == AUTO:
        return _from_environment()
    check_kernel(kernel)
    return kernel


def check_kernel(kernel: str, known: Sequence[str] = KERNELS, source: str = "kernel") -> None:
    """ValueError for a kernel that is not among the `known`, listing them."""
    if kernel not in known:
        raise ValueError(f"unknown {source} {kernel!r}; known: {', '.join(known)}")


def call_kind(method: str, dtype: str, training: bool, bias: bool = False) -> str:
    """What measurements of calls are filed under: "agent float32 forward plain"."""
    return f"{method} {layer_kind(dtype, training)} {'bias' if bias else 'plain'}"


def layer_kind(dtype: str, training: bool) -> str:
    """What measurements of whole layers are filed under: "float32 forward"."""
    return f"{dtype} {'training' if training else 'forward'}"


def device_key(device: torch.device) -> str:
    """What measurements of a device are filed under: "cpu", or the capability of a CUDA device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type
    return _capability(device.index)


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda-{major}.{minor}"


@torch.compiler.assume_constant_result
def _from_environment() -> str:
    kernel = os.environ.get(_ENVIRONMENT) or AUTO
    check_kernel(kernel, source=f"kernel in the environment variable {_ENVIRONMENT},")
    return kernel


def _settle(
    found: Choice, wanted: str, known: Sequence[str], default: str, why_not_triton: Callable[[], str | None]
) -> Choice:
    """What runs, given what is fastest, what is wanted, and whether the Triton kernels can run at all."""
    named = wanted in known
    kernel = wanted if named else found.kernel
    reason = why_not_triton() if kernel == "triton" else None
    if reason is not None:
        kernel = default if found.kernel == "triton" else found.kernel
    elif not named and wanted not in (AUTO, *LAYER_KERNELS):
        reason = f"there is no such path; there is {' and '.join(known)}"
    asked = reason if wanted != AUTO else None
    return Choice(kernel, found.speedup if kernel == found.kernel else None, asked)


def _look_up(method: str, problem: Problem) -> Choice | None:
    kind = call_kind(method, problem.dtype, problem.training, problem.bias)
    axes = _axes(problem.device, kind)
    if not axes:
        return None
    sizes = [problem.batch_heads, problem.head_dim, problem.tokens, *([problem.agents] if problem.agents else [])]
    cell = _cell(problem.device, kind, *[_nearest(size, axis) for size, axis in zip(sizes, axes, strict=True)])
    return None if cell is None else Choice(*cell)


# torch.compile takes the results of these for constants; it cannot look into the tables.


@torch.compiler.assume_constant_result
def _axes(device: str, kind: str) -> tuple[tuple[int, ...], ...]:
    table = _tables().get(device)
    return () if table is None else table.axes(kind)


@torch.compiler.assume_constant_result
def _cell(device: str, kind: str, *sizes: int) -> tuple[str, float | None] | None:
    choice = _tables()[device].cell(kind, sizes)
    return None if choice is None else (choice.kernel, choice.speedup)


@torch.compiler.assume_constant_result
def _absorbed_cost(device: str, kind: str) -> tuple[float, ...] | None:
    table = _tables().get(device)
    cost = None if table is None else table.absorbed.get(kind)
    return None if cost is None else tuple(cost)


def _nearest(size: int, axis: Iterable[int]) -> int:
    """In whole numbers only, so that torch.compile can trace it with a size that it keeps symbolic."""
    chosen = None
    for value in axis:
        if chosen is None or size * size > chosen * value:
            chosen = value
    assert chosen is not None
    return chosen


def _computing_dtype(x: Tensor) -> str:
    """The dtype that attention over `x` runs in, or the one of those measured whose paths rank alike."""
    wanted = None if x.dtype == torch.float64 else autocast_dtype(x.device.type)
    dtype = wanted or x.dtype
    if dtype == torch.float16:
        return "bfloat16" if x.device.type == "cuda" else "float32"  # CPUs compute float16 in float32
    return "float32" if dtype == torch.float64 else str(dtype).removeprefix("torch.")


def _records(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def read_crossovers(text: str) -> dict[str, Crossovers]:
    """Measurements by device, from the text of a file.

    Raises:
        ValueError: if the text is not of the known format.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"crossovers are JSON, and this is not: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "attngen-crossovers" or content.get("version") != 1:
        raise ValueError('crossovers begin with "format": "attngen-crossovers", "version": 1')
    return {device: Crossovers(part) for device, part in content.get("devices", {}).items()}


_loaded: dict[str, dict[str, Crossovers]] = {}


def _tables() -> dict[str, Crossovers]:
    path = os.environ.get(_TABLE_ENVIRONMENT, "")
    if path not in _loaded:
        _loaded[path] = _read_tables(path)
    return _loaded[path]


def _read_tables(path: str) -> dict[str, Crossovers]:
    if not path:
        return read_crossovers(resources.files("attngen.kernels").joinpath("crossovers.json").read_text("utf-8"))
    try:
        return read_crossovers(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the measurements in {path} ({_TABLE_ENVIRONMENT}): {error}") from error


_AGENT_PATHS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.agent_attention,
    "sdpa": sdpa.agent_attention,
    "matmul": matmul.agent_attention,
    "triton": triton_agent.agent_attention,
}
