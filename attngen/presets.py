"""PRESETS: what `apply` makes of a preset's name."""

from __future__ import annotations

from collections.abc import Mapping

from attngen.methods import (
    AgentAttention,
    DownsampledKV,
    FocalAttention,
    LinearAttention,
    SoftmaxAttention,
    TokenMerging,
)
from attngen.plan import Plan, Stage

PRESETS: Mapping[str, Plan] = {
    # Exact attention everywhere, bit for bit: to compare with, and to give older models diffusers' attention backends.
    "softmax": Plan.of(SoftmaxAttention()),
    # Agents pooled from the queries; no merging, no gather. The paper's number of agents at 512 px.
    "agent": Plan.of(AgentAttention(num_agents=256), min_tokens=1024),
    # The recipe of arXiv 2312.08874 for Stable Diffusion: agents in the first 40% of the way, then token merging.
    "agentsd": Plan(
        (
            Stage(1.0, {"*": TokenMerging(ratio=0.4, stride=4, agent_ratio=0.95)}),
            Stage(0.6, {"*": TokenMerging(ratio=0.4, stride=2)}),
        ),
        max_levels=1,
    ),
    # tomesd 0.1.3's defaults (arXiv 2303.17604) but for the draw: each cell's destination is its top-left token.
    "tome": Plan.of(TokenMerging(ratio=0.5, stride=2), max_levels=1),
    # arXiv 2402.13573.
    "todo": Plan.of(DownsampledKV(factor=2), max_levels=1),
    # arXiv 2107.00641 with plain means in place of learned pooling: near tokens exactly, far ones as 64 cells.
    "focal": Plan.of(FocalAttention(), min_tokens=1024),
    # For models trained with it; without training the picture is lost.
    "linear": Plan.of(LinearAttention(feature_map="elu"), min_tokens=1024),
}


def resolve_preset(name: str) -> Plan:
    """The plan of a preset; ValueError lists the known names."""
    if name not in PRESETS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(PRESETS)}, or the path of a plan file (.json)")
    return PRESETS[name]
