"""Listening to a pipeline's run: what each layer gets and gives, and what every candidate would give in its place.

A candidate is computed inside the layer's own call, from the very tensors that are there, and only sums are kept. What
the layer passes on is its own exact output, bit for bit.
"""

from __future__ import annotations

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
from attngen.hosts.families import family_of, slot
from attngen.hosts.hooks import patched_layers
from attngen.hosts.layers import active_method
from attngen.schedule import stage_at
from attngen.step import CHANNEL_KEY, StepInfo

TIMING_ROUNDS = 5
SMALLEST_PROBE = 1e-3
"""A layer's influence is measured with an error of at least this share of its output, which rounding cannot be."""


@dataclass
class Sums:
    """What is kept of one layer in one stage.

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
    """On a denoiser: hands the time of each call, 1 to 0, to a listener before the call."""

    def __init__(self, model: nn.Module, listener: Callable[[float], None]) -> None:
        family = family_of(model)
        assert family is not None
        self.clock, self.place, self.listener = family.clock, slot(model.forward, family.time), listener

    @torch.compiler.disable
    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = self.place.get(args, kwargs)
        values = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [float(timestep)]
        self.listener(max(self.clock(value) for value in values))


@contextmanager
def clocked(models: Mapping[str, nn.Module], listener: Callable[[str, float], None]) -> Iterator[None]:
    """Within it `listener` hears of every call: the model's name and the time."""

    def tell(name: str) -> Callable[[float], None]:
        return lambda moment: listener(name, moment)

    hooks: dict[str, Any] = {name: ClockHook(model, tell(name)) for name, model in models.items()}
    handles = [model.register_forward_pre_hook(hooks[name], with_kwargs=True) for name, model in models.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """Measures all probes in all layers at chosen calls of each model.

    The models are patched with a plan whose stage 0 is exact and whose stage 1 + i is probe i, and stay in stage 0.

    Args:
        models: the patched models, by name.
        probes: `WITHOUT`, `VALUES`, then the others.
        starts: of the stages.
        chosen: for each model, the numbers of the calls to measure at, and whether influence is measured there.
        timed: whether to measure times.
        tell: called after every call of a network.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        probes: Sequence[Probe],
        starts: Sequence[float],
        chosen: Mapping[str, Mapping[int, bool]],
        timed: bool,
        tell: Callable[[], None],
    ) -> None:
        self.models, self.probes, self.starts, self.chosen = models, probes, starts, chosen
        self.timed, self.tell = timed, tell
        self.sums: dict[tuple[str, int], Sums] = {}
        self.active: dict[str, set[int]] = {}
        self.times: dict[str, dict[int, float]] = {}  # by layer; probe -1 is exact
        self._timed_shapes: dict[tuple[Any, ...], dict[int, float]] = {}
        self._counts = dict.fromkeys(models, 0)
        self._stage: int | None = None  # of the call that is measured, or None
        self._errors: dict[str, dict[int, float]] = {}  # of the call, by layer and probe
        self._replaced: tuple[nn.Module, int] | None = None  # a layer that gives what a probe gives

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the models' calls are measured."""
        handles = []
        for name, model in self.models.items():
            clock: Any = ClockHook(model, self._before(name))
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
                return Replay(attn, args, kwargs).output(probe) if replaced is attn else None
            if self._stage is not None:
                self._measure(layer, Replay(attn, args, kwargs), output)
            return None

        return listen

    def _measure(self, layer: str, replay: Replay, output: Any) -> None:
        """Take in one call of a layer."""
        active = [i for i in range(len(self.probes)) if replay.is_active(i)]
        self.active.setdefault(layer, set()).update(active)
        if not active:
            return
        assert self._stage is not None
        if self.timed and layer not in self.times:
            self.times[layer] = self._time(replay, active)
        sums = self.sums.setdefault((layer, self._stage), Sums())
        exact = _image(output).float()
        length = float(exact.double().square().sum())
        sums.exact += length
        without, values, target = None, None, None
        if 0 in active and any(self.probes[i].fitted for i in active):
            without = replay.image(0).float()
            values, target = replay.image(1).float() - without, exact - without
        errors = self._errors.setdefault(layer, {})
        for i in active:
            probe = self.probes[i]
            if probe.candidate < 0 or self._only_timed(probe):
                continue
            got = replay.image(i).float()
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
                    seconds[i].append(replay.seconds(i))
            self._timed_shapes[key] = {i: statistics.median(values[1:]) for i, values in seconds.items()}
        return self._timed_shapes[key]

    def _measure_influence(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Call the model again for each layer, with that layer's output replaced, and see what becomes of its own."""
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
        self.info: StepInfo | None = kwargs.get(CHANNEL_KEY)
        self.hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]

    @property
    def shape(self) -> tuple[Any, ...]:
        """What its time depends on."""
        hidden_states, text = self.hidden_states, self.kwargs.get("encoder_hidden_states")
        sizes = (tuple(hidden_states.shape), None if text is None else tuple(text.shape), self.attn.heads)
        return (*sizes, self.attn.inner_dim, None if self.info is None else self.info.grid)

    def is_active(self, probe: int) -> bool:
        if self.info is None:
            return False
        in_one = self.kwargs.get("encoder_hidden_states") is None
        tokens = self.hidden_states.shape[1] - (self.info.context if in_one else 0)
        return active_method(self.attn, self.info._replace(stage=str(probe + 1)), tokens) is not None

    def output(self, probe: int) -> Any:
        """What the layer gives by a probe, or exactly where that is -1. Its own hooks are not called."""
        assert self.info is not None
        return self.attn.forward(*self.args, **{**self.kwargs, CHANNEL_KEY: self.info._replace(stage=str(probe + 1))})

    def image(self, probe: int) -> Tensor:
        return _image(self.output(probe))

    def seconds(self, probe: int) -> float:
        _wait(self.hidden_states.device)
        start = time.perf_counter()
        self.output(probe)
        _wait(self.hidden_states.device)
        return time.perf_counter() - start


def _image(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _prediction(output: Any) -> Tensor:
    """All tensors of a model's output, flat: a ControlNet has many."""
    values = (
        output
        if isinstance(output, (tuple, list))
        else list(output.values())
        if hasattr(output, "values")
        else [output]
    )
    flat: list[Tensor] = []
    for value in values:
        flat += [x for x in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(x, Tensor)]
    return torch.cat([x.detach().float().flatten() for x in flat])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
