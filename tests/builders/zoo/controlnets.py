"""ControlNets, alone and in the containers of several; their outputs are residuals of the blocks of a denoiser."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn

from tests.builders.zoo import unets
from tests.builders.zoo.base import Grid, Tiny, build, noise, packed, positions, rows, text_mask, times
from tests.builders.zoo.unets import TEXT, condition
from tests.builders.zoo.videos import latents

_SD15: dict[str, Any] = {
    **{name: value for name, value in unets.SD15.items() if name not in ("sample_size", "up_block_types")},
    "conditioning_embedding_out_channels": (4, 4, 8, 8),
}
_UNION: dict[str, Any] = {
    **{name: value for name, value in unets.SDXL.items() if name not in ("sample_size", "up_block_types")},
    "conditioning_embedding_out_channels": (4, 4, 8, 8),
    "num_trans_channel": 16,
    "num_trans_head": 2,
    "num_proj_channel": 16,
}
_SPARSE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 8,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
}
_JOINT: dict[str, Any] = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4}
_SD3: dict[str, Any] = {
    **_JOINT,
    "sample_size": 16,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "out_channels": 4,
}
_FLUX: dict[str, Any] = {
    **_JOINT,
    "num_single_layers": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
_QWEN: dict[str, Any] = {**_JOINT, "out_channels": 4, "joint_attention_dim": TEXT, "axes_dims_rope": (4, 6, 6)}
_HUNYUAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 16,
    "hidden_size": 32,
    "transformer_num_layers": 6,
    "mlp_ratio": 2.0,
    "cross_attention_dim": TEXT,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 16,
    "text_len": 7,
    "text_len_t5": 6,
    "use_style_cond_and_image_meta_size": False,
}
_TWO = (1.0, 0.5)


def _image(grid: Grid, batch: int, patch: int = 2, seed: int = 1) -> Tensor:
    return noise(batch, 4, patch * grid[1], patch * grid[2], seed=seed)


def _unet(grid: Grid, batch: int) -> dict[str, Any]:
    return {**unets.with_text(grid, batch), "controlnet_cond": condition(grid, batch)}


def _unet_two(grid: Grid, batch: int) -> dict[str, Any]:
    conditions = [condition(grid, batch, seed) for seed in (5, 6)]
    return {**_unet(grid, batch), "controlnet_cond": conditions, "conditioning_scale": _TWO, "return_dict": False}


def _union(grid: Grid, batch: int) -> dict[str, Any]:
    # two of six kinds of conditions
    return {
        **unets.with_size(grid, batch),
        "controlnet_cond": [condition(grid, batch, seed) for seed in (5, 6)],
        "control_type": torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0]).repeat(batch, 1),
        "control_type_idx": (0, 2),
    }


def _union_two(grid: Grid, batch: int) -> dict[str, Any]:
    kinds = torch.eye(6)[:2, None].expand(2, batch, 6)
    return {
        **unets.with_size(grid, batch),
        "controlnet_cond": [[condition(grid, batch, seed)] for seed in (5, 6)],
        "control_type": [kinds[0].contiguous(), kinds[1].contiguous()],
        "control_type_idx": ((0,), (1,)),
        "conditioning_scale": ((1.0,), (0.5,)),
        "return_dict": False,
    }


def _sparse(grid: Grid, batch: int) -> dict[str, Any]:
    # latents are ignored: the output depends on the condition, given for the first frame
    mask = torch.zeros(batch, 1, *grid)
    mask[:, :, 0] = 1.0
    return {
        **unets.text_of_frames(grid, batch),
        "controlnet_cond": noise(batch, 4, *grid, seed=5),
        "conditioning_mask": mask,
    }


def _sd3(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _image(grid, batch),
        "controlnet_cond": _image(grid, batch, seed=5),
        "encoder_hidden_states": noise(batch, 7, TEXT, seed=2),
        "pooled_projections": noise(batch, 16, seed=3),
        "timestep": times(batch),
    }


def _sd35(grid: Grid, batch: int) -> dict[str, Any]:
    # the transformer's own embedding of the latents, and no text
    given = _sd3(grid, batch)
    return {**given, "hidden_states": packed(grid, batch, 32, seed=1), "encoder_hidden_states": None}


def _reversed_corner(embedded: Tensor, grid: Grid, last: bool) -> Tensor:
    # a norm follows at once, which would take away a constant that is added to all channels
    changed = embedded.clone()
    at = -1 if last else 0
    changed[:, at] = embedded[:, at].flip(-1)
    return changed


def _two(given: dict[str, Any], other: Tensor) -> dict[str, Any]:
    conditions = [given["controlnet_cond"], other]
    return {**given, "controlnet_cond": conditions, "conditioning_scale": _TWO, "return_dict": False}


def _flux(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": packed(grid, batch, 4, seed=1),
        "controlnet_cond": packed(grid, batch, 4, seed=5),
        "encoder_hidden_states": noise(batch, 7, TEXT, seed=2),
        "pooled_projections": noise(batch, 16, seed=3),
        "timestep": times(batch, 1.0),
        "img_ids": positions(grid),
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def _flux_union(grid: Grid, batch: int) -> dict[str, Any]:
    return {**_flux(grid, batch), "controlnet_mode": torch.full((batch, 1), 2)}


def _flux_two(grid: Grid, batch: int) -> dict[str, Any]:
    modes = [torch.full((batch,), mode) for mode in (2, 0)]
    return {**_two(_flux(grid, batch), packed(grid, batch, 4, seed=6)), "controlnet_mode": modes}


def _qwen(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": packed(grid, batch, 4, seed=1),
        "controlnet_cond": packed(grid, batch, 4, seed=5),
        "encoder_hidden_states": noise(batch, 8, TEXT, seed=2),
        "encoder_hidden_states_mask": text_mask(batch, 8, torch.long),
        "timestep": times(batch, 1.0),
        "img_shapes": [[grid] for _ in range(batch)],
    }


def _hunyuan(grid: Grid, batch: int) -> dict[str, Any]:
    size = grid[1:]
    return {
        "hidden_states": _image(grid, batch),
        "controlnet_cond": _image(grid, batch, seed=5),
        "timestep": times(batch),
        "encoder_hidden_states": noise(batch, 7, TEXT, seed=2),
        "text_embedding_mask": text_mask(batch, 7, torch.long),
        "encoder_hidden_states_t5": noise(batch, 6, 16, seed=3),
        "text_embedding_mask_t5": text_mask(batch, 6, torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), size), size, output_type="pt"),
    }


_cosmos_model = build(
    "CosmosControlNetModel",
    n_controlnet_blocks=2,
    in_channels=6,
    latent_channels=6,
    model_channels=32,
    num_attention_heads=2,
    attention_head_dim=16,
    mlp_ratio=2.0,
    text_embed_dim=TEXT,
    adaln_lora_dim=8,
    max_size=(4, 16, 16),
)


def _cosmos(grid: Grid, batch: int) -> dict[str, Any]:
    # the first frame is given: its time is 0 and its mask is 1
    timestep = times(batch, 1.0).reshape(batch, 1, 1, 1, 1).repeat(1, 1, grid[0], 1, 1)
    mask = torch.zeros(batch, 1, grid[0], 2 * grid[1], 2 * grid[2])
    timestep[:, :, 0], mask[:, :, 0] = 0.0, 1.0
    return {
        "controls_latents": latents(grid, batch, seed=5),
        "latents": latents(grid, batch),
        "timestep": timestep,
        "encoder_hidden_states": noise(batch, 7, TEXT, seed=2),
        "condition_mask": mask,
        "padding_mask": torch.zeros(1, 1, 16 * grid[1], 16 * grid[2]),
    }


_Z_IMAGE: dict[str, Any] = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def _z_image_model() -> nn.Module:
    control = diffusers.ZImageControlNetModel(
        **_Z_IMAGE,
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=4,
        add_control_noise_refiner="control_noise_refiner",
    )
    base = diffusers.ZImageTransformer2DModel(
        **_Z_IMAGE, in_channels=4, n_layers=2, cap_feat_dim=TEXT, axes_dims=[4, 6, 6], axes_lens=[128, 16, 16]
    )
    return diffusers.ZImageControlNetModel.from_transformer(control, base)


def _z_image(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "x": list(latents(grid, batch)),
        "t": times(batch, 1.0),
        "cap_feats": list(noise(batch, 7, TEXT, seed=2)),
        "control_context": list(latents(grid, batch, seed=5)),
    }


def _sana(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _image(grid, batch, patch=1),
        "controlnet_cond": _image(grid, batch, patch=1, seed=5),
        "encoder_hidden_states": noise(batch, 8, TEXT, seed=2),
        "encoder_attention_mask": text_mask(batch, 8, torch.long),
        "timestep": times(batch),
    }


def _several(
    container: Callable[..., nn.Module], net: Callable[[], nn.Module], number: int = 2
) -> Callable[[], nn.Module]:
    return lambda: container([net() for _ in range(number)])


_sd3_net = build("SD3ControlNetModel", **_SD3, joint_attention_dim=TEXT, pos_embed_max_size=16)
_flux_net = build("FluxControlNetModel", **_FLUX, num_mode=3)
_qwen_net = build("QwenImageControlNetModel", **_QWEN)
_hunyuan_net = build("HunyuanDiT2DControlNetModel", **_HUNYUAN)
_unet_net = build("ControlNetModel", **_SD15)
_union_net = build("ControlNetUnionModel", **_UNION)

ROWS = rows(
    Tiny("ControlNetModel", _unet_net, _unet, unets.IMAGES, "sample"),
    Tiny("SD3ControlNetModel", _sd3_net, _sd3),
    Tiny(
        "SD3ControlNetModel@3.5",
        build("SD3ControlNetModel", **_SD3, joint_attention_dim=None, use_pos_embed=False),
        _sd35,
        corner=_reversed_corner,
        note="self-attention alone; the latents come embedded, (batch, tokens, channels), without their grid",
    ),
    Tiny("FluxControlNetModel", build("FluxControlNetModel", **_FLUX), _flux),
    Tiny("FluxControlNetModel@union", _flux_net, _flux_union, note="a token for the kind of condition before the text"),
    Tiny("QwenImageControlNetModel", _qwen_net, _qwen),
    Tiny("HunyuanDiT2DControlNetModel", _hunyuan_net, _hunyuan),
    Tiny("CosmosControlNetModel", _cosmos_model, _cosmos, ((2, 4, 6), (3, 6, 4)), "latents"),
    Tiny(
        "ZImageControlNetModel",
        _z_image_model,
        _z_image,
        latents="x",
        note="its embeddings and refiners are those of a base model",
    ),
    Tiny(
        "SanaControlNetModel",
        build(
            "SanaControlNetModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=TEXT,
            sample_size=8,
        ),
        _sana,
        note="linear attention already",
    ),
    Tiny(
        "MultiControlNetModel",
        _several(diffusers.MultiControlNetModel, _unet_net),
        _unet_two,
        unets.IMAGES,
        "sample",
    ),
    Tiny(
        "SD3MultiControlNetModel",
        _several(diffusers.SD3MultiControlNetModel, _sd3_net),
        lambda grid, batch: _two(_sd3(grid, batch), _image(grid, batch, seed=6)),
    ),
    Tiny(
        "FluxMultiControlNetModel",
        _several(diffusers.FluxMultiControlNetModel, _flux_net),
        _flux_two,
    ),
    Tiny(
        "QwenImageMultiControlNetModel",
        _several(diffusers.QwenImageMultiControlNetModel, _qwen_net, 1),
        lambda grid, batch: _two(_qwen(grid, batch), packed(grid, batch, 4, seed=6)),
        note="takes one net alone, for several conditions",
    ),
    Tiny(
        "HunyuanDiT2DMultiControlNetModel",
        _several(diffusers.HunyuanDiT2DMultiControlNetModel, _hunyuan_net),
        lambda grid, batch: _two(_hunyuan(grid, batch), _image(grid, batch, seed=6)),
    ),
)

APART = rows(
    Tiny(
        "SparseControlNetModel",
        build("SparseControlNetModel", **_SPARSE),
        _sparse,
        unets.VIDEOS,
        "controlnet_cond",
        note="ignores the latents; frames of the text are in the axis of samples",
    ),
    Tiny(
        "ControlNetUnionModel",
        _union_net,
        _union,
        unets.IMAGES,
        "sample",
        note="a small transformer over the means of the conditions comes first and mixes the samples of a batch",
    ),
    Tiny(
        "MultiControlNetUnionModel",
        _several(MultiControlNetUnionModel, _union_net),
        _union_two,
        unets.IMAGES,
        "sample",
        note="not at the top of diffusers",
    ),
)
"""Rows that are not in the zoo: their calls cannot be cut into samples by the first axis of each argument."""
