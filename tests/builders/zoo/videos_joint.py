"""Video transformers with joint attention of image and text tokens: Hunyuan, Motif, Mochi, CogVideoX, EasyAnimate."""

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from tests.builders.zoo.base import Grid, Tiny, build, corner_of, noise, rows, text_mask, times
from tests.builders.zoo.videos import VIDEOS, latents

_TEXT = 16
_HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": _TEXT,
    "rope_axes_dim": (4, 4, 4),
}
_HUNYUAN_1: dict[str, Any] = {**_HUNYUAN, "num_single_layers": 2, "pooled_projection_dim": 16}
_MOTIF: dict[str, Any] = {name: value for name, value in _HUNYUAN.items() if name != "num_refiner_layers"}
_COG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": _TEXT,
    "num_layers": 2,
    "max_text_seq_length": 7,
    "use_rotary_positional_embeddings": True,
}


def _hunyuan(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, batch),
        "timestep": times(batch),
        "encoder_hidden_states": noise(batch, 8, _TEXT, seed=2),
        "encoder_attention_mask": text_mask(batch, 8, torch.long),
        "pooled_projections": noise(batch, 16, seed=3),
        "guidance": torch.full((batch,), 6000.0),
    }


def _token_replace(grid: Grid, batch: int) -> dict[str, Any]:
    return {name: value for name, value in _hunyuan(grid, batch).items() if name != "guidance"}


def _hunyuan_15(grid: Grid, batch: int, image: bool = False) -> dict[str, Any]:
    # patches of one latent; 4 channels of noise, 4 of the first frame and a mask, as the pipelines concatenate them
    return {
        "hidden_states": latents(grid, batch, channels=9, patch=1),
        "timestep": times(batch),
        "encoder_hidden_states": noise(batch, 8, _TEXT, seed=2),
        "encoder_attention_mask": text_mask(batch, 8, torch.long),
        "encoder_hidden_states_2": noise(batch, 6, _TEXT, seed=3),
        "encoder_attention_mask_2": text_mask(batch, 6, torch.long),
        "image_embeds": noise(batch, 5, _TEXT, seed=4) if image else torch.zeros(batch, 5, _TEXT),
    }


def _hunyuan_15_model() -> nn.Module:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        **{**_HUNYUAN, "in_channels": 9}, text_embed_2_dim=_TEXT, image_embed_dim=_TEXT
    )
    # the constructor makes the projection of ByT5 2048 wide, 4.2M weights, whatever the configuration
    model.context_embedder_2 = type(model.context_embedder_2)(_TEXT, 32, 24)
    return model


def _framepack(grid: Grid, batch: int) -> dict[str, Any]:
    # history in three resolutions: 4 frames at a quarter, 4 at a half, the first and the last two in full
    first, quarter, half, last, drawn = torch.arange(1 + 4 + 4 + 2 + grid[0]).split([1, 4, 4, 2, grid[0]])
    return {
        **_hunyuan(grid, batch),
        "image_embeds": noise(batch, 5, _TEXT, seed=4),
        "indices_latents": drawn,
        "latents_clean": latents((3, *grid[1:]), batch, seed=5),
        "indices_latents_clean": torch.cat([first, last]),
        "latents_history_2x": latents((4, *grid[1:]), batch, seed=6),
        "indices_latents_history_2x": half,
        "latents_history_4x": latents((4, *grid[1:]), batch, seed=7),
        "indices_latents_history_4x": quarter,
    }


def _motif(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, batch, channels=9),
        "timestep": times(batch),
        "encoder_hidden_states": noise(batch, 8, _TEXT, seed=2),
        "encoder_attention_mask": text_mask(batch, 8),
    }


def _motif_image(grid: Grid, batch: int) -> dict[str, Any]:
    return {**_motif(grid, batch), "image_embeds": noise(batch, 5, _TEXT, seed=3)}


def _motif_decoder() -> nn.Module:
    return diffusers.MotifVideoTransformer3DModel(
        **{**_MOTIF, "in_channels": 9},
        num_single_layers=3,
        num_decoder_layers=1,
        image_embed_dim=_TEXT,
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


_mochi_model = build(
    "MochiTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    pooled_projection_dim=16,
    in_channels=4,
    text_embed_dim=_TEXT,
    time_embed_dim=16,
    max_sequence_length=8,
)


def _mochi(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, batch),
        "encoder_hidden_states": noise(batch, 8, _TEXT, seed=2),
        "timestep": times(batch),
        "encoder_attention_mask": text_mask(batch, 8),
    }


def _rotary(grid: Grid) -> tuple[Tensor, Tensor]:
    frames, rows_, columns = grid
    cos, sin = get_3d_rotary_pos_embed(16, ((0, 0), (rows_, columns)), (rows_, columns), frames)
    return cos, sin


