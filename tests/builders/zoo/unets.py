"""UNets; grids are those of the latents, the tokens of the finest level; every level below has a quarter of them."""

from typing import Any

import torch
from torch import Tensor

from tests.builders.zoo.base import Grid, Tiny, build, change_corner, corner_of, noise, rows, text_mask, times

IMAGES: tuple[Grid, Grid] = ((1, 8, 12), (1, 16, 8))
VIDEOS: tuple[Grid, Grid] = ((2, 8, 12), (3, 12, 8))
TEXT = 16

SD15: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL: dict[str, Any] = {
    **SD15,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 2, 4),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + TEXT,
}
_PIXELS: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_dim": TEXT,
    "resnet_time_scale_shift": "scale_shift",
}
_KANDINSKY22: dict[str, Any] = {
    **_PIXELS,
    "out_channels": 8,
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
}
_IF: dict[str, Any] = {
    **_PIXELS,
    "in_channels": 3,
    "out_channels": 6,
    "act_fn": "gelu",
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_dim": 32,  # a multiple of the 32 groups of its norm
    "cross_attention_norm": "group_norm",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4142,
}


def sample(grid: Grid, batch: int, channels: int = 4) -> dict[str, Any]:
    """Latents (batch, channels, height, width) and timesteps."""
    return {"sample": noise(batch, channels, *grid[1:], seed=1), "timestep": times(batch)}


def with_text(grid: Grid, batch: int, channels: int = 4) -> dict[str, Any]:
    """The same, and text."""
    return {**sample(grid, batch, channels), "encoder_hidden_states": noise(batch, 7, TEXT, seed=2)}


def with_size(grid: Grid, batch: int, channels: int = 4) -> dict[str, Any]:
    """The same, and what SDXL adds: a pooled text and the sizes of the image."""
    sizes = torch.tensor([128.0, 96.0, 0.0, 0.0, 128.0, 96.0]).repeat(batch, 1)
    added = {"text_embeds": noise(batch, TEXT, seed=3), "time_ids": sizes}
    return {**with_text(grid, batch, channels), "added_cond_kwargs": added}


def _kandinsky22(grid: Grid, batch: int) -> dict[str, Any]:
    added = {"image_embeds": noise(batch, 24, 4, seed=3)[..., 0]}
    return {**sample(grid, batch), "encoder_hidden_states": None, "added_cond_kwargs": added}


def _if(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **sample(grid, batch, channels=3),
        "encoder_hidden_states": noise(batch, 8, 24, seed=2),
        "encoder_attention_mask": text_mask(batch, 8, torch.long),
    }


def video(grid: Grid, batch: int, channels: int = 4) -> dict[str, Any]:
    """Latents (batch, channels, frames, height, width), timesteps and text."""
    return {
        "sample": noise(batch, channels, *grid, seed=1),
        "timestep": times(batch),
        "encoder_hidden_states": noise(batch, 7, TEXT, seed=2),
    }


def text_of_frames(grid: Grid, batch: int) -> dict[str, Any]:
    """The same with the text of every frame, (batch · frames, tokens, channels)."""
    given = video(grid, batch)
    return {**given, "encoder_hidden_states": given["encoder_hidden_states"].repeat_interleave(grid[0], 0)}


def _stable_video(grid: Grid, batch: int) -> dict[str, Any]:
    # 4 channels of noise and 4 of the given image; the text is one embedding of that image
    return {
        **video(grid, batch, channels=8),
        "sample": noise(batch, grid[0], 8, *grid[1:], seed=1),
        "encoder_hidden_states": noise(batch, 1, TEXT, seed=2),
        "added_time_ids": torch.tensor([6.0, 127.0, 0.02]).repeat(batch, 1),
    }


def _i2vgen(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **video(grid, batch),
        "fps": torch.full((batch,), 16.0),
        "image_latents": noise(batch, 4, *grid, seed=3),
        "image_embeddings": noise(batch, TEXT, seed=4),
    }


_VIDEO: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
_MOTION: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT,
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 8,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}


def _kandinsky3(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **sample(grid, batch),
        "encoder_hidden_states": noise(batch, 8, 24, seed=2),
        "encoder_attention_mask": text_mask(batch, 8, torch.long),
    }


_CASCADE_C = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
_CASCADE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "timestep_ratio_embedding_dim": 8,
    "conditioning_dim": 16,
    "block_out_channels": (16, 32),
    "num_attention_heads": (2, 4),
    "down_num_layers_per_block": (1, 2),
    "up_num_layers_per_block": (2, 1),
    "clip_text_pooled_in_channels": 16,
}


def _cascade(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "sample": noise(batch, 4, *grid[1:], seed=1),
        "timestep_ratio": times(batch, 1.0),
        "clip_text_pooled": noise(batch, 1, 16, seed=2),
        "clip_text": noise(batch, 7, TEXT, seed=3),
        "clip_img": noise(batch, 1, 16, seed=4),
    }


def _cascade_decoder(grid: Grid, batch: int) -> dict[str, Any]:
    # two latents a side of a token at the finest level; only the level below it attends
    return {
        "sample": noise(batch, 4, 2 * grid[1], 2 * grid[2], seed=1),
        "timestep_ratio": times(batch, 1.0),
        "clip_text_pooled": noise(batch, 1, 16, seed=2),
        "effnet": noise(batch, 16, 4, 4, seed=3),
    }


def _dreamlite(grid: Grid, batch: int) -> dict[str, Any]:
    # the reference is to the right of the sample, in the same latents
    return {
        **with_text((1, grid[1], 2 * grid[2]), batch),
        "encoder_attention_mask": text_mask(batch, 7, torch.long),
        "added_cond_kwargs": {"time_ids": torch.tensor([128.0, 96.0]).repeat(batch, 1)},
    }


