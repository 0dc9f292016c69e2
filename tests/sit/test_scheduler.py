"""InterpolantScheduler against the reference's numbers, closed forms of a Gaussian, and diffusers' contracts."""

import copy
import itertools
import json
import math
import pickle

import pytest
import torch
from torch import Tensor

from attngen.sit.paths import DIFFUSION_FORMS, PATHS, PREDICTIONS
from attngen.sit.scheduler import LAST_STEPS, InterpolantScheduler, InterpolantSchedulerOutput
from tests.golden_cases import golden_cases

GOLDEN = {name: (tensors, metadata) for name, tensors, metadata in golden_cases("transport_*")}
SAMPLINGS = [
    (name, key)
    for name, (tensors, _) in GOLDEN.items()
    for key in tensors
    if key.startswith(("ode_", "sde_")) and not key.endswith(".noise")
]
REFERENCE_NAMES = {"noise": "epsilon", "SBDM": "sbdm", "inccreasing-decreasing": "increasing-decreasing"}
MEAN, STD = 0.7, 0.4  # of the data of the Gaussian toy
BATCH = (2, 4, 4, 4)


def golden_field(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x * (1 + t.reshape(-1, 1, 1, 1))) - 0.3 * x


def golden_scheduler(metadata: dict, **options) -> InterpolantScheduler:
    prediction = REFERENCE_NAMES.get(metadata["prediction"], metadata["prediction"])
    return InterpolantScheduler(path=metadata["path"].lower(), prediction_type=prediction, **options)


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max().clamp_min(1))


def sample_with(scheduler, model, x: Tensor, num_steps: int, noises=None, **options) -> Tensor:
    """The loop of a pipeline; `noises` are the draws of the steps, in order, to use instead of a generator."""
    scheduler.set_timesteps(num_steps)
    for i, t in enumerate(scheduler.timesteps):
        if noises is not None:
            number = (i + scheduler.order - 1) // scheduler.order  # Heun's noise comes with every second call
            options["variance_noise"] = noises[min(number, len(noises) - 1)]
        x = scheduler.step(model(x, t), t, x, **options).prev_sample
    return x


class GaussianModel:
    """The exact network for data N(MEAN, STD²): x_t ~ N(α MEAN, V) with V = α² STD² + σ²."""

    def __init__(self, path: str, prediction: str):
        self.path, self.prediction = PATHS[path], prediction

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        point = self.path(t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t)
        centred = (x.double() - point.alpha * MEAN) / (point.alpha**2 * STD**2 + point.sigma**2)
        if self.prediction == "score":
            return (-centred).to(x.dtype)
        noise = point.sigma * centred
        if self.prediction == "epsilon":
            return noise.to(x.dtype)
        data = MEAN + point.alpha * STD**2 * centred
        return (point.d_alpha * data + point.d_sigma * noise).to(x.dtype)


# The reference's numbers


@pytest.mark.parametrize("name", GOLDEN)
def test_plan_equals_the_reference(name):
    tensors, metadata = GOLDEN[name]
    scheduler = golden_scheduler(metadata)
    x1, x0, t, xt = (tensors[key] for key in ("x1", "x0", "t", "xt"))
    output = golden_field(xt, t)
    assert relative_error(scheduler.add_noise(x1, x0, t), xt) < 1e-6
    assert relative_error(scheduler.scale_noise(x1, t, x0), xt) < 1e-6
    assert relative_error(scheduler.loss(output, x1, x0, t, weighting=metadata["loss_weight"]), tensors["loss"]) < 1e-6
    assert relative_error(scheduler.velocity(output, xt, t), tensors["drift"]) < 2e-6
    assert relative_error(scheduler.score(output, xt, t), tensors["score"]) < 2e-6
    velocity_scheduler = InterpolantScheduler(path=metadata["path"].lower())
    assert relative_error(velocity_scheduler.get_target(x1, x0, t), tensors["ut"]) < 1e-6


