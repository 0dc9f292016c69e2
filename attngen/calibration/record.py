"""Measurements during a run of a pipeline: each layer's exact output, and the output of every candidate in its place.

A candidate is computed inside the layer's own call, from the same inputs, and only sums are kept. The layer returns its
own exact output, bit for bit.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attngen.calibration.candidates import Probe
from attngen.calibration.fit import Products
from attngen.hosts.clock import Clock
from attngen.hosts.core import core_enter, core_layer
from attngen.hosts.families import family_of, slots
from attngen.hosts.hooks import patched_layers
from attngen.hosts.spec import decide
from attngen.layers.call import CHANNEL_KEY, Call
from attngen.layers.layer import Layer
from attngen.layers.route import EXACT, Route, exact
from attngen.methods import AttentionMethod, SoftmaxAttention
from attngen.report import layer_shape
from attngen.schedule import stage_at

TIMING_ROUNDS = 5
SMALLEST_PROBE = 1e-3
"""A layer's influence is measured with an error of at least this share of its output, which rounding cannot be."""


@dataclass
class Sums:
    """Sums over the measured calls of one layer in one stage.

    Attributes:
        exact: sum of the squares of its exact output.
        squares: sum of squared errors, by probe.
        products: for the probes that are fitted.
        influence: relative error of the model's prediction by relative error of this layer; NaN until measured.
    """

    exact: float = 0.0
    squares: dict[int, float] = field(default_factory=dict)
    products: dict[int, Products] = field(default_factory=dict)
    influence: float = float("nan")


