"""Which calls the linear attention kernels take. Imports without Triton."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attngen.kernels.like import Like
from attngen.kernels.triton import common

FUSED_FEATURE_MAPS = ("elu", "relu", "focused", "identity")
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 16, 160


def why_not(
    query: Tensor | Like,
    key: Tensor | Like,
    value: Tensor | Like,
    feature_map: str | Callable[[Tensor], Tensor],
) -> str | None:
    """Why the kernels cannot take these tensors, or None if they can.

    Args:
        query: (B, H, N, D).
        key: (B, H, L, D).
        value: (B, H, L, E).
        feature_map: a name or a function.
    """
    if not isinstance(feature_map, str):
        return "the feature map is a function, which only runs outside a kernel"
    if feature_map not in FUSED_FEATURE_MAPS:
        return f"feature map {feature_map!r} is not one of {', '.join(FUSED_FEATURE_MAPS)}"
    return _shapes_differ(query, key, value) or common.why_no_kernels((query, key, value))


def check(query: Tensor, key: Tensor, value: Tensor, feature_map: str) -> None:
    """Raise ValueError with the reason of `why_not`."""
    reason = why_not(query, key, value, feature_map)
    if reason is not None:
        raise ValueError(f"no fused linear attention: {reason}; use kernel='reference'")


def _shapes_differ(query: Tensor | Like, key: Tensor | Like, value: Tensor | Like) -> str | None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if any(tensor.ndim != 4 for tensor in (query, key, value)):
        return f"not all tensors have 4 dimensions: {shapes}"
    same_heads = query.shape[:2] == key.shape[:2] == value.shape[:2]
    if not same_heads or query.shape[3] != key.shape[3] or key.shape[2] != value.shape[2]:
        return f"shapes do not fit together: {shapes}"
    if any(size == 0 for size in (*query.shape, *value.shape)):
        return f"a tensor is empty: {shapes}"
    for size in (query.shape[3], value.shape[3]):
        if not MIN_HEAD_SIZE <= size <= MAX_HEAD_SIZE or size % 8:
            return f"head size {size} is not a multiple of 8 from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}"
    return None
