"""`calibrate`: measure a pipeline's layers on the user's own inputs, and choose a plan."""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attngen.calibration.candidates import check_candidates, probes_of
from attngen.calibration.choose import Choice, Chooser, Picks
from attngen.calibration.measurements import Cell, LayerMeasurements, Measurements
from attngen.calibration.record import Recorder, clocked
from attngen.calibration.runs import Runner, check_pipeline, relative_error, untouched
from attngen.calibration.trials import Layers, Place, make_trials
from attngen.checks import check_choice, check_count
from attngen.hosts.clock import Clock
from attngen.hosts.hooks import AttnGenWarning, warn
from attngen.hosts.install import Patching, detach, install
from attngen.methods import AttentionMethod, SoftmaxAttention
from attngen.plan import Plan, Stage
from attngen.report import Review
from attngen.schedule import stage_at

COSTS = ("time", "flops")
SAMPLES = 2
"""Network calls of a stage at which layers are measured."""
MAX_CHECKS = 8
"""Plans that are run at most to find one within the bound."""
CLOSE_ENOUGH = 0.85
"""A plan whose error is at least this share of the bound is not made cheaper."""
SMALL_ERROR = 0.05
"""Error at which the influence of a stage is measured where no bound is given."""


def calibrate(
    pipe: Any,
    *,
    candidates: Sequence[AttentionMethod] | None = None,
    max_error: float | None = None,
    speedup: float | None = None,
    num_stages: int = 3,
    seed: int = 0,
    cost: str = "time",
    **call_kwargs: Any,
) -> Plan:
    """Find which attention method each layer should use at each time, by measuring on your own inputs.

    It runs the pipeline about `num_stages` + 4 times. In one run every layer's exact output is compared with that
    of each candidate; the gain, the shortcut and the sharpness of agents are fitted to it, layer by layer and stage
    by stage, without training. How much an error of a layer changes the network's prediction, and how much an error of
    a stage changes the final latents, is measured too. Then the best plan is chosen, run, and chosen again until the
    bound holds. Afterwards the pipeline and all random states are as before.

    Args:
        pipe: a diffusers pipeline without a patch.
        candidates: methods to try in every layer; None tries the default ones. Agent methods are fitted.
        max_error: find the cheapest plan whose relative error ‖latents - exact latents‖ / ‖exact latents‖, after the
            last step and with the same random numbers, is at most this. One of this and `speedup`.
        speedup: find the most exact plan whose attention layers, projections included, cost this many times less.
        num_stages: number of stages the denoising schedule is split into.
        seed: of the pipeline's generator, where `call_kwargs` have none.
        cost: to minimise: "time", measured on this machine, or "flops", counted, the same on every machine.
        call_kwargs: of the pipeline's call: prompts or labels, steps, guidance. Several prompts measure better.
            `output_type` is not used.

    Returns:
        The plan, for `attngen.apply`. Its `measurements` are an `attngen.calibration.Measurements`: errors, costs,
        and a heat map by `.plot(path)`. `plan.save(path)` writes them next to the plan.

    Raises:
        ValueError: before any work for arguments that cannot be used; after measuring for a `speedup` that no plan
            reaches, naming the largest that one does, and where the exact output is not finite.
    """
    _check_bound(max_error, speedup)
    check_count("num_stages", num_stages)
    check_count("seed", seed, at_least=0)
    check_choice("cost", cost, COSTS)
    methods = check_candidates(candidates)
    models = check_pipeline(pipe, call_kwargs)
    runner = Runner(pipe, call_kwargs, seed)
    with untouched(pipe), torch.compiler.set_stance("force_eager"), _bar() as bar:
        try:
            return _Search(models, runner, methods, num_stages, cost, bar).find(max_error, speedup)
        finally:
            for model in models.values():
                detach(model)
            runner.rewind()