@pytest.mark.parametrize(("name", "key"), SAMPLINGS)
def test_sampling_equals_the_reference(name, key):
    tensors, metadata = GOLDEN[name]
    sampler, solver, *rest = key.split("_")
    options = {"sampler": sampler, "solver": solver.lower().rstrip("2")}
    num_steps, noises = metadata["num_steps_ode"] - 1, None
    if sampler == "sde":
        form, last_step = REFERENCE_NAMES.get(rest[0], rest[0]), None if rest[1] == "None" else rest[1].lower()
        options |= {"diffusion_form": form, "last_step": last_step, "last_step_size": metadata["last_step_size"]}
        num_steps, noises = metadata["num_steps_sde"] - (last_step is None), tensors[f"{key}.noise"]
    scheduler = golden_scheduler(metadata, **options)
    got = sample_with(scheduler, golden_field, tensors["init"], num_steps, noises)
    assert relative_error(got, tensors[key]) < 2e-6


def test_golden_samplings_cover_every_kind():
    keys = {key for _, key in SAMPLINGS}
    assert {"ode_euler", "ode_heun2", "sde_Heun_sigma_Mean", "sde_Euler_SBDM_Tweedie"} <= keys and len(SAMPLINGS) > 50


# The path


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_equal_autograd(path):
    t = torch.linspace(0.001, 0.999, 101, dtype=torch.float64, requires_grad=True)
    point = PATHS[path](t)
    for level, derivative in ((point.alpha, point.d_alpha), (point.sigma, point.d_sigma)):
        (want,) = torch.autograd.grad(level.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, want, rtol=1e-9, atol=1e-12)
    (ratio,) = torch.autograd.grad(point.alpha.log().sum(), t)
    drift_form = ratio * point.sigma**2 - point.sigma * point.d_sigma
    torch.testing.assert_close(point.diffusivity, drift_form, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_float32_keeps_its_digits_near_both_ends(path):
    t = torch.tensor([0.0, 1e-4, 1e-2, 0.5, 0.99, 1 - 1e-4])
    got, want = PATHS[path](t), PATHS[path](t.double())
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=2e-6, atol=0)


def test_diffusivity_of_vp_is_half_its_beta():
    t = torch.linspace(0, 0.999, 11, dtype=torch.float64)
    torch.testing.assert_close(PATHS["vp"](t).diffusivity, (0.1 + 19.9 * (1 - t)) / 2)


@pytest.mark.parametrize("path", PATHS)
def test_path_goes_from_noise_to_data(path):
    point = PATHS[path](torch.tensor([0.0, 1.0]))
    assert point.alpha[0] < 0.01 and point.sigma[0] > 0.99995
    assert point.alpha[1] == 1 and point.sigma[1] == 0


# Predictions


@pytest.mark.parametrize("path", PATHS)
def test_every_prediction_stands_for_the_same_velocity_score_and_data(path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99], dtype=torch.float64)
    point = PATHS[path](t[:, None])
    variance = point.alpha**2 * STD**2 + point.sigma**2
    score = -(x - point.alpha * MEAN) / variance
    data = MEAN - point.alpha * STD**2 * score
    velocity = GaussianModel(path, "velocity")(x, t)
    for prediction in PREDICTIONS:
        scheduler = InterpolantScheduler(path=path, prediction_type=prediction)
        output = GaussianModel(path, prediction)(x, t)
        torch.testing.assert_close(scheduler.velocity(output, x, t), velocity, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scheduler.score(output, x, t), score, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scheduler.pred_original_sample(output, x, t), data, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("path", "prediction"), itertools.product(PATHS, PREDICTIONS))
def test_conversions_invert_the_target(path, prediction):
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    scheduler = InterpolantScheduler(path=path, prediction_type=prediction)
    xt, target = scheduler.add_noise(x1, x0, t), scheduler.get_target(x1, x0, t)
    torch.testing.assert_close(scheduler.pred_original_sample(target, xt, t), x1)
    torch.testing.assert_close(scheduler.score(target, xt, t), -x0 / PATHS[path](t[:, None]).sigma)
    velocity = InterpolantScheduler(path=path).get_target(x1, x0, t)
    torch.testing.assert_close(scheduler.velocity(target, xt, t), velocity)
    assert scheduler.loss(target, x1, x0, t).abs().max() < 1e-20


@pytest.mark.parametrize(("path", "prediction"), itertools.product(PATHS, PREDICTIONS))
@pytest.mark.parametrize("t", [0.0, 0, 1e-7, 1.0, 1])
def test_training_and_conversions_are_finite_at_both_ends(path, prediction, t):
    x1, x0, output = torch.randn(3, *BATCH, generator=torch.Generator().manual_seed(0))
    scheduler = InterpolantScheduler(path=path, prediction_type=prediction)
    xt = scheduler.add_noise(x1, x0, t)
    results = [xt, scheduler.get_target(x1, x0, t)]
    results += [getattr(scheduler, name)(output, xt, t) for name in ("velocity", "score", "pred_original_sample")]
    results += [scheduler.loss(output, x1, x0, t, weighting) for weighting in (None, "velocity", "likelihood")]
    assert all(result.isfinite().all() for result in results)


