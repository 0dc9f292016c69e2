"""`Trace`: counts of what really ran, by layer and stage, as text and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from torch import nn

from attngen.hosts.hooks import patched_layers, root_hook
from attngen.hosts.spec import spec_of
from attngen.layers.route import EXACT
from attngen.layers.trace import COUNTS, Counts, Noted
from attngen.tables import pattern, table


@dataclass(frozen=True)
class TraceRow:
    """What a layer ran in a stage.

    Attributes:
        model: component of the pipeline, "" for a bare model.
        layer: module name.
        start: time from which the stage holds, 1 is noise.
        calls: how often; None where the layer ran in compiled code, which does not count.
        kernel: what computed it: "exact", a path of attngen, or an attention backend.
        agents: number of agents, or None.
        why: why it was exact, or None.
        references: what reduced the keys of reference images, or None.
    """

    model: str
    layer: str
    start: float
    calls: int | None
    kernel: str
    agents: int | None
    why: str | None
    references: str | None = None

    def __str__(self) -> str:
        reduced = "" if self.references is None else f", references {self.references}"
        if self.kernel == EXACT:
            return f"exact: {self.why}{reduced}"
        return f"{self.kernel}{'' if self.agents is None else f' ({self.agents} agents)'}{reduced}"


class Trace:
    """Counts calls from `handle.trace()` on, until `stop`; also a context manager that stops at its end.

    Args:
        models: the patched models, by component.
        patch_id: of the patch.
    """

    def __init__(self, models: Mapping[str, nn.Module], patch_id: str) -> None:
        self._models = dict(models)
        self._keys = {name: f"{patch_id} {name}" for name in models}
        # Counts outlive the patch.
        self._groups: dict[str, dict[str, str]] = {}
        self._starts: dict[str, tuple[float, ...]] = {}
        for name, model in self._models.items():
            self._counts(name).clear()
            specs = {layer: spec_of(attn) for layer, attn in patched_layers(model).items()}
            self._groups[name] = {layer: spec.group for layer, spec in specs.items() if spec is not None}
            hook = root_hook(model)
            self._starts[name] = () if hook is None else hook.starts
            if hook is not None:
                hook.trace = self._keys[name]

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether calls are still counted."""
        hooks = {name: root_hook(model) for name, model in self._models.items()}
        return any(hook is not None and hook.trace == self._keys[name] for name, hook in hooks.items())

    def stop(self) -> None:
        """Count no further calls; what was counted stays."""
        for name, model in self._models.items():
            hook = root_hook(model)
            if hook is not None and hook.trace == self._keys[name]:
                hook.trace = None

    @property
    def calls(self) -> dict[str, int]:
        """Calls of each model, by component."""
        return {name: sum(self._counts(name).calls.values()) for name in self._models}

    @property
    def rows(self) -> list[TraceRow]:
        """What each layer ran, in the order of the models, their layers and the stages."""
        return [row for name in self._models for row in self._rows_of(name)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"calls": self.calls, "layers": [asdict(row) for row in self.rows]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A table with one line for each group of layers that ran the same as often."""
        calls = ", ".join(f"{name or 'model'}: {count} calls" for name, count in self.calls.items())
        groups: dict[Any, list[TraceRow]] = {}
        for row in self.rows:
            groups.setdefault((row.model, row.start, row.calls, str(row)), []).append(row)
        rows = [
            (
                pattern([".".join(p for p in (row.model, row.layer) if p) for row in group]),
                str(len(group)),
                f"{group[0].start:g}",
                "compiled" if group[0].calls is None else str(group[0].calls),
                str(group[0]),
            )
            for group in groups.values()
        ]
        return "\n".join([calls, *table(("layers", "number", "from", "calls", "what ran"), rows)])

    def _counts(self, name: str) -> Counts:
        return COUNTS.setdefault(self._keys[name], Counts())

    def _rows_of(self, component: str) -> list[TraceRow]:
        counts, starts = self._counts(component), self._starts[component]
        rows = []
        for layer, group in self._groups[component].items():
            found = [(noted, number) for noted, number in counts.eager.items() if noted.layer == layer]
            if not found:
                ran = [noted for noted in counts.compiled if noted.layer == group and counts.calls[noted.stage]]
                found = [(noted, None) for noted in ran]
            found.sort(key=lambda entry: (int(entry[0].stage), entry[0].kernel))
            rows += [_row(component, layer, starts, noted, number) for noted, number in found]
        return rows


def _row(component: str, layer: str, starts: tuple[float, ...], noted: Noted, calls: int | None) -> TraceRow:
    agents = int(noted.agents) if noted.agents else None
    why, references = noted.why or None, noted.references or None
    return TraceRow(component, layer, starts[int(noted.stage)], calls, noted.kernel, agents, why, references)
