"""What an attention method is to the programs: its name, its options and their limits. Nothing heavy is imported."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cli import UserError
from pipelines.methods.counts import Part, counts_text, parse_counts

if TYPE_CHECKING:
    from attngen import Plan

UNCHANGED = "none"
MEDIATORS = "mediators"
PLAN = "plan"
NONE = "none"  # how None is typed
MAX_PLAN_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        name: key in a method's options; the field's name where it is one of attngen's.
        kind: "counts" (see `parse_counts`), "count" (whole number), "number", "choice", "flag" or "plan".
        default: value where none is given.
        about: one line.
        low: smallest value, or count.
        high: largest value.
        step: of a slider.
        choices: of a "choice".
        optional: whether None is a value.
    """

    name: str
    kind: str
    default: Any
    about: str = ""
    low: float = 0
    high: float = 1
    step: float = 1
    choices: tuple[str | None, ...] = ()
    optional: bool = False

    @property
    def label(self) -> str:
        """The name as words."""
        return self.name.replace("_", " ").capitalize()

    @property
    def limits(self) -> str:
        """The values that it takes, in a few characters."""
        if self.kind == "choice":
            return " or ".join(plain(choice) for choice in self.choices)
        if self.kind in ("flag", "plan"):
            return {"flag": "true or false", "plan": "JSON"}[self.kind]
        return f"{self.low:,.10g} to {self.high:,.10g}" + (" or none" if self.optional else "")

    def checked(self, value: Any) -> Any:
        """The value in its own type.

        Raises:
            UserError: naming the option and what it takes.
        """
        if self.optional and value in (None, NONE):
            return None
        if self.kind == "counts":
            return counts_text(*parse_counts(self.name, value, int(self.low), int(self.high)))
        if self.kind == "choice":
            if value not in self.choices:
                raise UserError(f"{self.name}: unknown {short(value)}; known: {', '.join(map(plain, self.choices))}")
            return value
        if self.kind == "plan":
            return checked_plan(value)
        if self.kind == "flag":
            return self._checked_flag(value)
        return self._checked_number(value)

    def _checked_flag(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        known = {"true": True, "false": False}
        if not isinstance(value, str) or value.lower() not in known:
            raise UserError(f"{self.name}: {short(value)} is neither true nor false")
        return known[value.lower()]

    def _checked_number(self, value: Any) -> float | int:
        whole = self.kind == "count"
        try:
            if isinstance(value, bool):
                raise TypeError
            number = float(value)
            if not math.isfinite(number) or not self.low <= number <= self.high or (whole and number != int(number)):
                raise ValueError
        except (TypeError, ValueError):
            what = "a whole number" if whole else "a number"
            raise UserError(f"{self.name}: {short(value)} is not {what} from {self.limits}") from None
        return int(number) if whole else number


def min_tokens(default: int) -> Option:
    """The option that every preset has from its plan, not from its method."""
    return Option("min_tokens", "count", default, "layers with fewer tokens stay exact", 0, 1 << 20, 64)


@dataclass(frozen=True)
class MethodInfo:
    """A method as it is offered.

    Attributes:
        name: key; that of `attngen.PRESETS` where it is one of its presets.
        title: for people.
        about: one sentence.
        options: in the order of the page.
        plan: checked options -> what `attngen.apply` takes; None for a method that patches nothing.
        parts: checked options -> what it does when, for the picture.
        source: of the formula, such as "arXiv 2312.08874", or "".
        is_usual: whether it is worth trying on any model, without training.
    """

    name: str
    title: str
    about: str
    options: tuple[Option, ...] = ()
    plan: Callable[[Mapping[str, Any]], Plan] | None = None
    parts: Callable[[Mapping[str, Any]], list[Part]] | None = None
    source: str = ""
    is_usual: bool = False

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options, checked, defaults filled in.

        Raises:
            UserError: for an unknown option or a bad value.
        """
        known = {option.name: option for option in self.options}
        for name in options:
            if name not in known:
                has = ", ".join(known) or "none"
                raise UserError(f"method {self.name!r} has no option {short(name)}; it has: {has}")
        return {name: option.checked(options.get(name, option.default)) for name, option in known.items()}


def preset_names() -> list[str]:
    """Names in `attngen.PRESETS`, read from the source: importing attngen takes seconds, which no --help should."""
    spec = importlib.util.find_spec("attngen")
    assert spec is not None and spec.submodule_search_locations is not None
    package = Path(next(iter(spec.submodule_search_locations)))
    declared = [(file, "presets") for file in sorted((package / "methods").glob("*.py"))]
    found: list[str] = []
    for file, variable in (*declared, (package / "presets.py", "RECIPES")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
                if getattr(node.target, "id", None) == variable:
                    found += [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    return found


def method_help(*others: str) -> str:
    """Help of an argument that is a preset, a plan file or one of `others`."""
    names = f"{', '.join(preset_names())} (see python -m pipelines.methods)"
    return ", ".join([names, *others, "or a plan file (.json)"])


def checked_plan(value: Any) -> dict[str, Any]:
    """A plan, given as a JSON text or object, as an object without measurements.

    Raises:
        UserError: if it is no plan, with the reason.
    """
    from attngen import Plan

    text = value if isinstance(value, str) else json.dumps(value)
    if not text.strip() or value is None:
        raise UserError("the method 'plan' needs a plan: the text of a file written by attngen.Plan.save")
    if len(text) > MAX_PLAN_CHARACTERS:
        raise UserError(f"a plan has at most {MAX_PLAN_CHARACTERS} characters, got {len(text)}")
    try:
        return replace(Plan.from_json(text), measurements=None).to_dict()
    except ValueError as error:
        raise UserError(f"the plan cannot be used: {error}") from error


def plain(value: Any) -> str:
    """A value as it is typed."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def short(value: Any) -> str:
    """What was given, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
