"""The rows of the quality table: which attention a set of pictures is drawn with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attngen import Plan

BASELINE = "softmax"


@dataclass(frozen=True)
class Row:
    """One way to draw.

    Attributes:
        name: of the row, also that of its folder.
        plan: what is applied to the model, or None for the model as it is.
        mediators: for a model that has them, as `train.sample --mediators` takes it, or None.
        kind: rows of one kind are joined by a line in the plot.
    """

    name: str
    plan: Plan | None = None
    mediators: str | None = None
    kind: str = ""


def shown(record: Mapping[str, Any]) -> str:
    """The mean of a row, and its spread where there are several sets."""
    spread = record["spread"]
    return f"{record['mean']:.3f}" if spread is None else f"{record['mean']:.3f} ± {spread:.3f}"


def rows_of(pipe: Any, plans: Sequence[tuple[str, Path]] = ()) -> list[Row]:
    """All rows for a model.

    Args:
        pipe: a pipeline; one with mediators is drawn with different numbers of them, any other with different methods.
        plans: (name, plan file) of further rows.

    Raises:
        ValueError: if a plan file cannot be read, or a model with mediators is given plans.
    """
    from attngen import Plan

    transformer = getattr(pipe, "transformer", None)
    if transformer is not None and dict(transformer.config).get("attention") == "mediator":
        if plans:
            raise ValueError(f"the model has mediators of its own and takes no plan; leave out {plans[0][0]}")
        return mediator_rows()
    return [*swap_rows(), *(Row(name, Plan.load(path), kind="calibrated") for name, path in plans)]


def swap_rows() -> list[Row]:
    """Training-free methods: the presets, and in every layer agents in several numbers, merging and fewer keys.

    The presets leave layers of few tokens exact, so that they change nothing in a small model.
    """
    from attngen import PRESETS, AgentAttention, DownsampledKV, Plan, TokenMerging

    agents = [Row(f"agent-{n}", Plan.of(AgentAttention(num_agents=n)), kind="agents") for n in (4, 16, 64, 128)]
    others = [
        Row("merge-half", Plan.of(TokenMerging(0.5)), kind="everywhere"),
        Row("keys-quarter", Plan.of(DownsampledKV(2)), kind="everywhere"),
    ]
    presets = [Row(name, plan, kind="presets") for name, plan in PRESETS.items() if name != BASELINE]
    return [Row(BASELINE, PRESETS[BASELINE], kind="presets"), *presets, *agents, *others]


def mediator_rows() -> list[Row]:
    """Fixed numbers of mediators, numbers by time, and by the change of the picture (arXiv 2408.05710, section 3.3)."""
    fixed = [Row(f"mediators-{n}", mediators=str(n), kind="fixed") for n in (25, 16, 9, 4, 1)]
    schedules = [
        Row("by-time-4-9-16", mediators="1:4,0.5:9,0.2:16", kind="by time"),
        Row("by-time-1-4-16", mediators="1:1,0.6:4,0.3:16", kind="by time"),
        Row("by-change-4-9-16", mediators="change:4,9,16:0.8,0.5", kind="by change"),
    ]
    return [*fixed, *schedules]
