"""Speeds measured where attention runs: once a shape, kept for later processes in the user's cache.

They answer for devices and sizes that no committed table knows. Nothing is measured in a traced graph, in the capture
of a CUDA graph, or under a dispatch mode; what was measured before then counts there too. No failure of it ends a call:
the caller is left without a measurement.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attngen.files import write_file
from attngen.kernels import clock
from attngen.kernels.candidates import ABSORBED, PROJECTIONS, SOFTMAX, Candidate, Shape, candidates
from attngen.kernels.crossovers import Choice
from attngen.kernels.machine import environment

Seconds = dict[str, float]
"""Of one call, by candidate."""

Key = tuple[torch.device, Shape]


class Choices(NamedTuple):
    """The fastest kernel of a shape; None where that could not be measured.

    Attributes:
        eager: of calls that the host launches.
        graph: of replays of a CUDA graph.
    """

    eager: Choice | None = None
    graph: Choice | None = None


SECONDS_A_SHAPE = 0.2
"""After which no further round of a shape is measured."""

SWITCH = "ATTNGEN_MEASURE"
"""Environment variable that turns measuring off where it is 0."""

_logger = logging.getLogger(__name__)
_lock = threading.RLock()
_known: dict[Key, Choices] = {}
_captured: set[Key] = set()
_said: set[str] = set()
version = "0"
"""Changes with every new measurement. Traced code reads it, so that a compiler traces again what was traced without."""


def find(shape: Shape, device: torch.device, otherwise: Callable[[], Choice]) -> Choice:
    """The fastest kernel for calls like these, measured now where it is not known; else that of `otherwise`.

    As a CUDA graph where the call is captured, or was before, else eagerly. Whether the kernel is faster than softmax
    attention is a matter of eager calls, so that a capture computes what its warm-up has computed.
    """
    if torch.compiler.is_compiling():
        return _traced(shape, str(device), version) or otherwise()
    if device.type not in ("cpu", "cuda") or os.environ.get(SWITCH) == "0":
        return otherwise()
    key = device, shape
    captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    choices = _known.get(key)
    if choices is None:
        may_measure = not captures and torch._C._len_torch_dispatch_stack() == 0
        choices = _learn(key, may_measure, otherwise)
    if captures:
        _captured.add(key)
    if choices.graph is not None and key in _captured:
        return choices.graph
    return choices.eager or otherwise()


def choice_of(seconds: Seconds) -> Choice:
    """The fastest kernel, of a layer with its projections where they were measured, and its speed over softmax."""
    kernels = [name for name in seconds if name not in (SOFTMAX, PROJECTIONS, ABSORBED)]
    fastest = min(kernels, key=seconds.__getitem__)
    choice = Choice(fastest, seconds[SOFTMAX] / seconds[fastest], here=True)
    beside = seconds.get(PROJECTIONS, 0.0)
    if seconds.get(ABSORBED, math.inf) >= beside + seconds[fastest]:
        return choice
    return Choice(ABSORBED, (beside + seconds[SOFTMAX]) / seconds[ABSORBED], here=True)


def _learn(key: Key, may_measure: bool, otherwise: Callable[[], Choice]) -> Choices:
    """From the cache, or by measuring; without any choice where neither is possible."""
    global version
    device, shape = key
    with _lock:
        if key in _known:
            return _known[key]
        path = _path(shape, environment(device))
        found = _read(path, shape)
        if found is None and may_measure:
            _say_once(path)
            found = _measured(shape, device)
            _write(path, shape, device, found)
        if found is None:
            return Choices()
        choices = _choices(found)
        _known[key] = choices
        if choices.eager is not None and _differ(choices.eager, otherwise()):
            version = str(int(version) + 1)
        return choices


def _choices(found: dict[str, Seconds]) -> Choices:
    if "eager" not in found:
        return Choices()
    eager = choice_of(found["eager"])
    return Choices(eager, choice_of(found["graph"])._replace(speedup=eager.speedup) if "graph" in found else None)


def _differ(choice: Choice, other: Choice) -> bool:
    """Whether other code runs."""
    return choice.kernel != other.kernel or choice.is_in_vain != other.is_in_vain


def _measured(shape: Shape, device: torch.device) -> dict[str, Seconds]:
    """Seconds by mode; empty where it failed, so that it is not tried again in this process."""
    try:
        with torch.autocast(device.type, enabled=False), torch.inference_mode(False):
            ways = candidates(shape, device)
            found = {"eager": _timed(ways, device, ways)}
            if device.type == "cuda":
                found["graph"] = _timed(ways, device, clock.as_graphs(ways, device))
    except Exception as error:
        _logger.debug("attngen could not measure %s: %r", shape, error)
        return {}
    whole = {mode: seconds for mode, seconds in found.items() if _is_whole(seconds)}
    return whole if "eager" in whole else {}


def _timed(ways: Mapping[str, Candidate], device: torch.device, calls: Mapping[str, Callable[[], object]]) -> Seconds:
    return {name: t / ways[name].share for name, t in clock.in_turn(calls, device, SECONDS_A_SHAPE).items()}


def _is_whole(seconds: Seconds) -> bool:
    """Whether softmax attention and a kernel were measured."""
    return SOFTMAX in seconds and bool(seconds.keys() - {SOFTMAX, PROJECTIONS, ABSORBED})


@torch.compiler.assume_constant_result
def is_shared_job() -> bool:
    """Whether several processes compute together: what is exact must be the same in all, and they measure apart."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


