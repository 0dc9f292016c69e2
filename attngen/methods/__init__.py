"""Attention methods: one file each, options as a frozen dataclass and the pure functions behind them.

A new method is one file here and one line in `METHOD_CLASSES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attngen.checks import as_mapping
from attngen.methods.agent import AgentAttention
from attngen.methods.base import AttentionMethod, Method
from attngen.methods.downsample import DownsampledKV
from attngen.methods.focal import FocalAttention
from attngen.methods.linear import LinearAttention
from attngen.methods.merge import TokenMerging
from attngen.methods.softmax import SoftmaxAttention
from attngen.methods.tiles import TileAttention

METHOD_CLASSES: Mapping[str, type[AttentionMethod]] = {
    cls.kind: cls
    for cls in (
        SoftmaxAttention,
        AgentAttention,
        TokenMerging,
        DownsampledKV,
        FocalAttention,
        TileAttention,
        LinearAttention,
    )
}


def method_from_dict(data: Any) -> AttentionMethod:
    """The method that `AttentionMethod.to_dict` wrote.

    Raises:
        ValueError: for an unknown method or option, naming the known ones.
    """
    return one_of(METHOD_CLASSES, data)


def one_of(known: Mapping[str, type[Method]], data: Any) -> Method:
    """The method among classes by kind that `AttentionMethod.to_dict` wrote; errors as of `method_from_dict`."""
    content = as_mapping(data)
    if content is None or "method" not in content:
        raise ValueError(f"a method is an object with a 'method' name, got {data!r}")
    kind = content["method"]
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"unknown method {kind!r}; known: {', '.join(known)}")
    return known[kind].from_options({name: value for name, value in content.items() if name != "method"})
