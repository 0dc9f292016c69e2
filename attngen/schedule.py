"""Time to value, and the change-driven schedule.

Every schedule uses one clock: t in [0, 1], 1 is pure noise, 0 is data.
"""

# pyright: reportUnnecessaryIsInstance=false
# Arguments are checked at run time, for callers without types.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def check_starts(starts: Sequence[float]) -> None:
    """Raise ValueError unless `starts` fall strictly from 1 and stay in [0, 1]."""
    if not starts or starts[0] != 1:
        raise ValueError(f"the first stage must start at 1.0 (pure noise), got starts {tuple(starts)}")
    for earlier, later in zip(starts, starts[1:], strict=False):
        if not 0 <= later < earlier:
            raise ValueError(f"starts must fall from 1 towards 0, got {tuple(starts)}")


def stage_at(starts: Sequence[float], time: float) -> int:
    """Index of the stage that holds at `time`: the last one whose start is not below it.

    Args:
        starts: falling times, the first is 1.
        time: in [0, 1], 1 is noise; values outside count as the nearest end.

    Raises:
        ValueError: if `time` is not a number.
    """
    if math.isnan(time):
        raise ValueError("the time is NaN")
    return max(0, sum(time <= start for start in starts) - 1)


@dataclass(frozen=True)
class Schedule(Generic[T]):
    """A value by time: `values[i]` holds from `starts[i]` down to the next start.

    `Schedule(starts=(1.0, 0.5, 0.2), values=(4, 16, 64))(0.3)` is 16: few mediators in the early, noisy steps and more
    later (arXiv 2408.05710), written without step numbers so that it fits any sampler.

    Attributes:
        starts: times in [0, 1], falling; the first is 1.
        values: one value a start.

    Raises:
        ValueError: for starts that do not fall from 1, or another number of values.
    """

    starts: tuple[float, ...]
    values: tuple[T, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple(float(start) for start in self.starts))
        object.__setattr__(self, "values", tuple(self.values))
        check_starts(self.starts)
        if len(self.values) != len(self.starts):
            raise ValueError(f"{len(self.starts)} starts need as many values, got {len(self.values)}")

    def __call__(self, time: float) -> T:
        """The value at `time` (1 is noise, 0 is data)."""
        return self.values[stage_at(self.starts, time)]


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


class ChangeSchedule:
    """Move to the next level when the latents change less than they did at first (section 3.3 of arXiv 2408.05710).

    The mean distance between successive latents over the first `warmup` pairs is the base; later, when a distance
    falls below `ratios[i]` times the base, level i becomes level i + 1, never back. Several levels may pass in one
    step. The distance is taken over the whole batch, so all samples of a batch share the level.

    Use the object as `callback_on_step_end` of a diffusers pipeline, or call `observe` after every step.

    Args:
        warmup: pairs of latents that make the base.
        ratios: one threshold a level to leave, usually falling.
        distance: "mae", mean absolute, or "mse", mean square.
        values: of `value` at each level, such as mediator counts; one more than `ratios`.

    Raises:
        ValueError: for an argument out of range.
    """

    tensor_inputs = ("latents",)

    def __init__(
        self,
        warmup: int = 3,
        ratios: Sequence[float] = (0.8, 0.5),
        distance: str = "mae",
        values: Sequence[Any] | None = None,
    ) -> None:
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:
            raise ValueError(f"warmup must be a whole number >= 1, got {warmup!r}")
        if not isinstance(ratios, (tuple, list)) or not ratios or not all(map(_is_positive, ratios)):
            raise ValueError(f"ratios must be positive numbers, one a level to leave, got {ratios!r}")
        if distance not in ("mae", "mse"):
            raise ValueError(f"unknown distance {distance!r}; known: mae, mse")
        if values is not None and len(values) != len(ratios) + 1:
            raise ValueError(f"{len(ratios)} ratios make {len(ratios) + 1} levels, but there are {len(values)} values")
        self.warmup, self.ratios, self.distance = warmup, tuple(ratios), distance
        self.values = None if values is None else tuple(values)
        self.reset()

    def __repr__(self) -> str:
        return (
            f"ChangeSchedule(warmup={self.warmup}, ratios={self.ratios}, distance={self.distance!r},"
            f" values={self.values})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChangeSchedule):
            return NotImplemented
        return (self.warmup, self.ratios, self.distance, self.values) == (
            other.warmup,
            other.ratios,
            other.distance,
            other.values,
        )

    __hash__ = None  # type: ignore[assignment]  # it changes while it runs

    def reset(self) -> None:
        """Start over: the next latents are the first of a generation."""
        self.level = 0
        self._base = 0.0
        self._pairs = 0
        self._previous: Tensor | None = None
        self._time: float | None = None
        self._step_index: int | None = None

    @property
    def value(self) -> Any:
        """The value of the current level; the level itself where no values were given."""
        return self.level if self.values is None else self.values[self.level]

    def at(self, time: float) -> int:
        """The level at `time` (1 is noise); starts over where time has moved back towards noise."""
        if self._time is not None and time > self._time:
            self.reset()
        self._time = float(time)
        return self.level

    def observe(self, latents: Tensor, time: float | None = None) -> int:
        """Compare the latents after a step with those before; returns the level for the next step.

        Args:
            latents: any shape; another shape than before starts over.
            time: of the step, as for `at`.
        """
        if time is not None:
            self.at(time)
        previous, self._previous = self._previous, latents.detach().clone()
        if previous is None:
            return self.level
        if previous.shape != latents.shape:
            clock = self._time, self._step_index
            self.reset()
            self._previous = latents.detach().clone()
            self._time, self._step_index = clock
            return self.level
        difference = self._previous.float() - previous.to(latents.device).float()
        distance = (difference.abs() if self.distance == "mae" else difference.square()).mean().item()
        self._pairs += 1
        if self._pairs <= self.warmup:
            self._base += distance / self.warmup
            return self.level
        while self.level < len(self.ratios) and distance < self.ratios[self.level] * self._base:
            self.level += 1
        return self.level

    @torch.no_grad()
    def __call__(self, pipe: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """`callback_on_step_end`: needs "latents" among the callback's tensor inputs; changes nothing."""
        if "latents" not in callback_kwargs:
            raise ValueError('ChangeSchedule needs callback_on_step_end_tensor_inputs=["latents"]')
        if self._step_index is not None and step_index <= self._step_index:
            self.reset()
        self._step_index = step_index
        self.observe(callback_kwargs["latents"])
        return callback_kwargs