# The loss


@pytest.mark.parametrize("path", PATHS)
def test_weighting_is_the_formula(path):
    generator = torch.Generator().manual_seed(0)
    x1, x0, output = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    point = PATHS[path](t)
    d = point.d_alpha / point.alpha * point.sigma**2 - point.sigma * point.d_sigma
    scheduler = InterpolantScheduler(path=path, prediction_type="epsilon")
    plain = (output - x0).square().mean(1)
    torch.testing.assert_close(scheduler.loss(output, x1, x0, t), plain)
    torch.testing.assert_close(scheduler.loss(output, x1, x0, t, "velocity"), (d / point.sigma) ** 2 * plain)
    torch.testing.assert_close(scheduler.loss(output, x1, x0, t, "likelihood"), d / point.sigma**2 * plain)


@pytest.mark.parametrize(("path", "weighting"), itertools.product(PATHS, ["velocity", "likelihood"]))
def test_weighting_is_one_objective_for_every_prediction(path, weighting):
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    xt = InterpolantScheduler(path=path).add_noise(x1, x0, t)
    losses = []
    for prediction in PREDICTIONS:
        scheduler = InterpolantScheduler(path=path, prediction_type=prediction)
        losses.append(scheduler.loss(GaussianModel(path, prediction)(xt, t), x1, x0, t, weighting))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_loss_is_by_sample_and_has_a_gradient():
    x1, x0 = torch.randn(2, *BATCH, generator=torch.Generator().manual_seed(0))
    output = torch.zeros(BATCH, requires_grad=True)
    loss = InterpolantScheduler().loss(output, x1, x0, torch.tensor([0.2, 0.7]))
    assert loss.shape == (2,)
    loss.mean().backward()
    torch.testing.assert_close(output.grad, -2 * (x1 - x0) / x1.numel())


# Sampling


def oracle_sample(scheduler: InterpolantScheduler, model, x: Tensor, num_steps: int, noises: Tensor) -> Tensor:
    """The SDE written out: velocity and score of each evaluation, no shared coefficients, in float64."""
    config = scheduler.config
    path = PATHS[config.path]
    last = config.last_step is not None
    times = torch.linspace(*scheduler.sample_interval, num_steps + (0 if last else 1), dtype=torch.float64)
    dt = times[1] - times[0]

    def diffusion(t):
        point = path(t)
        forms = {
            "sigma": point.sigma,
            "linear": 1 - t,
            "constant": torch.ones(()),
            "decreasing": 0.25 * (1 + torch.cos(math.pi * t)) ** 2,
            "increasing-decreasing": torch.sin(math.pi * t) ** 2,
            "sbdm": point.d_alpha / point.alpha * point.sigma**2 - point.sigma * point.d_sigma,
        }
        w = config.diffusion_norm * forms[config.diffusion_form]
        return w if w.isfinite() else diffusion(times[1])

    def drift(x, t):
        output = model(x, t)
        return scheduler.velocity(output, x, t) + diffusion(t) * scheduler.score(output, x, t)

    for i in range(len(times) - 1):
        noise = (2 * diffusion(times[i]) * dt).sqrt() * noises[i]
        if config.solver == "euler":
            x = x + drift(x, times[i]) * dt + noise
            continue
        x = x + noise
        first = drift(x, times[i])
        at_the_end = times[i + 1] == 1
        second = first if at_the_end else drift(x + dt * first, times[i + 1])
        x = x + dt * (first + second) / 2
    if config.last_step == "mean":
        return x + drift(x, times[-1]) * config.last_step_size
    if config.last_step == "euler":
        return x + scheduler.velocity(model(x, times[-1]), x, times[-1]) * config.last_step_size
    if config.last_step == "tweedie":
        point = path(times[-1])
        return (x + point.sigma**2 * scheduler.score(model(x, times[-1]), x, times[-1])) / point.alpha
    return x


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize(("path", "prediction"), itertools.product(PATHS, PREDICTIONS))
def test_sde_is_the_formula(path, prediction, form, last_step, solver):
    scheduler = InterpolantScheduler(
        path,
        prediction,
        solver=solver,
        diffusion_form=form,
        diffusion_norm=0.7,
        last_step=last_step,
        last_step_size=0.1,
    )
    generator = torch.Generator().manual_seed(0)
    x, *noises = torch.randn(8, 2, 3, generator=generator, dtype=torch.float64)
    model = GaussianModel(path, prediction)
    want = oracle_sample(scheduler, model, x, 7, noises)
    got = sample_with(scheduler, model, x, 7, noises)
    assert want.isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # the scheduler's timesteps are float32


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize(("path", "prediction"), itertools.product(PATHS, PREDICTIONS))
def test_every_sample_of_the_sde_is_finite(path, prediction, form, last_step, solver):
    scheduler = InterpolantScheduler(path, prediction, solver=solver, diffusion_form=form, last_step=last_step)
    generator = torch.Generator().manual_seed(0)
    for num_steps in (1 if last_step is None else 2, 4):
        scheduler.set_timesteps(num_steps)
        x = torch.randn(BATCH, generator=generator)
        for t in scheduler.timesteps:
            output = scheduler.step(golden_field(x, t), t, x, generator=generator)
            x = output.prev_sample
            assert x.isfinite().all() and output.pred_original_sample.isfinite().all()


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("path", "prediction"), itertools.product(PATHS, PREDICTIONS))
@pytest.mark.parametrize("num_steps", [1, 5])
def test_every_sample_of_the_ode_is_finite(path, prediction, solver, num_steps):
    x = torch.randn(BATCH, generator=torch.Generator().manual_seed(0))
    scheduler = InterpolantScheduler(path, prediction, sampler="ode", solver=solver)
    assert sample_with(scheduler, golden_field, x, num_steps).isfinite().all()


