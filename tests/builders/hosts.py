"""Small diffusers models with random weights, one of each kind that attngen patches, and one way to call them all."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import attngen
from attngen import AgentAttention, DownsampledKV, FocalAttention, LinearAttention, SoftmaxAttention, TokenMerging

TEXT = 16
"""Width of the text tokens of all models."""


def normal(*shape, seed=0):
    """Standard normal numbers that leave the global random state alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode with weights that make every layer count: no zeros, and a peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                gain = 2.0 if any(part in name for part in ("to_q", "to_k", "add_q", "add_k")) else 1.0
                weight.normal_(0, gain * weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1, generator=generator)
    return model.eval()


_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_SD21 = {"attention_head_dim": [2, 4, 4], "use_linear_projection": True, "upcast_attention": True}
_SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [2, 2, 4],
    "transformer_layers_per_block": [1, 1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + TEXT,
}
_CONTROLNET = {name: value for name, value in _UNET.items() if name not in ("sample_size", "up_block_types")}
_TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16, "patch_size": 2}
_SD3 = {
    **_TRANSFORMER,
    "in_channels": 4,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 32,
}


def _unet(**config: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(**{**_UNET, **config})


def _call_unet(model, latents, timestep, **kwargs):
    text = normal(1, 5, TEXT, seed=1).expand(len(latents), -1, -1)
    return model(latents, timestep, encoder_hidden_states=text, **kwargs).sample


def _call_sdxl(model, latents, timestep, **kwargs):
    batch = len(latents)
    added = {"text_embeds": normal(1, TEXT, seed=2).expand(batch, -1), "time_ids": torch.ones(batch, 6)}
    return _call_unet(model, latents, timestep, added_cond_kwargs=added, **kwargs)


def _call_controlnet(model, latents, timestep, **kwargs):
    text = normal(1, 5, TEXT, seed=1).expand(len(latents), -1, -1)
    picture = normal(1, 3, latents.shape[2] * 8, latents.shape[3] * 8, seed=3).expand(len(latents), -1, -1, -1)
    out = model(latents, timestep, encoder_hidden_states=text, controlnet_cond=picture, **kwargs)
    return torch.cat([x.flatten(1) for x in (*out.down_block_res_samples, out.mid_block_res_sample)], dim=1)


def _call_dit(model, latents, timestep, **kwargs):
    labels = torch.arange(len(latents), device=latents.device)
    return model(latents, timestep=timestep, class_labels=labels, **kwargs).sample


def _call_pixart(model, latents, timestep, **kwargs):
    batch = len(latents)
    mask = torch.ones(batch, 5)
    mask[:, 3:] = 0
    return model(
        latents,
        encoder_hidden_states=normal(1, 5, TEXT, seed=1).expand(batch, -1, -1),
        timestep=timestep,
        encoder_attention_mask=mask,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        **kwargs,
    ).sample


def _call_sd3(model, latents, timestep, **kwargs):
    text, pooled = normal(1, 5, TEXT, seed=1), normal(1, 8, seed=2)
    batch = len(latents)
    return model(
        latents,
        encoder_hidden_states=text.expand(batch, -1, -1),
        pooled_projections=pooled.expand(batch, -1),
        timestep=timestep,
        **kwargs,
    ).sample


def flux_ids(rows: int, columns: int) -> Tensor:
    """Position ids of packed tokens, as FLUX's pipelines make them."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return ids.flatten(0, 1)


def _call_flux(model, latents, timestep, img_ids=None, **kwargs):
    batch, _, height, width = latents.shape
    return model(
        hidden_states=latents.flatten(2).transpose(1, 2),
        encoder_hidden_states=normal(1, 5, TEXT, seed=1).expand(batch, -1, -1),
        pooled_projections=normal(1, 8, seed=2).expand(batch, -1),
        timestep=timestep,
        img_ids=flux_ids(height, width) if img_ids is None else img_ids,
        txt_ids=torch.zeros(5, 3),
        guidance=torch.full((batch,), 3.5),
        **kwargs,
    ).sample


def _call_sit(model, latents, timestep, **kwargs):
    return model(latents, timestep, torch.arange(len(latents)), **kwargs).sample


def _thousand(time: float, batch: int) -> Tensor:
    return torch.full((batch,), 1000.0 * time)


@dataclass(frozen=True)
class Host:
    """One kind of model.

    Attributes:
        make: builds it, untrained.
        forward: (model, latents, timestep, **kwargs) -> output.
        patch: latent pixels a side of a token (1 in UNets, where the grid is that of the latents).
        clock: time in [0, 1], 1 is noise, and batch -> the model's own time step.
        blocks: prefix of module names before a patched layer's.
        rotary: whether linear attention does not fit.
        square: whether it takes square latents only.
        channel: the forward argument with the attention kwargs.
    """

    make: Callable[[], nn.Module]
    forward: Callable[..., Tensor]
    patch: int = 1
    clock: Callable[[float, int], Any] = _thousand
    rotary: bool = False
    square: bool = False
    channel: str = "cross_attention_kwargs"
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            return randomised(self.make())

    def __call__(self, model, size=(16, 16), time=0.4, batch=2, **kwargs) -> Tensor:
        latents = normal(batch, 4, *size, seed=4)
        return self.forward(model, latents, self.clock(time, batch), **self.kwargs, **kwargs)


_FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}

HOSTS = {
    "sd15": Host(_unet, _call_unet),
    "sd21": Host(functools.partial(_unet, **_SD21), _call_unet),
    "sdxl": Host(functools.partial(_unet, **_SDXL), _call_sdxl),
    "controlnet": Host(lambda: diffusers.ControlNetModel(**_CONTROLNET), _call_controlnet),
    "dit": Host(
        lambda: diffusers.DiTTransformer2DModel(**_TRANSFORMER, norm_num_groups=4, out_channels=8),
        _call_dit,
        patch=2,
        square=True,
    ),
    "pixart": Host(
        lambda: diffusers.PixArtTransformer2DModel(
            **_TRANSFORMER,
            norm_num_groups=4,
            cross_attention_dim=32,
            caption_channels=TEXT,
            use_additional_conditions=False,
        ),
        _call_pixart,
        patch=2,
    ),
    "sd3": Host(lambda: diffusers.SD3Transformer2DModel(**_SD3), _call_sd3, patch=2, channel="joint_attention_kwargs"),
    "sd3-norm": Host(
        lambda: diffusers.SD3Transformer2DModel(**_SD3, qk_norm="rms_norm"),
        _call_sd3,
        patch=2,
        channel="joint_attention_kwargs",
    ),
    "sd35": Host(
        lambda: diffusers.SD3Transformer2DModel(**_SD3, qk_norm="rms_norm", dual_attention_layers=(0,)),
        _call_sd3,
        patch=2,
        channel="joint_attention_kwargs",
    ),
    "flux": Host(
        lambda: diffusers.FluxTransformer2DModel(**_FLUX),
        _call_flux,
        clock=lambda time, batch: torch.full((batch,), time),
        rotary=True,
        channel="joint_attention_kwargs",
    ),
    "sit": Host(
        lambda: attngen.SiTTransformer2DModel(**_TRANSFORMER, num_classes=10, class_dropout_prob=0.0),
        _call_sit,
        patch=2,
        clock=lambda time, batch: torch.full((batch,), 1.0 - time),
        channel="attention_kwargs",
    ),
}

ACTIVE = {
    "agents": AgentAttention(num_agents=4),
    "merging": TokenMerging(ratio=0.5),
    "merging-random": TokenMerging(ratio=0.5, random=True),
    "merging-agents": TokenMerging(ratio=0.25, stride=4, agent_ratio=0.9),
    "downsampled": DownsampledKV(2),
    "focal": FocalAttention(2, 1, 4),
    **{f"linear-{name}": LinearAttention(name) for name in ("elu", "relu", "focused", "identity")},
}
"""Methods that change something at the small sizes of these tests."""

EXACT = {
    "softmax": SoftmaxAttention(),
    "too-many-agents": AgentAttention(num_agents=10_000),
    "ratio-0": TokenMerging(ratio=0.0),
    "factor-1": DownsampledKV(1),
    "region-too-large": FocalAttention(8, 4, 64),
    "cells-too-large": TokenMerging(ratio=0.5, stride=64),
}
"""Methods that must leave everything as it is at these sizes."""


@functools.cache
def _original(name: str) -> nn.Module:
    return HOSTS[name].build()


def fresh(name: str) -> nn.Module:
    """A new copy of a host's model; all copies have the same weights."""
    return copy.deepcopy(_original(name))


SLIM = {
    "sd15": {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
    },
    "dit": {"num_layers": 1},
    "pixart": {"num_layers": 1},
    "sd3": {"num_layers": 1},
    "sd35": {"num_layers": 1},
    "flux": {},
    "sit": {"num_layers": 1},
}


@functools.cache
def _original_slim(name: str) -> nn.Module:
    full = _original(name)
    with torch.random.fork_rng():
        return randomised(type(full).from_config({**full.config, **SLIM[name]}))


def slim(name: str) -> nn.Module:
    """A copy of the model with as few layers as it can have, for tests that compile it."""
    return copy.deepcopy(_original_slim(name))


def self_attention(model: nn.Module) -> dict[str, Any]:
    """The layers a patch must reach, found without attngen's help, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "set_processor") and not getattr(module, "is_cross_attention", False)
    }


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a patch might leave behind."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_pre_hooks_with_kwargs")
    return {
        "state": list(model.state_dict()),
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: [list(getattr(module, h)) for h in hooks] for name, module in model.named_modules()},
        "processors": {name: id(m.processor) for name, m in model.named_modules() if hasattr(m, "processor")},
        "config": dict(getattr(model, "config", {})),
    }
