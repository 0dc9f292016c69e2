"""Training objectives: stochastic interpolants (SiT) and discrete diffusion (DiT) behind one interface.

Papers: SiT, arXiv 2401.08740; DiT, arXiv 2212.09748; the learned variance is that of Improved Denoising Diffusion
Probabilistic Models, Nichol and Dhariwal, ICML 2021, arXiv 2102.09672; logit-normal times: SD3, arXiv 2403.03206.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, cast

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from attngen.sit.paths import PATHS, PREDICTIONS, PathName, PredictionType
from attngen.sit.scheduler import WEIGHTINGS, InterpolantScheduler, Weighting

DIT = "dit"
OBJECTIVES = (*PREDICTIONS, DIT)
TIME_SAMPLINGS = ("uniform", "logit-normal")

DIT_STEPS = 1000
DIT_BETAS = 1e-4, 0.02
# Half the width of one of the 256 levels of a picture in [-1, 1].
HALF_LEVEL = 1 / 255
# Pictures' ends: a value beyond belongs to a level that is open on that side.
FIRST_LEVEL, LAST_LEVEL = -0.999, 0.999
LEAST_LOG_PROBABILITY = math.log(1e-12)


class Objective(ABC):
    """A forward process, its loss and a scheduler to draw with. Times are the network's own."""

    @property
    @abstractmethod
    def model_config(self) -> dict[str, bool]:
        """Arguments of `SiTTransformer2DModel` that a network of this objective needs."""

    @abstractmethod
    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) times, on the generator's device."""

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network is shown.

        Args:
            clean: (B, C, H, W).
            noise: (B, C, H, W), standard normal.
            times: (B,).

        Returns:
            (B, C, H, W) in the dtype of `clean`.

        Raises:
            ValueError: for shapes or times that cannot be; times on an accelerator are not looked at, which would wait.
        """

    @abstractmethod
    def loss(self, output: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The loss of each sample, computed in float32.

        Args:
            output: (B, C, H, W), or (B, 2 · C, H, W) for "dit": of the network for `add_noise` of the other arguments.
            clean: (B, C, H, W).
            noise: (B, C, H, W).
            times: (B,).

        Returns:
            (B,) float32.

        Raises:
            ValueError: as `add_noise`.
        """

    @abstractmethod
    def noise_level(self, times: Tensor) -> Tensor:
        """(B,) in [0, 1], 1 is pure noise: the clock of `attngen.Schedule`."""

    @abstractmethod
    def sampling_scheduler(self) -> SchedulerMixin:
        """A new scheduler to draw with from the network."""


def make_objective(
    name: str, *, path: str | None = None, weighting: str | None = None, time_sampling: str = "uniform"
) -> Objective:
    """The objective of a name.

    Args:
        name: "velocity", "epsilon" or "score" (interpolants), or "dit".
        path: of an interpolant: "linear" (the default), "gvp" or "vp"; "dit" has linear betas and takes no other.
        weighting: of an interpolant: None, "velocity" or "likelihood", see `InterpolantScheduler.loss`.
        time_sampling: "uniform", or "logit-normal" (middle times more often), for interpolants.

    Raises:
        ValueError: for an unknown name, or an option that the objective does not have.
    """
    _check("objective", name, OBJECTIVES)
    if name != DIT:
        return InterpolantObjective(name, path or "linear", weighting, time_sampling)
    for option, value, only in (
        ("path", path or "linear", "linear"),
        ("weighting", weighting, None),
        ("time_sampling", time_sampling, "uniform"),
    ):
        if value != only:
            raise ValueError(f"{option}={value!r} does not apply to the objective 'dit'; leave it at {only!r}")
    return DiTObjective()


