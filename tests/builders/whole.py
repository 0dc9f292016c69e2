"""Tiny pipelines of models of the core host, and one of each layer host beside them, whole but for their text encoders.

`WHOLE["flux2"]()` is a pipeline and a function that draws latents with it; prompts are given encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers
import numpy
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.builders.zoo import APART, ZOO
from tests.builders.zoo.base import build, noise, randomise

Draw = Callable[[], Tensor]
Whole = Callable[[], tuple[Any, Draw]]

_TWO = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_THREE = (*_TWO, "text_encoder_3", "tokenizer_3")
_WAN_VAE = {
    "base_dim": 3,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}


def made(cls: str, **config: Any) -> nn.Module:
    """A module of diffusers with weights of seed 0, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        return randomise(build(cls, **config)()).eval()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray((noise(height, width, 3, seed=seed).sigmoid().numpy() * 255).astype(numpy.uint8))


def _vae(channels: int, **config: Any) -> nn.Module:
    """One that halves once."""
    sides = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": channels, "shift_factor": 0.1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return made("AutoencoderKL", **sides, **blocks, force_upcast=False, **config)


def _whole(cls: str, arguments: dict[str, Any], empty: tuple[str, ...] = (), **parts: Any) -> tuple[Any, Draw]:
    given = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), **parts}
    pipe = getattr(diffusers, cls)(**dict.fromkeys(("text_encoder", "tokenizer", *empty)), **given)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some pipelines draw without their generator
            generator = torch.Generator().manual_seed(0)
            return pipe(
                **{"num_inference_steps": 2, "output_type": "latent", **arguments},
                generator=generator,
                return_dict=False,
            )[0]

    return pipe, draw


def _flux2() -> tuple[Any, Draw]:
    vae = made(
        "AutoencoderKLFlux2",
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
    )
    vae.bn.running_var.fill_(1.0)
    references = [picture(64, 96, 1), picture(96, 64, 2)]
    given = {"prompt_embeds": noise(1, 7, 12), "image": references, "height": 32, "width": 48}
    return _whole("Flux2Pipeline", given, vae=vae, transformer=ZOO["Flux2Transformer2DModel"].model())


def _kontext() -> tuple[Any, Draw]:
    given = {
        "prompt_embeds": noise(1, 7, 12),
        "pooled_prompt_embeds": noise(1, 6, seed=1),
        "image": picture(48, 32),
        "height": 32,
        "width": 48,
        "max_area": 32 * 48,
        "_auto_resize": False,
    }
    transformer = ZOO["FluxTransformer2DModel"].model()
    return _whole("FluxKontextPipeline", given, _TWO, vae=_vae(2), transformer=transformer)


def _chroma() -> tuple[Any, Draw]:
    text = {
        "prompt_embeds": noise(1, 7, 12),
        "negative_prompt_embeds": noise(1, 7, 12, seed=1),
        "prompt_attention_mask": (torch.arange(7) < 5).float()[None],
        "negative_prompt_attention_mask": (torch.arange(7) < 6).float()[None],
    }
    given = {**text, "height": 32, "width": 48}
    return _whole("ChromaPipeline", given, vae=_vae(2), transformer=ZOO["ChromaTransformer2DModel"].model())


def _z_image() -> tuple[Any, Draw]:
    text = {"prompt_embeds": [noise(6, 12)], "negative_prompt_embeds": [noise(9, 12, seed=1)]}
    given = {**text, "guidance_scale": 3.0, "height": 32, "width": 48}
    return _whole("ZImagePipeline", given, vae=_vae(4), transformer=ZOO["ZImageTransformer2DModel"].model())


_QWEN_VAE = {
    "base_dim": 8,
    "z_dim": 1,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
}
_QWEN_TEXT = {"prompt_embeds": noise(1, 8, 12), "prompt_embeds_mask": torch.ones(1, 8, dtype=torch.long)}
_QWEN_OTHER = {
    "negative_prompt_embeds": noise(1, 5, 12, seed=1),
    "negative_prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long),
    "true_cfg_scale": 2.0,
}


def _qwen() -> tuple[Any, Draw]:
    vae = made("AutoencoderKLQwenImage", **_QWEN_VAE, latents_mean=[0.0], latents_std=[1.0])
    given = {**_QWEN_TEXT, **_QWEN_OTHER, "height": 32, "width": 48}
    return _whole("QwenImagePipeline", given, vae=vae, transformer=ZOO["QwenImageTransformer2DModel"].model())