def check_marginal(scheduler: InterpolantScheduler, num_steps: int, mean_tolerance: float, std_tolerance: float):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, 1, generator=generator, dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    model = GaussianModel(scheduler.config.path, scheduler.config.prediction_type)
    got = sample_with(scheduler, model, x, num_steps, generator=generator)
    assert abs(got.mean() - MEAN) < mean_tolerance
    assert abs(got.std() - STD) < std_tolerance


@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_sde_ends_in_the_distribution_of_the_data(path, form, last_step):
    # A short last step: "mean" and "tweedie" leave out its noise.
    scheduler = InterpolantScheduler(path, diffusion_form=form, last_step=last_step, last_step_size=0.005)
    check_marginal(scheduler, 100, 0.02, 0.02)


@pytest.mark.parametrize(("path", "prediction"), itertools.product(PATHS, PREDICTIONS))
def test_sde_by_heun_ends_in_the_distribution_of_the_data(path, prediction):
    check_marginal(InterpolantScheduler(path, prediction, solver="heun", last_step_size=0.005), 100, 0.02, 0.02)


@pytest.mark.parametrize(("path", "prediction"), itertools.product(PATHS, PREDICTIONS))
def test_ode_ends_in_the_distribution_of_the_data(path, prediction):
    check_marginal(InterpolantScheduler(path, prediction, sampler="ode", solver="heun"), 100, 0.01, 0.01)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_ode_converges_with_the_order_of_its_solver(solver, order):
    x = torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64)
    exact = MEAN + STD * x  # the flow between two Gaussians is the linear map between them
    scheduler = InterpolantScheduler(sampler="ode", solver=solver)
    model = GaussianModel("linear", "velocity")
    coarse, fine = (float((sample_with(scheduler, model, x, n) - exact).abs().max()) for n in (20, 80))
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.2)


# Calls of the network


@pytest.mark.parametrize(
    ("options", "num_calls"),
    [
        ({}, 10),
        ({"last_step": "tweedie"}, 10),
        ({"last_step": None}, 10),
        ({"sampler": "ode"}, 10),
        ({"sampler": "ode", "solver": "heun"}, 20),
        ({"solver": "heun"}, 20),  # nine steps of two calls, the first noise, the last step
        ({"solver": "heun", "last_step": None}, 20),  # the last interval by Euler: there is no score at t = 1
        ({"solver": "heun", "last_step": None, "prediction_type": "score"}, 21),
        ({"solver": "heun", "diffusion_form": "increasing-decreasing"}, 19),  # w(0) = 0
    ],
)
def test_number_of_network_calls(options, num_calls):
    scheduler = InterpolantScheduler(**options)
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == num_calls
    assert scheduler.timesteps.dtype == torch.float32
    assert (scheduler.timesteps.diff() >= 0).all()
    assert scheduler.order == (2 if options.get("solver") == "heun" else 1)


