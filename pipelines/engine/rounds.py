"""Times of several methods that can be compared: measured in rounds, all methods in turn, with median and range."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipelines.engine.comparison import Comparison
from pipelines.engine.results import Progress, Result
from pipelines.engine.session import Engine
from pipelines.engine.settings import Settings
from pipelines.methods.uses import Use

ROUNDS = 7
SECONDS = 30.0  # after which no further round begins
SAME_SIDE_ROUNDS, CLEAR = 6, 0.2


class Speed(NamedTuple):
    """Times faster than the first method, over rounds in which both were measured.

    Attributes:
        median: of the rounds' ratios.
        low: smallest ratio.
        high: largest ratio.
        rounds: number of rounds.
    """

    median: float
    low: float
    high: float
    rounds: int

    @property
    def differs(self) -> bool:
        """Whether the ratio can be told from 1: all rounds on one side of it, of which a coin would give 1 in 32, or
        at least two of them 20% away."""
        if not (self.low > 1 or self.high < 1):
            return False
        nearest = self.low - 1 if self.low > 1 else 1 / self.high - 1
        return self.rounds >= SAME_SIDE_ROUNDS or (self.rounds > 1 and nearest >= CLEAR)

    def __str__(self) -> str:
        spread = f"{self.low:.2f} to {self.high:.2f}" if self.rounds > 1 else f"{self.median:.2f} in one round"
        return f"{self.median:.2f} ({spread})" if self.differs else f"not told from 1 ({spread})"


@dataclass(frozen=True)
class Measured:
    """A comparison with times.

    Attributes:
        comparison: the samples, operations and differences.
        seconds: of each round, by method, in the order of the rows.
    """

    comparison: Comparison
    seconds: list[list[float]]

    def speed(self, row: int) -> Speed:
        """Of a row against the first."""
        ratios = [first / own for first, own in zip(self.seconds[0], self.seconds[row], strict=True) if own]
        if row == 0 or not ratios:
            return Speed(1.0, 1.0, 1.0, len(ratios))
        return Speed(statistics.median(ratios), min(ratios), max(ratios), len(ratios))

    def median_seconds(self, row: int) -> float:
        """Of a row."""
        return statistics.median(self.seconds[row])


def measure(
    engine: Engine,
    settings: Settings,
    uses: Sequence[Use],
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    stop: threading.Event | None = None,
) -> Generator[Progress | Measured, None, None]:
    """Compare methods; yields `Progress` and at last `Measured`. Every other round goes backwards, against drifts.

    Args:
        engine: that draws.
        settings: what to draw.
        uses: the methods; the others are compared with the first.
        rounds: of timing; the first is not the comparison's own, which also pays for counting.
        seconds: after so many of timing no further round begins, but the first.
        stop: see `Engine.generate`.

    Raises:
        UserError: and what else `Engine.compare` raises.
    """
    with closing(engine.compare(settings, uses, previews=False, stop=stop)) as events:
        for event in events:
            if isinstance(event, Comparison):
                comparison = event
            else:
                yield event
    times: list[list[float]] = [[] for _ in uses]
    start = time.monotonic()
    for number in range(rounds):
        order = list(range(len(uses)))
        for row in reversed(order) if number % 2 else order:
            again = comparison.rows[row].result.settings
            which = f"timing, round {number + 1} of {rounds}, {again.use.label}"
            with closing(engine.generate(again, previews=False, stop=stop)) as events:
                for event in events:
                    if isinstance(event, Result):
                        times[row].append(event.seconds)
                    else:
                        yield replace(event, what=which) if event.total else event
        if time.monotonic() - start > seconds:
            break
    yield Measured(comparison, times)
