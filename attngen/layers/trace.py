"""Counts of the routes that really ran, by layer and stage. Off, it costs a comparison with None a layer.

In compiled code a layer notes its route while it is traced, without a graph break; equal layers may share one graph, so
such a note belongs to a group of layers, and the calls are those of the model.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Results of some of torch's methods have no types.

from __future__ import annotations

import threading
from collections import Counter
from typing import NamedTuple

import torch

from attngen.layers.route import Route


class Noted(NamedTuple):
    """A route that ran in a layer.

    Attributes:
        layer: module name; in compiled code the group of equal layers.
        stage: index of the plan's stage, as text.
        kernel: see `Route`.
        agents: number of agents as text, "" for none.
        why: why it is exact, "" where it is not.
        references: what reduced the keys of reference images, "" for nothing.
    """

    layer: str
    stage: str
    kernel: str
    agents: str
    why: str
    references: str = ""


class Counts:
    """The counts of one model.

    Attributes:
        calls: of the model, by stage.
        eager: calls of layers.
        compiled: notes of compiled code, kept for as long as its graphs may be.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.eager: Counter[Noted] = Counter()
        self.compiled: set[Noted] = set()
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Start at zero; notes of compiled code stay, for a graph is traced once."""
        with self._lock:
            self.calls.clear()
            self.eager.clear()

    def call(self, stage: str) -> None:
        """Count a call of the model."""
        with self._lock:
            self.calls[stage] += 1

    def note(self, noted: Noted) -> None:
        """Count a call of a layer."""
        with self._lock:
            self.eager[noted] += 1


COUNTS: dict[str, Counts] = {}
"""By `Call.trace`, the key of a patched model."""


def note(trace: str, name: str, stage: str, route: Route, references: str = "") -> None:
    """Note the route of a layer.

    Args:
        trace: `Call.trace`.
        name: of the layer; in compiled code of the group of layers equal to it.
        stage: of the call.
        route: that runs.
        references: what reduces the keys of reference images, "" for nothing.
    """
    why = route.why if route.run is None and route.why is not None else ""
    agents = "" if route.agents is None else str(route.agents)
    if torch.compiler.is_compiling():
        _note_compiled(trace, name, stage, route.kernel, agents, why, references)
    else:
        COUNTS[trace].note(Noted(name, stage, route.kernel, agents, why, references))


@torch.compiler.assume_constant_result
def _note_compiled(trace: str, group: str, stage: str, kernel: str, agents: str, why: str, references: str) -> int:
    COUNTS[trace].compiled.add(Noted(group, stage, kernel, agents, why, references))
    return 0
