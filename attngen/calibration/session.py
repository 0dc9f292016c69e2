"""The runs of a calibration: each is counted, and compared or timed with the exact one."""

from __future__ import annotations

import statistics
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attngen.calibration.candidates import Probe
from attngen.calibration.notes import Notes
from attngen.calibration.progress import LAYERS, PLANS, STAGES, Reporter
from attngen.calibration.record import Recorder, clocked
from attngen.calibration.runs import Runner, relative_error
from attngen.calibration.stages import choose_calls, stage_starts
from attngen.calibration.timing import Stopwatch
from attngen.hosts.clock import Clock
from attngen.hosts.hooks import patched_layers
from attngen.hosts.install import Patching, detach, install
from attngen.hosts.seen import AttnGenWarning, warn
from attngen.layer_rows import Review
from attngen.methods import SoftmaxAttention
from attngen.plan import Plan
from attngen.schedule import stage_at

MAX_RUNS = 30
"""Runs of the pipeline that a calibration takes at most, calls that measure influence included."""
INFLUENCE_RUNS = 6
"""Runs whose calls measure influence, at most; neighbouring layers share a call where there are more."""
ROUNDS = 3
"""Rounds of a timing: an exact run and one with the plan."""
CHECKS = 4
"""Checks of plans that are expected, for the progress."""


class Session:
    """A pipeline's runs, exact or with a plan.

    Args:
        models: the denoisers.
        runner: calls the pipeline.
        watch: measures seconds.
        notes: what was measured before; errors and times are added.
        reporter: of the progress.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], runner: Runner, watch: Stopwatch, notes: Notes, reporter: Reporter
    ) -> None:
        self.models, self.runner, self.watch, self.notes, self.reporter = models, runner, watch, notes, reporter
        self.clock = Clock(runner.pipe)
        self.moments: dict[str, list[float]] = {name: [] for name in models}
        self.before = notes.runs  # of an earlier process
        started = reporter.clock()
        with clocked(models, self.clock, lambda name, moment: self.moments[name].append(moment)):
            self.exact, self.first_seconds = self._run()
        self.wall_seconds = reporter.clock() - started
        notes.check_exact(self.exact)

    @property
    def calls(self) -> int:
        """Calls of networks in a run."""
        return sum(map(len, self.moments.values()))

    @property
    def runs(self) -> float:
        """Runs of the pipeline so far, calls that measured influence included."""
        return self.notes.runs + self.notes.recorded.influence_calls / self.calls

    def can_run(self, number: int) -> bool:
        """Whether that many runs more are left to this process."""
        return self.runs - self.before + number <= MAX_RUNS

    def starts(self, num_stages: int | None) -> tuple[float, ...]:
        """Times at which stages start."""
        return stage_starts([moment for times in self.moments.values() for moment in times], num_stages)

    def calls_in(self, starts: Sequence[float], stage: int) -> int:
        """Calls of networks in a stage."""
        return sum(stage_at(starts, moment) == stage for times in self.moments.values() for moment in times)

    def expect(self, starts: Sequence[float], probes: int) -> None:
        """Estimate what is to come, for the progress."""
        each = self.wall_seconds
        measured = sum(len(choose_calls(times, starts)) for times in self.moments.values()) / self.calls
        checks = CHECKS + 2 * ROUNDS
        self.reporter.expect(
            {LAYERS: each * (2 + measured * probes / 3), STAGES: each * len(starts), PLANS: each * checks}
        )

    def measure(self, probes: Sequence[Probe], starts: Sequence[float], timed: bool) -> None:
        """One run in which layers are measured, as far as they were not before."""
        chosen = {name: choose_calls(times, starts) for name, times in self.moments.items()}
        done = self.notes.recorded.done
        if all(set(chosen[name]) <= set(done.get(name, [])) for name in self.models):
            return
        self._patch(Plan.of(SoftmaxAttention()), metric=any(probe.method.needs_metric for probe in probes))
        numbers = {name: len(patched_layers(model)) for name, model in self.models.items()}
        influence = sum(numbers[name] * sum(calls.values()) for name, calls in chosen.items())
        group = max(1, -(-influence // (INFLUENCE_RUNS * self.calls)))
        layers = sum(numbers[name] * len(set(calls) - set(done.get(name, []))) for name, calls in chosen.items())
        self.reporter.start(LAYERS, layers + influence // group)
        recorder = Recorder(
            self.models,
            self.clock,
            probes,
            starts,
            chosen,
            self.watch if timed else None,
            group,
            self.notes.recorded,
            self.reporter.step,
            self.notes.keep,
        )
        with recorder.listening(), _quiet():
            output, _ = self._run()
        self._unpatch()
        if not torch.equal(output, self.exact):
            warn("two runs of the pipeline with the same seed differ, so errors below that difference mean nothing")

    def error(self, plan: Plan) -> float:
        """Measured error of the final latents with a plan."""
        if plan not in self.notes.errors:
            self._planned(plan)
        return self.notes.errors[plan]

    def round(self, plan: Plan) -> None:
        """Time an exact run and one with the plan, in turn."""
        _, exact = self._run()
        own = self._planned(plan)
        self.notes.rounds.setdefault(plan, []).append((exact, own))
        self.notes.keep()

    def rounds(self, plan: Plan) -> list[tuple[float, float]]:
        """Seconds of the runs that were timed in turn, exact and with the plan."""
        return self.notes.rounds.get(plan, [])

    def speedup(self, plan: Plan) -> float:
        """How many times faster than exact attention the whole pipeline is: the median over the rounds so far."""
        return statistics.median(exact / max(own, 1e-12) for exact, own in self.rounds(plan))

    @property
    def exact_seconds(self) -> float:
        """Seconds of an exact run: the median of those that were timed, or the first one, which is slower."""
        found = [exact for rounds in self.notes.rounds.values() for exact, _ in rounds]
        return statistics.median(found) if found else self.first_seconds

    def _planned(self, plan: Plan) -> float:
        """Run a plan, keep its error; its seconds."""
        self._patch(plan)
        output, seconds = self._run()
        self._unpatch()
        self.notes.errors[plan] = relative_error(output, self.exact)
        self.notes.keep()
        return seconds

    def _run(self) -> tuple[Tensor, float]:
        self.notes.runs += 1
        return self.watch(self.runner)

    def _patch(self, plan: Plan, metric: bool = False) -> None:
        for model in self.models.values():
            install(model, Patching(plan, uuid.uuid4().hex, Review(plan.starts), self.clock, metric=metric))

    def _unpatch(self) -> None:
        for model in self.models.values():
            detach(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings about slow methods while all of them are tried."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnGenWarning)
        yield
