"""Video transformers that cross-attend to the text, each its own kind: LTX, Allegro, Latte, Cosmos, Kandinsky, Sana."""

import math
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import Tensor, nn

from tests.builders.zoo.base import Grid, Tiny, build, corner_of, noise, rows, text_mask, times
from tests.builders.zoo.videos import VIDEOS, latents

_TEXT = 16


def _packed(grid: Grid, batch: int) -> Tensor:
    return noise(batch, math.prod(grid), 8, seed=1)


_ltx_model = build(
    "LTXVideoTransformer3DModel",
    in_channels=8,
    out_channels=8,
    num_attention_heads=2,
    attention_head_dim=16,
    cross_attention_dim=32,
    num_layers=2,
    caption_channels=_TEXT,
)


def _ltx(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _packed(grid, batch),
        "encoder_hidden_states": noise(batch, 8, _TEXT, seed=2),
        "timestep": times(batch),
        "encoder_attention_mask": text_mask(batch, 8, torch.long),
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _ltx_given(grid: Grid, batch: int) -> dict[str, Any]:
    # image to video: the tokens of the first frame have time 0
    timestep = times(batch)[:, None].repeat(1, math.prod(grid))
    timestep[:, : grid[1] * grid[2]] = 0.0
    return {**_ltx(grid, batch), "timestep": timestep}


def _ltx2_model(**config: Any) -> nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=_TEXT,
        rope_type="split",
        **config,
    )


def _ltx2(grid: Grid, batch: int, width: int = _TEXT, audio_width: int = _TEXT) -> dict[str, Any]:
    mask = text_mask(batch, 8, torch.long)
    return {
        "hidden_states": _packed(grid, batch),
        "audio_hidden_states": noise(batch, 10, 8, seed=3),
        "encoder_hidden_states": noise(batch, 8, width, seed=2),
        "audio_encoder_hidden_states": noise(batch, 8, audio_width, seed=4),
        "timestep": times(batch),
        "sigma": times(batch),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
        "audio_num_frames": 10,
    }


_allegro_model = build(
    "AllegroTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    cross_attention_dim=24,
    sample_height=16,
    sample_width=16,
    sample_frames=4,
    caption_channels=_TEXT,
)


def _allegro(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    made = get_3d_rotary_pos_embed_allegro(
        12, ((0, 0), (height, width)), (height, width), frames, interpolation_scale=(2.2, 2.0, 2.0)
    )
    tables, axes = tuple(made[:3]), [axis.long() for axis in made[3:]]
    position = torch.cartesian_prod(*axes).T.reshape(3, 1, -1)
    return {
        "hidden_states": latents(grid, batch),
        "encoder_hidden_states": noise(batch, 8, _TEXT, seed=2),
        "timestep": times(batch),
        "encoder_attention_mask": text_mask(batch, 8, torch.long),
        "image_rotary_emb": (tables, tuple(position)),
    }


_latte_model = build(
    "LatteTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=16,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    caption_channels=_TEXT,
    video_length=3,
)


def _latte(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, batch),
        "timestep": times(batch),
        "encoder_hidden_states": noise(batch, 7, _TEXT, seed=2),
    }


_COSMOS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": _TEXT,
    "adaln_lora_dim": 8,
    "max_size": (4, 16, 16),
}


def _cosmos(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, batch),
        "timestep": times(batch, 1.0),
        "encoder_hidden_states": noise(batch, 7, _TEXT, seed=2),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 16 * grid[1], 16 * grid[2]),
    }


def _cosmos_25(grid: Grid, batch: int) -> dict[str, Any]:
    # the first frame is given: its time is 0 and its mask is 1
    timestep = times(batch, 1.0).reshape(batch, 1, 1, 1, 1).repeat(1, 1, grid[0], 1, 1)
    mask = torch.zeros(batch, 1, grid[0], 2 * grid[1], 2 * grid[2])
    timestep[:, :, 0], mask[:, :, 0] = 0.0, 1.0
    return {
        **_cosmos(grid, batch),
        "timestep": timestep,
        "encoder_hidden_states": (noise(batch, 8, 24, seed=2), noise(batch, 6, 8, seed=3)),
        "condition_mask": mask,
    }


_cosmos_25_model = build(
    "CosmosTransformer3DModel",
    **{**_COSMOS, "in_channels": 5},
    extra_pos_embed_type=None,
    use_crossattn_projection=True,
    crossattn_proj_in_channels=24,
    encoder_hidden_states_channels=_TEXT,
    img_context_dim_in=8,
    img_context_num_tokens=6,
    img_context_dim_out=32,
)


_KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": _TEXT,
    "in_text_dim2": 16,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 48,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
    "visual_cond": True,
}


def _kandinsky(grid: Grid, batch: int) -> dict[str, Any]:
    # 4 channels of noise, 4 of the given frames and their mask; channels are last
    return {
        "hidden_states": latents(grid, batch, channels=9).permute(0, 2, 3, 4, 1).contiguous(),
        "encoder_hidden_states": noise(batch, 8, _TEXT, seed=2),
        "timestep": times(batch),
        "pooled_projections": noise(batch, 16, seed=3),
        "visual_rope_pos": tuple(torch.arange(size) for size in grid),
    }


def _kandinsky_5(grid: Grid, batch: int) -> dict[str, Any]:
    return {**_kandinsky(grid, batch), "text_rope_pos": torch.arange(8), "scale_factor": (1.0, 2.0, 2.0)}