class _Search:
    """One calibration, from the exact run to the plan."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        runner: Runner,
        candidates: Sequence[AttentionMethod],
        num_stages: int,
        cost: str,
        bar: Any,
    ) -> None:
        self.models, self.runner, self.candidates, self.cost, self.bar = models, runner, candidates, cost, bar
        self.clock = Clock(runner.pipe)
        self.runs = 0
        self.checks: list[dict[str, float]] = []
        self._errors: dict[Plan, float] = {}
        self.moments: dict[str, list[float]] = {name: [] for name in models}
        self.bar.set_description("exact run")
        with clocked(models, self.clock, lambda name, moment: self.moments[name].append(moment)):
            self.exact = self._run(count=False)
        self.starts = stage_starts([t for times in self.moments.values() for t in times], num_stages)
        self.calls = tuple(self._calls_in(stage) for stage in range(len(self.starts)))
        self.bar.total = sum(self.calls) * (2 + len(self.starts) + 3)
        self.bar.update(sum(self.calls))

    def find(self, max_error: float | None, speedup: float | None) -> Plan:
        """The plan under a bound, with its measurements."""
        self.layers = self._measure()
        self.trials = make_trials(self.layers, self.candidates, self.cost)
        self.gains = self._stage_gains(max_error or SMALL_ERROR)
        self.chooser = self._chooser(self.gains)
        self.full_cost = self.chooser.cost({place: 0 for place in self.trials})
        if speedup is not None:
            picks = self.chooser.most_exact(self.full_cost / speedup)
            if picks is None:
                best = self.full_cost / max(self.chooser.lowest_cost(), 1e-30)
                raise ValueError(
                    f"no plan makes attention {speedup:g} times cheaper; the most these candidates reach is {best:.2f}"
                )
        else:
            assert max_error is not None
            picks = self._within(max_error)
        self.bar.total = self.bar.n
        bound = {"max_error": float(max_error)} if max_error is not None else {"speedup": float(speedup or 1)}
        return self._result(picks, bound)

    # Runs

    def _run(self, count: bool = True) -> Tensor:
        self.runs += 1
        output = self.runner()
        if count:
            self.bar.update(sum(self.calls))
        return output

    def _error(self, plan: Plan) -> float:
        """Measured error of the final latents with a plan."""
        if plan not in self._errors:
            self._patch(plan)
            self._errors[plan] = relative_error(self._run(), self.exact)
            self._unpatch()
        return self._errors[plan]

    def _patch(self, plan: Plan, metric: bool = False) -> None:
        for model in self.models.values():
            install(model, Patching(plan, uuid.uuid4().hex, Review(plan.starts), self.clock, metric=metric))

    def _unpatch(self) -> None:
        for model in self.models.values():
            detach(model)

    def _calls_in(self, stage: int) -> int:
        return sum(stage_at(self.starts, t) == stage for times in self.moments.values() for t in times)

    # Measuring

    def _measure(self) -> Layers:
        probes = probes_of(self.candidates)
        metric = any(probe.method.needs_metric for probe in probes)
        self._patch(Plan.of(SoftmaxAttention()), metric)
        chosen = {name: choose_calls(times, self.starts) for name, times in self.moments.items()}
        self.bar.set_description("measuring layers")
        timed = self.cost == "time"
        recorder = Recorder(self.models, self.clock, probes, self.starts, chosen, timed, lambda: self.bar.update(1))
        with recorder.listening(), _quiet():
            output = self._run(count=False)
        if not torch.equal(output, self.exact):
            warn("two runs of the pipeline with the same seed differ, so errors below that difference mean nothing")
        layers = Layers.of(self.models, recorder, self.moments, self.starts)
        self._unpatch()
        return layers

    def _stage_gains(self, size: float) -> list[float]:
        """Relative error of the final latents by that of the predictions, measured with a plan for each stage."""
        chooser, gains = self._chooser([1.0] * len(self.starts)), []
        for stage in range(len(self.starts)):
            self.bar.set_description(f"stage {stage + 1} of {len(self.starts)}")
            places = {place: chooser.places[place] for place in self.trials if place[1] == stage}
            picks = Chooser(places).cheapest(size * size)
            if chooser.square(picks) == 0:  # nothing is that exact: take the most exact of the inexact
                picks = {place: _least_square(choices) for place, choices in places.items()}
            predicted = math.sqrt(chooser.square(picks))
            gains.append(max(self._error(self._plan(picks)) / predicted, 1e-6) if predicted > 0 else 1.0)
        return gains

    def _chooser(self, gains: Sequence[float]) -> Chooser:
        return Chooser(
            {
                place: [self.layers.choice(place, trial, gains[place[1]]) for trial in trials]
                for place, trials in self.trials.items()
            }
        )

    # Choosing

    def _within(self, max_error: float) -> Picks:
        """The cheapest picks found whose measured error is within the bound; exact ones are, always."""
        best: Picks = dict.fromkeys(self.trials, 0)
        low, high, budget = 0.0, math.inf, max_error
        for i in range(MAX_CHECKS):
            self.bar.set_description(f"checking plan {i + 1}")
            picks = self.chooser.cheapest(budget * budget)
            error = self._check(picks)
            if error <= max_error:
                low = max(low, budget)
                if self.chooser.cost(picks) < self.chooser.cost(best):
                    best = picks
                if error >= CLOSE_ENOUGH * max_error or self.chooser.cost(picks) <= self.chooser.lowest_cost():
                    break
            else:
                high = min(high, budget)
            budget = _next_budget(budget, low, high, error, max_error)
            if high / max(low, 1e-30) < 1.03:
                break
        if all(pick == 0 for pick in best.values()):
            warn(f"no plan within max_error={max_error:g} was found, so this one is exact attention everywhere")
        return best

    def _check(self, picks: Picks) -> float:
        error = self._error(self._plan(picks))
        self.checks.append({"predicted": self._predicted(picks), "error": error, "speedup": self._speedup(picks)})
        return error

    def _predicted(self, picks: Picks) -> float:
        return math.sqrt(self.chooser.square(picks))

    def _speedup(self, picks: Picks) -> float:
        return self.full_cost / max(self.chooser.cost(picks), 1e-30)

    # Results

    def _plan(self, picks: Picks) -> Plan:
        stages = []
        for i, start in enumerate(self.starts):
            taken = {
                layer: self.trials[layer, i][picks[layer, i]].method
                for layer in self.layers.tokens
                if picks.get((layer, i), 0) != 0
            }
            stages.append(Stage(start, taken))
        return Plan(tuple(stages))

    def _result(self, picks: Picks, bound: dict[str, float]) -> Plan:
        plan = self._plan(picks)
        self.bar.set_description("checking the plan")
        error = self._check(picks) if plan not in self._errors else self._errors[plan]
        layers = tuple(
            LayerMeasurements(name, tokens, tuple(self._cell(name, i, picks) for i in range(len(self.starts))))
            for name, tokens in self.layers.tokens.items()
        )
        parameter = next(next(iter(self.models.values())).parameters())
        measurements = Measurements(
            layers=layers,
            starts=self.starts,
            calls=self.calls,
            cost=self.cost,
            error=error,
            predicted_error=self._predicted(picks),
            speedup=self._speedup(picks),
            bound=bound,
            checks=tuple(self.checks),
            settings={
                "seed": self.runner.seed,
                "device": parameter.device.type,
                "dtype": str(parameter.dtype).removeprefix("torch."),
                "runs": self.runs,
            },
        )
        return replace(plan, measurements=measurements)

    def _cell(self, layer: str, stage: int, picks: Picks) -> Cell:
        place: Place = (layer, stage)
        influence = self.gains[stage] * self.layers.influence(place)
        return Cell(self.starts[stage], influence, tuple(self.trials[place]), picks[place])


def _least_square(choices: Sequence[Choice]) -> int:
    """The most exact choice that has an error at all; 0 where none has."""
    return min((i for i, choice in enumerate(choices) if choice.square > 0), key=lambda i: choices[i].square, default=0)


def _check_bound(max_error: float | None, speedup: float | None) -> None:
    if (max_error is None) == (speedup is None):
        raise ValueError("calibrate needs either max_error=... or speedup=..., and not both")
    name, value, least = ("max_error", max_error, 0) if speedup is None else ("speedup", speedup, 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= least:
        raise ValueError(f"{name} must be a finite number above {least}, got {value!r}")


def stage_starts(times: Sequence[float], num_stages: int) -> tuple[float, ...]:
    """Times at which stages start so that each has as many of the pipeline's own steps, as near as can be.

    A start is between two steps, so it has the same effect with somewhat more or fewer steps.

    Args:
        times: of the network's calls, 1 is noise.
        num_stages: number of stages.

    Raises:
        ValueError: if there are fewer steps than stages.
    """
    steps = sorted(set(times), reverse=True)
    if len(steps) < num_stages:
        raise ValueError(
            f"{num_stages} stages need as many steps, but this call of the pipeline takes {len(steps)}; lower"
            f" num_stages or raise num_inference_steps"
        )
    firsts = [round(i * len(steps) / num_stages) for i in range(1, num_stages)]
    return (1.0, *((steps[first - 1] + steps[first]) / 2 for first in firsts))


def choose_calls(times: Sequence[float], starts: Sequence[float]) -> dict[int, bool]:
    """Numbers of the calls to measure at, spread over each stage; True once a stage, where influence is measured."""
    chosen: dict[int, bool] = {}
    for stage in range(len(starts)):
        numbers = [i for i, moment in enumerate(times) if stage_at(starts, moment) == stage]
        count = min(SAMPLES, len(numbers))
        picked = [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]
        chosen.update({number: number == picked[len(picked) // 2] for number in picked})
    return chosen


def _next_budget(budget: float, low: float, high: float, error: float, max_error: float) -> float:
    """The next budget: by the ratio of bound to measured error, between budgets within and beyond the bound."""
    wanted = budget * 0.95 * max_error / error if error > 0 else 4 * budget
    if high < math.inf and low > 0 and not low * 1.01 < wanted < high * 0.99:
        wanted = math.sqrt(low * high)
    return min(wanted, 0.99 * high) if wanted >= high else max(wanted, 1.01 * low)


@contextmanager
def _bar() -> Iterator[Any]:
    """A progress bar over network calls, on a terminal."""
    from tqdm.auto import tqdm

    with tqdm(desc="calibrating", unit="call", disable=None, leave=False) as bar:
        yield bar


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings about slow methods while all of them are tried."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnGenWarning)
        yield