@pytest.mark.parametrize(
    ("options", "interval"),
    [
        ({}, (0, 0.96)),
        ({"path": "gvp", "prediction_type": "score"}, (1e-3, 0.96)),
        ({"path": "vp", "prediction_type": "score"}, (0, 0.96)),
        ({"last_step_size": 0.1}, (0, 0.9)),
        ({"last_step": None}, (0, 1)),
        ({"last_step": None, "path": "vp"}, (0, 0.999)),
        ({"sampler": "ode"}, (0, 1)),
        ({"sampler": "ode", "prediction_type": "epsilon"}, (1e-3, 0.999)),
        ({"sampler": "ode", "path": "vp"}, (0, 0.999)),
    ],
)
def test_sampling_interval(options, interval):
    scheduler = InterpolantScheduler(**options)
    assert scheduler.sample_interval == pytest.approx(interval)
    scheduler.set_timesteps(4)
    steps = 3 if options.get("last_step", "mean") and options.get("sampler") != "ode" else 4
    want = torch.linspace(*interval, steps + 1)[:4]
    torch.testing.assert_close(scheduler.timesteps, want)


def test_training_interval():
    assert InterpolantScheduler().train_interval == (0, 1)
    assert InterpolantScheduler(prediction_type="score").train_interval == (1e-3, 1 - 1e-3)
    assert InterpolantScheduler("vp").train_interval == (0, 1 - 1e-5)


