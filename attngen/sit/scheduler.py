"""Sampling and training with stochastic interpolants, the scheduler of SiT.

Papers: SiT, Ma et al., ECCV 2024, arXiv 2401.08740. Stochastic Interpolants, Albergo et al., arXiv 2303.08797.

Time runs as in these papers: t = 0 is noise, t = 1 is data, and

    x_t = α(t) x₁ + σ(t) x₀,    x₀ ~ N(0, I) the noise, x₁ the data.

Three quantities describe the process, and a network may predict any of them (its output is called m below):

    velocity  v = α' x₁ + σ' x₀        noise  x₀        score  s = ∇ log p_t(x) = −x₀ / σ

Given x_t and one of them the others follow, because two linear equations hold for (x₁, x₀). So everything a sampler
needs is (coefficient of x_t) · x_t + (coefficient of m) · m, with coefficients that depend on time alone. In particular
the SDE

    dx = (v + w s) dt + √(2w) dW

needs one evaluation of the network a step, and the product w s = −(w/σ) x₀ stays finite where s alone does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from attngen.checks import check_choice, check_count, check_number
from attngen.sit import paths
from attngen.sit.calls import Call, lay_out
from attngen.sit.paths import EDGE, PATHS, PREDICTIONS, Affine, Estimates, PathPoint, point_at, working_dtype

# Sampling and training stay this far from an end at which the prediction or the path is singular.
MARGIN = 1e-3
# Equal times: float32 grids against Python floats.
TIME_TOLERANCE = 1e-6

Sampler = Literal["sde", "ode"]
Solver = Literal["euler", "heun"]
LastStep = Literal["mean", "tweedie", "euler"]
Weighting = Literal["velocity", "likelihood"]

LAST_STEPS: tuple[LastStep | None, ...] = (*get_args(LastStep), None)
WEIGHTINGS: tuple[Weighting | None, ...] = (None, *get_args(Weighting))


@dataclass
class InterpolantSchedulerOutput(BaseOutput):
    """The next sample, and the data x₁ that follows from the network's output; of the sample's shape and dtype."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class InterpolantScheduler(SchedulerMixin, ConfigMixin):
    """Samples with, and trains, a model of a stochastic interpolant: SiT's `transport` as a diffusers scheduler.

    `timesteps` holds the times for the model, ascending from noise (0) to data (1). A loop over them that calls `step`
    is right for every option:

        scheduler.set_timesteps(250)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, generator=generator).prev_sample

    `set_timesteps(n)` lays out n calls of the network by Euler, the SDE's last step among them. Heun's steps take two
    calls each, and its SDE one more, the very first, for the noise that it adds before a step (unless w is 0 there).

    Where a formula divides by zero: w s is computed as −(w/σ) x₀. w of the form "sbdm" on the linear and the GVP path
    is infinite at t = 0, where velocity models start, and is taken from the next grid point there. The SDE does not
    evaluate at t = 1, where the score does not exist, so Heun's last interval is an Euler step then. `velocity`,
    `score`, `pred_original_sample`, and the divisions in `get_target` and `loss`, hold t in [1e-5, 1 − 1e-5].

    In the methods below x₁ (`original_samples`), x₀ (`noise`), x_t (`sample`) and the network's output have one shape
    (B, ...), and `timesteps` is t in [0, 1], a number, a scalar tensor or (B,); anything else is a ValueError, see
    `attngen.sit.paths.point_at`. Results have the dtype of x₁ or x_t and are computed in float32 at least.

    Args:
        path (`str`, defaults to `"linear"`): α and σ, `"linear"`, `"gvp"` or `"vp"`.
        prediction_type (`str`, defaults to `"velocity"`): the model's output, `"velocity"`, `"epsilon"` or `"score"`.
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
        path: paths.PathName = "linear",
        prediction_type: paths.PredictionType = "velocity",
        sampler: Sampler = "sde",
        solver: Solver = "euler",
        diffusion_form: paths.DiffusionForm = "sigma",
        diffusion_norm: float = 1.0,
        last_step: LastStep | None = "mean",
        last_step_size: float = 0.04,
        num_train_timesteps: int = 1000,
    ):
        check_choice("path", path, PATHS)
        check_choice("prediction_type", prediction_type, PREDICTIONS)
        check_choice("sampler", sampler, get_args(Sampler))
        check_choice("solver", solver, get_args(Solver))
        check_choice("diffusion_form", diffusion_form, paths.DIFFUSION_FORMS)
        check_choice("last_step", last_step, LAST_STEPS)
        check_number("diffusion_norm", diffusion_norm)
        check_count("num_train_timesteps", num_train_timesteps)
        if not 0 < last_step_size < 1 - MARGIN:
            raise ValueError(
                f"last_step_size must be between 0 and {1 - MARGIN}, got {last_step_size}; last_step=None is without it"
            )
        self.order = 2 if solver == "heun" else 1
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.linspace(*self.train_interval, num_train_timesteps)
        self._calls: list[Call] = []
        self._first_half: tuple[Tensor, Tensor] | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

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

    @property
    def step_index(self) -> int | None:
        """The index into `timesteps` of the next `step`; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first `step`, if a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Make the first `step` that of `timesteps[begin_index]` (even with Heun) instead of looking its time up."""
        self._begin_index = begin_index

    @property
    def state_in_first_order(self) -> bool:
        """Whether the sample is that of a whole step: False between the two calls of a Heun step, as in diffusers."""
        return self._first_half is None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lay out the calls of the network and reset the scheduler; to be run before each sampling.

        Args:
            num_inference_steps: n, at least 1, or 2 where one of them is the SDE's last step (ValueError).
            device: of `timesteps`.
        """
        fewest = 2 if self._has_last_step else 1
        if num_inference_steps < fewest:
            why = " (an SDE with a last step integrates before it)" if self._has_last_step else ""
            raise ValueError(f"num_inference_steps must be at least {fewest}{why}, got {num_inference_steps}")
        self.num_inference_steps = num_inference_steps
        num_steps = num_inference_steps - 1 if self._has_last_step else num_inference_steps
        self._calls = lay_out(self.config, num_steps, self.sample_interval, self._has_last_step)
        self.timesteps = torch.tensor([call.t for call in self._calls], dtype=torch.float32).to(device)
        self._first_half = self._step_index = self._begin_index = None

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
        if not self._calls:
            raise ValueError("the scheduler has no timesteps yet; call set_timesteps first")
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

    def _next_index(self, timestep: float | Tensor) -> int:
        """The index of the call that `step` is for: looked up once, then counted, for Heun's times come twice."""
        given = self._step_index if self._step_index is not None else self._begin_index
        index = self.index_for_timestep(timestep) if given is None else given
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
            timestep: the value of `timesteps` it was evaluated at. Only the first one is looked up, unless
                `set_begin_index` was called; then the scheduler counts.
            sample: (B, ...), any rank.
            generator: of the noise, one or one for each sample; PyTorch's global one if not given.
            variance_noise: (B, ...), standard normal, to use instead of random noise; ignored by steps without noise.
            return_dict: whether to return an `InterpolantSchedulerOutput` or its fields as a tuple.

        Raises:
            ValueError: before `set_timesteps`, past the end of the schedule, for a first timestep that is not on it,
                and for shapes or a number of generators that do not fit the sample.
        """
        _check_shape("model_output", model_output, sample)
        index = self._next_index(timestep)
        call, dtype = self._calls[index], working_dtype(sample)
        x, output = sample.to(dtype), model_output.to(dtype)
        noise = _noise_like(x, generator, variance_noise) if call.noise > 0 else None
        moved = self._move(call, x, call.drift(x, output))
        if noise is not None:
            moved = moved + call.noise * noise
        self._step_index = index + 1
        prev_sample, data = moved.to(sample.dtype), call.data(x, output).to(sample.dtype)
        return InterpolantSchedulerOutput(prev_sample, data) if return_dict else (prev_sample, data)

    def _move(self, call: Call, x: Tensor, drift: Tensor) -> Tensor:
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
        """x_t = α(t) x₁ + σ(t) x₀."""
        _check_shape("noise", noise, original_samples)
        point = self._at(timesteps, original_samples)
        dtype = working_dtype(original_samples)
        noised = point.alpha * original_samples.to(dtype) + point.sigma * noise.to(dtype)
        return noised.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and in the order that diffusers' flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def get_target(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """The network's target at x_t: v = α' x₁ + σ' x₀, the noise x₀, or the score −x₀/σ."""
        _check_shape("noise", noise, original_samples)
        dtype = working_dtype(original_samples)
        x0, prediction = noise.to(dtype), self.config["prediction_type"]
        point = self._at(timesteps, original_samples, inside=prediction != "velocity")
        if prediction == "velocity":
            target = point.d_alpha * original_samples.to(dtype) + point.d_sigma * x0
        else:
            target = x0 if prediction == "epsilon" else -x0 / point.sigma
        return target.to(original_samples.dtype)

    def loss(
        self,
        model_output: Tensor,
        original_samples: Tensor,
        noise: Tensor,
        timesteps: float | Tensor,
        weighting: Weighting | None = None,
    ) -> Tensor:
        """(B,) mean square of the network's error, sample by sample, in float32 at least.

        The error is v̂ − v, x̂₀ − x₀, or σŝ + x₀. `weighting` names an objective, the same for every prediction, by its
        weight on the squared error of the noise: "velocity" (D/σ)², "likelihood" D/σ², with D = σW/α. The velocity's
        error is D/σ times the noise's, so for velocity models these are 1 and 1/D.
        """
        check_choice("weighting", weighting, WEIGHTINGS)
        _check_shape("model_output", model_output, original_samples)
        _check_shape("noise", noise, original_samples)
        dtype = working_dtype(original_samples)
        output, x0, prediction = model_output.to(dtype), noise.to(dtype), self.config["prediction_type"]
        if prediction == "score":
            error = self._at(timesteps, original_samples).sigma * output + x0
        else:
            error = output - self.get_target(original_samples.to(dtype), x0, timesteps)
        error = error.reshape(len(error), -1).square().mean(1)
        if weighting is None:
            return error
        point = self._at(timesteps, original_samples, inside=True)
        # W/α = D/σ, the velocity's error per error of the noise.
        ratio = point.wronskian / point.alpha
        weight = ratio**2 if weighting == "velocity" else ratio / point.sigma
        return (weight / ratio**2 if prediction == "velocity" else weight).flatten() * error

    def velocity(self, model_output: Tensor, sample: Tensor, timesteps: float | Tensor) -> Tensor:
        """v of the network's output, the drift of the ODE: m, (α'x − Wm)/α or (α'x + σWm)/α."""
        return self._convert(lambda point, estimates: estimates.velocity, model_output, sample, timesteps)

    def score(self, model_output: Tensor, sample: Tensor, timesteps: float | Tensor) -> Tensor:
        """∇ log p_t(x) = −x₀/σ of the network's output."""

        def quantity(point: PathPoint, estimates: Estimates) -> Affine:
            return Affine(*(-a / point.sigma for a in estimates.noise))

        return self._convert(quantity, model_output, sample, timesteps)

    def pred_original_sample(self, model_output: Tensor, sample: Tensor, timesteps: float | Tensor) -> Tensor:
        """The data x₁ that follows from the network's output."""
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
        dtype = working_dtype(sample)
        affine = quantity(point, PREDICTIONS[self.config["prediction_type"]](point))
        return affine(sample.to(dtype), model_output.to(dtype)).to(sample.dtype)

    def _at(self, timesteps: float | Tensor, sample: Tensor, inside: bool = False) -> PathPoint:
        return point_at(self.config["path"], timesteps, sample, inside)


def _noise_like(x: Tensor, generator: torch.Generator | list[torch.Generator] | None, given: Tensor | None) -> Tensor:
    """Standard normal noise like x, or the given one."""
    if given is not None:
        _check_shape("variance_noise", given, x)
        return given.to(x)
    if isinstance(generator, list) and len(generator) not in (1, len(x)):
        raise ValueError(f"a list of generators needs one a sample, got {len(generator)} for {len(x)} samples")
    return randn_tensor(tuple(x.shape), generator=generator, device=x.device, dtype=x.dtype)


def _check_shape(name: str, tensor: Tensor, sample: Tensor) -> None:
    if tensor.shape != sample.shape:
        raise ValueError(f"{name} must have the sample's shape {tuple(sample.shape)}, got {tuple(tensor.shape)}")