# In traced code


def _traced(shape: Shape, device: str, version: str) -> Choice | None:
    """What is known by now, by comparisons of sizes that a compiler can keep symbolic."""
    settings, sizes = (shape.method, shape.dtype, *shape[8:11]), (*shape[2:8], *shape[11:])
    for known, kernel, speedup in _constants(device, settings, version):
        if all(a == b for a, b in zip(sizes, known, strict=True)):
            return Choice(kernel, speedup, here=True)
    return None


@torch.compiler.assume_constant_result
def _constants(device: str, settings: tuple[Any, ...], version: str) -> tuple[tuple[tuple[int, ...], str, float], ...]:
    """Sizes, kernel and speedup of all that is known."""
    found: list[tuple[tuple[int, ...], str, float]] = []
    for (known, shape), (choice, _) in _known.items():
        if str(known) == device and (shape.method, shape.dtype, *shape[8:11]) == settings and choice is not None:
            assert choice.speedup is not None
            found.append(((*shape[2:8], *shape[11:]), choice.kernel, choice.speedup))
    return tuple(found)


# In the cache


def folder() -> Path:
    """Where measurements are kept: in torch's cache, which TORCH_HOME and XDG_CACHE_HOME move."""
    return Path(torch.hub.get_dir()) / "attngen"


def _path(shape: Shape, around: dict[str, str]) -> Path:
    """The file of one shape: a process that measures another one writes another file."""
    digest = hashlib.sha256(json.dumps([shape, around]).encode()).hexdigest()
    return folder() / f"{digest[:24]}.json"


def _read(path: Path, shape: Shape) -> dict[str, Seconds] | None:
    """What a file holds, or None where it is not there or not a measurement of this shape."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["shape"] != shape._asdict():
            return None
        found = {
            str(mode): {str(name): float(seconds) for name, seconds in by_name.items()}
            for mode, by_name in content["seconds"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    numbers = [seconds for by_name in found.values() for seconds in by_name.values()]
    whole = "eager" in found and all(_is_whole(by_name) for by_name in found.values())
    return found if whole and all(0 < seconds < math.inf for seconds in numbers) else None


def _write(path: Path, shape: Shape, device: torch.device, found: dict[str, Seconds]) -> None:
    if not found:
        return
    content = {"shape": shape._asdict(), "environment": environment(device), "seconds": found}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        _logger.debug("attngen could not keep a measurement: %s", error)


def _say_once(path: Path) -> None:
    if "measuring" not in _said:
        _said.add("measuring")
        _logger.warning(
            "attngen measures once which attention kernel is fastest at each shape here; the times are kept in %s "
            "(kernel='table' chooses without measuring)",
            path.parent,
        )