def _qwen_edit() -> tuple[Any, Draw]:
    vae = made("AutoencoderKLQwenImage", **_QWEN_VAE, latents_mean=[0.0], latents_std=[1.0])
    given = {**_QWEN_TEXT, "image": picture(64, 64), "height": 32, "width": 48}
    transformer = ZOO["QwenImageTransformer2DModel@edit"].model()
    pipe, draw = _whole("QwenImageEditPipeline", given, ("processor",), vae=vae, transformer=transformer)

    def small() -> Tensor:
        # it brings references to a million pixels
        with mock.patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (64, 64, None)):
            return draw()

    return pipe, small


def _wan_image() -> tuple[Any, Draw]:
    vae = made("AutoencoderKLWan", **_WAN_VAE, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    given = {
        "prompt_embeds": noise(1, 512, 16),
        "image": picture(64, 96),
        "guidance_scale": 1.0,
        "height": 64,
        "width": 96,
        "num_frames": 5,
    }
    transformer = ZOO["WanTransformer3DModel@image"].model()
    sees = CLIPVisionConfig(
        hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    with torch.random.fork_rng(devices=[]):
        encoder = randomise(CLIPVisionModel(sees)).eval()
    size = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    parts = {"vae": vae, "transformer": transformer, "image_encoder": encoder, "image_processor": size}
    return _whole("WanImageToVideoPipeline", given, **parts)


def _ltx() -> tuple[Any, Draw]:
    given = {
        "prompt_embeds": noise(1, 8, 16),
        "prompt_attention_mask": torch.ones(1, 8, dtype=torch.long),
        "guidance_scale": 1.0,
        "height": 128,
        "width": 192,
        "num_frames": 9,
    }
    return _whole("LTXPipeline", given, vae=None, transformer=ZOO["LTXVideoTransformer3DModel"].model())


def _hunyuan_video() -> tuple[Any, Draw]:
    given = {
        "prompt_embeds": noise(1, 8, 16),
        "prompt_attention_mask": (torch.arange(8) < 6).long()[None],
        "pooled_prompt_embeds": noise(1, 16, seed=1),
        "height": 64,
        "width": 96,
        "num_frames": 5,
    }
    transformer = ZOO["HunyuanVideoTransformer3DModel"].model()
    return _whole("HunyuanVideoPipeline", given, _TWO, vae=None, transformer=transformer)


def _sd3_control() -> tuple[Any, Draw]:
    both = {"joint_attention_dim": 12, "pooled_projection_dim": 6, "caption_projection_dim": 32, "sample_size": 16}
    both |= {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    net = made("SD3ControlNetModel", **both, pos_embed_max_size=16)
    given = {
        "prompt_embeds": noise(1, 7, 12),
        "negative_prompt_embeds": noise(1, 7, 12, seed=1),
        "pooled_prompt_embeds": noise(1, 6, seed=2),
        "negative_pooled_prompt_embeds": noise(1, 6, seed=3),
        "control_image": picture(32, 48),
        "height": 32,
        "width": 48,
    }
    transformer = made("SD3Transformer2DModel", **both, pos_embed_max_size=16)
    parts = {"vae": _vae(4), "transformer": transformer, "controlnet": net}
    return _whole("StableDiffusion3ControlNetPipeline", given, _THREE, **parts)


def _animatediff() -> tuple[Any, Draw]:
    adapter = made(
        "MotionAdapter",
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=0,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
    )
    given = {
        "prompt_embeds": noise(1, 7, 16),
        "negative_prompt_embeds": noise(1, 7, 16, seed=1),
        "num_frames": 3,
        "height": 16,
        "width": 24,
    }
    parts = {"vae": _vae(4), "unet": APART["UNetMotionModel"].model(), "motion_adapter": adapter}
    return _whole("AnimateDiffPipeline", given, scheduler=diffusers.DDIMScheduler(clip_sample=False), **parts)


WHOLE: dict[str, Whole] = {
    "flux2": _flux2,
    "kontext": _kontext,
    "chroma": _chroma,
    "z-image": _z_image,
    "qwen": _qwen,
    "qwen-edit": _qwen_edit,
    "wan-image": _wan_image,
    "ltx": _ltx,
    "hunyuan-video": _hunyuan_video,
    "sd3-control": _sd3_control,
    "animatediff": _animatediff,
}