def _cog(grid: Grid, batch: int, frames: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": latents((frames * grid[0], *grid[1:]), batch).transpose(1, 2).contiguous(),
        "encoder_hidden_states": noise(batch, 7, _TEXT, seed=2),
        "timestep": times(batch),
        "image_rotary_emb": _rotary(grid),
    }


def _cog_15(grid: Grid, batch: int) -> dict[str, Any]:
    return {**_cog(grid, batch, frames=2), "ofs": torch.full((1,), 2.0)}


def _consisid(grid: Grid, batch: int) -> dict[str, Any]:
    faces = [noise(batch, 6, 16, seed=seed) for seed in (4, 5)]
    return {**_cog(grid, batch), "id_cond": noise(batch, 16, seed=3), "id_vit_hidden": faces}


_consisid_model = build(
    "ConsisIDTransformer3DModel",
    **{**_COG, "num_attention_heads": 3},
    is_train_face=True,
    cross_attn_interval=1,
    cross_attn_dim_head=8,
    cross_attn_num_heads=2,
    LFE_id_dim=16,
    LFE_vit_dim=16,
    LFE_depth=2,
    LFE_dim_head=8,
    LFE_num_heads=2,
    LFE_num_id_token=2,
    LFE_num_querie=4,
    LFE_output_dim=32,  # two thirds of the model's width
    LFE_ff_mult=1,
    LFE_num_scale=2,
)


_easyanimate_model = build(
    "EasyAnimateTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    patch_size=2,
    num_layers=2,
    mmdit_layers=1,
    time_embed_dim=16,
    text_embed_dim=_TEXT,
)


def _easyanimate(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, batch),
        "timestep": times(batch),
        "encoder_hidden_states": noise(batch, 7, _TEXT, seed=2),
    }


ROWS = rows(
    Tiny(
        "HunyuanVideoTransformer3DModel",
        build("HunyuanVideoTransformer3DModel", **_HUNYUAN_1),
        _hunyuan,
        VIDEOS,
    ),
    Tiny(
        "HunyuanVideoTransformer3DModel@token_replace",
        build(
            "HunyuanVideoTransformer3DModel", **_HUNYUAN_1, guidance_embeds=False, image_condition_type="token_replace"
        ),
        _token_replace,
        VIDEOS,
        note="the first frame is given: its tokens are modulated with time 0",
    ),
    Tiny(
        "HunyuanVideo15Transformer3DModel",
        _hunyuan_15_model,
        _hunyuan_15,
        VIDEOS,
        note="image embeddings of zeros, which the model masks",
    ),
    Tiny(
        "HunyuanVideo15Transformer3DModel@image",
        _hunyuan_15_model,
        lambda grid, batch: _hunyuan_15(grid, batch, image=True),
        VIDEOS,
    ),
    Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        build(
            "HunyuanVideoFramepackTransformer3DModel",
            **_HUNYUAN_1,
            has_image_proj=True,
            image_proj_dim=_TEXT,
            has_clean_x_embedder=True,
        ),
        _framepack,
        ((3, 4, 6), (4, 6, 4)),
        note="history, what is drawn, image embeddings and text, in this order; one sample alone has no mask",
    ),
    Tiny(
        "MotifVideoTransformer3DModel",
        build("MotifVideoTransformer3DModel", **{**_MOTIF, "in_channels": 9}, num_single_layers=2),
        _motif,
        VIDEOS,
    ),
    Tiny(
        "MotifVideoTransformer3DModel@decoder",
        _motif_decoder,
        _motif_image,
        VIDEOS,
        note="the last block's context is the encoder's image tokens; shared cross-attention to the text in the others",
    ),
    Tiny("MochiTransformer3DModel", _mochi_model, _mochi, VIDEOS, note="attends sample by sample, without padding"),
    Tiny(
        "CogVideoXTransformer3DModel",
        build("CogVideoXTransformer3DModel", **_COG),
        _cog,
        VIDEOS,
        corner=corner_of("bfchw"),
        note="latents (batch, frames, channels, height, width)",
    ),
    Tiny(
        "CogVideoXTransformer3DModel@1.5",
        build("CogVideoXTransformer3DModel", **_COG, patch_size_t=2, ofs_embed_dim=16, patch_bias=False),
        _cog_15,
        VIDEOS,
        corner=corner_of("bfchw"),
        note="two frames of latents a token",
    ),
    Tiny("ConsisIDTransformer3DModel", _consisid_model, _consisid, VIDEOS, corner=corner_of("bfchw")),
    Tiny(
        "EasyAnimateTransformer3DModel",
        _easyanimate_model,
        _easyanimate,
        VIDEOS,
        note="the first block has weights of its own for the text, the second has not",
    ),
)
