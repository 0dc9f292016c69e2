"""Attention methods: one file each, options as a frozen dataclass and the pure functions behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from attngen.methods.agent import AgentAttention
from attngen.methods.base import AttentionMethod
from attngen.methods.downsample import DownsampledKV
from attngen.methods.focal import FocalAttention
from attngen.methods.linear import LinearAttention
from attngen.methods.merge import TokenMerging
from attngen.methods.softmax import SoftmaxAttention

METHOD_CLASSES: Mapping[str, type[AttentionMethod]] = {
    cls.kind: cls
    for cls in (SoftmaxAttention, AgentAttention, FocalAttention, TokenMerging, DownsampledKV, LinearAttention)
}


def method_from_dict(data: Mapping[str, Any]) -> AttentionMethod:
    """The method that `AttentionMethod.to_dict` wrote.

    Raises:
        ValueError: for an unknown method or option, naming the known ones.
    """
    if not isinstance(data, Mapping) or "method" not in data:
        raise ValueError(f"a method is an object with a 'method' name, got {data!r}")
    kind = data["method"]
    if not isinstance(kind, str) or kind not in METHOD_CLASSES:
        raise ValueError(f"unknown method {kind!r}; known: {', '.join(METHOD_CLASSES)}")
    options = {name: value for name, value in data.items() if name != "method"}
    known = [f.name for f in dataclasses.fields(METHOD_CLASSES[kind])]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"method {kind!r} has no option {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    return METHOD_CLASSES[kind](**options)