class InterpolantObjective(Objective):
    """SiT's objectives: predict velocity, noise or score on an interpolant; 0 is noise, 1 is data.

    Args:
        prediction_type: "velocity", "epsilon" or "score".
        path: "linear", "gvp" or "vp".
        weighting: None, "velocity" or "likelihood".
        time_sampling: "uniform" or "logit-normal".

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(
        self,
        prediction_type: str,
        path: str = "linear",
        weighting: str | None = None,
        time_sampling: str = "uniform",
    ) -> None:
        _check("prediction_type", prediction_type, PREDICTIONS)
        _check("path", path, PATHS)
        _check("weighting", weighting, WEIGHTINGS)
        _check("time_sampling", time_sampling, TIME_SAMPLINGS)
        self.weighting: Weighting | None = cast(Weighting | None, weighting)
        self.time_sampling = time_sampling
        self.scheduler = InterpolantScheduler(
            path=cast(PathName, path), prediction_type=cast(PredictionType, prediction_type)
        )

    @property
    def model_config(self) -> dict[str, bool]:
        return {"learn_sigma": False, "predicts_variance": False}

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        draw = torch.rand if self.time_sampling == "uniform" else torch.randn
        times = draw(count, generator=generator, device=generator.device)
        if self.time_sampling == "logit-normal":
            times = times.sigmoid()
        low, high = self.scheduler.train_interval
        return low + (high - low) * times

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.add_noise(clean, noise, times)

    def loss(self, output: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.loss(output.float(), clean.float(), noise.float(), times, self.weighting)

    def noise_level(self, times: Tensor) -> Tensor:
        return 1 - times

    def sampling_scheduler(self) -> InterpolantScheduler:
        """The ODE by Heun's method, two network calls a step."""
        config = self.scheduler.config
        return InterpolantScheduler(
            path=config["path"], prediction_type=config["prediction_type"], sampler="ode", solver="heun"
        )


class _Steps(NamedTuple):
    """What the loss needs of the forward process, step by step: (T,) float64 tensors.

    The mean of q(x_{t−1} | x_t, x_0) less that of p(x_{t−1} | x_t) is `mean_gap` · (ε̂ − ε): both are the same
    combination of x_t and of x_0, known or estimated, and the estimate is (x_t − √(1 − ᾱ) ε̂) / √ᾱ.
    """

    data: Tensor  # √ᾱ
    noise: Tensor  # √(1 − ᾱ)
    mean_gap: Tensor
    log_low: Tensor  # log of the posterior's variance β̃, the lower bound of the learned one
    log_range: Tensor  # log β − log β̃


def _steps() -> _Steps:
    betas = torch.linspace(*DIT_BETAS, DIT_STEPS, dtype=torch.float64)
    levels = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), levels[:-1]])
    posterior = betas * (1 - before) / (1 - levels)
    posterior[0] = posterior[1]  # zero, and its logarithm is needed
    of_data = betas * before.sqrt() / (1 - levels)
    data, noise = levels.sqrt(), (1 - levels).sqrt()
    return _Steps(data, noise, of_data * noise / data, posterior.log(), betas.log() - posterior.log())


