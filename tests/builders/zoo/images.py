"""Image models with self-attention over image tokens alone; the text enters by cross-attention or modulation."""

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import Tensor

from tests.builders.zoo.base import Grid, Tiny, build, noise, rows, text_mask, times

CHANNELS = 4
TEXT, TEXT_WIDTH = 7, 12
_SQUARE: tuple[Grid, Grid] = ((1, 5, 5), (1, 6, 6))
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": CHANNELS}


def _latents(grid: Grid, batch: int, patch: int, channels: int = CHANNELS) -> Tensor:
    return noise(batch, channels, grid[1] * patch, grid[2] * patch)


def _text(batch: int) -> Tensor:
    return noise(batch, TEXT, TEXT_WIDTH, seed=1)


def _dit(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch, 2),
        "timestep": times(batch),
        "class_labels": torch.arange(3, 3 + batch),
    }


def _pixart(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch, 2),
        "timestep": times(batch),
        "encoder_hidden_states": _text(batch),
        "encoder_attention_mask": text_mask(batch, TEXT, torch.float32),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sana(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch, 1),
        "timestep": times(batch),
        "encoder_hidden_states": _text(batch),
        "encoder_attention_mask": text_mask(batch, TEXT, torch.float32),
    }


def _hunyuan_dit(grid: Grid, batch: int) -> dict[str, Any]:
    _, height, width = grid
    return {
        "hidden_states": _latents(grid, batch, 2),
        "timestep": times(batch),
        "encoder_hidden_states": _text(batch),
        "text_embedding_mask": text_mask(batch, TEXT),
        "encoder_hidden_states_t5": noise(batch, 5, 16, seed=2),
        "text_embedding_mask_t5": text_mask(batch, 5),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (height, width)), (height, width), output_type="pt"),
    }


def _lumina_next(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch, 2),
        "timestep": times(batch, 1.0),
        "encoder_hidden_states": _text(batch),
        "encoder_mask": text_mask(batch, TEXT),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 16, 16),
        "cross_attention_kwargs": {},
    }


def _inner(grid: Grid, batch: int) -> dict[str, Any]:
    return {"hidden_states": _latents(grid, batch, 1, 32), "encoder_hidden_states": _text(batch)}


def _uvit(grid: Grid, batch: int) -> dict[str, Any]:
    _, height, width = grid
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(24, (batch, height, width), generator=generator),
        "encoder_hidden_states": _text(batch),
        "pooled_text_emb": noise(batch, 8, seed=2),
        "micro_conds": torch.tensor([512.0, 512.0, 0.0, 0.0, 6.0]).expand(batch, -1),
    }


def _another_id(ids: Tensor, grid: Grid, last: bool) -> Tensor:
    changed = ids.clone()
    place = (-1, -1) if last else (0, 0)
    changed[:, place[0], place[1]] = (ids[:, place[0], place[1]] + 1) % 24
    return changed


ROWS = rows(
    Tiny(
        "DiTTransformer2DModel",
        build("DiTTransformer2DModel", **_HEADS, sample_size=12, num_embeds_ada_norm=8),
        _dit,
        _SQUARE,
        note="square images only: it reads the grid as the square root of the number of tokens",
    ),
    Tiny(
        "PixArtTransformer2DModel",
        build(
            "PixArtTransformer2DModel",
            **_HEADS,
            out_channels=8,
            sample_size=12,
            cross_attention_dim=32,
            caption_channels=TEXT_WIDTH,
        ),
        _pixart,
    ),
    Tiny(
        "SanaTransformer2DModel",
        build(
            "SanaTransformer2DModel",
            **_HEADS,
            out_channels=CHANNELS,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=TEXT_WIDTH,
            sample_size=8,
        ),
        _sana,
        note="linear attention already",
    ),
    Tiny(
        "HunyuanDiT2DModel",
        build(
            "HunyuanDiT2DModel",
            **{**_HEADS, "num_layers": 4},
            patch_size=2,
            sample_size=12,
            hidden_size=32,
            cross_attention_dim=TEXT_WIDTH,
            cross_attention_dim_t5=16,
            pooled_projection_dim=8,
            text_len=TEXT,
            text_len_t5=5,
            use_style_cond_and_image_meta_size=False,
        ),
        _hunyuan_dit,
        note="the last blocks take a skip connection",
    ),
    Tiny(
        "LuminaNextDiT2DModel",
        build(
            "LuminaNextDiT2DModel",
            in_channels=CHANNELS,
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=32,
            cross_attention_dim=TEXT_WIDTH,
        ),
        _lumina_next,
        note="a mask of ones on self-attention, half as many key heads; time from 0 (noise) to 1",
    ),
    Tiny(
        "Transformer2DModel",
        build(
            "Transformer2DModel",
            **{**_HEADS, "in_channels": 32},
            norm_num_groups=8,
            cross_attention_dim=TEXT_WIDTH,
        ),
        _inner,
        note="inner block of UNets; the group norm mixes all tokens",
    ),
    Tiny(
        "DreamLiteTransformer2DModel",
        build(
            "DreamLiteTransformer2DModel",
            **{**_HEADS, "in_channels": 32},
            norm_num_groups=8,
            cross_attention_dim=TEXT_WIDTH,
            use_linear_projection=True,
            ff_mult=2,
        ),
        _inner,
        note="inner block of DreamLiteUNetModel, which sets QK-norm, fewer key heads and a processor for them",
    ),
    Tiny(
        "UVit2DModel",
        build(
            "UVit2DModel",
            hidden_size=32,
            cond_embed_dim=8,
            micro_cond_encode_dim=4,
            micro_cond_embed_dim=20,
            encoder_hidden_size=TEXT_WIDTH,
            vocab_size=32,
            codebook_size=24,
            in_channels=16,
            block_out_channels=32,
            num_res_blocks=1,
            block_num_heads=2,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
        ),
        _uvit,
        latents="input_ids",
        corner=_another_id,
        note="tokens of a codebook instead of latents, no timestep; convolutions mix neighbours before attention",
    ),
)
