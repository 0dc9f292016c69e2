"""A plan assigns an attention method to each layer at each time; it is data: printable, comparable, saved as JSON."""

# pyright: reportUnnecessaryIsInstance=false
# Arguments are checked at run time, for callers without types.

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attngen.checks import as_mapping, check_count
from attngen.files import write_file
from attngen.methods import AttentionMethod, SoftmaxAttention, method_from_dict
from attngen.schedule import check_starts

FORMAT, VERSION = "attngen-plan", 1


@dataclass(frozen=True, eq=True)
class Stage:
    """The methods that hold from a time on, until the next stage starts.

    Attributes:
        start: time in [0, 1], 1 is noise.
        layers: pattern of module names (fnmatch) -> method. The first pattern that matches a layer decides; a layer
            that none matches stays exact.
    """

    start: float = 1.0
    layers: Mapping[str, AttentionMethod] = field(default_factory=dict[str, AttentionMethod])

    def __post_init__(self) -> None:
        if isinstance(self.start, bool) or not isinstance(self.start, (int, float)) or not 0 <= self.start <= 1:
            raise ValueError(f"a stage starts at a time in [0, 1], got {self.start!r}")
        object.__setattr__(self, "start", float(self.start))
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"layers must map patterns of layer names to methods, got {self.layers!r}")
        for pattern, method in self.layers.items():
            if not isinstance(pattern, str) or not isinstance(method, AttentionMethod):
                raise ValueError(f"layers must map patterns of layer names to methods, got {pattern!r}: {method!r}")
        object.__setattr__(self, "layers", dict(self.layers))

    def __hash__(self) -> int:
        return hash((self.start, tuple(self.layers.items())))

    def __eq__(self, other: object) -> bool:
        # The order of the patterns decides, so it counts.
        if not isinstance(other, Stage):
            return NotImplemented
        return self.start == other.start and list(self.layers.items()) == list(other.layers.items())

    def method_for(self, layer: str) -> AttentionMethod:
        """The method of a layer by its module name."""
        for pattern, method in self.layers.items():
            if fnmatchcase(layer, pattern):
                return method
        return SoftmaxAttention()


@dataclass(frozen=True)
class Plan:
    """Stages by time, layer patterns in each: the same form for presets, recipes of papers and hand-written plans.

    Attributes:
        stages: by falling start; the first starts at 1.
        min_tokens: layers with fewer tokens stay exact.
        max_levels: only layers at the model's finest attention resolutions take part, this many of them; None for all.
            1 is what token-merging tools call a maximal downsampling of 1, but counted from the finest level that has
            attention, so it also means something for SDXL.
        measurements: of `attngen.calibrate`, an `attngen.calibration.Measurements`; None for a plan written by hand or
            read from a file. Plans are compared without them.

    Raises:
        ValueError: for stages that do not fall from 1, or sizes below 0 and 1.
    """

    stages: tuple[Stage, ...]
    min_tokens: int = 0
    max_levels: int | None = None
    measurements: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.stages, (tuple, list)):
            raise ValueError(f"stages must be a tuple of Stage objects, got {self.stages!r}")
        object.__setattr__(self, "stages", tuple(self.stages))
        if not all(isinstance(stage, Stage) for stage in self.stages):
            raise ValueError(f"stages must be Stage objects, got {self.stages!r}")
        check_starts(self.starts)
        check_count("min_tokens", self.min_tokens, at_least=0)
        if self.max_levels is not None:
            check_count("max_levels", self.max_levels)

    @classmethod
    def of(cls, method: AttentionMethod, **options: Any) -> Plan:
        """One method for every layer at all times."""
        return cls((Stage(1.0, {"*": method}),), **options)

    @property
    def starts(self) -> tuple[float, ...]:
        return tuple(stage.start for stage in self.stages)

    def methods_for(self, layer: str) -> tuple[AttentionMethod, ...]:
        """The method of a layer in each stage."""
        return tuple(stage.method_for(layer) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, with a format name and version."""
        stages = [
            {"start": stage.start, "layers": {pattern: m.to_dict() for pattern, m in stage.layers.items()}}
            for stage in self.stages
        ]
        return {
            "format": FORMAT,
            "version": VERSION,
            "stages": stages,
            "min_tokens": self.min_tokens,
            "max_levels": self.max_levels,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The plan that `to_dict` wrote.

        Raises:
            ValueError: if it is something else, or of a newer version, or names an unknown method or option.
        """
        content = as_mapping(data)
        if content is None or content.get("format") != FORMAT:
            raise ValueError(f'this is not a plan: it has no "format": "{FORMAT}"')
        if content.get("version") != VERSION or isinstance(content["version"], bool):
            raise ValueError(f"plan version {content.get('version')!r} is not supported; this attngen reads {VERSION}")
        unknown = set(content) - {"format", "version", "stages", "min_tokens", "max_levels"}
        if unknown:
            raise ValueError(f"a plan has no entry {sorted(map(str, unknown))[0]!r}")
        if not isinstance(content.get("stages"), list):
            raise ValueError('a plan needs a list of "stages"')
        return cls(
            tuple(_stage_from_dict(stage) for stage in content["stages"]),
            min_tokens=content.get("min_tokens", 0),
            max_levels=content.get("max_levels"),
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote; raises ValueError with the reason for any other text."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"this is not JSON: {error}") from error
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; an older file of that name stays intact until the new one is complete.

        Measurements go into a second file, "plan.measurements.json" for "plan.json".
        """
        write_file(Path(path), (self.to_json() + "\n").encode())
        if self.measurements is not None:
            self.measurements.save(Path(path).with_suffix(".measurements.json"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.

        Raises:
            ValueError: naming the file, if it is missing or not a plan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the plan file {os.fspath(path)}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def _stage_from_dict(data: Any) -> Stage:
    content = as_mapping(data)
    layers = None if content is None else as_mapping(content.get("layers"))
    if content is None or layers is None or set(content) != {"start", "layers"}:
        raise ValueError(f'a stage has a "start" and "layers", got {data!r}')
    return Stage(content["start"], {pattern: method_from_dict(method) for pattern, method in layers.items()})
