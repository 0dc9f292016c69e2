"""Measurements of the kernels that compute the same formula, by device, kind of call and sizes."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attngen.kernels.machine import device_name

TOLERANCE = 0.98
"""A kernel with less than this share of softmax attention's speed counts as slower than it."""

GAIN = 1.03
"""A kernel that was measured here is worth its error where it is this many times as fast as softmax attention."""


class Choice(NamedTuple):
    """A kernel and its measured speed.

    Attributes:
        kernel: its name.
        speedup: how many times faster than the best softmax attention, or None where that was not measured.
        reason: why the kernel that was asked for does not run, or None.
        here: whether it was measured on this machine, at these sizes.
    """

    kernel: str
    speedup: float | None = None
    reason: str | None = None
    here: bool = False

    @property
    def is_slower(self) -> bool:
        """Whether softmax attention was measured to be faster."""
        return self.speedup is not None and self.speedup < TOLERANCE

    @property
    def is_in_vain(self) -> bool:
        """Whether softmax attention is as fast here."""
        return self.here and self.speedup is not None and self.speedup < GAIN


class AbsorbedCost(NamedTuple):
    """Cost of the absorbed kernel's multiply-adds, in units of full projections'; see `attngen.kernels.absorbed`.

    Attributes:
        narrow: of the products with as many columns as all agents together.
        own: of the agents' own projections.
        kept: of the projections that stay.
    """

    narrow: float = 1.25
    own: float = 3.0
    kept: float = 1.0


class AbsorbedSize(NamedTuple):
    """Sizes that decide whether absorbing a layer's projections pays.

    Attributes:
        num_agents: M.
        head_dim: D.
        num_heads: H.
        channels: C.
        tokens: N, of one sample.
        kept_projections: products of all tokens by C × C weights that stay: 1 with a shortcut or a convolution of the
            input, 2 with one of the values.
    """

    num_agents: int
    head_dim: int
    num_heads: int
    channels: int
    tokens: int
    kept_projections: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the absorbed layer for one sample, two a multiply-add."""
        channels, width, tokens = self.channels, self.num_heads * self.head_dim, self.tokens
        kept = self.kept_projections * tokens * width * channels
        if self.kept_projections == 1:  # through W_v and W_o: one after the other, or their product made first
            kept = min(2 * kept, channels * width * channels + tokens * channels * channels)
        narrow, own = 4 * self.num_agents * self.num_heads * tokens * channels, 5 * self.num_agents * channels * width
        return 2 * (narrow + own + kept)

    def gain(self, cost: AbsorbedCost) -> float:
        """How many times faster the absorbed layer is than projections and agent attention, estimated.

        Compares multiply-adds a token, weighted as they were measured. That is about M < 0.8 · D for many tokens.
        """
        width = self.num_heads * self.head_dim
        direct = 4 * width * (self.channels + self.num_agents)
        narrow = 4 * self.num_agents * self.num_heads * self.channels
        own = 5 * self.num_agents * self.channels * width / self.tokens
        kept = self.kept_projections * self.channels * width
        return direct / (cost.narrow * narrow + cost.own * own + cost.kept * kept)


class Crossovers:
    """Measurements of one device: for each kind of call, the fastest kernel on a grid of sizes.

    Between the measured sizes the nearest one counts, on a logarithmic scale, axis by axis.

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
        """The fastest kernel at a point of the grid, or None where nothing was measured there."""
        return self._cells[kind].get(sizes)


def call_kind(method: str, dtype: str, training: bool, bias: bool = False) -> str:
    """Key of the measurements of calls, such as "agent float32 forward plain"."""
    return f"{method} {layer_kind(dtype, training)} {'bias' if bias else 'plain'}"


def layer_kind(dtype: str, training: bool) -> str:
    """Key of the measurements of whole layers, such as "float32 forward"."""
    return f"{dtype} {'training' if training else 'forward'}"


def device_key(device: torch.device) -> str:
    """Key of the measurements of a device: "cpu", or the capability of a CUDA device, such as "cuda-9.0"."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type
    return _capability(device.index)


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda-{major}.{minor}"


@torch.compiler.assume_constant_result
def is_known(device: torch.device) -> bool:
    """Whether the measurements of its kind are of this very device; a capability is one of CUDA devices alike."""
    table = _tables().get(device_key(device))
    if table is None:
        return False
    named = table.machine.get("device")
    return device.type == "cuda" or named is None or named == device_name(device)


@torch.compiler.assume_constant_result
def axes(device: str, kind: str) -> tuple[tuple[int, ...], ...]:
    """The sizes measured on a device for a kind of call. Constants for torch.compile, as the others."""
    table = _tables().get(device)
    return () if table is None else table.axes(kind)


@torch.compiler.assume_constant_result
def cell(device: str, kind: str, *sizes: int) -> tuple[str, float | None] | None:
    """The fastest kernel at a measured point and its speedup, or None."""
    choice = _tables()[device].cell(kind, sizes)
    return None if choice is None else (choice.kernel, choice.speedup)


@torch.compiler.assume_constant_result
def absorbed_cost(device: str, kind: str) -> tuple[float, ...] | None:
    """The fields of the `AbsorbedCost` measured on a device for a kind of layer, or None."""
    table = _tables().get(device)
    cost = None if table is None else table.absorbed.get(kind)
    return None if cost is None else tuple(cost)


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


_in_force: dict[str, dict[str, Crossovers]] = {}


def use_crossovers(path: Path | None) -> None:
    """Choose kernels in this process by the measurements in a file, not those that ship; None restores the latter.

    Raises:
        ValueError: if the file cannot be read, naming it.
    """
    _in_force.clear()
    if path is None:
        return
    try:
        _in_force["tables"] = read_crossovers(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the measurements in {path}: {error}") from error


def _tables() -> dict[str, Crossovers]:
    if "tables" not in _in_force:
        shipped = resources.files("attngen.kernels").joinpath("crossovers.json")
        _in_force["tables"] = read_crossovers(shipped.read_text("utf-8"))
    return _in_force["tables"]
