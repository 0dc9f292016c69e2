"""Video transformers whose attention is causal, sparse or reads a cache of keys."""

import math
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers.models.transformers import transformer_wan_animate_2 as wan_animate_2
from diffusers.models.transformers.transformer_sana_wm_refiner import (
    SanaWMLTX2AudioVideoRotaryPosEmbed,
    SanaWMRefinerKVCache,
)
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tests.builders.zoo.base import (
    Grid,
    Tiny,
    build,
    change_corner,
    corner_of,
    list_of_samples,
    noise,
    rows,
    text_mask,
    times,
)
from tests.builders.zoo.videos import VIDEOS, latents

_TEXT = 16


_far_model = build(
    "AnyFlowFARTransformer3DModel",
    full_chunk_limit=2,
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=_TEXT,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)


def _far(grid: Grid, batch: int) -> dict[str, Any]:
    # the third of three chunks: the first is cached compressed, the second in full, one frame each
    frames, height, width = grid
    sizes = {"full_cache": height * width, "compressed_cache": height * width // 4}
    cache = {
        layer: {name: noise(batch, 2, 2, size, 12, seed=10 + layer).transpose(0, 1) for name, size in sizes.items()}
        for layer in (0, 1)
    }
    timestep = times(batch)[:, None] * torch.linspace(0.5, 1.0, frames)
    return {
        "hidden_states": latents(grid, batch).transpose(1, 2).contiguous(),
        "timestep": timestep,
        "r_timestep": timestep / 2,
        "encoder_hidden_states": noise(batch, 7, _TEXT, seed=2),
        "chunk_partition": [1, 1, frames],
        "kv_cache": cache,
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


def _without_cache(output: Any) -> Tensor:
    return output[0].float().flatten()


_ANIMATE: dict[str, Any] = {
    "in_dim": 12,
    "dim": 24,
    "ffn_dim": 32,
    "freq_dim": 16,
    "text_dim": _TEXT,
    "text_len": 8,
    "out_dim": 4,
}


def _animate_model() -> nn.Module:
    model = diffusers.WanAnimate2Transformer3DModel(**_ANIMATE, num_heads=2, num_layers=2)
    # the model compiles the masks it makes, for half a minute; those of the grids below are made without
    with mock.patch.object(wan_animate_2, "create_block_mask", _mask_without_compiling):
        for frames, height, width in VIDEOS:
            key = (frames - 1, height * width)
            model.block_masks[key] = model.create_mask(*key, torch.device("cpu"))
    return model


def _mask_without_compiling(*args: Any, **kwargs: Any) -> BlockMask:
    return create_block_mask(*args, **{**kwargs, "_compile": False})


def _animate(grid: Grid, batch: int) -> dict[str, Any]:
    # encodes the driving video and stores its keys
    return {
        "hidden_states": list(latents(grid, batch)),
        "timestep": times(batch),
        "encoder_hidden_states": list(noise(batch, 7, _TEXT, seed=2)),
        "encoder_hidden_states_image": noise(batch, 5, 1280, seed=3),
        "condition_latents": list(latents(grid, batch, channels=8, seed=4)),
        "kv_cache": wan_animate_2.WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": math.prod(grid),
        "offset_grid_sizes": torch.tensor(grid).repeat(batch, 1),
    }


def _animate_cached(grid: Grid, batch: int) -> dict[str, Any]:
    # a reference frame before the frames of the driving video; 16 x 16 pixels a token
    frames, height, width = grid
    given = _animate(grid, batch)
    for layer, cache in enumerate(given["kv_cache"].layer_caches):
        keys = noise(batch, 2, (frames - 1) * height * width, 2, 12, seed=10 + layer)
        cache.store(keys[:, 0], keys[:, 1])
    return {
        **given,
        "kv_cache_mode": "cached",
        "reference_grid_sizes": torch.tensor([frames - 1, height, width]).repeat(batch, 1),
        "origin_len": 4 * (frames - 2) + 1,
        "origin_area": [16 * height, 16 * width],
    }


_sr_model = build(
    "Kandinsky6SRTransformer3DModel",
    in_visual_dim=4,
    out_visual_dim=4,
    time_dim=16,
    model_dim=24,
    ff_dim=48,
    num_visual_blocks=2,
    axes_dims=(4, 4, 4),
    nabla_window=(1, 1, 1),
)


def _sr(grid: Grid, batch: int) -> dict[str, Any]:
    # channels last: 4 of noise, 4 of the small video and a mask
    video = latents(grid, batch, channels=9, patch=1).permute(0, 2, 3, 4, 1)
    return {"hidden_states": video.contiguous(), "timestep": times(batch)}


_refiner_model = build(
    "SanaWMLTX2RefinerTransformer3DModel",
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
)


def _refiner(grid: Grid, batch: int) -> dict[str, Any]:
    # one block of the video, without a frame before it
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(dim=32, rope_type="split", num_attention_heads=2)
    tokens = math.prod(grid)
    coordinates = rope.prepare_video_coords(batch, *grid, torch.device("cpu"))
    return {
        "hidden_states": noise(batch, tokens, 8, seed=1),
        "encoder_hidden_states": noise(batch, 8, _TEXT, seed=2),
        "timestep": times(batch)[:, None].repeat(1, tokens),
        "video_rotary_emb": rope(coordinates),
        "encoder_attention_mask": text_mask(batch, 8, torch.long),
    }


def _refiner_cached(grid: Grid, batch: int) -> dict[str, Any]:
    # keys of a frame the video began with and of the last frame come before those of the block
    given = _refiner(grid, batch)
    frame = grid[1] * grid[2]
    cache = SanaWMRefinerKVCache(2)
    cache.sink_pe = tuple(table[:, :, :frame] for table in given["video_rotary_emb"])
    for layer, kept in enumerate(cache.layer_caches):
        keys = noise(batch, 4, frame, 32, seed=10 + layer).unbind(1)
        kept.store_sink(*keys[:2])
        kept.store_history(*keys[2:])
    return {**given, "kv_cache": cache, "kv_cache_mode": "inject"}


_omni_model = build(
    "Cosmos3OmniTransformer",
    head_dim=12,
    hidden_size=24,
    intermediate_size=48,
    latent_channel=4,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=2,
    patch_latent_dim=16,
    vocab_size=32,
    rope_axes_dim=[2, 2, 2],
)


def _omni(grid: Grid, batch: int) -> dict[str, Any]:
    # one sequence: 7 text tokens, then those of the video, all of them noisy; the model takes one sample a call
    text, tokens = 7, math.prod(grid)
    axes = torch.cartesian_prod(*(torch.arange(size) for size in grid)).T
    video = torch.arange(text, text + tokens)
    return {
        "input_ids": torch.arange(text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.cat([torch.arange(text).expand(3, -1), text + axes], 1),
        "und_len": text,
        "sequence_length": text + tokens,
        "vision_tokens": [latents(grid, 1)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": times(1).expand(tokens),
        "vision_noisy_frame_indexes": [torch.arange(grid[0])],
    }


def _corner_of_first(videos: list[Tensor], grid: Grid, last: bool) -> list[Tensor]:
    return [change_corner(videos[0], grid, last)]


ROWS = rows(
    Tiny(
        "WanAnimate2Transformer3DModel@extract",
        _animate_model,
        _animate,
        VIDEOS,
        drawn=list_of_samples,
        note="encodes the driving video: plain self-attention that stores keys in a cache",
    ),
    Tiny(
        "Kandinsky6SRTransformer3DModel",
        _sr_model,
        _sr,
        ((2, 8, 16), (3, 16, 8)),
        corner=corner_of("bfhwc"),
        note="flex attention over tiles of 8 x 8 tokens; the first call at a size takes seconds",
    ),
)

APART = rows(
    Tiny(
        "WanAnimate2Transformer3DModel",
        _animate_model,
        _animate_cached,
        VIDEOS,
        drawn=list_of_samples,
        note="flex attention; keys of the driving video, from a cache, come after those of the tokens, in tiles of 128",
    ),
    Tiny(
        "AnyFlowFARTransformer3DModel",
        _far_model,
        _far,
        VIDEOS,
        corner=corner_of("bfchw"),
        drawn=_without_cache,
        note="flex attention; keys of earlier frames, from a cache, come before those of the tokens, in tiles of 128",
    ),
    Tiny("SanaWMLTX2RefinerTransformer3DModel", _refiner_model, _refiner, VIDEOS),
    Tiny(
        "SanaWMLTX2RefinerTransformer3DModel@cached",
        _refiner_model,
        _refiner_cached,
        VIDEOS,
        note="keys of earlier frames, from a cache, come before those of the tokens",
    ),
    Tiny(
        "Cosmos3OmniTransformer",
        _omni_model,
        _omni,
        VIDEOS,
        latents="vision_tokens",
        corner=_corner_of_first,
        note="one sample a call; causal attention of the text, that of the video reads both; fewer heads of keys",
    ),
)
"""Rows that are not in the zoo: their calls cannot be cut into samples by the first axis of each argument."""