# Dtypes, shapes, random numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"sampler": "ode", "solver": "heun"}, {"last_step": "tweedie", "path": "gvp"}])
def test_dtype_is_kept_and_the_work_is_done_in_float32(dtype, options):
    scheduler = InterpolantScheduler(**options)
    x, output, noise = torch.randn(3, *BATCH, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.tensor([0.3, 0.6])
    assert scheduler.add_noise(x, noise, t).dtype == dtype
    assert scheduler.get_target(x, noise, t).dtype == dtype
    assert scheduler.velocity(output, x, t).dtype == dtype
    assert scheduler.loss(output, x, noise, t).dtype == torch.promote_types(dtype, torch.float32)
    scheduler.set_timesteps(4)
    got = scheduler.step(output, scheduler.timesteps[0], x, variance_noise=noise)
    assert got.prev_sample.dtype == got.pred_original_sample.dtype == dtype
    scheduler.set_timesteps(4)
    exact = scheduler.step(output.double(), scheduler.timesteps[0], x.double(), variance_noise=noise.double())
    torch.testing.assert_close(got.prev_sample, exact.prev_sample.to(dtype))  # one rounding, at the end


def test_prev_sample_has_the_dtype_of_the_sample_not_of_the_network():
    scheduler = InterpolantScheduler()
    scheduler.set_timesteps(4)
    x = torch.ones(BATCH)
    assert scheduler.step(x.bfloat16(), 0.0, x).prev_sample.dtype == torch.float32


@pytest.mark.parametrize("shape", [(3,), (3, 5), (2, 4, 8, 6), (2, 3, 4, 5, 6)])
def test_any_rank(shape):
    x, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    scheduler = InterpolantScheduler()
    t = torch.linspace(0.1, 0.9, shape[0])
    one_by_one = torch.cat([scheduler.add_noise(x[i : i + 1], noise[i : i + 1], t[i]) for i in range(shape[0])])
    torch.testing.assert_close(scheduler.add_noise(x, noise, t), one_by_one, rtol=0, atol=0)
    assert scheduler.loss(x, x, noise, t).shape == shape[:1]
    assert sample_with(scheduler, lambda x, t: -x, noise, 3).shape == shape


def test_a_time_may_be_a_number_a_scalar_or_one_for_each_sample():
    x, noise = torch.randn(2, *BATCH, generator=torch.Generator().manual_seed(0))
    scheduler = InterpolantScheduler(path="gvp")
    times = [0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([0.25, 0.25]), torch.tensor(0.25).double()]
    results = [scheduler.add_noise(x, noise, t) for t in times]
    assert all(torch.equal(result, results[0]) for result in results)
    results = []
    for t in [0.0, 0, torch.tensor(0.0), torch.zeros(2)]:
        scheduler.set_timesteps(3)
        results.append(scheduler.step(x, t, x, variance_noise=noise).prev_sample)
    assert all(torch.equal(result, results[0]) for result in results)


def test_noise_comes_from_the_generator_alone(global_rng_untouched):
    scheduler = InterpolantScheduler()
    x = torch.randn(BATCH, generator=torch.Generator().manual_seed(0))
    results = [
        sample_with(scheduler, golden_field, x, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_one_generator_a_sample_makes_samples_independent_of_the_batch(global_rng_untouched):
    scheduler = InterpolantScheduler()
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = sample_with(scheduler, golden_field, x, 5, generator=generators([1, 2, 3]))
    alone = sample_with(scheduler, golden_field, x[1:2], 5, generator=generators([2]))
    assert torch.equal(together[1:2], alone)


def test_the_same_seed_gives_the_same_noise_in_every_dtype():
    moves = []
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = InterpolantScheduler()
        scheduler.set_timesteps(3)
        x = torch.zeros(BATCH, dtype=dtype)
        moves.append(scheduler.step(x, 0.0, x, generator=torch.Generator().manual_seed(0)).prev_sample)
    assert torch.equal(moves[0].bfloat16(), moves[1])


def test_variance_noise_is_used_instead_of_the_generator():
    x = torch.ones(BATCH)
    noise = torch.randn(BATCH, generator=torch.Generator().manual_seed(3))
    scheduler = InterpolantScheduler()
    scheduler.set_timesteps(3)
    drawn = scheduler.step(x, 0.0, x, generator=torch.Generator().manual_seed(3)).prev_sample
    scheduler.set_timesteps(3)
    given = scheduler.step(x, 0.0, x, generator=torch.Generator().manual_seed(4), variance_noise=noise).prev_sample
    assert torch.equal(drawn, given)


def test_the_ode_and_the_last_step_draw_nothing(global_rng_untouched):
    x = torch.ones(BATCH)
    sample_with(InterpolantScheduler(sampler="ode"), golden_field, x, 3)
    scheduler = InterpolantScheduler()
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(2)
    scheduler.step(x, scheduler.timesteps[2], x)


# Starting in the middle


@pytest.mark.parametrize(
    "options",
    [{}, {"last_step": None}, {"sampler": "ode"}, {"sampler": "ode", "solver": "heun"}, {"solver": "heun"}],
)
def test_starting_in_the_middle(options):
    """As image-to-image pipelines do: with the index set, or by looking up the first timestep."""
    scheduler = InterpolantScheduler(**options)
    data, noise = torch.randn(2, *BATCH, generator=torch.Generator().manual_seed(0))
    results = []
    for sets_index in (True, False):
        scheduler.set_timesteps(10)
        first = 6 * scheduler.order
        times = scheduler.timesteps[first:]
        if sets_index:
            scheduler.set_begin_index(first)
            assert scheduler.begin_index == first
        x = scheduler.add_noise(data, noise, times[:1])
        generator = torch.Generator().manual_seed(1)
        for t in times:
            x = scheduler.step(golden_field(x, t), t, x, generator=generator).prev_sample
        results.append(x)
        assert scheduler.step_index == len(scheduler.timesteps)
    assert torch.equal(*results)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_ode_from_the_middle_is_the_rest_of_the_whole(solver):
    scheduler = InterpolantScheduler(sampler="ode", solver=solver)
    x = torch.randn(BATCH, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(10)
    middle = 3 * scheduler.order
    for i, t in enumerate(scheduler.timesteps):
        if i == middle:
            kept = x
        x = scheduler.step(golden_field(x, t), t, x).prev_sample
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps[middle:]:
        kept = scheduler.step(golden_field(kept, t), t, kept).prev_sample
    assert torch.equal(kept, x)


# Errors


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("path", "cosine", "linear, gvp, vp"),
        ("prediction_type", "v_prediction", "velocity, epsilon, score"),
        ("sampler", "ddim", "sde, ode"),
        ("solver", "dopri5", "euler, heun"),
        ("diffusion_form", "inccreasing-decreasing", "decreasing, increasing-decreasing"),
        ("last_step", "Mean", "mean, tweedie, euler, None"),
    ],
)
def test_an_unknown_name_is_refused_with_those_accepted(option, value, accepted):
    with pytest.raises(ValueError, match=option) as error:
        InterpolantScheduler(**{option: value})
    assert accepted in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("diffusion_norm", [-1.0, math.inf, math.nan]),
        ("last_step_size", [0, -0.1, 1.0, 0.9995]),
        ("num_train_timesteps", [0]),
    ],
)
def test_a_number_out_of_range_is_refused(option, values):
    for value in values:
        with pytest.raises(ValueError, match=option):
            InterpolantScheduler(**{option: value})


