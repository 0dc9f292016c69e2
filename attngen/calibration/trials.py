"""From sums to trials: cost and error of each fitted candidate, per layer and stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from attngen.calibration.candidates import Probe, gained
from attngen.calibration.choose import Choice
from attngen.calibration.sums import Recorded, Sums
from attngen.measurements import Trial
from attngen.methods import AgentAttention, AttentionMethod, SoftmaxAttention, TileAttention
from attngen.schedule import stage_at

Place = tuple[str, int]
"""A layer's name and the index of a stage."""


@dataclass
class Layers:
    """What was measured of layers, as numbers to choose by.

    Attributes:
        recorded: sums, operations and times.
        probes: that were run.
        calls: of each layer in each stage.
    """

    recorded: Recorded
    probes: Sequence[Probe]
    calls: dict[Place, int]

    @classmethod
    def of(
        cls,
        models: Mapping[str, nn.Module],
        recorded: Recorded,
        probes: Sequence[Probe],
        moments: Mapping[str, Sequence[float]],
        starts: Sequence[float],
    ) -> Layers:
        """Count the calls; models that share names of layers share their methods, as in a plan."""
        calls: dict[Place, int] = {}
        for name, model in models.items():
            modules = dict(model.named_modules())
            for layer in recorded.tokens:
                for i in range(len(starts)) if layer in modules else ():
                    number = sum(stage_at(starts, moment) == i for moment in moments[name])
                    calls[layer, i] = calls.get((layer, i), 0) + number
        return cls(recorded, probes, calls)

    def influence(self, place: Place) -> float:
        """Relative error of the prediction by that of the layer; 0 where nothing was to be measured."""
        sums = self.recorded.sums.get(place)
        return 0.0 if sums is None or math.isnan(sums.influence) else sums.influence

    def choice(self, place: Place, trial: Trial, gain: float) -> Choice:
        """Cost and squared error of a trial over all calls of its stage."""
        return Choice(trial.cost * self.calls[place], (gain * self.influence(place) * trial.error) ** 2)

    def costs(self, layer: str, kind: str) -> dict[int, float]:
        """Cost of one call by probe; -1 is exact."""
        if kind == "flops":
            return self.recorded.operations[layer]
        return self.recorded.times.get(layer, {})


def make_trials(layers: Layers, candidates: Sequence[AttentionMethod], cost: str) -> dict[Place, list[Trial]]:
    """Trials by layer and stage; the first is exact attention."""
    return {
        (layer, stage): _trials_at(layers, (layer, stage), candidates, cost)
        for layer in layers.recorded.tokens
        for stage in sorted({stage for _, stage in layers.calls})
    }


def _trials_at(layers: Layers, place: Place, candidates: Sequence[AttentionMethod], cost: str) -> list[Trial]:
    costs, sums = layers.costs(place[0], cost), layers.recorded.sums.get(place)
    active = layers.recorded.active[place[0]]
    trials = [Trial(SoftmaxAttention(), 0.0, costs.get(-1, 0.0))]
    if sums is None or sums.exact == 0 or math.isnan(sums.influence):
        return trials
    for i, candidate in enumerate(candidates):
        numbers = [n for n, probe in enumerate(layers.probes) if probe.candidate == i and n in active]
        if not numbers:
            continue
        if isinstance(candidate, AgentAttention):
            trials += _agent_trials(layers, sums, candidate, numbers, costs)
        elif numbers[0] in sums.squares and math.isfinite(sums.squares[numbers[0]]):
            error = math.sqrt(sums.squares[numbers[0]] / sums.exact)
            trials.append(Trial(candidate, error, costs[numbers[0]]))
            if isinstance(candidate, TileAttention):
                trials += _tile_trials(sums, candidate, numbers, costs, error)
    return trials


def _agent_trials(
    layers: Layers, sums: Sums, candidate: AgentAttention, numbers: Sequence[int], costs: Mapping[int, float]
) -> list[Trial]:
    """The candidate at its best sharpness, with and without a shortcut, which has a cost of its own."""
    fitted = {n: sums.products[n] for n in numbers if n in sums.products}
    if not fitted:
        return []
    own = next(n for n in fitted if _exponent(layers, n) == candidate.broadcast_exponent)
    given = _relative(fitted[own].square(candidate.gain, candidate.shortcut), sums)
    trials = []
    for with_shortcut in (False, True):
        fits = {n: products.fit(with_shortcut) for n, products in fitted.items()}
        best = min(fits, key=lambda n: fits[n].square)
        fit = fits[best]
        if not math.isfinite(fit.square) or with_shortcut and fit.shortcut == 0:
            continue
        # Times are measured once for all sharpnesses, at the first; the last probe has a shortcut.
        price = costs[numbers[-1] if with_shortcut else numbers[0]]
        method = replace(candidate, broadcast_exponent=_exponent(layers, best), gain=fit.gain, shortcut=fit.shortcut)
        trials.append(Trial(method, _relative(fit.square, sums), price, given))
    return trials


def _tile_trials(
    sums: Sums, candidate: TileAttention, numbers: Sequence[int], costs: Mapping[int, float], error: float
) -> list[Trial]:
    """Tiles with the gains that were fitted, whose first-order term has a cost; none where no gain is above 0."""
    found = sums.gains.get(numbers[0])
    if found is None or not math.isfinite(found.square):
        return []
    gains, square = found.fit()
    if not any(gains):
        return []
    return [Trial(gained(candidate, gains), _relative(square, sums), costs[numbers[-1]], error)]


def _exponent(layers: Layers, probe: int) -> float:
    method = layers.probes[probe].method
    assert isinstance(method, AgentAttention)
    return method.broadcast_exponent


def _relative(square: float, sums: Sums) -> float:
    return math.sqrt(max(0.0, square) / sums.exact)


def front(trials: Sequence[Trial], chosen: int) -> tuple[tuple[Trial, ...], int]:
    """Exact attention, the chosen trial, and those that no other beats in both error and cost; and where it now is."""
    kept = [0]
    for i, trial in enumerate(trials[1:], start=1):
        better = (other.error <= trial.error and other.cost <= trial.cost for other in trials[1:i])
        later = (other.error <= trial.error and other.cost <= trial.cost for other in trials[i + 1 :] if other != trial)
        if i == chosen or not (any(better) or any(later)):
            kept.append(i)
    return tuple(trials[i] for i in kept), kept.index(chosen)
