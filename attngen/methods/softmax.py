"""Exact softmax attention, a method like the others: the best plans mix exact and cheap layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer
from attngen.layers.route import Route, exact
from attngen.methods.base import AttentionMethod, LayerShape, Preset

ASKED_FOR = "the plan asks for softmax attention"


@dataclass(frozen=True)
class SoftmaxAttention(AttentionMethod):
    """The layer stays exact, bit for bit; older models get diffusers' attention backends."""

    kind: ClassVar[str] = "softmax"
    title: ClassVar[str] = "Exact softmax"
    short: ClassVar[str] = "exact"
    presets: ClassVar[Mapping[str, Preset]] = {"softmax": Preset()}

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        return exact(ASKED_FOR)

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        return shape.exact_flops()
