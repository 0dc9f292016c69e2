"""What an attention method is to the programs: its name, its options and their limits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.cli import UserError
from pipelines.schedules import Part, counts_text, parse_counts

MAX_PLAN_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        name: key in a method's options.
        label: for people.
        kind: "counts" (see `parse_counts`), "whole", "number", "choice" or "plan".
        default: value where none is given.
        low: smallest value, or count.
        high: largest value.
        step: of a slider.
        choices: of a "choice".
        about: one sentence.
    """

    name: str
    label: str
    kind: str
    default: Any
    low: float = 0
    high: float = 1
    step: float = 0.05
    choices: tuple[str, ...] = ()
    about: str = ""

    def checked(self, value: Any) -> Any:
        """The value in its own type.

        Raises:
            UserError: naming the option and what it takes.
        """
        if self.kind == "counts":
            return counts_text(*parse_counts(self.label, value, int(self.low)))
        if self.kind == "choice":
            if value not in self.choices:
                raise UserError(f"{self.label}: unknown {short(value)}; known: {', '.join(self.choices)}")
            return value
        if self.kind == "plan":
            return checked_plan(value)
        return self._checked_number(value)

    def _checked_number(self, value: Any) -> float | int:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = float(value)
            if not math.isfinite(number) or not self.low <= number <= self.high:
                raise ValueError
            if self.kind == "whole" and number != int(number):
                raise ValueError
        except (TypeError, ValueError):
            what = "a whole number" if self.kind == "whole" else "a number"
            raise UserError(f"{self.label}: {short(value)} is not {what} from {self.low:g} to {self.high:g}") from None
        return int(number) if self.kind == "whole" else number


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
    """

    name: str
    title: str
    about: str
    options: tuple[Option, ...] = ()
    plan: Callable[[Mapping[str, Any]], Any] | None = None
    parts: Callable[[Mapping[str, Any]], list[Part]] | None = None

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


def checked_plan(value: Any) -> dict[str, Any]:
    """A plan, given as a JSON text or object, as an object.

    Raises:
        UserError: if it is no plan, with the reason.
    """
    from attngen import Plan

    text = value if isinstance(value, str) else json.dumps(value)
    if not text.strip() or value is None:
        raise UserError("the method 'plan' needs a plan: the text of a file that attngen.Plan.save wrote")
    if len(text) > MAX_PLAN_CHARACTERS:
        raise UserError(f"a plan has at most {MAX_PLAN_CHARACTERS} characters, got {len(text)}")
    try:
        return Plan.from_json(text).to_dict()
    except ValueError as error:
        raise UserError(f"the plan cannot be used: {error}") from error


def short(value: Any) -> str:
    """What was given, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