@pytest.mark.parametrize(("options", "fewest"), [({}, 2), ({"last_step": None}, 1), ({"sampler": "ode"}, 1)])
def test_too_few_steps_are_refused(options, fewest):
    scheduler = InterpolantScheduler(**options)
    for number in (fewest - 1, -3):
        with pytest.raises(ValueError, match=f"num_inference_steps must be at least {fewest}.*got {number}"):
            scheduler.set_timesteps(number)
    scheduler.set_timesteps(fewest)


def test_step_before_set_timesteps_is_refused():
    x = torch.ones(BATCH)
    with pytest.raises(ValueError, match="set_timesteps"):
        InterpolantScheduler().step(x, 0.0, x)
    with pytest.raises(ValueError, match="set_timesteps"):
        InterpolantScheduler().index_for_timestep(0.0)


def test_a_timestep_off_the_schedule_is_refused():
    scheduler = InterpolantScheduler()
    scheduler.set_timesteps(10)
    x = torch.ones(BATCH)
    with pytest.raises(ValueError, match="999 is not on the schedule of 10 times from 0 to 0.96"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="one timestep"):
        scheduler.step(x, scheduler.timesteps[:2], x)


def test_the_ends_of_time_are_the_ends_of_the_schedule():
    scheduler = InterpolantScheduler(prediction_type="score")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] > 0 and scheduler.timesteps[-1] < 1
    assert (scheduler.index_for_timestep(0), scheduler.index_for_timestep(1)) == (0, 9)


