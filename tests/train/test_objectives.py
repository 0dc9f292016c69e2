"""Objectives: SiT's against the golden vectors, DiT's against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attngen.sit.model import SiTTransformer2DModel
from tests.golden_cases import golden_cases
from train.recipe.objectives import OBJECTIVES, DiTObjective, make_objective

PREDICTIONS = {"noise": "epsilon"}


def golden_field(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x * (1 + t.reshape(-1, 1, 1, 1))) - 0.3 * x


# Interpolants


@pytest.mark.parametrize("name, tensors, metadata", golden_cases("transport_*"))
def test_interpolants_equal_the_reference(name, tensors, metadata):
    prediction = PREDICTIONS.get(metadata["prediction"], metadata["prediction"])
    objective = make_objective(prediction, path=metadata["path"].lower(), weighting=metadata["loss_weight"])
    clean, noise, times = tensors["x1"], tensors["x0"], tensors["t"]
    noisy = objective.add_noise(clean, noise, times)
    torch.testing.assert_close(noisy, tensors["xt"], atol=1e-6, rtol=1e-6)
    loss = objective.loss(golden_field(tensors["xt"], times), clean, noise, times)
    torch.testing.assert_close(loss, tensors["loss"], atol=1e-6, rtol=1e-6)
    assert torch.equal(objective.noise_level(times), 1 - times)


@pytest.mark.parametrize("weighting", ["velocity", "likelihood"])
@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "score"])
def test_weightings_are_those_of_the_paper(prediction, weighting):
    """(D/σ)² and D/σ² on the squared error of the noise, D = (α'/α) σ² − σσ', on the GVP path in float64."""
    clean, noise, output = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    times = torch.tensor([0.2, 0.5, 0.8])
    angle = math.pi / 2 * times.double().view(-1, 1, 1, 1)
    alpha, sigma, quarter = angle.sin(), angle.cos(), math.pi / 2
    diffusivity = quarter * sigma / alpha * sigma**2 + sigma * quarter * alpha
    if prediction == "velocity":
        error = (output - (quarter * sigma * clean - quarter * alpha * noise)) * sigma / diffusivity
    else:
        error = output - noise if prediction == "epsilon" else sigma * output + noise
    weight = (diffusivity / sigma) ** 2 if weighting == "velocity" else diffusivity / sigma**2
    want = (weight * error**2).flatten(1).mean(1)
    got = make_objective(prediction, path="gvp", weighting=weighting).loss(output, clean, noise, times)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=2e-6)


def test_times_are_drawn_as_named(global_rng_untouched):
    generator = torch.Generator().manual_seed(0)
    for prediction, low, high in (("velocity", 0, 1), ("epsilon", 1e-3, 1 - 1e-3)):
        uniform = make_objective(prediction).draw_times(20_000, generator)
        assert uniform.shape == (20_000,) and uniform.dtype == torch.float32
        assert low <= uniform.min() < low + 1e-3 and high - 1e-3 < uniform.max() <= high
        assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
        assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)
        normal = make_objective(prediction, time_sampling="logit-normal").draw_times(20_000, generator)
        inside = (normal - low) / (high - low)
        assert inside.logit().std().item() == pytest.approx(1, abs=0.02)
        assert inside.logit().mean().item() == pytest.approx(0, abs=0.02)
    steps = make_objective("dit").draw_times(100_000, generator)
    assert not steps.is_floating_point() and (steps.min(), steps.max()) == (0, 999)
    assert steps.double().mean().item() == pytest.approx(499.5, abs=3)
    again = make_objective("dit").draw_times(9, torch.Generator().manual_seed(1))
    assert torch.equal(again, make_objective("dit").draw_times(9, torch.Generator().manual_seed(1)))


# DiT: the definition, in float64 and with nothing shared with the code


def cumulative_normal(z: Tensor) -> Tensor:
    """The approximation in the published code of improved DDPM."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def oracle(output: Tensor, clean: Tensor, noise: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """(noise's mean square, variational bound in bits) of one sample (C, H, W)."""
    output, clean, noise = output.double(), clean.double(), noise.double()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    levels = torch.cumprod(1 - betas, 0)
    beta, level = betas[step], levels[step]
    before = levels[step - 1] if step > 0 else torch.ones((), dtype=torch.float64)
    predicted, place = output.chunk(2, dim=0)
    noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
    guess = (noisy - (1 - level).sqrt() * predicted) / level.sqrt()

    def mean(data: Tensor) -> Tensor:  # equation 7 of arXiv 2006.11239
        return before.sqrt() * beta / (1 - level) * data + (1 - beta).sqrt() * (1 - before) / (1 - level) * noisy

    first = max(step, 1)
    low = betas[first] * (1 - levels[first - 1]) / (1 - levels[first])
    variance = torch.exp((place + 1) / 2 * beta.log() + (1 - place) / 2 * low.log())
    if step > 0:
        gap = mean(clean) - mean(guess)
        bound = 0.5 * (torch.log(variance / low) + low / variance + gap**2 / variance - 1)
    else:
        centred, deviation = clean - mean(guess), variance.sqrt()
        upper = cumulative_normal((centred + 1 / 255) / deviation)
        lower = cumulative_normal((centred - 1 / 255) / deviation)
        share = torch.where(clean < -0.999, upper, torch.where(clean > 0.999, 1 - lower, upper - lower))
        bound = -torch.log(share.clamp(min=1e-12))
    return (predicted - noise).square().mean(), bound.mean() / math.log(2)


STEPS = [0, 0, 1, 2, 10, 100, 500, 998, 999]


def batch(scale: float = 0.1, seed: int = 0, dtype=torch.float32):
    """Predictions near the noise, variances between their bounds and beyond, pictures with all kinds of level."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(STEPS), 3, 6, 6
    clean = (torch.randn(shape, generator=generator).clamp(-1, 1) * 127.5).round() / 127.5
    clean = clean.clamp(-1, 1)
    noise = torch.randn(shape, generator=generator)
    predicted = noise + scale * torch.randn(shape, generator=generator)
    place = 1.5 * torch.randn(shape, generator=generator)
    return torch.cat([predicted, place], 1).to(dtype), clean.to(dtype), noise.to(dtype), torch.tensor(STEPS)


@pytest.mark.parametrize("scale", [0.003, 0.1, 1.0, 5.0])
def test_the_loss_of_dit_is_the_definition(scale):
    output, clean, noise, steps = batch(scale)
    got = DiTObjective().loss(output, clean, noise, steps)
    parts = [oracle(*sample) for sample in zip(output, clean, noise, STEPS, strict=True)]
    want = torch.stack([squares + 1000 / 1000 * bound for squares, bound in parts])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
    # The bound alone, which the squares would hide.
    squares = torch.stack([squares for squares, _ in parts])
    bounds = torch.stack([bound for _, bound in parts])
    assert (bounds.abs() > 1e-3).any()
    alone = got.double() - squares
    torch.testing.assert_close(alone, bounds, atol=1e-6 * max(1.0, squares.max().item()), rtol=2e-6)


def test_the_oracle_is_a_divergence_of_gaussians():
    """PyTorch's own divergence, between the posterior and the model's step."""
    output, clean, noise, _ = batch(0.5)
    objective = DiTObjective()
    for step in (1, 300, 999):
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        levels = torch.cumprod(1 - betas, 0)
        low = betas[step] * (1 - levels[step - 1]) / (1 - levels[step])
        predicted, place = output[:1].double().chunk(2, dim=1)
        noisy = levels[step].sqrt() * clean[:1].double() + (1 - levels[step]).sqrt() * noise[:1].double()

        means = [
            (noisy - betas[step] / (1 - levels[step]).sqrt() * epsilon) / (1 - betas[step]).sqrt()
            for epsilon in (noise[:1].double(), predicted)
        ]
        truth = torch.distributions.Normal(means[0], low.sqrt())
        log_variance = low.log() + (place + 1) / 2 * (betas[step] / low).log()
        model = torch.distributions.Normal(means[1], (log_variance / 2).exp())
        bits = torch.distributions.kl_divergence(truth, model).mean() / math.log(2)
        want = (predicted - noise[:1].double()).square().mean() + bits
        got = objective.loss(output[:1], clean[:1], noise[:1], torch.tensor([step]))
        torch.testing.assert_close(got[0].double(), want, atol=1e-6, rtol=1e-6)


def test_shares_of_the_levels_add_up():
    """At step 0 the probabilities of all 256 levels of one pixel are one."""
    levels = torch.arange(256.0) / 127.5 - 1
    for place in (-1.0, 0.0, 1.0):
        probability = torch.zeros((), dtype=torch.float64)
        for data in levels.split(64):
            # One picture for each level; the guess of all of them is the same, 0.3.
            clean = data.view(-1, 1, 1, 1)
            level = 1 - 1e-4
            noise = torch.zeros_like(clean)
            predicted = (math.sqrt(level) * clean - math.sqrt(level) * 0.3) / math.sqrt(1e-4)
            output = torch.cat([predicted, torch.full_like(clean, place)], 1)
            loss = DiTObjective().loss(output, clean, noise, torch.zeros(len(clean), dtype=torch.long))
            bits = loss.double() - predicted.double().square().flatten()
            near = (clean - 0.3).abs().flatten() < 0.05  # elsewhere the squares leave no digits
            probability += (2.0 ** -bits[near]).sum()
        assert probability.item() == pytest.approx(1, abs=2e-3)


def test_the_gradient_of_the_bound_stays_off_the_noise():
    output, clean, noise, steps = batch(0.1)
    output.requires_grad_()
    DiTObjective().loss(output, clean, noise, steps).sum().backward()
    of_noise, of_variance = output.grad.chunk(2, dim=1)
    size = clean[0].numel()
    torch.testing.assert_close(of_noise, 2 * (output.detach()[:, :3] - noise) / size, atol=1e-7, rtol=1e-5)
    assert (of_variance.flatten(1).abs().max(1).values > 0).all() and output.grad.isfinite().all()


def test_gradients_of_the_variance_are_the_definitions():
    output, clean, noise, steps = batch(0.1)
    mine = output.clone().requires_grad_()
    DiTObjective().loss(mine, clean, noise, steps).sum().backward()
    theirs = output.double().requires_grad_()
    held = torch.cat([theirs[:, :3].detach(), theirs[:, 3:]], 1)
    sum(oracle(*sample)[1] for sample in zip(held, clean, noise, STEPS, strict=True)).backward()
    torch.testing.assert_close(mine.grad[:, 3:].double(), theirs.grad[:, 3:], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("value", [1e3, -40.0, 60.0])
def test_wild_outputs_keep_loss_and_gradient_finite(value):
    _, clean, noise, steps = batch()
    output = torch.full((len(steps), 6, 6, 6), value).requires_grad_()
    loss = DiTObjective().loss(output, clean, noise, steps)
    loss.sum().backward()
    assert loss.isfinite().all() and output.grad.isfinite().all()


def test_noise_is_added_by_the_linear_betas():
    clean, noise = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), 3.0)
    levels = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    steps = torch.tensor([0, 500, 999])
    got = DiTObjective().add_noise(clean, noise, steps).flatten()
    want = levels[steps].sqrt() * 2 + (1 - levels[steps]).sqrt() * 3
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
    assert DiTObjective().add_noise(clean.half(), noise.half(), steps).dtype == torch.float16
    level = DiTObjective().noise_level(steps)
    torch.testing.assert_close(level, torch.tensor([0.0, 0.5, 0.999]))


def test_half_precision_is_computed_in_float32():
    output, clean, noise, steps = batch(0.5, dtype=torch.bfloat16)
    got = DiTObjective().loss(output, clean, noise, steps)
    want = DiTObjective().loss(output.float(), clean.float(), noise.float(), steps)
    assert got.dtype == torch.float32 and torch.equal(got, want)


# Both


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_network_trains_and_draws(name):
    """The objective's model, loss and scheduler fit one another, and a step down the gradient helps."""
    from attngen.sit.pipeline import SiTPipeline

    objective, generator = make_objective(name), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiTTransformer2DModel(
            sample_size=8,
            in_channels=3,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            num_classes=2,
            class_dropout_prob=0.0,
            **objective.model_config,
        )
    clean, noise = (torch.randn(16, 3, 8, 8, generator=generator) for _ in range(2))
    times, labels = objective.draw_times(16, generator), torch.zeros(16, dtype=torch.long)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(8):
        output = model(objective.add_noise(clean, noise, times), times, labels).sample
        loss = objective.loss(output, clean, noise, times)
        assert loss.shape == (16,) and loss.dtype == torch.float32
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.mean().item())
    assert losses[-1] < losses[0]
    level = objective.noise_level(times)
    assert level.shape == (16,) and (level >= 0).all() and (level <= 1).all()
    pipe = SiTPipeline(model.eval(), objective.sampling_scheduler())
    pipe.set_progress_bar_config(disable=True)
    assert pipe(1, num_inference_steps=3, output_type="latent", generator=generator).images.isfinite().all()


def test_the_schedulers_draw_what_is_trained():
    ode = make_objective("score", path="gvp").sampling_scheduler()
    assert (ode.config.path, ode.config.prediction_type, ode.config.sampler) == ("gvp", "score", "ode")
    ddpm = make_objective("dit").sampling_scheduler()
    clean, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    steps = torch.tensor([3, 900])
    want = make_objective("dit").add_noise(clean, noise, steps)
    torch.testing.assert_close(ddpm.add_noise(clean, noise, steps), want, atol=1e-5, rtol=1e-5)
    assert ddpm.config.variance_type == "learned_range" and not ddpm.config.clip_sample
    ddpm.set_timesteps(250)
    assert ddpm.timesteps[0] == 999 and ddpm.timesteps[-1] == 0


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"name": "v"}, "unknown objective 'v'; known: velocity, epsilon, score, dit"),
        ({"name": "velocity", "path": "cosine"}, "unknown path 'cosine'; known: linear, gvp, vp"),
        ({"name": "score", "weighting": "min-snr"}, "unknown weighting 'min-snr'"),
        ({"name": "velocity", "time_sampling": "cosine"}, "unknown time_sampling 'cosine'; known: uniform, logit"),
        ({"name": "dit", "path": "gvp"}, "path='gvp' does not apply to the objective 'dit'; leave it at 'linear'"),
        ({"name": "dit", "weighting": "velocity"}, "weighting='velocity' does not apply"),
        ({"name": "dit", "time_sampling": "logit-normal"}, "time_sampling='logit-normal' does not apply"),
    ],
)
def test_options_that_cannot_be(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_objective(**arguments)


def test_tensors_that_cannot_be():
    objective, clean = make_objective("dit"), torch.zeros(2, 3, 4, 4)
    steps = torch.tensor([0, 999])
    with pytest.raises(ValueError, match=r"output \(noise and variance\) must have shape \(2, 6, 4, 4\), got \(2, 3"):
        objective.loss(clean, clean, clean, steps)
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 3, 4, 4\)"):
        objective.add_noise(clean, clean[:1], steps)
    with pytest.raises(ValueError, match="steps from 0 to 999, integers, not torch.float32"):
        objective.add_noise(clean, clean, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"steps from 0 to 999, got \[0, 1000\]"):
        objective.add_noise(clean, clean, torch.tensor([0, 1000]))
    with pytest.raises(ValueError, match=r"times must have shape \(2,\), got \(1,\)"):
        objective.add_noise(clean, clean, torch.tensor([0]))
