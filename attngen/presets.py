"""PRESETS: plans by name, from the methods' own presets and from recipes of papers that mix methods over time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from attngen.methods import METHOD_CLASSES, AttentionMethod, SoftmaxAttention, TokenMerging
from attngen.plan import Plan, Stage

RECIPES: Mapping[str, Plan] = {
    # arXiv 2312.08874 for Stable Diffusion: agents during the first 40% of denoising, then token merging.
    "agentsd": Plan(
        (
            Stage(1.0, {"*": TokenMerging(ratio=0.4, stride=4, agent_ratio=0.95)}),
            Stage(0.6, {"*": TokenMerging(ratio=0.4, stride=2)}),
        ),
        max_levels=1,
    ),
}

PRESETS: Mapping[str, Plan] = {
    **{
        name: Plan.of(cls(**preset.options), min_tokens=preset.min_tokens, max_levels=preset.max_levels)
        for cls in METHOD_CLASSES.values()
        for name, preset in cls.presets.items()
    },
    **RECIPES,
}


def resolve_preset(name: str, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a preset, with other values of its methods' options.

    Where a preset has several methods, an override changes those whose value is not the default, or all if none is.

    Raises:
        ValueError: for an unknown name, listing the known ones; for an option that no method of the preset has, naming
            the nearest; for a bad value.
    """
    if name not in PRESETS:
        raise ValueError(
            f"unknown method {name!r}; {_nearest(name, PRESETS)}known: {', '.join(PRESETS)}, or the path of a plan file"
            " (.json)"
        )
    plan = PRESETS[name]
    for option, value in (overrides or {}).items():
        plan = _overridden(name, plan, option, value)
    return plan


def _overridden(name: str, plan: Plan, option: str, value: Any) -> Plan:
    methods = [method for stage in plan.stages for method in stage.layers.values()]
    known = dict.fromkeys(o.name for method in methods for o in method.options())
    if option not in known:
        raise ValueError(
            f"the preset {name!r} has no option {option!r}; {_nearest(option, known)}it has:"
            f" {', '.join(known) or 'none'}"
        )
    changed = [m for m in methods if any(o.name == option and getattr(m, option) != o.default for o in m.options())]

    def with_value(method: AttentionMethod) -> AttentionMethod:
        if isinstance(method, SoftmaxAttention) or (changed and method not in changed):
            return method
        return replace(method, **{option: value})

    stages = tuple(Stage(s.start, {pattern: with_value(m) for pattern, m in s.layers.items()}) for s in plan.stages)
    return replace(plan, stages=stages)


def _nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""
