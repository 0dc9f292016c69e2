"""The attention methods that the programs offer: names, options with their limits, and what attngen gets of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.cli import UserError
from pipelines.schedules import Part, count_parts, counts_text, parse_counts

UNCHANGED = "none"
MEDIATORS = "mediators"
PLAN = "plan"
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
                raise UserError(f"{self.label}: unknown {_short(value)}; known: {', '.join(self.choices)}")
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
            raise UserError(f"{self.label}: {_short(value)} is not {what} from {self.low:g} to {self.high:g}") from None
        return int(number) if self.kind == "whole" else number


@dataclass(frozen=True)
class MethodInfo:
    """A method as it is offered.

    Attributes:
        name: key; that of `attngen.METHODS` where it is one of its presets.
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
                raise UserError(f"method {self.name!r} has no option {_short(name)}; it has: {has}")
        return {name: option.checked(options.get(name, option.default)) for name, option in known.items()}


class Use(NamedTuple):
    """A method with options, as one row of a comparison."""

    method: str = UNCHANGED
    options: Mapping[str, Any] = {}

    def checked(self) -> Use:
        """The same with every option.

        Raises:
            UserError: for an unknown method or option, or a bad value.
        """
        return Use(self.method, find_method(self.method).checked(self.options))

    @property
    def label(self) -> str:
        """A few words that tell it from other uses: the name, and the options that are not the default."""
        info = find_method(self.method)
        defaults = {option.name: option for option in info.options}
        told = [
            "" if name == PLAN else str(value) if defaults[name].kind == "counts" else f"{name} {_plain(value)}"
            for name, value in self.options.items()
            if name in defaults and value != defaults[name].default
        ]
        return " ".join([info.name if info.name != UNCHANGED else "unchanged", *filter(None, told)])

    @property
    def text(self) -> str:
        """The text that `parse_use` reads; only options that are not the default."""
        defaults = {option.name: option.default for option in find_method(self.method).options}
        options = [f"{name}={_plain(value)}" for name, value in self.options.items() if value != defaults.get(name)]
        return " ".join([self.method, *options])


def parse_use(typed: str) -> Use:
    """A checked use of a text: a method's name and its options, such as "agent agents=64 min_tokens=256".

    The first option may go without its name: "agent 64", "mediators 1:4,0.5:16".

    Raises:
        UserError: for an unknown method or option, or a bad value.
    """
    name, *words = typed.split()[:32] or [""]
    known = find_method(name).options
    options: dict[str, Any] = {}
    for i, word in enumerate(words):
        key, sign, value = word.partition("=")
        if not sign and i == 0 and known:
            key, value = known[0].name, word
        elif not sign:
            raise UserError(
                f"{typed[:60]!r}: write options as name=value, such as {name} {known[0].name}=…"
                if known
                else f"method {name!r} has no options, got {word[:60]!r}"
            )
        options[key] = value
    return Use(name, options).checked()


