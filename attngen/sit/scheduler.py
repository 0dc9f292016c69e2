"""Sampling and training with stochastic interpolants, the scheduler of SiT.

Papers: SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers, Ma et al.,
ECCV 2024, arXiv 2401.08740. Stochastic Interpolants: A Unifying Framework for Flows and Diffusions, Albergo et al.,
arXiv 2303.08797.

Time runs as in these papers and at the edge of the model: t = 0 is noise, t = 1 is data, and

    x_t = α(t) x₁ + σ(t) x₀,    x₀ ~ N(0, I) the noise, x₁ the data.

Three quantities describe the process, and a network may predict any of them (its output is called m below):

    velocity  v = α' x₁ + σ' x₀        noise  x₀        score  s = ∇ log p_t(x) = −x₀ / σ

Given x_t and one of them the others follow, because two linear equations hold for (x₁, x₀). So everything a sampler
needs is (coefficient of x_t) · x_t + (coefficient of m) · m, with coefficients that depend on time alone and are
computed once, in float64. In particular the SDE

    dx = (v + w s) dt + √(2w) dW

needs one evaluation of the network a step, and the product w s = −(w/σ) x₀ stays finite where s alone does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from attngen.sit.paths import DIFFUSION_FORMS, EDGE, PATHS, PREDICTIONS, Affine, Estimates, PathPoint

# A sampler stays this far from an end at which its prediction or its path is singular, and so does training.
MARGIN = 1e-3
# Equal times: float32 grids against Python floats.
TIME_TOLERANCE = 1e-6


SAMPLERS = ("sde", "ode")
SOLVERS = ("euler", "heun")
LAST_STEPS = ("mean", "tweedie", "euler", None)
WEIGHTINGS = (None, "velocity", "likelihood")


Kind = Literal["euler", "predict", "correct"]
Pair = tuple[float, float]


@dataclass(frozen=True)
class _Call:
    """One evaluation of the network at time t and what `step` makes of it; pairs are coefficients of (x_t, m).

    euler: x + dt · drift. predict: the same, remembered as the first half of a Heun step. correct: the second half,
    the start plus dt times the mean of both drifts; without a first half it leaves x as it is, which is how the first
    step of Heun's SDE gets its noise. In the end noise · N(0, I) is added.
    """

    t: float
    kind: Kind
    dt: float
    drift: Pair
    data: Pair
    noise: float = 0.0

    @property
    def starts_a_step(self) -> bool:
        """Whether a sample of this time can enter here: not in the middle of a Heun step, unless to get its noise."""
        return self.kind != "correct" or self.noise > 0


@dataclass
class InterpolantSchedulerOutput(BaseOutput):
    """What `InterpolantScheduler.step` returns.

    Args:
        prev_sample: the sample to give to the network next, of the shape and dtype of `sample`.
        pred_original_sample: the data x₁ that the network's output stands for, of the same shape and dtype.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class InterpolantScheduler(SchedulerMixin, ConfigMixin):
    """Samples with, and trains, a model of a stochastic interpolant: SiT's `transport` as a diffusers scheduler.

    `timesteps` holds the times to give to the model, ascending from noise (0) to data (1). A loop over them that calls
    `step` is right for every option:

        scheduler.set_timesteps(250)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, generator=generator).prev_sample

    `set_timesteps(n)` asks for n calls of the network by Euler: n steps, or for the SDE with a last step n − 1 steps
    and the last one. Heun's steps take two calls each. The SDE by Heun adds its noise before the first drift of a step,
    so one call more, the very first, serves for that alone (unless w is 0 there).

    Where a formula divides by zero: w s is computed as −(w/σ) x₀. w of the form "sbdm" on the linear and the GVP path
    is infinite at t = 0, where velocity models start, and is taken from the next grid point there. The SDE does not
    evaluate at t = 1, where the score does not exist, so Heun's last interval is an Euler step then. `velocity`,
    `score`, `pred_original_sample`, and the divisions in `get_target` and `loss`, hold t in [1e-5, 1 − 1e-5].

    Args:
        path (`str`, defaults to `"linear"`): α and σ, `"linear"`, `"gvp"` or `"vp"`.
        prediction_type (`str`, defaults to `"velocity"`): what the model predicts, `"velocity"`, `"epsilon"` or
            `"score"`.
        sampler (`str`, defaults to `"sde"`): `"sde"`, or `"ode"` for the deterministic flow, to which
            `diffusion_form`, `diffusion_norm`, `last_step` and `last_step_size` do not apply.
        solver (`str`, defaults to `"euler"`): `"euler"` (Euler–Maruyama for the SDE) or `"heun"`.
        diffusion_form (`str`, defaults to `"sigma"`): w(t): `"sigma"` σ, `"sbdm"` σW/α with W = α'σ − ασ', `"linear"`
            1 − t, `"constant"` 1, `"decreasing"` (1 + cos πt)²/4, `"increasing-decreasing"` sin² πt.
        diffusion_norm (`float`, defaults to 1.0): factor of w.
        last_step (`str`, *optional*, defaults to `"mean"`): how the SDE goes from t = 1 − `last_step_size` to the data:
            `"mean"` by its drift without noise, `"tweedie"` by the expected data, `"euler"` by the velocity; with
            `None` the SDE itself runs up to t = 1 (0.999 where that is singular).
        last_step_size (`float`, defaults to 0.04): length of the last step.
        num_train_timesteps (`int`, defaults to 1000): the length by diffusers' convention; time is continuous here.

    Raises:
        ValueError: for an unknown name or a number out of range.
    """

    _compatibles = []
    order = 1

    @register_to_config
    def __init__(
        self,
        path: str = "linear",
        prediction_type: str = "velocity",
        sampler: str = "sde",
        solver: str = "euler",
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str | None = "mean",
        last_step_size: float = 0.04,
        num_train_timesteps: int = 1000,
    ):
        _check_choice("path", path, PATHS)
        _check_choice("prediction_type", prediction_type, PREDICTIONS)
        _check_choice("sampler", sampler, SAMPLERS)
        _check_choice("solver", solver, SOLVERS)
        _check_choice("diffusion_form", diffusion_form, DIFFUSION_FORMS)
        _check_choice("last_step", last_step, LAST_STEPS)
        if not (math.isfinite(diffusion_norm) and diffusion_norm >= 0):
            raise ValueError(f"diffusion_norm must be a finite number of at least 0, got {diffusion_norm}")
        if not 0 < last_step_size < 1 - MARGIN:
            raise ValueError(
                f"last_step_size must lie between 0 and {1 - MARGIN}, got {last_step_size};"
                " last_step=None does without a last step"
            )
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
        self.order = 2 if solver == "heun" else 1
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.linspace(*self.train_interval, num_train_timesteps)
        self._calls: list[_Call] = []
        self._first_half: tuple[Tensor, Tensor] | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    @property
    def step_index(self) -> int | None:
        """The index into `timesteps` of the next `step`; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first `step`, if a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Makes the first `step` that of `timesteps[begin_index]`, where looking its time up would wait for the GPU.

        Args:
            begin_index: index into `timesteps`; with Heun an even one, where a step starts.
        """
        self._begin_index = begin_index

    @property
    def train_interval(self) -> tuple[float, float]:
        """The times (t0, t1) to draw from uniformly in training: as far as path and target are regular."""
        if self.config["path"] == "vp":
            return 0.0, 1 - EDGE
        return (0.0, 1.0) if self.config["prediction_type"] == "velocity" else (MARGIN, 1 - MARGIN)

    @property
    def sample_interval(self) -> tuple[float, float]:
        """The times (t0, t1) that sampling runs over; where the SDE has a last step, t1 is where that one begins."""
        velocity, vp = self.config["prediction_type"] == "velocity", self.config["path"] == "vp"
        t0 = 0.0 if velocity or vp else MARGIN
        if self._has_last_step:
            return t0, 1 - self.config["last_step_size"]
        return t0, 1.0 if velocity and not vp else 1 - MARGIN

    @property
    def _has_last_step(self) -> bool:
        return self.config["sampler"] == "sde" and self.config["last_step"] is not None

    # Sampling

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lays out the calls of the network and resets the scheduler; to be run before each sampling.

        Args:
            num_inference_steps: n; see the class for the calls that makes.
            device: where `timesteps` shall lie.

        Raises:
            ValueError: for n < 1, or n < 2 where one of the n is the SDE's last step.
        """
        fewest = 2 if self._has_last_step else 1
        if num_inference_steps < fewest:
            why = " (an SDE with a last step integrates before it)" if self._has_last_step else ""
            raise ValueError(f"num_inference_steps must be at least {fewest}{why}, got {num_inference_steps}")
        self.num_inference_steps = num_inference_steps
        self._calls = self._lay_out(num_inference_steps)
        self.timesteps = torch.tensor([call.t for call in self._calls], dtype=torch.float32).to(device)
        self._first_half = None
        self._step_index = None
        self._begin_index = None

    def _lay_out(self, num_inference_steps: int) -> list[_Call]:
        """The calls of `num_inference_steps` steps on an even grid from t0 to t1."""
        sde, heun = self.config["sampler"] == "sde", self.config["solver"] == "heun"
        t0, t1 = self.sample_interval
        num_steps = num_inference_steps - 1 if self._has_last_step else num_inference_steps
        dt = (t1 - t0) / num_steps
        grid = torch.linspace(t0, t1, num_steps + 1, dtype=torch.float64)
        point = PATHS[self.config["path"]](grid)
        estimates = PREDICTIONS[self.config["prediction_type"]](point)
        diffusion = self._diffusion(point)
        drift = estimates.velocity
        if sde:
            ratio = diffusion / point.sigma
            drift = Affine(*(a - ratio * b for a, b in zip(drift, estimates.noise, strict=True)))
        times, drifts, data = grid.tolist(), _pairs(drift), _pairs(estimates.data)
        noises = torch.sqrt(2 * dt * diffusion).tolist() if sde else [0.0] * len(times)

        def call(i: int, kind: Kind, noise: float = 0.0) -> _Call:
            return _Call(times[i], kind, dt, drifts[i], data[i], noise)

        if heun:
            calls = _heun_calls(
                call, num_steps, noises, starts_with_noise=noises[0] > 0, ends_corrected=not sde or t1 < 1
            )
        else:
            calls = [call(i, "euler", noises[i]) for i in range(num_steps)]
        if self._has_last_step:
            calls.append(self._last_call(times[-1], drifts[-1], data[-1], _pairs(estimates.velocity)[-1]))
        return calls

    def _diffusion(self, point: PathPoint) -> Tensor:
        """w on a grid; where it is infinite, at α = 0, that of the next grid point.

        The choice hardly matters: N(0, I) is stationary under w s and its noise at t = 0, and the next step, with w dt
        near 1, all but forgets where it starts.
        """
        w = self.config["diffusion_norm"] * DIFFUSION_FORMS[self.config["diffusion_form"]](point)
        w[0] = w[0] if w[0].isfinite() else w[1]
        return w

    def _last_call(self, t: float, drift: Pair, data: Pair, velocity: Pair) -> _Call:
        """The SDE's last step, every kind as x + dt · drift; Tweedie's formula gives the data: x + 1 · (x₁ − x)."""
        size = self.config["last_step_size"]
        if self.config["last_step"] == "mean":
            return _Call(t, "euler", size, drift, data)
        if self.config["last_step"] == "euler":
            return _Call(t, "euler", size, velocity, data)
        return _Call(t, "euler", 1.0, (data[0] - 1, data[1]), data)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is: an interpolant needs no scaling."""
        return sample

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The index into `timesteps` at which a step that starts at `timestep` begins.

        Args:
            timestep: one of `timesteps`, a number, a scalar tensor or (B,) times that are all the same. 0 and 1 are the
                first and the last call also where the schedule keeps off these ends.

        Raises:
            ValueError: before `set_timesteps`, for a time that is not on the schedule, or for several times.
        """
        self._check_is_laid_out()
        values = torch.as_tensor(timestep, dtype=torch.float64, device="cpu").flatten()
        if values.numel() == 0 or (values != values[0]).any():
            raise ValueError(f"step takes one timestep for the whole batch, got {values.tolist()}")
        t = values[0].item()
        # The ends of time mean the ends of the schedule, which may keep off them: 0.001 to 0.96, say.
        t = {0.0: self._calls[0].t, 1.0: self._calls[-1].t}.get(t, t)
        found = [i for i, call in enumerate(self._calls) if abs(call.t - t) <= TIME_TOLERANCE]
        if not found:
            raise ValueError(
                f"timestep {t:g} is not on the schedule of {len(self._calls)} times from {self._calls[0].t:g} to"
                f" {self._calls[-1].t:g}; pass a value of scheduler.timesteps (0 is noise, 1 is data)"
            )
        return next((i for i in found if self._calls[i].starts_a_step), found[0])

    def _check_is_laid_out(self) -> None:
        if not self._calls:
            raise ValueError("there is no schedule yet: call set_timesteps first")

    def _next_index(self, timestep: float | Tensor) -> int:
        """The index of the call that `step` is for: looked up once, then counted, for Heun's times come twice."""
        self._check_is_laid_out()
        if self._step_index is not None:
            index = self._step_index
        elif self._begin_index is not None:
            index = self._begin_index
        else:
            index = self.index_for_timestep(timestep)
        if not 0 <= index < len(self._calls):
            raise ValueError(
                f"the schedule has {len(self._calls)} timesteps and index {index} is none of them;"
                " call set_timesteps to start again"
            )
        return index

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> InterpolantSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_t and the network's output to the next sample: x + (v + w s) dt + √(2w dt) N(0, I), or as configured.

        Args:
            model_output: (B, ...), the network's output at (sample, timestep).
            timestep: the value of `timesteps` it was evaluated at. The first one is looked up, unless `set_begin_index`
                was called; after it the scheduler counts by itself.
            sample: (B, ...), any rank.
            generator: of the noise, one or one for each sample; PyTorch's global one if not given.
            variance_noise: (B, ...), standard normal, to use instead of a draw; ignored by steps without noise.
            return_dict: whether to return an `InterpolantSchedulerOutput` or its fields as a tuple.

        Returns:
            The next sample and the predicted data in the dtype of `sample`, computed in float32 at least.

        Raises:
            ValueError: before `set_timesteps`, past the end of the schedule, for a first timestep that is not on it,
                and for shapes or a number of generators that do not fit the sample.
        """
        _check_shape("model_output", model_output, sample)
        call_index = self._next_index(timestep)
        call = self._calls[call_index]
        dtype = _working_dtype(sample)
        x, output = sample.to(dtype), model_output.to(dtype)
        noise = _noise_like(x, generator, variance_noise) if call.noise > 0 else None
        drift = call.drift[0] * x + call.drift[1] * output
        moved = self._move(call, x, drift)
        if noise is not None:
            moved = moved + call.noise * noise
        data = call.data[0] * x + call.data[1] * output
        self._step_index = call_index + 1
        prev_sample, data = moved.to(sample.dtype), data.to(sample.dtype)
        return InterpolantSchedulerOutput(prev_sample, data) if return_dict else (prev_sample, data)

    def _move(self, call: _Call, x: Tensor, drift: Tensor) -> Tensor:
        """The sample after the call, noise apart; remembers the first half of a Heun step for the second."""
        first_half, self._first_half = self._first_half, None
        if call.kind == "correct":
            if first_half is None:
                return x
            start, first_drift = first_half
            return start + call.dt / 2 * (first_drift + drift)
        if call.kind == "predict":
            self._first_half = x, drift
        return x + call.dt * drift

    # Training, and conversions at any time

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """x_t = α(t) x₁ + σ(t) x₀.

        Args:
            original_samples: x₁ (B, ...).
            noise: x₀, of the same shape.
            timesteps: t in [0, 1], a number, a scalar tensor or (B,).

        Returns:
            (B, ...) in the dtype of `original_samples`.

        Raises:
            ValueError: for shapes that do not fit, integer tensors, and times outside [0, 1], unless they lie on an
                accelerator, where looking at them would cost a wait.
        """
        _check_shape("noise", noise, original_samples)
        point = self._at(timesteps, original_samples)
        dtype = _working_dtype(original_samples)
        noised = point.alpha * original_samples.to(dtype) + point.sigma * noise.to(dtype)
        return noised.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and in the order that diffusers' flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def get_target(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """What the network is to predict at x_t: v = α' x₁ + σ' x₀, the noise x₀, or the score −x₀/σ.

        Args:
            original_samples: x₁ (B, ...).
            noise: x₀, of the same shape.
            timesteps: t in [0, 1], a number, a scalar tensor or (B,).

        Returns:
            (B, ...) in the dtype of `original_samples`.

        Raises:
            ValueError: as `add_noise`.
        """
        _check_shape("noise", noise, original_samples)
        dtype = _working_dtype(original_samples)
        x0, prediction = noise.to(dtype), self.config["prediction_type"]
        if prediction == "velocity":
            point = self._at(timesteps, original_samples)
            target = point.d_alpha * original_samples.to(dtype) + point.d_sigma * x0
        else:
            sigma = self._at(timesteps, original_samples, inside=True).sigma
            target = x0 if prediction == "epsilon" else -x0 / sigma
        return target.to(original_samples.dtype)

    def loss(
        self,
        model_output: Tensor,
        original_samples: Tensor,
        noise: Tensor,
        timesteps: float | Tensor,
        weighting: str | None = None,
    ) -> Tensor:
        """Mean square of the network's error, sample by sample.

        The error is v̂ − v, x̂₀ − x₀, or σŝ + x₀. `weighting` names an objective, the same for every prediction, by its
        weight on the squared error of the noise: "velocity" (D/σ)², "likelihood" D/σ², with D = σW/α. The velocity's
        error is D/σ times the noise's, so for velocity models these are 1 and 1/D.

        Args:
            model_output: (B, ...), the network's output at (`add_noise` of the same arguments, timesteps).
            original_samples: x₁ (B, ...).
            noise: x₀, of the same shape.
            timesteps: t in [0, 1], a number, a scalar tensor or (B,).
            weighting: None, "velocity" or "likelihood".

        Returns:
            (B,), float32 (float64 for float64 samples).

        Raises:
            ValueError: for an unknown weighting, and as `add_noise`.
        """
        _check_choice("weighting", weighting, WEIGHTINGS)
        _check_shape("model_output", model_output, original_samples)
        _check_shape("noise", noise, original_samples)
        dtype = _working_dtype(original_samples)
        output, x0, prediction = model_output.to(dtype), noise.to(dtype), self.config["prediction_type"]
        if prediction == "score":
            error = self._at(timesteps, original_samples).sigma * output + x0
        else:
            error = output - self.get_target(original_samples.to(dtype), x0, timesteps)
        error = error.reshape(len(error), -1).square().mean(1)
        if weighting is None:
            return error
        point = self._at(timesteps, original_samples, inside=True)
        weight = _weight(point, weighting, on_velocity=prediction == "velocity")
        return weight.flatten() * error

    def velocity(self, model_output: Tensor, sample: Tensor, timesteps: float | Tensor) -> Tensor:
        """v of the network's output, the drift of the ODE: m, (α'x − Wm)/α or (α'x + σWm)/α.

        Args:
            model_output: (B, ...), the network's output at (sample, timesteps).
            sample: x_t (B, ...).
            timesteps: t in [0, 1], a number, a scalar tensor or (B,).

        Returns:
            (B, ...) in the dtype of `sample`.

        Raises:
            ValueError: as `add_noise`.
        """
        return self._convert(lambda point, estimates: estimates.velocity, model_output, sample, timesteps)

    def score(self, model_output: Tensor, sample: Tensor, timesteps: float | Tensor) -> Tensor:
        """∇ log p_t(x) = −x₀/σ of the network's output; arguments, result and errors as `velocity`."""

        def quantity(point: PathPoint, estimates: Estimates) -> Affine:
            return Affine(*(-a / point.sigma for a in estimates.noise))

        return self._convert(quantity, model_output, sample, timesteps)

    def pred_original_sample(self, model_output: Tensor, sample: Tensor, timesteps: float | Tensor) -> Tensor:
        """The data x₁ that the network's output stands for; arguments, result and errors as `velocity`."""
        return self._convert(lambda point, estimates: estimates.data, model_output, sample, timesteps)

    def _convert(
        self,
        quantity: Callable[[PathPoint, Estimates], Affine],
        model_output: Tensor,
        sample: Tensor,
        timesteps: float | Tensor,
    ) -> Tensor:
        _check_shape("model_output", model_output, sample)
        point = self._at(timesteps, sample, inside=True)
        dtype = _working_dtype(sample)
        affine = quantity(point, PREDICTIONS[self.config["prediction_type"]](point))
        return affine(sample.to(dtype), model_output.to(dtype)).to(sample.dtype)

    def _at(self, timesteps: float | Tensor, sample: Tensor, inside: bool = False) -> PathPoint:
        """The path at the times, shaped to broadcast with (B, ...); `inside` keeps off both ends."""
        t = _check_times(timesteps, len(sample)).to(sample.device, _working_dtype(sample))
        t = t.reshape(-1, *[1] * (sample.ndim - 1))
        return PATHS[self.config["path"]](t.clamp(EDGE, 1 - EDGE) if inside else t)


def _weight(point: PathPoint, weighting: str, on_velocity: bool) -> Tensor:
    """The weight of the squared error of the noise, or of the velocity's, whose error is W/α = D/σ times as large."""
    ratio = point.wronskian / point.alpha
    on_noise = ratio**2 if weighting == "velocity" else ratio / point.sigma
    return on_noise / ratio**2 if on_velocity else on_noise


def _heun_calls(
    call: Callable[..., _Call], num_steps: int, noises: list[float], starts_with_noise: bool, ends_corrected: bool
) -> list[_Call]:
    """Two calls a step, as pairs that share a time: the second half of one step (and noise), the first of the next."""
    calls = []
    for i in range(num_steps):
        if i > 0 or starts_with_noise:
            calls.append(call(i, "correct", noises[i]))
        calls.append(call(i, "predict" if i < num_steps - 1 or ends_corrected else "euler"))
    if ends_corrected:
        calls.append(call(num_steps, "correct"))
    return calls


def _pairs(affine: Affine) -> list[Pair]:
    return list(zip(*(coefficient.tolist() for coefficient in affine), strict=True))


def _working_dtype(sample: Tensor) -> torch.dtype:
    """float32, or float64 for float64 samples."""
    return torch.promote_types(sample.dtype, torch.float32)


def _noise_like(x: Tensor, generator: torch.Generator | list[torch.Generator] | None, given: Tensor | None) -> Tensor:
    """A standard normal draw of x's shape, dtype and device, or the given one."""
    if given is not None:
        _check_shape("variance_noise", given, x)
        return given.to(x)
    if isinstance(generator, list) and len(generator) not in (1, len(x)):
        raise ValueError(f"a list of generators needs one a sample, got {len(generator)} for {len(x)} samples")
    return randn_tensor(tuple(x.shape), generator=generator, device=x.device, dtype=x.dtype)


def _check_choice(name: str, value: object, accepted: Iterable[object]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def _check_shape(name: str, tensor: Tensor, sample: Tensor) -> None:
    if tensor.shape != sample.shape:
        raise ValueError(f"{name} must have the sample's shape {tuple(sample.shape)}, got {tuple(tensor.shape)}")


def _check_times(timesteps: float | Tensor, batch: int) -> Tensor:
    """The times as a tensor of one or `batch` entries in [0, 1].

    Times on an accelerator are not looked at: reading them would make the host wait in every training step.
    """
    t = timesteps if isinstance(timesteps, Tensor) else torch.tensor(timesteps, dtype=torch.float64)
    if not t.is_floating_point():
        raise ValueError(f"timesteps are times in [0, 1] (0 is noise, 1 is data), not indices of {t.dtype}")
    if t.ndim > 1 or t.numel() not in (1, batch):
        raise ValueError(f"timesteps must be one time or one for each of the {batch} samples, got {tuple(t.shape)}")
    if t.device.type == "cpu" and not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"timesteps must lie in [0, 1], where 0 is noise and 1 is data, got {t.tolist()}")
    return t
