"""One optimiser step of our SiT is the step of the published model, written out here from its formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attngen import SiTTransformer2DModel
from tests.golden_cases import golden_cases, state
from train.loop.build import build_optimizers
from train.recipe.objectives import make_objective
from train.recipe.presets import PRESETS

CASES = list(golden_cases("sit_model_*"))
EPSILON, BETAS = 1e-8, (0.9, 0.999)  # AdamW's


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]


def attention(w: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    batch, tokens, channels = x.shape
    q, k, v = (part.view(batch, tokens, heads, -1) for part in linear(w, f"{name}.qkv", x).chunk(3, dim=-1))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(channels // heads)
    return linear(w, f"{name}.proj", torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2))


def condition(w: dict[str, Tensor], t: Tensor, y: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=t.dtype) / 128)
    angles = t[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return (
        linear(w, "t_embedder.mlp.2", F.silu(linear(w, "t_embedder.mlp.0", waves)))
        + w["y_embedder.embedding_table.weight"][y]
    )


def sit(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int, patch: int = 2) -> Tensor:
    """SiT (arXiv 2401.08740) with weights in the layout of its published checkpoints."""
    batch, channels, height, width = x.shape
    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    hidden, c = tokens.flatten(2).transpose(1, 2) + w["pos_embed"], F.silu(condition(w, t, y))
    depth = sum(name.endswith("attn.qkv.weight") for name in w)
    for block in (f"blocks.{i}" for i in range(depth)):
        parts = linear(w, f"{block}.adaLN_modulation.1", c).chunk(6, dim=-1)
        hidden = hidden + parts[2][:, None] * attention(w, f"{block}.attn", modulated(hidden, *parts[:2]), heads)
        inner = F.gelu(linear(w, f"{block}.mlp.fc1", modulated(hidden, *parts[3:5])), approximate="tanh")
        hidden = hidden + parts[5][:, None] * linear(w, f"{block}.mlp.fc2", inner)
    out = linear(
        w, "final_layer.linear", modulated(hidden, *linear(w, "final_layer.adaLN_modulation.1", c).chunk(2, -1))
    )
    out = out.view(batch, height // patch, width // patch, patch, patch, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)[:, :channels]


@pytest.mark.parametrize(("name", "tensors", "meta"), CASES)
def test_the_formulas_here_are_the_published_ones(name, tensors, meta):
    out = sit(state(tensors), tensors["x"], tensors["t"], tensors["y"], meta["config"]["num_heads"])
    torch.testing.assert_close(out, tensors["out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "tensors", "meta"), CASES)
def test_one_step(name, tensors, meta):
    heads, rate = meta["config"]["num_heads"], PRESETS["sit-s2-256"].learning_rate
    clean, times, labels = tensors["x"].double(), torch.tensor([0.1, 0.5, 0.9]).double(), tensors["y"]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    published = {key: value.double() for key, value in state(tensors).items()}
    learned = {key: value.requires_grad_() for key, value in published.items() if key != "pos_embed"}
    t = times.view(-1, 1, 1, 1)
    loss = (sit(published, t * clean + (1 - t) * noise, times, labels, heads) - (clean - noise)).square().mean()
    gradients = torch.autograd.grad(loss, list(learned.values()))
    after = dict(published)
    for (key, value), gradient in zip(learned.items(), gradients, strict=True):
        mean, square = (1 - BETAS[0]) * gradient, (1 - BETAS[1]) * gradient.square()
        step = mean / (1 - BETAS[0]) / ((square / (1 - BETAS[1])).sqrt() + EPSILON)
        after[key] = (value - rate * step).detach()

    model = SiTTransformer2DModel.from_original(state(tensors), num_attention_heads=heads).double().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objective = make_objective("velocity", path="linear", weighting=None, time_sampling="uniform")
    output = model(objective.add_noise(clean, noise, times), times, labels).sample
    ours = objective.loss(output, clean, noise, times).mean()
    torch.testing.assert_close(ours, loss, atol=1e-6, rtol=0, check_dtype=False)
    ours.backward()
    (optimizer,) = build_optimizers(model, PRESETS["sit-s2-256"])
    optimizer.step()

    wanted = SiTTransformer2DModel.from_original(after, num_attention_heads=heads).double().state_dict()
    found = model.state_dict()
    moved = max((found[key] - before[key]).abs().max().item() for key in found)
    assert moved == pytest.approx(rate, rel=1e-3)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
