"""The attention methods that the programs offer: attngen's presets, derived from their fields, and the programs' own.

A preset that attngen gains is here without an edit: title, help, options, ranges and defaults are those of its methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import attngen
from attngen import Plan, SoftmaxAttention, Stage
from attngen.methods import AttentionMethod, base
from attngen.presets import resolve_preset
from pipelines.methods.counts import Part, bar_level, count_parts, parse_counts
from pipelines.methods.options import MEDIATORS, PLAN, UNCHANGED, MethodInfo, Option, min_tokens, plain

SWITCH = "switch"


def describe(method: AttentionMethod) -> str:
    """A method and its options that are not the default, in words."""
    values = {option.name: getattr(method, option.name) for option in method.options()}
    told = [f"{o.name} {plain(values[o.name])}" for o in method.options() if values[o.name] != o.default]
    title = method.title[:1].lower() + method.title[1:]
    return f"{title} ({', '.join(told)})" if told else title


def plan_parts(plan: Plan) -> list[Part]:
    """What a plan does when; a bar is as high as the logarithm of its largest count that tables show."""
    counts = [[count for m in stage.layers.values() if (count := _shown_count(m))] for stage in plan.stages]
    most = max((max(found, default=0) for found in counts), default=0)
    parts = []
    for stage, found in zip(plan.stages, counts, strict=True):
        methods = list(stage.layers.values())
        labels = ", ".join(sorted({method.label for method in methods})) or "exact"
        exact = all(isinstance(method, SoftmaxAttention) for method in methods)
        parts.append(Part(stage.start, labels, bar_level(max(found, default=most), most), exact))
    return parts


def _shown_count(method: AttentionMethod) -> int | None:
    shown = [getattr(method, option.name) for option in method.options() if option.shown and option.kind == "count"]
    return shown[0] if shown else None


class Offer:
    """One of attngen's presets, with what the programs make of it.

    Args:
        name: in `attngen.PRESETS`.
    """

    def __init__(self, name: str) -> None:
        self.name, self.base = name, attngen.PRESETS[name]
        self.methods = [method for stage in self.base.stages for method in stage.layers.values()]
        self.has_switch = len(self.base.stages) == 2

    def info(self) -> MethodInfo:
        """The preset as it is offered."""
        kinds = list(dict.fromkeys(type(method) for method in self.methods))
        sources = list(dict.fromkeys(kind.source for kind in kinds if kind.source))
        return MethodInfo(
            self.name,
            self._title(kinds),
            self._about(kinds),
            self._options(),
            self.plan,
            lambda options: plan_parts(self.plan(options)),
            ", ".join(sources),
            all(kind.candidates for kind in kinds),
        )

    def _title(self, kinds: Sequence[type[AttentionMethod]]) -> str:
        titles = " and ".join(kind.title for kind in kinds)
        return titles if list(kinds[0].presets) == [self.name] else f"{titles} ({self.name})"

    def _about(self, kinds: Sequence[type[AttentionMethod]]) -> str:
        if len(self.methods) == 1:
            return kinds[0].about()
        told = ", ".join(f"from time {stage.start:g} {_all(stage)}" for stage in self.base.stages)
        return f"F{told[1:]}; 1 is noise."

    def _options(self) -> tuple[Option, ...]:
        """Those of its methods, each once; the time of a second stage; the smallest layer."""
        found = {}
        for o, value in self.fields():
            offered = Option(o.name, o.kind, value, o.help, o.low, o.high, o.step, o.choices, o.optional)
            if o.shown and o.kind == "count" and len(self.methods) == 1:
                about = f"{o.help}; or time:count pairs, 0 is exact: 1:{value},0.4:0"
                offered = replace(offered, kind="counts", default=str(value), about=about, low=0)
            found[o.name] = offered
        if self.has_switch:
            about = "time from which the second stage applies; 1 is noise"
            found[SWITCH] = Option(SWITCH, "number", self.base.stages[1].start, about, step=0.05)
        if found:
            found["min_tokens"] = min_tokens(self.base.min_tokens)
        return tuple(found.values())

    def fields(self) -> list[tuple[base.Option, Any]]:
        """The methods' options, each once, with its value in the preset: the first that is not the option's default."""
        found: dict[str, tuple[base.Option, Any]] = {}
        for method in self.methods:
            for o in method.options():
                value = getattr(method, o.name)
                if o.name not in found or found[o.name][1] == o.default:
                    found[o.name] = o, value
        return list(found.values())

    def plan(self, options: Mapping[str, Any]) -> Plan:
        """The plan of checked options."""
        known = {option.name: option for option in self._options()}
        changed: dict[str, Any] = {}
        counts = None
        for name, value in options.items():
            if name in (SWITCH, "min_tokens"):
                continue
            if known[name].kind == "counts":
                counts = (name, *parse_counts(name, value, 0))
            elif value != known[name].default:
                changed[name] = value
        plan = resolve_preset(self.name, changed)
        if counts is not None:
            plan = _over_time(plan, *counts)
        if SWITCH in options:
            plan = _switched(plan, options[SWITCH])
        return replace(plan, min_tokens=options.get("min_tokens", plan.min_tokens))


def _all(stage: Stage) -> str:
    return ", ".join(describe(method) for method in stage.layers.values())


def _over_time(plan: Plan, name: str, starts: Sequence[float], counts: Sequence[int]) -> Plan:
    """A plan of one stage with other counts from these times on; 0 is exact attention."""
    (only,) = plan.stages

    def with_count(count: int) -> dict[str, AttentionMethod]:
        return {p: replace(m, **{name: count}) if count else SoftmaxAttention() for p, m in only.layers.items()}

    return replace(plan, stages=tuple(Stage(s, with_count(c)) for s, c in zip(starts, counts, strict=True)))


def _switched(plan: Plan, time: float) -> Plan:
    """A plan of two stages whose second starts at another time; 1 is the second alone, 0 the first."""
    first, second = plan.stages
    if time in (0, 1):
        return replace(plan, stages=(replace(first if time == 0 else second, start=1.0),))
    return replace(plan, stages=(first, replace(second, start=time)))


def _mediator_parts(options: Mapping[str, Any]) -> list[Part]:
    starts, counts = parse_counts(MEDIATORS, options[MEDIATORS])
    if options["follow"] == "change" and len(counts) > 1:
        # The change decides the times while drawing: equal parts here, in their order.
        starts = tuple(1 - i / len(counts) for i in range(len(counts)))
        return [part._replace(label=f"{part.label} (by change)") for part in count_parts(starts, counts, MEDIATORS)]
    return count_parts(starts, counts, MEDIATORS)


def _own_plan(options: Mapping[str, Any]) -> Plan:
    return Plan.from_dict(options[PLAN])


_INFOS: Sequence[MethodInfo] = (
    MethodInfo(UNCHANGED, "Unchanged", "The model as it is."),
    MethodInfo(
        MEDIATORS,
        "Mediators",
        "A SiT with mediator attention runs with any number of mediators, few while it is noise and more later.",
        (
            Option(MEDIATORS, "counts", "1:4,0.5:16,0.2:25", "a count, or time:count pairs; 1 is noise", 1, 1 << 16),
            Option(
                "follow",
                "choice",
                "time",
                "next count at the times given, or when the image changes less from step to step",
                choices=("time", "change"),
            ),
        ),
        parts=_mediator_parts,
    ),
    *(Offer(name).info() for name in attngen.PRESETS),
    MethodInfo(
        PLAN,
        "Plan",
        "A plan of methods by layer and time, such as a calibrated one.",
        (Option(PLAN, "plan", None, "the text of a plan file; calibration makes one"),),
        _own_plan,
        lambda options: plan_parts(_own_plan(options)),
    ),
)
METHODS: Mapping[str, MethodInfo] = {info.name: info for info in _INFOS}