class ClockHook:
    """On a denoiser: passes the time of each call, 1 to 0, to a listener before the call."""

    def __init__(self, model: nn.Module, clock: Clock, listener: Callable[[float], None]) -> None:
        family = family_of(model)
        assert family is not None
        self.clock, self.default, self.place, self.listener = clock, family.clock, slots(model)[family.time], listener

    @torch.compiler.disable
    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = self.place.get(args, kwargs)
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
        timed: whether to measure times.
        tell: called after every call of a network.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        clock: Clock,
        probes: Sequence[Probe],
        starts: Sequence[float],
        chosen: Mapping[str, Mapping[int, bool]],
        timed: bool,
        tell: Callable[[], None],
    ) -> None:
        self.models, self.clock, self.probes, self.starts, self.chosen = models, clock, probes, starts, chosen
        self.timed, self.tell = timed, tell
        self.sums: dict[tuple[str, int], Sums] = {}
        self.active: dict[str, set[int]] = {}
        self.tokens: dict[str, int] = {}
        self.operations: dict[str, dict[int, float]] = {}  # by layer; probe -1 is exact
        self.times: dict[str, dict[int, float]] = {}  # by layer; probe -1 is exact
        self._timed_shapes: dict[tuple[Any, ...], dict[int, float]] = {}
        self._counts = dict.fromkeys(models, 0)
        self._stage: int | None = None  # of the call that is measured, or None
        self._errors: dict[str, dict[int, float]] = {}  # of the call, by layer and probe
        self._replaced: tuple[nn.Module, int] | None = None  # a layer whose output is a probe's

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
            if self._replaced is not None:
                return
            measured = self._counts[name] in self.chosen[name]
            self._stage = stage_at(self.starts, moment) if measured else None
            self._errors = {}

        return listen

    def _after(self, name: str) -> Callable[..., None]:
        def listen(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._replaced is not None:
                return
            self.tell()
            if self._stage is not None and self.chosen[name][self._counts[name]]:
                self._measure_influence(model, args, kwargs, output)
            self._counts[name] += 1
            self._stage = None

        return listen

    def _on_layer(self, layer: str) -> Callable[..., Any]:
        def listen(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._replaced is not None:
                replaced, probe = self._replaced
                return Replay(attn, args, kwargs).output(self.probes[probe].method) if replaced is attn else None
            if self._stage is not None:
                self._measure(layer, Replay(attn, args, kwargs), output)
            return None

        return listen

    def _measure(self, layer: str, replay: Replay, output: Any) -> None:
        """Measure one call of a layer."""
        routes = {i: replay.route(probe.method) for i, probe in enumerate(self.probes)}
        active = [i for i, route in routes.items() if route.kernel != EXACT]
        self.active.setdefault(layer, set()).update(active)
        if layer not in self.operations:
            self.tokens[layer] = replay.tokens
            self.operations[layer] = replay.operations([probe.method for probe in self.probes], routes)
        if not active:
            return
        assert self._stage is not None
        if self.timed and layer not in self.times:
            self.times[layer] = self._time(replay, active)
        sums = self.sums.setdefault((layer, self._stage), Sums())
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
            if probe.candidate < 0 or self._only_timed(probe):
                continue
            got = replay.image(probe.method).float()
            square = float((got - exact).double().square().sum())
            sums.squares[i] = sums.squares.get(i, 0.0) + square
            errors[i] = errors.get(i, 0.0) + (square / max(length, 1e-30)) ** 0.5
            if probe.fitted and without is not None and values is not None and target is not None:
                sums.products.setdefault(i, Products()).add(got - without, values, target)

    def _only_timed(self, probe: Probe) -> bool:
        return not probe.fitted and any(p.fitted and p.candidate == probe.candidate for p in self.probes)

    def _time(self, replay: Replay, active: Sequence[int]) -> dict[int, float]:
        """Seconds of exact attention (-1) and of the first fitted and all other probes, taken in turn, medians."""
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
            for _ in range(1 + TIMING_ROUNDS):
                for i in wanted:
                    seconds[i].append(replay.seconds(SoftmaxAttention() if i < 0 else self.probes[i].method))
            self._timed_shapes[key] = {i: statistics.median(values[1:]) for i, values in seconds.items()}
        return self._timed_shapes[key]

    def _measure_influence(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Call the model again for each layer with that layer's output replaced; measure the prediction's change."""
        assert self._stage is not None
        exact = _prediction(output)
        length = float(exact.norm())
        for layer, attn in patched_layers(model).items():
            errors = {i: error for i, error in self._errors.get(layer, {}).items() if error > 0}
            if not errors:
                continue
            large = {i: error for i, error in errors.items() if error >= SMALLEST_PROBE}
            probe = min(large, key=lambda i: large[i]) if large else max(errors, key=lambda i: errors[i])
            self._replaced = (attn, probe)
            try:
                changed = _prediction(model(*args, **kwargs))
            finally:
                self._replaced = None
            self.tell()
            share = float((changed - exact).norm()) / max(length, 1e-30)
            self.sums[layer, self._stage].influence = share / errors[probe]


class Replay:
    """One call of a layer, to be computed again by other methods."""

    def __init__(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.attn, self.args, self.kwargs = attn, args, kwargs
        self.enter = core_enter(attn)  # of a core host, or None
        self.call: Call | None = kwargs.get(CHANNEL_KEY) if self.enter is None else self.enter.calls.now
        first = args[0] if args else next(iter(kwargs.values()))
        self.hidden_states: Tensor = kwargs.get("hidden_states", first)
        text = kwargs.get("encoder_hidden_states")
        in_front = 0 if self.call is None or text is not None else self.call.context
        self.context_tokens: int = in_front if text is None else text.shape[1]
        self.tokens: int = self.hidden_states.shape[1] - in_front
        if self.call is not None and (self.enter is not None or self.tokens > math.prod(self.call.grid)):
            # Reference images follow the image, and are context.
            self.context_tokens += self.tokens - math.prod(self.call.grid)
            self.tokens = math.prod(self.call.grid)

    @property
    def layer(self) -> Layer:
        """The layer as its host sees it."""
        if self.enter is not None and self.enter.seen is not None:
            return core_layer(self.attn, *self.enter.seen)
        return self.attn.processor.layer(self.attn, self.context_tokens)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The sizes that its time depends on."""
        layer = self.layer
        sizes = tuple(self.hidden_states.shape), self.context_tokens, layer.heads, layer.width
        return (*sizes, None if self.call is None else self.call.grid)

    def route(self, method: AttentionMethod) -> Route:
        """The layer's route with a method."""
        if self.enter is not None and self.enter.seen is None:
            return exact("its product was not over the image")
        layer = self.layer
        like = layer.like(self.hidden_states)
        like = like.sized(like.shape[0], self.tokens, *like.shape[2:])
        return decide(layer, None if self.call is None else self.call._replace(method=method), like)

    def operations(self, methods: Sequence[AttentionMethod], routes: Mapping[int, Route]) -> dict[int, float]:
        """Of one sample and call, by probe; -1 is exact."""
        assert self.call is not None
        if all(route.kernel == EXACT for route in routes.values()):
            return dict.fromkeys((-1, *routes), 0.0)
        shape = layer_shape(self.layer, self.call.grid)
        found = {-1: float(shape.exact_flops())}
        for i, route in routes.items():
            found[i] = shape.exact_flops() if route.kernel == EXACT else methods[i].flops(shape, route.kernel)
        return found

    def output(self, method: AttentionMethod) -> Any:
        """The layer's output with a method. Its own hooks are not called."""
        assert self.call is not None
        call = self.call._replace(method=method, trace=None)
        if self.enter is None:
            return self.attn.forward(*self.args, **{**self.kwargs, CHANNEL_KEY: call})
        with self.enter.catching(self.attn, call):
            return self.attn.forward(*self.args, **self.kwargs)

    def image(self, method: AttentionMethod) -> Tensor:
        """The image tokens of that output; of a core host's layer all of it, since their order is the model's."""
        return self.of_image(self.output(method))

    def of_image(self, output: Any) -> Tensor:
        """The part of an output that errors are measured on."""
        if self.enter is not None:
            return _prediction(output)
        return output[0] if isinstance(output, tuple) else output

    def seconds(self, method: AttentionMethod) -> float:
        """The time that computing it takes."""
        _wait(self.hidden_states.device)
        start = time.perf_counter()
        self.output(method)
        _wait(self.hidden_states.device)
        return time.perf_counter() - start


def _prediction(output: Any) -> Tensor:
    """All tensors of a model's output, flat: a ControlNet has many."""
    values: list[Any] = [output]
    if isinstance(output, (tuple, list)):
        values = list(output)
    elif not isinstance(output, Tensor) and hasattr(output, "values"):
        values = list(output.values())
    flat: list[Tensor] = []
    for value in values:
        flat += [x for x in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(x, Tensor)]
    return torch.cat([x.detach().float().flatten() for x in flat])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
