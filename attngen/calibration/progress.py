"""How far a calibration is, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

EXACT, LAYERS, STAGES, PLANS = "exact run", "measuring layers", "measuring stages", "checking plans"


@dataclass(frozen=True)
class Progress:
    """A moment of a calibration.

    Attributes:
        phase: what is done now.
        share: of the whole time, in [0, 1].
        seconds_left: expected, or None during the first run.
    """

    phase: str
    share: float
    seconds_left: float | None

    def __str__(self) -> str:
        if self.seconds_left is None:
            return self.phase
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return f"{self.phase}, {f'{minutes} min ' if minutes else ''}{seconds} s left"


Listener = Callable[[Progress], None]


class Reporter:
    """Passes on the progress of phases with known numbers of steps.

    The rest of the present phase is extrapolated from its steps so far, what comes after is as expected.

    Args:
        listener: gets a `Progress` after every step.
        clock: gives seconds.
    """

    def __init__(self, listener: Listener, clock: Callable[[], float] = time.monotonic) -> None:
        self.listener, self.clock = listener, clock
        self.begun = self.started = clock()
        self.phase, self.steps, self.done = EXACT, 1, 0
        self.expected: dict[str, float] = {}

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Seconds that the phases to come will take."""
        self.expected = dict(seconds)

    def start(self, phase: str, steps: int) -> None:
        """Begin a phase of that many steps."""
        self.phase, self.steps, self.done, self.started = phase, max(steps, 1), 0, self.clock()
        self._tell()

    def step(self) -> None:
        """One step of the phase is done."""
        self.done += 1
        self._tell()

    def _tell(self) -> None:
        left = self._left()
        spent = self.clock() - self.begun
        share = 0.0 if left is None else spent / max(spent + left, 1e-9)
        self.listener(Progress(self.phase, share, left))

    def _left(self) -> float | None:
        if not self.expected:
            return None
        phases = list(self.expected)
        now = phases.index(self.phase) if self.phase in phases else -1
        done = min(self.done / self.steps, 1.0)
        here = self.expected.get(self.phase, 0.0) * (1 - done)
        if done >= 0.1:
            here = (self.clock() - self.started) * (1 - done) / done
        return here + sum(self.expected[phase] for phase in phases[now + 1 :])


@contextmanager
def bar() -> Iterator[Listener]:
    """A progress bar, on a terminal."""
    from tqdm.auto import tqdm

    with tqdm(total=100, disable=None, leave=False, bar_format="{percentage:3.0f}%|{bar}| {desc}") as shown:

        def show(progress: Progress) -> None:
            shown.set_description_str(str(progress), refresh=False)
            shown.n = round(100 * progress.share)
            shown.refresh()

        yield show
