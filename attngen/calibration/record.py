"""Measurements during a run of a pipeline: each layer's exact output, and the output of every candidate in its place.

A candidate is computed inside the layer's own call, from the same inputs, and only sums are kept. The layer returns its
own exact output, bit for bit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attngen.calibration.candidates import Probe, with_gains
from attngen.calibration.fit import Gains, Products
from attngen.calibration.replay import Replay, prediction_of
from attngen.calibration.sums import Recorded, Sums
from attngen.calibration.timing import Stopwatch
from attngen.hosts.clock import Clock
from attngen.hosts.families import family_of, slots
from attngen.hosts.hooks import patched_layers
from attngen.layers.route import EXACT
from attngen.methods import SoftmaxAttention, TileAttention
from attngen.schedule import stage_at

TIMING_ROUNDS = 4
"""Rounds after the first two: one warms up, and one shows what is far too slow."""
TOO_SLOW = 1.5
"""Times the seconds of exact attention at which a candidate is not timed again."""
SMALLEST_PROBE = 1e-3
"""A layer's influence is measured with an error of at least this share of its output, which rounding cannot be."""


class ClockHook:
    """On a denoiser: passes the time of each call, 1 to 0, to a listener before the call."""

    def __init__(self, model: nn.Module, clock: Clock, listener: Callable[[float], None]) -> None:
        family = family_of(model)
        assert family is not None
        self.clock, self.default, self.listener = clock, family.clock, listener
        self.place = None if family.time is None else slots(model)[family.time]

    @torch.compiler.disable
    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = None if self.place is None else self.place.get(args, kwargs)
        if timestep is None:  # a plan of one stage is all that holds then
            self.listener(1.0)
            return
        values = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [float(timestep)]
        self.listener(max(self.clock.time(value, self.default) for value in values))


