"""The calls of the network that sampling an interpolant takes: times and coefficients, computed once, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attngen.sit.paths import DIFFUSION_FORMS, PATHS, PREDICTIONS, Affine, PathPoint

Kind = Literal["euler", "predict", "correct"]


@dataclass(frozen=True)
class Call:
    """One evaluation of the network at time t and the update that follows.

    euler: x + dt · drift. predict: the same, kept as the first half of a Heun step. correct: the second half, the start
    plus dt times the mean of both drifts; without a first half it leaves x as it is, which is how the first step of
    Heun's SDE gets its noise. In the end noise · N(0, I) is added.
    """

    t: float
    kind: Kind
    dt: float
    drift: Affine
    data: Affine
    noise: float = 0.0

    @property
    def starts_a_step(self) -> bool:
        """Whether sampling can start here: not in the middle of a Heun step, unless the call adds its noise."""
        return self.kind != "correct" or self.noise > 0


def lay_out(
    config: Mapping[str, Any], num_steps: int, interval: tuple[float, float], has_last_step: bool
) -> list[Call]:
    """The calls of `num_steps` steps of an `InterpolantScheduler` on an even grid over `interval`, and the last step.

    Args:
        config: of the scheduler.
        num_steps: steps, the last step of the SDE not counted.
        interval: (t0, t1), the first and the last time.
        has_last_step: add a call at t1 for the SDE's last step.
    """
    sde = config["sampler"] == "sde"
    t0, t1 = interval
    dt = (t1 - t0) / num_steps
    grid = torch.linspace(t0, t1, num_steps + 1, dtype=torch.float64)
    point = PATHS[config["path"]](grid)
    estimates = PREDICTIONS[config["prediction_type"]](point)
    diffusion = _diffusion(config, point)
    drift = estimates.velocity
    if sde:
        ratio = diffusion / point.sigma
        drift = Affine(*(a - ratio * b for a, b in zip(drift, estimates.noise, strict=True)))
    times, drifts, data = grid.tolist(), _by_time(drift), _by_time(estimates.data)
    noises = torch.sqrt(2 * dt * diffusion).tolist() if sde else [0.0] * len(times)

    def call(i: int, kind: Kind, noise: float = 0.0) -> Call:
        return Call(times[i], kind, dt, drifts[i], data[i], noise)

    if config["solver"] == "heun":
        calls = _heun_calls(call, num_steps, noises, starts_with_noise=noises[0] > 0, ends_corrected=not sde or t1 < 1)
    else:
        calls = [call(i, "euler", noises[i]) for i in range(num_steps)]
    if has_last_step:
        calls.append(_last_call(config, times[-1], drifts[-1], data[-1], _by_time(estimates.velocity)[-1]))
    return calls


def _diffusion(config: Mapping[str, Any], point: PathPoint) -> Tensor:
    """w on a grid; where it is infinite, at α = 0, that of the next grid point.

    The choice hardly matters: N(0, I) is stationary under w s and its noise at t = 0, and the next step, with w dt
    near 1, all but forgets where it starts.
    """
    w = config["diffusion_norm"] * DIFFUSION_FORMS[config["diffusion_form"]](point)
    w[0] = w[0] if w[0].isfinite() else w[1]
    return w


def _heun_calls(
    call: Callable[..., Call], num_steps: int, noises: list[float], starts_with_noise: bool, ends_corrected: bool
) -> list[Call]:
    """Two calls a step, as pairs that share a time: the second half of one step (and noise), the first of the next."""
    calls = []
    for i in range(num_steps):
        if i > 0 or starts_with_noise:
            calls.append(call(i, "correct", noises[i]))
        calls.append(call(i, "predict" if i < num_steps - 1 or ends_corrected else "euler"))
    if ends_corrected:
        calls.append(call(num_steps, "correct"))
    return calls


def _last_call(config: Mapping[str, Any], t: float, drift: Affine, data: Affine, velocity: Affine) -> Call:
    """The SDE's last step, every kind as x + dt · drift; Tweedie's formula gives the data: x + 1 · (x₁ − x)."""
    size = config["last_step_size"]
    if config["last_step"] == "mean":
        return Call(t, "euler", size, drift, data)
    if config["last_step"] == "euler":
        return Call(t, "euler", size, velocity, data)
    return Call(t, "euler", 1.0, Affine(data.of_sample - 1, data.of_output), data)


def _by_time(affine: Affine) -> list[Affine]:
    return [Affine(*pair) for pair in zip(affine.of_sample.tolist(), affine.of_output.tolist(), strict=True)]
