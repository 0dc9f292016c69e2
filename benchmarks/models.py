"""Full-size denoisers with random weights: speed and operations do not depend on the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class BenchmarkModel:
    """One denoiser to measure.

    Attributes:
        build: makes the model, on the CPU in float32.
        inputs: (model, picture side in pixels, batch) -> arguments of its forward, in float32.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[Any, int, int], dict[str, Any]]


def _sd15() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def _sd21() -> nn.Module:
    from diffusers import UNet2DConditionModel

    heads: Any = (5, 10, 20, 20)  # diffusers' annotation forgets that there are four
    return UNet2DConditionModel(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=heads, use_linear_projection=True
    )


def _unet_inputs(unet: Any, size: int, batch: int) -> dict[str, Any]:
    import torch

    latents = torch.randn(batch, 4, size // 8, size // 8)
    text = torch.randn(batch, 77, unet.config.cross_attention_dim)
    return {"sample": latents, "timestep": torch.tensor(500), "encoder_hidden_states": text}


def _sit_xl() -> nn.Module:
    from attngen import SiTTransformer2DModel

    return SiTTransformer2DModel.from_preset("SiT-XL/2")


def _sit_inputs(sit: Any, size: int, batch: int) -> dict[str, Any]:
    import torch

    latents = torch.randn(batch, 4, size // 8, size // 8)
    return {"hidden_states": latents, "timestep": torch.full((batch,), 0.5), "class_labels": torch.arange(batch)}


MODELS: Mapping[str, BenchmarkModel] = {
    "sd15": BenchmarkModel(_sd15, _unet_inputs),
    "sd21": BenchmarkModel(_sd21, _unet_inputs),
    "sit-xl": BenchmarkModel(_sit_xl, _sit_inputs),
}


def build_random(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The model with weights drawn from a fixed seed; layers that start at zero get small weights like the others."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name].build()
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().to(device=device, dtype=dtype)