def find_method(name: Any) -> MethodInfo:
    """The method of that name.

    Raises:
        UserError: listing the known ones.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(f"unknown method {_short(name)}; known: {', '.join(METHODS)}")
    return METHODS[name]


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


def timeline(use: Use) -> list[Part]:
    """What a checked use does when, for `draw_parts`."""
    info = find_method(use.method)
    if info.parts is None:
        return [Part(1.0, info.title, exact=use.method in (UNCHANGED, "softmax"))]
    return info.parts(use.options)


# What attngen gets


def _agent_plan(options: Mapping[str, Any]) -> Any:
    from attngen import AgentAttention, Plan, SoftmaxAttention, Stage

    starts, counts = parse_counts("agents", options["agents"], 0)
    stages = [
        Stage(
            start,
            {
                "*": AgentAttention(count, options["broadcast_exponent"], options["shortcut"])
                if count
                else SoftmaxAttention()
            },
        )
        for start, count in zip(starts, counts, strict=True)
    ]
    return Plan(tuple(stages), min_tokens=options["min_tokens"])


def _agentsd_plan(options: Mapping[str, Any]) -> Any:
    from attngen import Plan, Stage, TokenMerging

    first = TokenMerging(ratio=options["ratio"], stride=4, agent_ratio=options["agent_ratio"])
    then = TokenMerging(ratio=options["ratio"], stride=2)
    if options["switch"] == 0:
        return Plan((Stage(1.0, {"*": first}),), max_levels=1)
    if options["switch"] == 1:
        return Plan((Stage(1.0, {"*": then}),), max_levels=1)
    return Plan((Stage(1.0, {"*": first}), Stage(options["switch"], {"*": then})), max_levels=1)


def _tome_plan(options: Mapping[str, Any]) -> Any:
    from attngen import Plan, TokenMerging

    return Plan.of(TokenMerging(ratio=options["ratio"], stride=options["stride"]), max_levels=1)


def _todo_plan(options: Mapping[str, Any]) -> Any:
    from attngen import DownsampledKV, Plan

    return Plan.of(DownsampledKV(factor=options["factor"]), max_levels=1)


def _linear_plan(options: Mapping[str, Any]) -> Any:
    from attngen import LinearAttention, Plan

    return Plan.of(LinearAttention(feature_map=options["feature_map"]), min_tokens=options["min_tokens"])


def _own_plan(options: Mapping[str, Any]) -> Any:
    from attngen import Plan

    return Plan.from_dict(options[PLAN])


def _softmax_plan(options: Mapping[str, Any]) -> Any:
    return "softmax"


def make_mediators(options: Mapping[str, Any]) -> Any:
    """What `SiTPipeline` takes as `num_mediators`: a count, or a schedule, anew for each picture."""
    from attngen import ChangeSchedule, Schedule

    starts, counts = parse_counts("mediators", options["mediators"])
    if len(counts) == 1:
        return counts[0]
    if options["follow"] == "change":
        ratios = [0.8 * 0.625**i for i in range(len(counts) - 1)]
        return ChangeSchedule(ratios=ratios, values=counts)
    return Schedule(starts=starts, values=counts)


# Pictures of what happens when


def _agent_parts(options: Mapping[str, Any]) -> list[Part]:
    return count_parts(*parse_counts("agents", options["agents"], 0), "agents")


def _mediator_parts(options: Mapping[str, Any]) -> list[Part]:
    starts, counts = parse_counts("mediators", options["mediators"])
    if options["follow"] == "change" and len(counts) > 1:
        # When the change decides nobody knows the times beforehand: equal parts, in their order.
        starts = tuple(1 - i / len(counts) for i in range(len(counts)))
        return [part._replace(label=f"{part.label} (by change)") for part in count_parts(starts, counts, "mediators")]
    return count_parts(starts, counts, "mediators")


def _agentsd_parts(options: Mapping[str, Any]) -> list[Part]:
    merging = f"merging {options['ratio']:.0%}"
    parts = [Part(1.0, f"agents and {merging}"), Part(options["switch"], merging, 0.6)]
    if options["switch"] in (0, 1):
        return [parts[0] if options["switch"] == 0 else parts[1]._replace(start=1.0)]
    return parts


def _plan_parts(options: Mapping[str, Any]) -> list[Part]:
    parts = []
    for stage in options[PLAN]["stages"]:
        names = sorted({method["method"] for method in stage["layers"].values()})
        parts.append(Part(stage["start"], ", ".join(names) or "exact", exact=names in ([], ["softmax"])))
    return parts


_MIN_TOKENS = Option(
    "min_tokens", "Smallest layer, tokens", "whole", 1024, 0, 1 << 20, 64, about="Layers with fewer tokens stay exact."
)
_RATIO = Option("ratio", "Share of tokens merged", "number", 0.5, 0, 0.9, 0.05)

_INFOS: Sequence[MethodInfo] = (
    MethodInfo(UNCHANGED, "Unchanged", "The model as it is."),
    MethodInfo(
        MEDIATORS,
        "Mediators",
        "A SiT with mediator attention runs with any number of mediators, few while it is noise and more later.",
        (
            Option(
                "mediators",
                "Mediators",
                "counts",
                "1:4,0.5:16,0.2:25",
                1,
                about="A count, or time:count pairs; 1 is noise and 0 the picture.",
            ),
            Option(
                "follow",
                "Next count",
                "choice",
                "time",
                choices=("time", "change"),
                about="At the times given, or when the picture changes less from step to step.",
            ),
        ),
        parts=_mediator_parts,
    ),
    MethodInfo(
        "agent",
        "Agents",
        "A few agents, pooled from the queries, stand between queries and keys.",
        (
            Option(
                "agents",
                "Agents",
                "counts",
                "256",
                0,
                about="A count, or time:count pairs; 0 is exact attention: 1:256,0.4:0.",
            ),
            _MIN_TOKENS,
            Option("broadcast_exponent", "Broadcast exponent", "number", 0.3, 0, 2, 0.05),
            Option("shortcut", "Share of values added", "number", 0.075, 0, 1, 0.005),
        ),
        _agent_plan,
        _agent_parts,
    ),
    MethodInfo(
        "agentsd",
        "Agents by merging",
        "The paper's recipe for Stable Diffusion: agents from token merging, then plain merging.",
        (
            Option("switch", "Plain merging from time", "number", 0.6, 0, 1, 0.05, about="1 is noise, 0 the picture."),
            Option("ratio", "Share of tokens merged", "number", 0.4, 0, 0.9, 0.05),
            Option("agent_ratio", "Share merged to make agents", "number", 0.95, 0, 0.99, 0.01),
        ),
        _agentsd_plan,
        _agentsd_parts,
    ),
    MethodInfo(
        "tome",
        "Token merging",
        "Similar tokens are merged before attention and copied back after.",
        (_RATIO, Option("stride", "Cell that keeps one token", "whole", 2, 2, 8, 1)),
        _tome_plan,
    ),
    MethodInfo(
        "todo",
        "Smaller keys",
        "Keys and values come from a coarser grid.",
        (Option("factor", "Times coarser a side", "whole", 2, 1, 16, 1),),
        _todo_plan,
    ),
    MethodInfo(
        "linear",
        "Linear",
        "For models trained with it; without training the picture is lost.",
        (
            Option("feature_map", "Feature map", "choice", "elu", choices=("elu", "relu", "focused", "identity")),
            _MIN_TOKENS,
        ),
        _linear_plan,
    ),
    MethodInfo("softmax", "Exact softmax", "Exact attention, bit for bit, through the patch.", (), _softmax_plan),
    MethodInfo(
        PLAN,
        "Plan",
        "A plan of methods by layer and time, such as a calibrated one.",
        (Option(PLAN, "Plan (JSON)", "plan", None, about="The text of a plan file; calibration makes one."),),
        _own_plan,
        _plan_parts,
    ),
)
METHODS: Mapping[str, MethodInfo] = {info.name: info for info in _INFOS}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
