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
from attngen.hub import fetch, is_hub_id
from attngen.measurements import Measurements
from attngen.methods import AttentionMethod, SoftmaxAttention, method_from_dict
from attngen.schedule import check_starts

FORMAT, VERSION = "attngen-plan", 1
_ENTRIES = ("format", "version", "model", "stages", "min_tokens", "max_levels", "measurements")


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
class PlanModel:
    """The model that a plan was found for.

    Attributes:
        model_class: name of its class.
        config_hash: of its configuration, see `attngen.learned.file.config_hash`.
    """

    model_class: str
    config_hash: str

    def __post_init__(self) -> None:
        for name, value in (("class", self.model_class), ("config_hash", self.config_hash)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"the {name} of a plan's model must be a text, got {value!r}")

    def why_not(self, model_class: str, config_hash: str) -> str | None:
        """Why a plan found for this model does not hold for another, or None where it does."""
        if model_class != self.model_class:
            return f"was found for a {self.model_class}, and this is a {model_class}"
        if config_hash != self.config_hash:
            mine, other = self.config_hash[:8], config_hash[:8]
            return f"was found for a {model_class} of another configuration ({mine}, and this one is {other})"
        return None


@dataclass(frozen=True)
class Plan:
    """Stages by time, layer patterns in each: the same form for presets, recipes of papers and hand-written plans.

    Attributes:
        stages: by falling start; the first starts at 1.
        min_tokens: layers with fewer tokens stay exact.
        max_levels: only layers at the model's finest attention resolutions take part, this many of them; None for all.
            1 is what token-merging tools call a maximal downsampling of 1, but counted from the finest level that has
            attention, so it also means something for SDXL.
        model: that the plan was found for; `attngen.apply` refuses it for another one. None fits every model, and
            `dataclasses.replace(plan, model=None)` applies a plan to another model all the same.
        measurements: of `attngen.calibrate`, or None for a plan written by hand. Plans are compared without them.

    Raises:
        ValueError: for stages that do not fall from 1, or sizes below 0 and 1.
    """

    stages: tuple[Stage, ...]
    min_tokens: int = 0
    max_levels: int | None = None
    model: PlanModel | None = None
    measurements: Measurements | None = field(default=None, compare=False, repr=False)

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
        """The plan as JSON values, with a format name and version; without what it does not have."""
        stages = [
            {"start": stage.start, "layers": {pattern: m.to_dict() for pattern, m in stage.layers.items()}}
            for stage in self.stages
        ]
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        if self.model is not None:
            content["model"] = {"class": self.model.model_class, "config_hash": self.model.config_hash}
        content |= {"stages": stages, "min_tokens": self.min_tokens, "max_levels": self.max_levels}
        if self.measurements is not None:
            content["measurements"] = self.measurements.to_dict()
        return content

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
        unknown = set(content) - set(_ENTRIES)
        if unknown:
            raise ValueError(f"a plan has no entry {sorted(map(str, unknown))[0]!r}")
        if not isinstance(content.get("stages"), list):
            raise ValueError('a plan needs a list of "stages"')
        measured = content.get("measurements")
        return cls(
            tuple(_stage_from_dict(stage) for stage in content["stages"]),
            min_tokens=content.get("min_tokens", 0),
            max_levels=content.get("max_levels"),
            model=_model_from_dict(content.get("model")),
            measurements=None if measured is None else Measurements.from_dict(measured),
        )

    def to_json(self) -> str:
        """The plan as JSON: a line an entry, and its measurements, if it has them, in one."""
        content = self.to_dict()
        measured = content.pop("measurements", None)
        text = json.dumps(content, indent=2)
        return text if measured is None else f'{text[:-2]},\n  "measurements": {json.dumps(measured)}\n}}'

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote; raises ValueError with the reason for any other text."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"this is not JSON: {error}") from error
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan and its measurements as JSON; an older file of that name stays until the new one is whole."""
        write_file(Path(path), (self.to_json() + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.

        Args:
            path: of the file; or OWNER/NAME of a repository on the Hugging Face Hub that has a plan.json, or
                OWNER/NAME:FILE.json.

        Raises:
            ValueError: naming the file, if it is missing, cannot be fetched, or is not a plan.
        """
        name = os.fspath(path)
        file = fetch(name) if is_hub_id(name) else Path(path)
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the plan file {name}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _model_from_dict(data: Any) -> PlanModel | None:
    if data is None:
        return None
    content = as_mapping(data)
    if content is None or set(content) != {"class", "config_hash"}:
        raise ValueError(f'the "model" of a plan has a "class" and a "config_hash", got {data!r}')
    return PlanModel(content["class"], content["config_hash"])


def _stage_from_dict(data: Any) -> Stage:
    content = as_mapping(data)
    layers = None if content is None else as_mapping(content.get("layers"))
    if content is None or layers is None or set(content) != {"start", "layers"}:
        raise ValueError(f'a stage has a "start" and "layers", got {data!r}')
    return Stage(content["start"], {pattern: method_from_dict(method) for pattern, method in layers.items()})
