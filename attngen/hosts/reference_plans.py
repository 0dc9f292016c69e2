"""Plans for reference images: what they may have, and how they run beside the plan for the image."""

# pyright: reportUnnecessaryIsInstance=false
# Arguments are checked at run time, for callers without types.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from attngen.hosts.families import FAMILIES, family_of
from attngen.methods import AttentionMethod, DownsampledKV, SoftmaxAttention
from attngen.plan import Plan
from attngen.schedule import stage_at


def references_plan(method: AttentionMethod | Plan | None) -> Plan | None:
    """What a user gave for references as a plan, or None.

    Raises:
        ValueError: for anything that neither reduces keys nor is exact.
    """
    if method is None:
        return None
    plan = Plan.of(method) if isinstance(method, AttentionMethod) else method
    if not isinstance(plan, Plan):
        raise ValueError(f"references are reduced by DownsampledKV or a Plan of it, got {method!r}")
    if plan.min_tokens or plan.max_levels is not None:
        raise ValueError("a plan for references has neither min_tokens nor max_levels")
    for stage in plan.stages:
        for pattern, one in stage.layers.items():
            if not isinstance(one, (DownsampledKV, SoftmaxAttention)):
                raise ValueError(f"references are reduced by DownsampledKV, or exact, got {one!r} for {pattern!r}")
    return plan


def in_step(first: Plan, second: Plan) -> tuple[Plan, Plan]:
    """Two plans with the stages of both: each holds the same methods at each time as before."""
    starts = sorted({*first.starts, *second.starts}, reverse=True)
    one, other = (
        replace(plan, stages=tuple(replace(plan.stages[stage_at(plan.starts, s)], start=s) for s in starts))
        for plan in (first, second)
    )
    return one, other


def check_takes_references(models: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless attngen finds the reference images of one of the models."""
    if any((family := family_of(model)) is not None and family.references is not None for model in models.values()):
        return
    kinds = " and ".join(dict.fromkeys(type(model).__name__ for model in models.values()))
    known = ", ".join(name for name, family in FAMILIES.items() if family.references is not None)
    raise ValueError(f"attngen finds no reference images in the tokens of {kinds}; it does in those of {known}")
