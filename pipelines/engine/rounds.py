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
SECONDS = 30.0  # that all rounds may take together; where whole drawings take longer they have fewer steps
LEAST_STEPS, SAME_SIDE_ROUNDS = 2, 6


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
        """Whether the ratio can be told from 1: six rounds or more, all on one side of it, which chance gives once in
        32 times."""
        return self.rounds >= SAME_SIDE_ROUNDS and (self.low > 1 or self.high < 1)

    def __str__(self) -> str:
        spread = f"{self.low:.2f} to {self.high:.2f}" if self.rounds > 1 else f"{self.median:.2f} in one round"
        return f"{self.median:.2f} ({spread})" if self.differs else f"not told from 1 ({spread})"


@dataclass(frozen=True)
class Measured:
    """A comparison with times.

    Attributes:
        comparison: the samples, operations and differences.
        seconds: of a whole drawing at the speed of each round, by method, in the order of the rows.
        steps: of a round.
    """

    comparison: Comparison
    seconds: list[list[float]]
    steps: int

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
        seconds: that all rounds may take, by the times of the comparison: rounds have fewer steps where they would
            take longer. After three times as many no further round begins.
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
    steps, images = comparison.rows[0].result.settings.steps or 1, comparison.rows[0].result.settings.images
    share = seconds / max(1e-9, rounds * sum(row.result.seconds for row in comparison.rows))
    short, few = (steps, images) if share >= 1 else (min(steps, max(LEAST_STEPS, int(steps * images * share))), 1)
    start = time.monotonic()
    for number in range(rounds):
        order = list(range(len(uses)))
        for row in reversed(order) if number % 2 else order:
            again = replace(comparison.rows[row].result.settings, steps=short, images=few)
            which = f"timing, round {number + 1} of {rounds}, {again.use.label}"
            with closing(engine.generate(again, previews=False, stop=stop)) as events:
                for event in events:
                    if isinstance(event, Result):
                        times[row].append(event.seconds * steps * images / (short * few))
                    else:
                        yield replace(event, what=which) if event.total else event
        if time.monotonic() - start > 3 * seconds:
            break
    yield Measured(comparison, times, short)