def test_stepping_past_the_end_is_refused():
    scheduler = InterpolantScheduler(sampler="ode")
    x = torch.ones(BATCH)
    sample_with(scheduler, golden_field, x, 3)
    with pytest.raises(ValueError, match="3 timesteps and index 3"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(-1)
    with pytest.raises(ValueError, match="index -1"):
        scheduler.step(x, 0.0, x)


@pytest.mark.parametrize("method", ["add_noise", "get_target"])
def test_times_outside_the_unit_interval_are_refused(method):
    call = getattr(InterpolantScheduler(), method)
    x = torch.ones(BATCH)
    for t in (-0.1, 1.5, 999, math.nan, torch.tensor([0.5, 1.2])):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            call(x, x, t)
    with pytest.raises(ValueError, match="indices of torch.int64"):
        call(x, x, torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="one time or one for each of the 2 samples"):
        call(x, x, torch.tensor([0.1, 0.2, 0.3]))


def test_shapes_that_do_not_fit_are_refused():
    scheduler = InterpolantScheduler()
    scheduler.set_timesteps(3)
    x, wide = torch.ones(BATCH), torch.ones(2, 8, 4, 4)
    for call in (
        lambda: scheduler.step(wide, 0.0, x),
        lambda: scheduler.step(x, 0.0, x, variance_noise=wide),
        lambda: scheduler.add_noise(x, wide, 0.5),
        lambda: scheduler.get_target(x, wide, 0.5),
        lambda: scheduler.loss(wide, x, x, 0.5),
        lambda: scheduler.loss(x, x, wide, 0.5),
        lambda: scheduler.velocity(wide, x, 0.5),
    ):
        with pytest.raises(ValueError, match=r"\(2, 4, 4, 4\), got \(2, 8, 4, 4\)"):
            call()
    with pytest.raises(ValueError, match="got 3 for 2 samples"):
        scheduler.step(x, 0.0, x, generator=[torch.Generator() for _ in range(3)])


def test_an_unknown_weighting_is_refused():
    x = torch.ones(BATCH)
    with pytest.raises(ValueError, match="unknown weighting 'snr'; known: None, velocity, likelihood"):
        InterpolantScheduler().loss(x, x, x, 0.5, weighting="snr")


# The contracts of diffusers' schedulers

OPTIONS = {"path": "gvp", "prediction_type": "score", "solver": "heun", "diffusion_form": "constant", "last_step": None}


def one_step(scheduler: InterpolantScheduler, **options):
    scheduler.set_timesteps(10)
    x = torch.linspace(-1, 1, 128).reshape(BATCH)
    generator = torch.Generator().manual_seed(0)
    return scheduler.step(0.1 * x, scheduler.timesteps[5], x, generator=generator, **options)


@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_saving_and_loading(options, tmp_path):
    scheduler = InterpolantScheduler(**options, num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    loaded = InterpolantScheduler.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert {name: value for name, value in written.items() if not name.startswith("_")} == {
        name: value for name, value in loaded.config.items() if not name.startswith("_")
    }
    assert all(loaded.config[name] == value for name, value in options.items()) and len(loaded) == 500
    assert torch.equal(one_step(loaded).prev_sample, one_step(scheduler).prev_sample)
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    assert config == loaded.config


def test_from_config_ignores_what_belongs_to_another_scheduler():
    config = {**InterpolantScheduler(**OPTIONS).config, "beta_schedule": "linear", "shift": 3.0}
    scheduler, unused = InterpolantScheduler.from_config(config, return_unused_kwargs=True, sampler="ode", extra=1)
    assert scheduler.config.path == "gvp" and scheduler.config.sampler == "ode" and unused["extra"] == 1


def test_output_is_a_tuple_or_has_attributes():
    scheduler = InterpolantScheduler()
    output = one_step(scheduler)
    assert isinstance(output, InterpolantSchedulerOutput)
    prev_sample, data = one_step(scheduler, return_dict=False)
    assert torch.equal(prev_sample, output.prev_sample) and torch.equal(prev_sample, output["prev_sample"])
    assert torch.equal(data, output.pred_original_sample) and data.shape == prev_sample.shape == BATCH


@pytest.mark.parametrize("options", [{}, OPTIONS, {"sampler": "ode", "solver": "heun"}])
def test_set_timesteps_starts_afresh(options):
    scheduler = InterpolantScheduler(**options)
    x = torch.randn(BATCH, generator=torch.Generator().manual_seed(0))

    def run():
        return sample_with(scheduler, golden_field, x, 4, generator=torch.Generator().manual_seed(1))

    want = run()
    scheduler.set_timesteps(7)
    scheduler.set_begin_index(3)
    scheduler.step(x, 0.0, x)  # leaves a run, and a step of Heun's, unfinished
    assert torch.equal(run(), want)
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_goes_on_where_the_original_is(copied):
    scheduler = InterpolantScheduler(sampler="ode", solver="heun")
    scheduler.set_timesteps(5)
    x = torch.ones(BATCH)
    times = scheduler.timesteps
    x = scheduler.step(golden_field(x, times[0]), times[0], x).prev_sample
    other = copied(scheduler)
    results = [each.step(golden_field(x, times[1]), times[1], x).prev_sample for each in (scheduler, other)]
    assert torch.equal(*results) and other.step_index == 2


def test_public_attributes():
    scheduler = InterpolantScheduler()
    x = torch.ones(BATCH)
    assert scheduler.init_noise_sigma == 1.0 and len(scheduler) == 1000 and scheduler.compatibles == []
    assert scheduler.scale_model_input(x, 0.0) is x
    assert len(scheduler.timesteps) == 1000  # before set_timesteps too, as diffusers' schedulers have it
    with pytest.raises(AttributeError):
        scheduler.does_not_exist  # noqa: B018


def test_timesteps_lie_on_the_device_asked_for():
    scheduler = InterpolantScheduler()
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    scheduler.set_timesteps(5, device=torch.device("cpu"))
    assert scheduler.timesteps.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"solver": "heun"}, {"sampler": "ode", "solver": "heun"}])
def test_sampling_and_training_never_wait_for_the_gpu(options):
    scheduler = InterpolantScheduler(**options)
    scheduler.set_timesteps(4, device="cuda")
    scheduler.set_begin_index(0)
    x, data, noise = torch.randn(3, *BATCH, device="cuda")
    t = torch.rand(2, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for time in scheduler.timesteps.unbind():
            x = scheduler.step(golden_field(x, time), time, x).prev_sample
        scheduler.loss(x, data, noise, t, weighting="velocity")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()
