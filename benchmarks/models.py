"""Full-size denoisers with random weights: speed and operations do not depend on the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class BenchmarkModel:
    """One denoiser to measure.

    Attributes:
        build: (picture side in pixels, whether reduced, more options of the model) -> the model.
        inputs: (model, picture side in pixels, batch) -> arguments of its forward, in float32 on the CPU.
        unit: the picture side must be a multiple of it.
        size: the picture side it was published at.
        kind: "unet", "sit", "dit", "pixart", or "core" for a model whose own processors run.
    """

    build: Callable[..., nn.Module]
    inputs: Callable[[Any, int, int], dict[str, Any]]
    unit: int
    size: int
    kind: str


def _unet(full: Mapping[str, Any], reduced: Mapping[str, Any]) -> Callable[..., nn.Module]:
    def build(size: int, small: bool = False, **config: Any) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(sample_size=size // 8, **{**full, **(reduced if small else {}), **config})

    return build


_SMALL_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_SD15 = {"cross_attention_dim": 768}
_SD21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
_SMALL_SDXL = {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
}


def _unet_inputs(unet: Any, size: int, batch: int) -> dict[str, Any]:
    import torch

    latents = torch.randn(batch, 4, size // 8, size // 8)
    text = torch.randn(batch, 77, unet.config.cross_attention_dim)
    inputs: dict[str, Any] = {"sample": latents, "timestep": torch.full((batch,), 500)}
    inputs["encoder_hidden_states"] = text
    if unet.config.addition_embed_type == "text_time":
        ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).repeat(batch, 1)
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 1280), "time_ids": ids}
    return inputs


def _sit(preset: str) -> Callable[..., nn.Module]:
    def build(size: int, small: bool = False, **config: Any) -> nn.Module:
        from attngen import SiTTransformer2DModel

        reduced = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16} if small else {}
        return SiTTransformer2DModel.from_preset(preset, **{"sample_size": size // 8, **reduced, **config})

    return build


def _sit_inputs(sit: Any, size: int, batch: int) -> dict[str, Any]:
    import torch

    latents = torch.randn(batch, 4, size // 8, size // 8)
    labels = torch.arange(batch) % 1000
    return {"hidden_states": latents, "timestep": torch.full((batch,), 0.5), "class_labels": labels}


_TRANSFORMER = {"in_channels": 4, "out_channels": 8, "patch_size": 2, "attention_head_dim": 72}


def _dit(size: int, small: bool = False, **config: Any) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    reduced = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16} if small else {}
    return DiTTransformer2DModel(**{**_TRANSFORMER, "sample_size": size // 8, "num_layers": 28, **reduced, **config})


def _dit_inputs(dit: Any, size: int, batch: int) -> dict[str, Any]:
    import torch

    latents = torch.randn(batch, 4, size // 8, size // 8)
    return {"hidden_states": latents, "timestep": torch.full((batch,), 500), "class_labels": torch.arange(batch) % 1000}


def _pixart(size: int, small: bool = False, **config: Any) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    reduced: dict[str, Any] = {}
    if small:
        reduced = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
        reduced |= {"cross_attention_dim": 32, "caption_channels": 16}
    given = {**_TRANSFORMER, "sample_size": size // 8, "num_layers": 28, "caption_channels": 4096}
    given["use_additional_conditions"] = False
    return PixArtTransformer2DModel(**{**given, **reduced, **config})


def _pixart_inputs(pixart: Any, size: int, batch: int) -> dict[str, Any]:
    import torch

    return {
        "hidden_states": torch.randn(batch, 4, size // 8, size // 8),
        "encoder_hidden_states": torch.randn(batch, 120, pixart.config.caption_channels),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _blocks(name: str, part: Mapping[str, Any], reduced: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """A model with `part` of its blocks: all are alike, so ratios are those of the whole, which may not fit."""

    def build(size: int, small: bool = False, **config: Any) -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**{**part, **(reduced if small else {}), **config})

    return build


_SMALL_BLOCKS = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
_SMALL_FLUX = {**_SMALL_BLOCKS, "num_single_layers": 1, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
_SMALL_QWEN = {**_SMALL_BLOCKS, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
_SMALL_WAN = {**_SMALL_BLOCKS, "text_dim": 32, "ffn_dim": 64}
_SMALL_FLUX2 = {**_SMALL_FLUX, "axes_dims_rope": (4, 4, 4, 4), "mlp_ratio": 2.0}


def _packed(model: Any, size: int, batch: int, axes: int) -> dict[str, Any]:
    """Tokens of 16 x 16 pixels, 512 of text, and the positions of both."""
    import torch

    side, config = size // 16, model.config
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image, text = torch.zeros(side * side, axes), torch.zeros(512, axes)
    image[:, 1], image[:, 2] = rows.flatten(), columns.flatten()
    if axes == 4:
        text[:, 3] = torch.arange(512)
    return {
        "hidden_states": torch.randn(batch, side * side, config.in_channels),
        "encoder_hidden_states": torch.randn(batch, 512, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": image if axes == 3 else image.expand(batch, -1, -1),
        "txt_ids": text if axes == 3 else text.expand(batch, -1, -1),
    }


def _flux_inputs(flux: Any, size: int, batch: int) -> dict[str, Any]:
    import torch

    pooled = torch.randn(batch, flux.config.pooled_projection_dim)
    return {**_packed(flux, size, batch, 3), "pooled_projections": pooled, "guidance": torch.full((batch,), 3.5)}


def _flux2_inputs(flux: Any, size: int, batch: int) -> dict[str, Any]:
    import torch

    return {**_packed(flux, size, batch, 4), "guidance": torch.full((batch,), 4.0)}


def _qwen_inputs(qwen: Any, size: int, batch: int) -> dict[str, Any]:
    given = _packed(qwen, size, batch, 3)
    del given["img_ids"], given["txt_ids"]
    return {**given, "img_shapes": [[(1, size // 16, size // 16)]] * batch}


def _wan_inputs(wan: Any, size: int, batch: int) -> dict[str, Any]:
    """81 frames of `size` rows and 26 / 15 as many columns: 480 x 832 is 32,760 tokens."""
    import torch

    rows, columns = size // 16 * 2, size * 26 // 15 // 16 * 2
    return {
        "hidden_states": torch.randn(batch, 16, 21, rows, columns),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 512, wan.config.text_dim),
    }


MODELS: Mapping[str, BenchmarkModel] = {
    "sd15": BenchmarkModel(_unet(_SD15, _SMALL_UNET), _unet_inputs, 64, 512, "unet"),
    "sd21": BenchmarkModel(_unet(_SD21, _SMALL_UNET), _unet_inputs, 64, 768, "unet"),
    "sdxl": BenchmarkModel(_unet(_SDXL, _SMALL_SDXL), _unet_inputs, 32, 1024, "unet"),
    "sit-s": BenchmarkModel(_sit("SiT-S/2"), _sit_inputs, 16, 256, "sit"),
    "sit-b": BenchmarkModel(_sit("SiT-B/2"), _sit_inputs, 16, 256, "sit"),
    "sit-xl": BenchmarkModel(_sit("SiT-XL/2"), _sit_inputs, 16, 256, "sit"),
    "dit-xl": BenchmarkModel(_dit, _dit_inputs, 16, 256, "dit"),
    "pixart": BenchmarkModel(_pixart, _pixart_inputs, 16, 512, "pixart"),
    "flux": BenchmarkModel(
        _blocks(
            "FluxTransformer2DModel", {"num_layers": 4, "num_single_layers": 8, "guidance_embeds": True}, _SMALL_FLUX
        ),
        _flux_inputs,
        16,
        1024,
        "core",
    ),
    "flux2": BenchmarkModel(
        _blocks("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 6}, _SMALL_FLUX2),
        _flux2_inputs,
        16,
        1024,
        "core",
    ),
    "qwen": BenchmarkModel(
        _blocks("QwenImageTransformer2DModel", {"num_layers": 6}, _SMALL_QWEN), _qwen_inputs, 16, 1024, "core"
    ),
    "wan": BenchmarkModel(
        _blocks("WanTransformer3DModel", {"num_layers": 4}, _SMALL_WAN), _wan_inputs, 16, 480, "core"
    ),
}


def build_random(
    name: str, dtype: torch.dtype, device: str, size: int | None = None, small: bool = False, **config: Any
) -> nn.Module:
    """The model with weights drawn from a fixed seed; layers that start at zero get small weights like the others.

    Args:
        name: of `MODELS`.
        dtype: of the weights.
        device: where they are drawn, too.
        size: picture side in pixels; that of publication if None.
        small: a reduced model, for tests and quick runs.
        config: more options of the model.
    """
    import torch

    model_of = MODELS[name]
    on_cpu = torch.device(device).type == "cpu"
    with torch.random.fork_rng(devices=[] if on_cpu else [device]), _default_dtype(dtype), torch.device(device):
        torch.manual_seed(0)
        model = model_of.build(size or model_of.size, small, **config)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    # Tables of positions are made in float32; ModelMixin.to would warn about modules kept in it, and there are none.
    return torch.nn.Module.to(model.eval(), device=device, dtype=dtype)


def random_inputs(name: str, model: Any, size: int, batch: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of the model's forward from a fixed seed, on the device and in the dtype."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        inputs = MODELS[name].inputs(model, size, batch)
    return {key: place(value, device, dtype) for key, value in inputs.items()}


def place(value: Any, device: str, dtype: torch.dtype) -> Any:
    """A tensor, or a dictionary of them, on the device; floating point in the dtype. Anything else is returned."""
    if isinstance(value, dict):
        return {key: place(item, device, dtype) for key, item in value.items()}
    if not hasattr(value, "is_floating_point"):
        return value
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def structural_copy(model: nn.Module) -> nn.Module:
    """A model of its own modules and hooks, so that it can be patched, with the weights of `model`, not copies."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
