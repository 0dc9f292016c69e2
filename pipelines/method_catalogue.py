"""The attention methods that the programs offer, what attngen gets of each, and what each does when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.method_info import MethodInfo, Option
from pipelines.schedules import Part, count_parts, parse_counts

UNCHANGED = "none"
MEDIATORS = "mediators"
PLAN = "plan"


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


def _focal_plan(options: Mapping[str, Any]) -> Any:
    from attngen import FocalAttention, Plan

    method = FocalAttention(options["window"], options["margin"], options["num_cells"])
    return Plan.of(method, min_tokens=options["min_tokens"])


def _linear_plan(options: Mapping[str, Any]) -> Any:
    from attngen import LinearAttention, Plan

    return Plan.of(LinearAttention(feature_map=options["feature_map"]), min_tokens=options["min_tokens"])


def _own_plan(options: Mapping[str, Any]) -> Any:
    from attngen import Plan

    return Plan.from_dict(options[PLAN])


def _softmax_plan(options: Mapping[str, Any]) -> Any:
    return "softmax"


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
        "focal",
        "Near exactly, far in cells",
        "Each window of the picture sees the tokens around it one by one and the rest as means of cells.",
        (
            Option("window", "Window, tokens a side", "whole", 8, 1, 64, 1),
            Option("margin", "Tokens seen around it", "whole", 4, 0, 64, 1),
            Option("num_cells", "Cells for the rest", "whole", 64, 1, 4096, 1),
            _MIN_TOKENS,
        ),
        _focal_plan,
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