@contextmanager
def clocked(models: Mapping[str, nn.Module], clock: Clock, listener: Callable[[str, float], None]) -> Iterator[None]:
    """Within it `listener` is called before every call, with the model's name and the time."""

    def tell(name: str) -> Callable[[float], None]:
        return lambda moment: listener(name, moment)

    hooks: dict[str, Any] = {name: ClockHook(model, clock, tell(name)) for name, model in models.items()}
    handles = [model.register_forward_pre_hook(hooks[name], with_kwargs=True) for name, model in models.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """Measures all probes in all layers at chosen calls of each model.

    Args:
        models: by name, patched with a plan that is exact everywhere.
        clock: of the pipeline.
        probes: `WITHOUT`, `VALUES`, then the others.
        starts: of the stages.
        chosen: for each model, the numbers of the calls to measure at, and whether influence is measured there.
        watch: measures times; None where they are not a cost.
        group: number of neighbouring layers whose influence is measured in one call.
        recorded: what was measured before, and where new numbers go; its calls are not measured again.
        step: called after every layer that was measured, and every call that measures influence.
        keep: called after every call of a network that was measured.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        clock: Clock,
        probes: Sequence[Probe],
        starts: Sequence[float],
        chosen: Mapping[str, Mapping[int, bool]],
        watch: Stopwatch | None,
        group: int,
        recorded: Recorded,
        step: Callable[[], None],
        keep: Callable[[], None],
    ) -> None:
        self.models, self.clock, self.probes, self.starts, self.chosen = models, clock, probes, starts, chosen
        self.watch, self.group, self.recorded, self.step, self.keep = watch, group, recorded, step, keep
        self._timed_shapes: dict[tuple[Any, ...], dict[int, float]] = {}
        self._counts = dict.fromkeys(models, 0)
        self._stage: int | None = None  # of the call that is measured, or None
        self._errors: dict[str, dict[int, float]] = {}  # of the call, by layer and probe
        self._replaced: dict[nn.Module, int] = {}  # layers whose output is a probe's

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the models' calls are measured."""
        handles = []
        for name, model in self.models.items():
            clock: Any = ClockHook(model, self.clock, self._before(name))
            handles.append(model.register_forward_pre_hook(clock, with_kwargs=True))
            handles.append(model.register_forward_hook(self._after(name), with_kwargs=True))
            for layer, attn in patched_layers(model).items():
                handles.append(attn.register_forward_hook(self._on_layer(layer), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Callable[[float], None]:
        def listen(moment: float) -> None:
            if self._replaced:
                return
            number = self._counts[name]
            wanted = number in self.chosen[name] and number not in self.recorded.done.get(name, [])
            self._stage = stage_at(self.starts, moment) if wanted else None
            self._errors = {}

        return listen

    def _after(self, name: str) -> Callable[..., None]:
        def listen(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._replaced:
                return
            number = self._counts[name]
            self._counts[name] += 1
            if self._stage is None:
                return
            if self.chosen[name][number]:
                self._measure_influence(model, args, kwargs, output)
            self.recorded.done.setdefault(name, []).append(number)
            self._stage = None
            self.keep()

        return listen

    def _on_layer(self, layer: str) -> Callable[..., Any]:
        def listen(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._replaced:
                probe = self._replaced.get(attn)
                return None if probe is None else Replay(attn, args, kwargs).output(self.probes[probe].method)
            if self._stage is not None:
                self._measure(layer, Replay(attn, args, kwargs), output)
                self.step()
            return None

        return listen

    def _measure(self, layer: str, replay: Replay, output: Any) -> None:
        """Measure one call of a layer."""
        found = self.recorded
        routes = {i: replay.route(probe.method) for i, probe in enumerate(self.probes)}
        active = [i for i, route in routes.items() if route.kernel != EXACT]
        if layer not in found.operations:
            found.tokens[layer] = replay.tokens
            found.operations[layer] = replay.operations([probe.method for probe in self.probes], routes)
        if active and self.watch is not None:
            if layer not in found.times:
                found.times[layer] = self._time(replay, active, self.watch)
            active = self._faster(active, found.times[layer])
        found.active.setdefault(layer, set()).update(active)
        if not active:
            return
        assert self._stage is not None
        self._compare(layer, found.sums.setdefault((layer, self._stage), Sums()), replay, active, output)

    def _compare(self, layer: str, sums: Sums, replay: Replay, active: Sequence[int], output: Any) -> None:
        """Add the errors of the probes in one call of a layer."""
        exact = replay.of_image(output).float()
        length = float(exact.double().square().sum())
        sums.exact += length
        without, values, target = None, None, None
        if 0 in active and any(self.probes[i].fitted for i in active):
            without = replay.image(self.probes[0].method).float()
            values, target = replay.image(self.probes[1].method).float() - without, exact - without
        errors = self._errors.setdefault(layer, {})
        for i in active:
            probe = self.probes[i]
            if probe.candidate < 0 or probe.only_timed:
                continue
            got = replay.image(probe.method).float()
            square = float((got - exact).double().square().sum())
            sums.squares[i] = sums.squares.get(i, 0.0) + square
            errors[i] = errors.get(i, 0.0) + (square / max(length, 1e-30)) ** 0.5
            if probe.fitted and without is not None and values is not None and target is not None:
                sums.products.setdefault(i, Products()).add(got - without, values, target)
            if isinstance(probe.method, TileAttention):
                bare, *ones = (replay.image(method).float() for method in with_gains(probe.method, replay.layer.heads))
                sums.gains.setdefault(i, Gains()).add([one - bare for one in ones], exact - bare)

    def _faster(self, active: Sequence[int], times: Mapping[int, float]) -> list[int]:
        """The probes of candidates that are faster than exact attention: the others are in no plan."""
        faster = {self.probes[i].candidate for i, seconds in times.items() if i >= 0 and seconds < times[-1]}
        return [i for i in active if self.probes[i].candidate in faster or faster and self.probes[i].candidate < 0]

    def _time(self, replay: Replay, active: Sequence[int], watch: Stopwatch) -> dict[int, float]:
        """Seconds of exact attention (-1) and of the first fitted and all other probes.

        They are taken in turn. A probe's seconds are the median of its share of the exact time over the rounds, so that
        a machine that gets slower meanwhile changes them little. Those that are far too slow drop out after a round.
        """
        wanted, seen = [-1], set()
        for i in active:
            probe = self.probes[i]
            if probe.candidate >= 0 and not (probe.fitted and probe.candidate in seen):
                wanted.append(i)
            if probe.fitted:
                seen.add(probe.candidate)
        key = (*replay.shape, tuple(wanted))
        if key not in self._timed_shapes:
            seconds: dict[int, list[float]] = {i: [] for i in wanted}
            for turn in range(2 + TIMING_ROUNDS):
                for i in wanted:
                    method = SoftmaxAttention() if i < 0 else self.probes[i].method
                    seconds[i].append(watch(lambda method=method: replay.output(method))[1])
                if turn == 1:
                    wanted = [i for i in wanted if seconds[i][1] < TOO_SLOW * seconds[-1][1]]
            found = {i: [own / max(base, 1e-12) for own, base in _paired(seconds, i)] for i in seconds}
            exact = statistics.median(seconds[-1][1:])
            self._timed_shapes[key] = {i: exact * statistics.median(shares) for i, shares in found.items()}
        return self._timed_shapes[key]

    def _measure_influence(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Call the model again with the outputs of each group of layers replaced; measure the change."""
        assert self._stage is not None
        exact = prediction_of(output)
        length = float(exact.norm())
        layers = list(patched_layers(model).items())
        for first in range(0, len(layers), self.group):
            probes = {layer: self._probe_of(layer) for layer, _ in layers[first : first + self.group]}
            replaced = {attn: probes[layer] for layer, attn in layers[first : first + self.group] if layer in probes}
            self._replaced = {attn: probe for attn, probe in replaced.items() if probe is not None}
            if not self._replaced:
                continue
            try:
                changed = prediction_of(model(*args, **kwargs))
            finally:
                self._replaced = {}
            self.recorded.influence_calls += 1
            self.step()
            used = {layer: self._errors[layer][probe] for layer, probe in probes.items() if probe is not None}
            share = float((changed - exact).norm()) / max(length, 1e-30)
            for layer in used:
                # Their squares add up, so layers of one group have one influence.
                influence = share / math.sqrt(sum(error * error for error in used.values()))
                self.recorded.sums[layer, self._stage].influence = influence

    def _probe_of(self, layer: str) -> int | None:
        """The probe of the smallest error that rounding cannot be, in this call; None where none has an error."""
        errors = {i: error for i, error in self._errors.get(layer, {}).items() if error > 0}
        large = {i: error for i, error in errors.items() if error >= SMALLEST_PROBE}
        if large:
            return min(large, key=lambda i: large[i])
        return max(errors, key=lambda i: errors[i]) if errors else None


def _paired(seconds: Mapping[int, Sequence[float]], probe: int) -> Iterator[tuple[float, float]]:
    """Seconds of a probe and of exact attention in the same rounds; the first round warms up."""
    return zip(seconds[probe][1:], seconds[-1][1:], strict=False)
