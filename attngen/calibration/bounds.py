"""The plan under a bound: the fastest within an error, or the most exact that is fast enough, found by running plans.

Predictions from the layers choose which plan is run next; only what was measured decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from attngen.calibration.choose import Chooser, Picks
from attngen.calibration.session import ROUNDS, Session

MAX_CHECKS = 8
"""Plans that are run at most to find one within an error."""
MAX_TIMED = 5
"""Plans that are timed at most to find one that is fast enough."""
CLOSE_ENOUGH = 0.85
"""A plan whose error is at least this share of the bound is not made cheaper."""
FASTER = 1.02
"""A plan is faster where whole runs are by this factor; less is within the noise of a few runs."""
NEAR = 1.1
"""A plan that is at most by this factor faster than it must be is not made more exact."""


@dataclass(frozen=True)
class Bounds:
    """What a plan must keep; at least one of both.

    Attributes:
        max_error: largest relative error.
        speedup: how many times faster, or fewer operations.

    Raises:
        ValueError: if neither is given, or one is out of range.
    """

    max_error: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if self.max_error is None and self.speedup is None:
            raise ValueError("calibrate needs max_error=... or speedup=..., or both")
        for name, value, least in (("max_error", self.max_error, 0), ("speedup", self.speedup, 1)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not (number and value > least):
                raise ValueError(f"{name} must be a finite number above {least}, got {value!r}")

    def to_dict(self) -> dict[str, float]:
        """Those that were given."""
        both = {"max_error": self.max_error, "speedup": self.speedup}
        return {name: float(value) for name, value in both.items() if value is not None}


class Found(NamedTuple):
    """The choice.

    Attributes:
        picks: of each place.
        why_exact: why it is exact attention everywhere, or None.
    """

    picks: Picks
    why_exact: str | None = None


class Search(Protocol):
    """What measures plans, see `attngen.calibration.search`."""

    session: Session
    chooser: Chooser
    cost: str

    @property
    def exact(self) -> Picks: ...
    def error(self, picks: Picks) -> float: ...
    def speedup(self, picks: Picks, rounds: int = 1) -> float: ...
    def predicted(self, picks: Picks) -> float: ...
    def attention_speedup(self, picks: Picks) -> float: ...


def find(search: Search, bounds: Bounds) -> Found:
    """The plan under the bounds.

    Raises:
        ValueError: for a `speedup` that no plan reaches, or not within `max_error`, naming what was found.
    """
    if bounds.speedup is None:
        assert bounds.max_error is not None
        within = _within(search, bounds.max_error)
        if not within:
            return Found(search.exact, f"no plan within max_error={bounds.max_error:g} was found")
        return Found(within[0]) if search.cost == "flops" else _faster(search, within, bounds.max_error)
    picks = _as_few(search, bounds.speedup) if search.cost == "flops" else _as_fast(search, bounds.speedup)
    error = search.error(picks)
    if bounds.max_error is not None and error > bounds.max_error:
        times = "times cheaper" if search.cost == "flops" else "times as fast"
        raise ValueError(
            f"no plan is {bounds.speedup:g} {times} within max_error={bounds.max_error:g}; the most exact one that is"
            f" has an error of {error:.4f}"
        )
    return Found(picks)


def _within(search: Search, max_error: float) -> list[Picks]:
    """Picks whose measured error is within the bound and predicted to be cheaper than exact, cheapest first."""
    chooser, found = search.chooser, list[Picks]()
    low, high, budget = 0.0, math.inf, max_error
    full = chooser.cost(search.exact)
    for _ in range(MAX_CHECKS):
        picks = chooser.cheapest(budget * budget)
        if picks == search.exact and low > 0:
            break
        error = search.error(picks)
        if error <= max_error:
            low = max(low, budget)
            if chooser.cost(picks) < full and picks not in found:
                found.append(picks)
            if error >= CLOSE_ENOUGH * max_error or chooser.cost(picks) <= chooser.lowest_cost():
                break
        else:
            high = min(high, budget)
        budget = _next_budget(budget, low, high, error, max_error)
        if high / max(low, 1e-30) < 1.03:
            break
    return sorted(found, key=chooser.cost)


def _faster(search: Search, within: list[Picks], max_error: float) -> Found:
    """The first that whole runs show to be faster than exact attention, or exact attention."""
    best = 0.0
    for picks in within[:2]:
        ratio = search.speedup(picks, ROUNDS)
        if ratio >= FASTER:
            return Found(picks)
        best = max(best, ratio)
    reason = f"the fastest plan within max_error={max_error:g} runs at {best:.2f} times the speed of exact attention"
    return Found(search.exact, reason)


def _as_few(search: Search, speedup: float) -> Picks:
    """The most exact picks with so many times fewer operations."""
    full = search.chooser.cost(search.exact)
    picks = search.chooser.most_exact(full / speedup)
    if picks is None:
        best = full / max(search.chooser.lowest_cost(), 1e-30)
        raise ValueError(
            f"no plan makes attention {speedup:g} times cheaper; the most these candidates reach is {best:.2f}"
        )
    return picks


def _as_fast(search: Search, speedup: float) -> Picks:
    """The most exact picks found with which whole runs are so many times faster."""
    tried: list[tuple[Picks, float]] = []
    target, low, high = speedup, 1.0, math.inf  # of the prediction; too slow at low, fast enough at high
    while len(tried) < MAX_TIMED and search.session.can_run(2 * ROUNDS):
        picks = _predicted_as_fast(search, target)
        if any(picks == known for known, _ in tried):
            break
        ratio = search.speedup(picks)
        tried.append((picks, ratio))
        if speedup <= ratio <= NEAR * speedup or ratio < speedup and picks == _cheapest(search.chooser):
            break
        low, high = (max(low, target), high) if ratio < speedup else (low, min(high, target))
        wanted = 1 + (target - 1) * (speedup - 1) / max(ratio - 1, 0.1 * (speedup - 1)) * (
            1.03 if ratio < speedup else 1
        )
        target = wanted if low < wanted < high else math.sqrt(low * high) if high < math.inf else 1.1 * target
    for picks, ratio in sorted(tried, key=lambda one: search.predicted(one[0])):
        if ratio >= speedup and search.speedup(picks, ROUNDS) >= speedup:
            return picks
    best = max((search.speedup(picks) for picks, _ in tried), default=1.0)
    raise ValueError(
        f"no plan makes the whole pipeline {speedup:g} times as fast; the fastest that was run reaches {best:.2f}"
    )


def _predicted_as_fast(search: Search, speedup: float) -> Picks:
    """The most exact picks that are predicted to make whole runs so fast, or the cheapest ones."""
    whole, full = search.session.exact_seconds, search.chooser.cost(search.exact)
    # What is not attention takes what is left of a run, but never less than nothing.
    budget = whole / speedup - max(whole - full, 0.0)
    picks = search.chooser.most_exact(budget) if budget > 0 else None
    return _cheapest(search.chooser) if picks is None else picks


def _cheapest(chooser: Chooser) -> Picks:
    return chooser.path()[-1]


def _next_budget(budget: float, low: float, high: float, error: float, max_error: float) -> float:
    """The next budget: by the ratio of bound to measured error, between budgets within and beyond the bound."""
    wanted = budget * 0.95 * max_error / error if error > 0 else 4 * budget
    if high < math.inf and low > 0 and not low * 1.01 < wanted < high * 0.99:
        wanted = math.sqrt(low * high)
    return min(wanted, 0.99 * high) if wanted >= high else max(wanted, 1.01 * low)
