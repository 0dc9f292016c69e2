"""`calibrate`: measure a pipeline's layers on the user's own inputs, and choose a plan."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from attngen.calibration import progress as progress_of
from attngen.calibration.bounds import Bounds, Found, find
from attngen.calibration.candidates import check_candidates, probes_of
from attngen.calibration.choose import Chooser, Picks, least_square
from attngen.calibration.notes import Notes, setting_of
from attngen.calibration.progress import PLANS, STAGES, Progress, Reporter
from attngen.calibration.runs import Runner, check_pipeline, untouched
from attngen.calibration.session import ROUNDS, Session
from attngen.calibration.stages import MAX_STAGES
from attngen.calibration.timing import Stopwatch
from attngen.calibration.trials import Layers, Place, front, make_trials
from attngen.checks import check_choice, check_count
from attngen.hosts.install import detach
from attngen.hosts.seen import warn
from attngen.learned.file import config_hash
from attngen.measurements import Cell, LayerMeasurements, Measurements
from attngen.methods import AttentionMethod
from attngen.plan import Plan, PlanModel, Stage

COSTS = ("time", "flops")
SMALL_ERROR = 0.05
"""Error at which the influence of a stage is measured where no bound is given."""


def calibrate(
    pipe: Any,
    *,
    candidates: Sequence[AttentionMethod] | None = None,
    max_error: float | None = None,
    speedup: float | None = None,
    num_stages: int | None = None,
    seed: int = 0,
    cost: str = "time",
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] | None = None,
    **call_kwargs: Any,
) -> Plan:
    """Find which attention method each layer should use at each time, by measuring on your own inputs.

    It takes at most 30 runs of the pipeline. In one run every layer's exact output is compared with that of each
    candidate; the gain, the shortcut and the sharpness of agents are fitted to it, layer by layer and stage by stage,
    without training. How much an error of a layer changes the network's prediction, and how much an error of a stage
    changes the final latents, is measured too. Then the best plan is chosen, run, and chosen again until the bound
    holds. With cost="time" whole runs with the plan are timed in turn with exact ones. Afterwards the pipeline and all
    random states are as before.

    Args:
        pipe: a diffusers pipeline without a patch.
        candidates: methods to try in every layer; None tries the default ones. Agent methods are fitted.
        max_error: find the fastest plan whose relative error ‖latents - exact latents‖ / ‖exact latents‖, after the
            last step and with the same random numbers, is at most this. Where no such plan is faster than exact
            attention, the result is exact attention, with a warning.
        speedup: find the most exact plan with which the whole pipeline is this many times faster; with cost="flops",
            with which the attention layers, projections included, need this many times fewer operations. With both
            bounds it also keeps `max_error`.
        num_stages: number of stages the denoising schedule is split into, at most 8. By default a stage for each
            step of a run of at most 8 steps, and 3 for longer ones.
        seed: of the pipeline's generator, where `call_kwargs` have none.
        cost: to minimise: "time", measured on this machine, or "flops", counted, the same on every machine.
        resume: a file that keeps what was measured. A calibration that was interrupted goes on from it, and another
            bound is found without measuring the layers again.
        progress: called with an `attngen.calibration.Progress` after every step; None shows a bar on a terminal.
        clock: gives seconds. By default the CPU time of the thread where one CPU thread computes, which other processes
            do not add to, and the time otherwise.
        call_kwargs: of the pipeline's call: prompts or labels, steps, guidance. Several prompts measure better.
            `output_type` is not used.

    Returns:
        The plan, for `attngen.apply`, for this model. Its `measurements` have seconds, errors, costs, and a heat map by
        `.plot(path)`. `plan.save(path)` writes all of it.

    Raises:
        ValueError: before any work for arguments that cannot be used; after measuring for a `speedup` that no plan
            reaches, within `max_error` if that is given too, naming the largest that was found, and where the exact
            output is not finite.
    """
    bounds = Bounds(max_error, speedup)
    if num_stages is not None:
        check_count("num_stages", num_stages, at_most=MAX_STAGES)
    check_count("seed", seed, at_least=0)
    check_choice("cost", cost, COSTS)
    methods = check_candidates(candidates)
    models = check_pipeline(pipe, call_kwargs)
    options = {"seed": seed, "num_stages": num_stages, "candidates": [method.to_dict() for method in methods]}
    notes = Notes(resume, setting_of(models, call_kwargs, cost, **options))
    runner = Runner(pipe, call_kwargs, seed)
    watch = Stopwatch(next(next(iter(models.values())).parameters()).device, clock)
    with untouched(pipe), torch.compiler.set_stance("force_eager"), _listener(progress) as listener:
        try:
            session = Session(models, runner, watch, notes, Reporter(listener))
            return _Search(session, methods, num_stages, cost).find(bounds)
        finally:
            for model in models.values():
                detach(model)
            runner.rewind()


@contextmanager
def _listener(given: Callable[[Progress], None] | None) -> Iterator[Callable[[Progress], None]]:
    if given is not None:
        yield given
        return
    with progress_of.bar() as shown:
        yield shown


class _Search:
    """One calibration, from the measured layers to the plan."""

    def __init__(
        self, session: Session, candidates: Sequence[AttentionMethod], num_stages: int | None, cost: str
    ) -> None:
        self.session, self.candidates, self.cost = session, candidates, cost
        self.checks: dict[Plan, dict[str, float]] = {}
        self.starts = session.starts(num_stages)
        self.calls = tuple(session.calls_in(self.starts, stage) for stage in range(len(self.starts)))

    def find(self, bounds: Bounds) -> Plan:
        """The plan under the bounds, with its measurements."""
        session = self.session
        probes = probes_of(self.candidates)
        session.expect(self.starts, len(probes))
        session.measure(probes, self.starts, self.cost == "time")
        self.layers = Layers.of(session.models, session.notes.recorded, probes, session.moments, self.starts)
        self.trials = make_trials(self.layers, self.candidates, self.cost)
        self.gains = self._stage_gains(bounds.max_error or SMALL_ERROR)
        self.chooser = self._chooser(self.gains)
        session.reporter.start(PLANS, 2 * ROUNDS)
        found = find(self, bounds)
        if found.why_exact is not None:
            warn(f"the plan is exact attention everywhere: {found.why_exact}")
        return self._result(found, bounds)

    # Measuring

    def _stage_gains(self, size: float) -> list[float]:
        """Relative error of the final latents by that of the predictions, measured with a plan for each stage."""
        chooser, gains = self._chooser([1.0] * len(self.starts)), []
        self.session.reporter.start(STAGES, len(self.starts))
        for stage in range(len(self.starts)):
            places = {place: chooser.places[place] for place in self.trials if place[1] == stage}
            picks = Chooser(places).cheapest(size * size)
            if chooser.square(picks) == 0:  # nothing is that exact: take the most exact of the inexact
                picks = {place: least_square(choices) for place, choices in places.items()}
            predicted = math.sqrt(chooser.square(picks))
            gains.append(max(self.session.error(self.plan(picks)) / predicted, 1e-6) if predicted > 0 else 1.0)
            self.session.reporter.step()
        return gains

    def _chooser(self, gains: Sequence[float]) -> Chooser:
        return Chooser(
            {
                place: [self.layers.choice(place, trial, gains[place[1]]) for trial in trials]
                for place, trials in self.trials.items()
            }
        )

    # What `find` asks

    @property
    def exact(self) -> Picks:
        """Exact attention everywhere."""
        return dict.fromkeys(self.trials, 0)

    def error(self, picks: Picks) -> float:
        """Measured error of a plan."""
        if picks == self.exact:
            return 0.0
        error = self.session.error(self.plan(picks))
        self._checked(picks, error)
        return error

    def speedup(self, picks: Picks, rounds: int = 1) -> float:
        """How many times faster than exact attention whole runs are, measured in that many rounds."""
        plan = self.plan(picks)
        while len(self.session.rounds(plan)) < rounds and (self.session.can_run(2) or not self.session.rounds(plan)):
            self.session.round(plan)
            self.session.reporter.step()
        self._checked(picks, self.session.error(plan))
        return self.session.speedup(plan)

    def _checked(self, picks: Picks, error: float) -> None:
        plan = self.plan(picks)
        check = {"predicted": self.predicted(picks), "error": error, "attention_speedup": self.attention_speedup(picks)}
        if self.session.rounds(plan):
            check["speedup"] = self.session.speedup(plan)
        self.checks[plan] = check

    def predicted(self, picks: Picks) -> float:
        """Error as it is predicted from the layers."""
        return math.sqrt(self.chooser.square(picks))

    def attention_speedup(self, picks: Picks) -> float:
        """Cost of the attention layers, exact by planned."""
        return self.chooser.cost(self.exact) / max(self.chooser.cost(picks), 1e-30)

    def plan(self, picks: Picks) -> Plan:
        """The picks as a plan for this model; places that are not in them are exact."""
        stages = []
        for i, start in enumerate(self.starts):
            taken = {
                layer: self.trials[layer, i][picks[layer, i]].method
                for layer in self.session.notes.recorded.tokens
                if picks.get((layer, i), 0) != 0
            }
            stages.append(Stage(start, taken))
        return Plan(tuple(stages), model=_main_model(self.session.models))

    # Results

    def _result(self, found: Found, bounds: Bounds) -> Plan:
        plan, picks = self.plan(found.picks), found.picks
        is_exact = all(pick == 0 for pick in picks.values())
        rounds = () if is_exact else tuple(self.session.rounds(plan))
        timed = self.session.speedup(plan) if rounds else 1.0
        layers = tuple(
            LayerMeasurements(name, tokens, tuple(self._cell(name, i, picks) for i in range(len(self.starts))))
            for name, tokens in self.session.notes.recorded.tokens.items()
        )
        measurements = Measurements(
            layers=layers,
            starts=self.starts,
            calls=self.calls,
            cost=self.cost,
            error=0.0 if is_exact else self.session.error(plan),
            predicted_error=self.predicted(picks),
            speedup=timed if self.cost == "time" else self.attention_speedup(picks),
            attention_speedup=self.attention_speedup(picks),
            bound=bounds.to_dict(),
            rounds=rounds,
            why_exact=found.why_exact,
            checks=tuple(self.checks.values()),
            settings=self._settings(),
        )
        return replace(plan, measurements=measurements)

    def _settings(self) -> dict[str, Any]:
        parameter = next(next(iter(self.session.models.values())).parameters())
        return {
            "seed": self.session.runner.seed,
            "device": parameter.device.type,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "runs": round(self.session.runs, 2),
        }

    def _cell(self, layer: str, stage: int, picks: Picks) -> Cell:
        place: Place = (layer, stage)
        influence = self.gains[stage] * self.layers.influence(place)
        return Cell(self.starts[stage], influence, *front(self.trials[place], picks[place]))


def _main_model(models: Mapping[str, nn.Module]) -> PlanModel:
    """The denoiser that the plan is for: not a ControlNet, where there is another."""
    names = [name for name in models if not name.startswith("controlnet")] or list(models)
    model = models[names[0]]
    return PlanModel(type(model).__name__, config_hash(model))
