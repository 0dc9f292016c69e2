"""Checks shared by the pure functions: every message names both sizes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, cast

import numpy as np
from torch import Tensor

Grid = tuple[int, ...]
"""(height, width) in tokens; of a video (frames, height, width). Tokens are in row-major order."""


def sides(grid: Grid) -> str:
    """The sides of a grid, or of a part of one, in words."""
    return " x ".join(map(str, grid))


def check_heads(query: Tensor, key: Tensor, value: Tensor, agents: Tensor | None = None) -> None:
    """Raise ValueError unless the tensors are (B, H, N, D), (B, H, L, D), (B, H, L, E) and (B, H, M, D)."""
    named = {"query": query, "key": key, "value": value}
    if agents is not None:
        named["agents"] = agents
    for name, tensor in named.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, tokens, head size), got {tuple(tensor.shape)}"
            )
    for name, tensor in named.items():
        if tensor.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{name} has (batch, heads) = {tuple(tensor.shape[:2])}, but query has {tuple(query.shape[:2])}"
            )
        if name != "value" and tensor.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name} has head size {tensor.shape[-1]}, but query has {query.shape[-1]}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, but query has {query.dtype}")
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"key has {key.shape[2]} tokens, but value has {value.shape[2]}")


def check_bias(name: str, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `bias` broadcasts to `shape`."""
    if bias is None:
        return
    # Written with !=, not `in`: torch.compile compares sizes that it keeps symbolic only by operators.
    sizes = zip(reversed(bias.shape), reversed(shape), strict=False)
    if bias.ndim > 4 or any(size != 1 and size != want for size, want in sizes):
        raise ValueError(f"{name} has shape {tuple(bias.shape)}, which does not broadcast to {shape}")


def check_tokens(x: Tensor, grid: Grid) -> None:
    """Raise ValueError unless `x` is (B, N, C) with N = the product of the grid's sides."""
    if x.ndim != 3:
        raise ValueError(f"tokens must have 3 dimensions (batch, tokens, channels), got {tuple(x.shape)}")
    check_grid(grid)
    if x.shape[1] != math.prod(grid):
        raise ValueError(f"{x.shape[1]} tokens do not fill a grid of {sides(grid)} = {math.prod(grid)}")


def check_grid(grid: Grid) -> None:
    """Raise ValueError unless `grid` is (height, width) or (frames, height, width), each at least 1."""
    if len(grid) not in (2, 3) or min(grid) < 1:
        raise ValueError(f"a grid is (height, width) or (frames, height, width) in tokens, got {tuple(grid)}")


def check_image(query: Tensor, key: Tensor, grid: Grid) -> None:
    """Raise ValueError unless the (B, H, N, D) queries and keys are the tokens of `grid`."""
    check_grid(grid)
    tokens = math.prod(grid)
    if query.shape[2] != tokens or key.shape[2] != tokens:
        raise ValueError(
            f"{query.shape[2]} queries and {key.shape[2]} keys do not fill a grid of {sides(grid)} = {tokens}"
        )


def check_number(name: str, value: float, at_least: float = 0.0, below: float | None = None) -> None:
    """Raise ValueError unless `value` is a finite number >= `at_least`, and below `below` where that is given."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and value >= at_least and (below is None or value < below):
        return
    wanted = f">= {at_least:g}" if below is None else f"in [{at_least:g}, {below:g})"
    raise ValueError(f"{name} must be a finite number {wanted}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: int, at_least: int = 1, at_most: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number from `at_least` to `at_most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < at_least or (at_most is not None and value > at_most):
        limits = f">= {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(f"{name} must be a whole number {limits}, got {value!r}")


def check_fraction(name: str, value: float, below_one: bool = True) -> None:
    """Raise ValueError unless 0 <= `value` < 1 (or <= 1 where `below_one` is False)."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value <= 1
        or (below_one and value == 1)
    ):
        raise ValueError(f"{name} must be in [0, 1{')' if below_one else ']'}, got {value!r}")


def as_mapping(data: object) -> Mapping[str, Any] | None:
    """`data` as the object of a JSON file, or None if it is something else."""
    return cast("Mapping[str, Any]", data) if isinstance(data, Mapping) else None


def check_choice(name: str, value: object, known: Collection[str | None]) -> None:
    """Raise ValueError unless `value` is one of the `known`, listing them."""
    # By type first: what compares strangely, like a tensor, is not among them either.
    if not (value is None or isinstance(value, str)) or value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(map(str, known))}")


def plain_number(value: Any) -> Any:
    """A NumPy number as Python's, for arguments that may be either; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value
