"""Exact softmax attention, a method like the others: the best plans mix exact and cheap layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attngen.checks import Grid
from attngen.methods.base import AttentionMethod, LayerShape


@dataclass(frozen=True)
class SoftmaxAttention(AttentionMethod):
    """Leave the layer exact: its own processor computes it, bit for bit as without a patch."""

    kind: ClassVar[str] = "softmax"

    def why_exact(self, grid: Grid) -> str | None:
        return "the plan asks for softmax attention"

    def flops(self, shape: LayerShape) -> int:
        return shape.exact_flops()
