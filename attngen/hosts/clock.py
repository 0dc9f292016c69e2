"""One clock for every scheduler: a time in [0, 1], 1 is pure noise, that means the same noise level for all of them.

The time of a call is defined by the noise in its sample:

- Flow matching, x = (1 - sigma) · data + sigma · noise: the time is sigma, shift and stretch included.
- Variance-preserving diffusion (the scheduler has `alphas_cumprod`): the training step, fractional if need be, with
  the sample's noise level, over the number of training steps. For DDPM and DDIM that is the timestep over their number.
  Where the schedule is one of sigmas, the step is interpolated in log sigma, sigma = sqrt((1 - abar) / abar).
- Schedulers of sigmas alone, x = data + sigma · noise (EDM): the step of Stable Diffusion's schedule (scaled linear
  betas from 0.00085 to 0.012, 1,000 steps) with the same sigma, over 1,000; beyond its ends the time is the end's.

The timestep that a model receives is not this time: pipelines pass scheduler.timesteps as they are (whole training
steps, 0.25 · log sigma, ...), over 1,000, over the number of training steps, or 1 minus that, and often in bfloat16.
`Clock` looks the value up among the forms that the scheduler's current timesteps can take; the clock of the model's
family defines the form.
"""

from __future__ import annotations

import copy
import math
import operator
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Rounding to bfloat16 twice moves a timestep by up to this share of its value, or of the whole if one is subtracted.
TOLERANCE = 1 / 128
STEPS = 1000  # of Stable Diffusion's schedule, by which pipelines divide timesteps too
# Timesteps no larger are fractions already: EDM's 0.25 · log sigma, times in [0, 1].
FRACTION = 2.0


class Clock:
    """The time of a denoiser call by its scheduler.

    Nothing is fixed when the clock is made: the scheduler, its timesteps and its sigmas are read at each call, for
    `set_timesteps` runs later and a pipeline's scheduler can be swapped. What is derived from them is kept until they
    change, so a call costs two bisections of Python floats, and a schedule on a GPU is copied once.

    Args:
        source: a pipeline, whose `scheduler` counts, held weakly; or a scheduler; or None.
    """

    def __init__(self, source: Any = None) -> None:
        owner = hasattr(source, "scheduler")
        self._pipeline = weakref.ref(source) if owner else None
        self._scheduler = None if owner else source
        self._read: _Read | None = None

    @property
    def pipeline(self) -> Any:
        """The pipeline whose scheduler counts, or None."""
        return None if self._pipeline is None else self._pipeline()

    @property
    def scheduler(self) -> Any:
        """The scheduler that counts now, or None."""
        return self._scheduler if self._pipeline is None else getattr(self._pipeline(), "scheduler", None)

    def time(self, timestep: float, default: Callable[[float], float]) -> float:
        """The time of a call.

        Args:
            timestep: what the model receives.
            default: the clock of the model's family, which also gives the form of its timesteps: `t / 1000` for
                training steps, `t` for fractions of them, `1 - t` and `1 - t / 1000` where they grow towards the data.
                Another function is taken as it is.

        Returns:
            The time in [0, 1], 1 is noise. It is `default(timestep)` without a scheduler, for one whose noise levels
            cannot be read, and for a timestep that is not on the schedule, as in a training loop.

        Raises:
            ValueError: if `timestep` is not a number.
        """
        if math.isnan(timestep):
            raise ValueError("the time step is NaN")
        scheduler = self.scheduler
        schedule = self._schedule(scheduler)
        form = None if schedule is None else _form(default)
        if schedule is None or form is None or math.isinf(timestep):
            return default(timestep)
        position = getattr(scheduler, "step_index", None) or getattr(scheduler, "begin_index", None) or 0
        time = schedule.find(timestep, form, position)
        return default(timestep) if time is None else time

    def _schedule(self, scheduler: Any) -> _Schedule | None:
        timesteps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
        objects, versions = (scheduler, timesteps, sigmas), (_version(timesteps), _version(sigmas))
        read = self._read
        if read is None or read.versions != versions or any(map(operator.is_not, read.objects, objects)):
            schedule = _schedule_of(scheduler, _numbers(timesteps), _numbers(sigmas))
            read = self._read = _Read(objects, versions, schedule)
        return read.schedule

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        """A copy that follows the copied pipeline where that is being copied too, else the same one."""
        clock = Clock(copy.deepcopy(self._scheduler, memo))
        if self._pipeline is not None and (pipeline := self._pipeline()) is not None:
            clock._pipeline = weakref.ref(memo.get(id(pipeline), pipeline))
        return clock

    def __reduce__(self) -> tuple[type[Clock], tuple[Any]]:
        return Clock, (self._scheduler,)  # no pipeline in a pickled model


class _Read(NamedTuple):
    """A schedule and what it was read from."""

    objects: tuple[Any, Any, Any]
    versions: tuple[int, int]
    schedule: _Schedule | None


class _Form(NamedTuple):
    """How the timesteps of a family are written.

    Attributes:
        fraction: whether as parts of the training steps, else as their numbers.
        falls: whether they grow towards the data.
    """

    fraction: bool
    falls: bool


def _form(default: Callable[[float], float]) -> _Form | None:
    """The form that a family's clock reads, by what it makes of one timestep; None for a clock of another kind."""
    quarter = default(0.25)
    for fraction, falls, low, high in (
        (True, False, 0.2499, 0.2501),
        (True, True, 0.7499, 0.7501),
        (False, False, 1e-6, 0.01),
        (False, True, 0.99, 1 - 1e-6),
    ):
        if low < quarter < high:
            return _Form(fraction, falls)
    return None