def _left_half(output: Any) -> Tensor:
    return output.sample[..., : output.sample.shape[3] // 2].float().flatten()


def _corner_of_left_half(latents: Tensor, grid: Grid, last: bool) -> Tensor:
    return torch.cat([change_corner(latents[..., : grid[2]], grid, last), latents[..., grid[2] :]], 3)


def _controlled(grid: Grid, batch: int) -> dict[str, Any]:
    return {**with_text(grid, batch), "controlnet_cond": condition(grid, batch)}


def condition(grid: Grid, batch: int, seed: int = 5) -> Tensor:
    """The image of a condition (batch, 3, height, width), with eight by eight pixels a latent."""
    return noise(batch, 3, 8 * grid[1], 8 * grid[2], seed=seed)


_xs_model = build(
    "UNetControlNetXSModel",
    sample_size=16,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(16, 32),
    norm_num_groups=8,
    cross_attention_dim=TEXT,
    num_attention_heads=2,
    ctrl_conditioning_embedding_out_channels=(4, 4, 8, 8),
    ctrl_block_out_channels=(8, 8),
    ctrl_num_attention_heads=2,
    ctrl_max_norm_num_groups=4,
)


ROWS = rows(
    Tiny("UNet2DConditionModel", build("UNet2DConditionModel", **SD15), with_text, IMAGES, "sample"),
    Tiny("UNet2DConditionModel@xl", build("UNet2DConditionModel", **SDXL), with_size, IMAGES, "sample"),
    Tiny(
        "UNet2DConditionModel@kandinsky22",
        build("UNet2DConditionModel", **_KANDINSKY22),
        _kandinsky22,
        ((1, 16, 24), (1, 24, 16)),
        "sample",
        note="keys of the image embeddings before those of the latents, in one layer; from the second level on",
    ),
    Tiny(
        "UNet2DConditionModel@if",
        build("UNet2DConditionModel", **_IF),
        _if,
        ((1, 16, 24), (1, 24, 16)),
        "sample",
        note="keys of the text before those of the pixels, in one layer; from the second level on",
    ),
    Tiny(
        "UNet2DModel",
        build(
            "UNet2DModel",
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        ),
        lambda grid, batch: sample(grid, batch, channels=3),
        IMAGES,
        "sample",
        note="attention takes (batch, channels, height, width)",
    ),
    Tiny("UNet3DConditionModel", build("UNet3DConditionModel", **_VIDEO), video, VIDEOS, "sample"),
    Tiny(
        "UNetSpatioTemporalConditionModel",
        build(
            "UNetSpatioTemporalConditionModel",
            block_out_channels=(32, 64),  # groups of norms are 32, whatever the configuration
            layers_per_block=1,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            cross_attention_dim=TEXT,
            num_attention_heads=(2, 4),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        ),
        _stable_video,
        VIDEOS,
        "sample",
        corner=corner_of("bfchw"),
        note="latents (batch, frames, channels, height, width)",
    ),
    Tiny("I2VGenXLUNet", build("I2VGenXLUNet", **_VIDEO), _i2vgen, VIDEOS, "sample"),
    Tiny(
        "Kandinsky3UNet",
        build(
            "Kandinsky3UNet",
            time_embedding_dim=16,
            groups=4,
            attention_head_dim=8,
            layers_per_block=2,
            block_out_channels=(16, 32),
            cross_attention_dim=TEXT,
            encoder_hid_dim=24,
        ),
        _kandinsky3,
        ((1, 16, 24), (1, 24, 16)),
        "sample",
        note="attends from the second level on; self-attention is given its own input as the text",
    ),
    Tiny(
        "StableCascadeUNet",
        build(
            "StableCascadeUNet",
            **_CASCADE,
            block_types_per_layer=(_CASCADE_C, _CASCADE_C),
            clip_text_in_channels=TEXT,
            clip_image_in_channels=16,
            switch_level=(False,),
        ),
        _cascade,
        IMAGES,
        "sample",
        note="stage C: keys of the latents, then of the text, in one layer; both levels have the same size",
    ),
    Tiny(
        "StableCascadeUNet@decoder",
        build(
            "StableCascadeUNet",
            **_CASCADE,
            patch_size=2,
            block_types_per_layer=(_CASCADE_C[:2], _CASCADE_C),
            effnet_in_channels=16,
            timestep_conditioning_type=("sca",),
        ),
        _cascade_decoder,
        ((1, 8, 12), (1, 12, 8)),
        "sample",
        note="stage B: the coarser level attends",
    ),
    Tiny(
        "DreamLiteUNetModel",
        build(
            "DreamLiteUNetModel",
            block_out_channels=(8, 16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=TEXT,
            attention_head_dim=(2, 2, 4),
            use_linear_projection=True,
            ff_mult=2,
            addition_embed_type="time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8,
        ),
        _dreamlite,
        ((1, 16, 12), (1, 24, 8)),
        "sample",
        _left_half,
        _corner_of_left_half,
        note="a reference right of the sample; the coarsest of three levels attends to itself, with one head of keys",
    ),
    Tiny("UNetControlNetXSModel", _xs_model, _controlled, IMAGES, "sample", note="two UNets side by side"),
)

APART = rows(
    Tiny(
        "UNetMotionModel",
        build("UNetMotionModel", **_MOTION),
        text_of_frames,
        VIDEOS,
        "sample",
        note="frames of the text are in the axis of samples",
    ),
)
"""Rows that are not in the zoo: their calls cannot be cut into samples by the first axis of each argument."""