class DiTObjective(Objective):
    """DiT's objective: the noise by least squares, and the variance by the variational bound.

    1000 steps, 0 to 999 (999 is noise), with linear betas from 0.0001 to 0.02. The network's first C channels are the
    noise ε̂, the others v say where the log variance lies: Σ = exp(f log β + (1 − f) log β̃), f = (v + 1)/2. The loss is

        mean (ε̂ − ε)²  +  T/1000 · L_vb,    in bits, per dimension:
        L_vb = KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t))  for t > 0,   −log p(x_0 | x_1)  for t = 0,

    in which the mean of p is held fixed, so that the bound teaches the variance alone. p(x_0 | x_1) gives each of the
    256 levels of a picture in [−1, 1] its share of the Gaussian, whose distribution function is approximated by a tanh
    as in the published code; for latents, too.
    """

    @property
    def model_config(self) -> dict[str, bool]:
        return {"learn_sigma": True, "predicts_variance": True}

    def __init__(self) -> None:
        self._tables: dict[torch.device, _Steps] = {}

    def _table(self, device: torch.device) -> _Steps:
        """The steps' values in float32; copied once a device, for a copy waits for the GPU."""
        if device not in self._tables:
            self._tables[device] = _Steps(*(values.to(device, torch.float32) for values in _steps()))
        return self._tables[device]

    def _at(self, times: Tensor, like: Tensor) -> _Steps:
        """The steps' values at the times, shaped to broadcast with (B, C, H, W)."""
        _check_steps(times, len(like))
        where = times.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
        return _Steps(*(values[where] for values in self._table(like.device)))

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(DIT_STEPS, (count,), generator=generator, device=generator.device)

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        _check_shape("noise", noise, tuple(clean.shape))
        at = self._at(times, clean)
        return (at.data * clean.float() + at.noise * noise.float()).to(clean.dtype)

    def loss(self, output: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        _check_shape("noise", noise, tuple(clean.shape))
        batch, channels, *size = clean.shape
        _check_shape("output (noise and variance)", output, (batch, 2 * channels, *size))
        at = self._at(times, clean)
        predicted, place = output.float().chunk(2, dim=1)
        error = predicted - noise.float()
        excess = (place + 1) / 2 * at.log_range  # of the log variance over its lower bound
        gap = at.mean_gap * error.detach()
        divergence = _divergence(gap, excess, at.log_low)
        surprise = _surprise(clean.float(), gap, at.log_low + excess)
        first = (times.to(clean.device) == 0).reshape(-1, *[1] * (clean.ndim - 1))
        bits = torch.where(first, surprise, divergence) / math.log(2)
        return error.square().flatten(1).mean(1) + DIT_STEPS / 1000 * bits.flatten(1).mean(1)

    def noise_level(self, times: Tensor) -> Tensor:
        return times / DIT_STEPS

    def sampling_scheduler(self) -> DDPMScheduler:
        """DDPM with the learned variance, on the evenly spaced steps that DiT's authors draw with."""
        low, high = DIT_BETAS
        return DDPMScheduler(
            num_train_timesteps=DIT_STEPS,
            beta_start=low,
            beta_end=high,
            beta_schedule="linear",
            variance_type="learned_range",
            clip_sample=False,
            timestep_spacing="linspace",
        )


def _divergence(gap: Tensor, excess: Tensor, log_low: Tensor) -> Tensor:
    """KL(N(m, s) ‖ N(m − gap, s e^excess)) in nats, s = exp(log_low), elementwise.

    (excess + e^−excess − 1 + gap²/s e^−excess) / 2, with expm1 because the excess is nearly 0 at most steps.
    """
    return (excess + torch.expm1(-excess) + gap.square() * torch.exp(-log_low - excess)) / 2


def _surprise(clean: Tensor, gap: Tensor, log_variance: Tensor) -> Tensor:
    """−log of the share that N(clean − gap, variance) gives to the picture level of `clean`, in nats, elementwise.

    With the distribution function Φ(z) = (1 + tanh u)/2, u = √(2/π) (z + 0.044715 z³), the share of an inner level is
    (tanh u − tanh w)/2 = sinh(u − w) / (2 cosh u cosh w), of an end level a logistic function: no difference of
    nearly equal numbers, so float32 is enough.
    """
    inverse = torch.exp(-log_variance / 2)
    upper, lower = (gap + HALF_LEVEL) * inverse, (gap - HALF_LEVEL) * inverse
    cubic, factor = 0.044715, math.sqrt(2 / math.pi)
    u, w = (factor * (z + cubic * z**3) for z in (upper, lower))
    width = factor * 2 * HALF_LEVEL * inverse * (1 + cubic * (upper**2 + upper * lower + lower**2))  # u − w
    # log sinh(u − w) − log cosh u − log cosh w with the exponentials taken out; a zero would spoil the gradient.
    outside = 2 * (F.relu(w) + F.relu(-u))
    inner = -outside + torch.log(-torch.expm1(-2 * width.clamp(min=1e-30)))
    inner = inner - torch.log1p(torch.exp(-2 * u.abs())) - torch.log1p(torch.exp(-2 * w.abs()))
    logarithm = torch.where(
        clean < FIRST_LEVEL, F.logsigmoid(2 * u), torch.where(clean > LAST_LEVEL, F.logsigmoid(-2 * w), inner)
    )
    return -logarithm.clamp(min=LEAST_LOG_PROBABILITY)


def _check(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(map(str, known))}")


def _check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")


def _check_steps(times: Tensor, batch: int) -> None:
    """Raise unless the times are (B,) steps; values are looked at on the CPU only."""
    if times.is_floating_point() or times.dtype == torch.bool:
        raise ValueError(f"the times of 'dit' are steps from 0 to {DIT_STEPS - 1}, integers, not {times.dtype}")
    if tuple(times.shape) != (batch,):
        raise ValueError(f"times must have shape ({batch},), got {tuple(times.shape)}")
    if times.device.type == "cpu" and not ((times >= 0) & (times < DIT_STEPS)).all():
        raise ValueError(f"the times of 'dit' are steps from 0 to {DIT_STEPS - 1}, got {times.tolist()}")