class _Schedule:
    """The timesteps of one `set_timesteps`, and the time of each.

    Args:
        steps: `scheduler.timesteps`.
        times: in [0, 1], one a step.
        train_steps: training steps of the scheduler.
    """

    def __init__(self, steps: Sequence[float], times: Sequence[float], train_steps: float) -> None:
        self.steps, self.times, self.train_steps = steps, times, train_steps
        self._sorted: dict[_Form, list[list[tuple[float, int]]]] = {}

    def find(self, value: float, form: _Form, position: int) -> float | None:
        """The time of the step that a model receives as `value`, or None.

        Args:
            value: the timestep.
            form: of the family's timesteps.
            position: index of the scheduler's next step, which decides where two divisors fit.
        """
        if form not in self._sorted:
            self._sorted[form] = [sorted(zip(row, range(len(row)), strict=True)) for row in self._passed(form)]
        found = [index for row in self._sorted[form] if (index := _nearest(row, value)) is not None]
        return self.times[min(found, key=lambda index: abs(index - position))] if found else None

    def _passed(self, form: _Form) -> list[list[float]]:
        """What pipelines make of the steps, one list a divisor."""
        largest = max(map(abs, self.steps))
        if not form.fraction:
            divisors, whole = {1.0}, self.train_steps
        elif largest <= FRACTION:
            divisors, whole = {1.0}, 1.0
        elif largest <= 1.01 * self.train_steps:
            divisors, whole = {self.train_steps, float(STEPS)}, 1.0
        else:  # no training steps: Cosmos 2 has sigmas up to 80 and passes sigma / (sigma + 1)
            return []
        rows = [[step / divisor for step in self.steps] for divisor in divisors]
        # Equal ends, on a schedule that begins and ends beyond the table, count as rising.
        falls = (self.steps[-1] - self.steps[0]) * (self.times[-1] - self.times[0]) < 0
        return rows if falls == form.falls else [[whole - value for value in row] for row in rows]


def _nearest(row: list[tuple[float, int]], value: float) -> int | None:
    """Index of the step nearest to a value among sorted (value, index), or None if none is within the tolerance."""
    place = bisect_left(row, (value, 0))
    nearest, index = min(row[max(0, place - 1) : place + 1], key=lambda point: abs(point[0] - value))
    tolerance = TOLERANCE * max(abs(value), row[-1][0] - row[0][0])
    return index if abs(nearest - value) <= tolerance else None


def _schedule_of(scheduler: Any, steps: list[float], sigmas: list[float]) -> _Schedule | None:
    times = _times(scheduler, steps, sigmas) if steps else None
    if times is None:
        return None
    return _Schedule(steps, [min(1.0, max(0.0, time)) for time in times], _train_steps(scheduler))


def _times(scheduler: Any, steps: list[float], sigmas: list[float]) -> list[float] | None:
    """The time of each step by the definition above, or None if the noise levels cannot be read."""
    config = _config(scheduler)
    if config.get("stages", 1) != 1:
        return None  # Helios on a pyramid: each stage counts its sigmas from 1 to 0
    abar = _numbers(getattr(scheduler, "alphas_cumprod", None))
    flow = config.get("use_flow_sigmas", False) or not abar
    if flow and len(sigmas) >= len(steps) and max(sigmas) <= 1 + 1e-3:
        return [1 - sigma if config.get("invert_sigmas", False) else sigma for sigma in sigmas[: len(steps)]]
    # A step's sigma has the step's place once `set_timesteps` has run: the end, one sigma or two, is then more. Not so
    # where a step takes two calls, the second perhaps between two sigmas: the timestep alone follows.
    aligned = 0 < len(sigmas) - len(steps) <= 2 and getattr(scheduler, "order", 1) == 1
    if aligned:
        return _steps_with(sigmas[: len(steps)], abar or _stable_diffusion())
    return [step / _train_steps(scheduler) for step in steps] if abar else None


def _config(scheduler: Any) -> Mapping[str, Any]:
    config = getattr(scheduler, "config", None)
    return config if isinstance(config, Mapping) else {}


def _train_steps(scheduler: Any) -> float:
    return float(_config(scheduler).get("num_train_timesteps", None) or STEPS)


def _steps_with(sigmas: Sequence[float], abar: Sequence[float]) -> list[float]:
    """For each sigma the training step with that noise level, interpolated in log sigma, over the number of steps."""
    signal = np.clip(np.asarray(abar), 1e-12, 1 - 1e-12)
    table = 0.5 * np.log((1 - signal) / signal)
    wanted = np.log(np.maximum(sigmas, 1e-12))
    return (np.interp(wanted, table, np.arange(len(table))) / len(table)).tolist()


def _stable_diffusion() -> list[float]:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2
    return np.cumprod(1 - betas).tolist()


def _numbers(values: Any) -> list[float]:
    """A tensor, array or list as floats; empty for anything else."""
    if callable(values) or values is None:
        return []
    try:
        return [float(value) for value in torch.as_tensor(values).flatten().tolist()]
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return []


def _version(values: Any) -> int:
    """Grows when a tensor is changed in place; inference tensors do not count."""
    return values._version if isinstance(values, Tensor) and not values.is_inference() else 0