def _kandinsky_6(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **_kandinsky(grid, batch),
        "audio_hidden_states": noise(batch, 10, 8, seed=4),
        "encoder_attention_mask": text_mask(batch, 8),
    }


_sana_video_model = build(
    "SanaVideoTransformer3DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=_TEXT,
    sample_size=8,
)


def _sana_video(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, batch),
        "encoder_hidden_states": noise(batch, 8, _TEXT, seed=2),
        "timestep": times(batch),
        "encoder_attention_mask": text_mask(batch, 8, torch.long),
    }


_sana_wm_model = build(
    "SanaWMTransformer3DModel",
    in_channels=4,
    num_layers=3,
    hidden_size=48,
    num_attention_heads=2,
    softmax_every_n=2,
    linear_head_dim=24,
    chunk_plucker_channels=6,
    chunk_plucker_post_attn_blocks=3,
    image_size=8,
    caption_channels=_TEXT,
    mlp_ratio=2.0,
)


def _sana_wm(grid: Grid, batch: int) -> dict[str, Any]:
    # a camera a frame: 4 x 4 of camera to world, moving along x, then focal lengths and centre in latent pixels
    frames, height, width = grid
    camera = torch.eye(4).repeat(batch, frames, 1, 1)
    camera[..., 0, 3] = 0.1 * torch.arange(frames)
    lens = torch.tensor([width, height, width / 2, height / 2]).expand(batch, frames, 4)
    return {
        "hidden_states": latents(grid, batch, patch=1),
        "timestep": times(batch).reshape(batch, 1, 1).repeat(1, 1, frames),
        "encoder_hidden_states": noise(batch, 8, _TEXT, seed=2),
        "mask": text_mask(batch, 8, torch.long),
        "camera_conditions": torch.cat([camera.flatten(2), lens], 2),
        "chunk_plucker": latents(grid, batch, channels=6, patch=1, seed=3),
    }


def _temporal(grid: Grid, batch: int) -> dict[str, Any]:
    pixels = latents(grid, batch, channels=16, patch=1).transpose(1, 2)
    return {"hidden_states": pixels.flatten(0, 1).contiguous(), "num_frames": grid[0]}


def _frames_in_batch(hidden: Tensor, grid: Grid, last: bool) -> Tensor:
    return corner_of("bfchw")(hidden.unflatten(0, (-1, grid[0])), grid, last).flatten(0, 1)


ROWS = rows(
    Tiny("LTXVideoTransformer3DModel", _ltx_model, _ltx, VIDEOS, note="packed; the grid is in arguments"),
    Tiny("LTXVideoTransformer3DModel@image", _ltx_model, _ltx_given, VIDEOS, note="a timestep for every token"),
    Tiny(
        "LTX2VideoTransformer3DModel",
        _ltx2_model,
        _ltx2,
        VIDEOS,
        note="predicts sound too; rotation of half vectors, split by heads",
    ),
    Tiny(
        "LTX2VideoTransformer3DModel@2.3",
        lambda: _ltx2_model(
            gated_attn=True,
            audio_gated_attn=True,
            cross_attn_mod=True,
            audio_cross_attn_mod=True,
            use_prompt_embeddings=False,
            perturbed_attn=True,
        ),
        lambda grid, batch: _ltx2(grid, batch, width=32, audio_width=16),
        VIDEOS,
        note="attention is gated by heads after the products",
    ),
    Tiny("AllegroTransformer3DModel", _allegro_model, _allegro, VIDEOS),
    Tiny(
        "LatteTransformer3DModel",
        _latte_model,
        _latte,
        ((3, 4, 6), (3, 6, 4)),
        note="a block within frames, then one across them; the number of frames is a constant of the model",
    ),
    Tiny("CosmosTransformer3DModel", build("CosmosTransformer3DModel", **_COSMOS), _cosmos, VIDEOS),
    Tiny(
        "Kandinsky6Transformer3DModel",
        build("Kandinsky6Transformer3DModel", **_KANDINSKY, in_audio_dim=8, out_audio_dim=8),
        _kandinsky_6,
        VIDEOS,
        corner=corner_of("bfhwc"),
        note="channels last; predicts sound too",
    ),
    Tiny("SanaVideoTransformer3DModel", _sana_video_model, _sana_video, VIDEOS, note="linear attention to itself"),
)

APART = rows(
    Tiny(
        "CosmosTransformer3DModel@2.5",
        _cosmos_25_model,
        _cosmos_25,
        VIDEOS,
        note="image tokens in the cross-attention, a timestep for every frame",
    ),
    Tiny(
        "Kandinsky5Transformer3DModel",
        build("Kandinsky5Transformer3DModel", **_KANDINSKY),
        _kandinsky_5,
        VIDEOS,
        corner=corner_of("bfhwc"),
        note="channels last; queries and keys are rounded to bfloat16",
    ),
    Tiny(
        "SanaWMTransformer3DModel",
        _sana_wm_model,
        _sana_wm,
        VIDEOS,
        note="blocks 0 and 2 are linear recurrences, block 1 is softmax attention in bfloat16",
    ),
    Tiny(
        "TransformerTemporalModel",
        build(
            "TransformerTemporalModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=16,
            num_layers=2,
            norm_num_groups=4,
        ),
        _temporal,
        VIDEOS,
        corner=_frames_in_batch,
        note="frames are in the axis of samples; every position attends to itself in other frames",
    ),
)
"""Rows that are not in the zoo: their calls cannot be cut into samples by the first axis of each argument."""
