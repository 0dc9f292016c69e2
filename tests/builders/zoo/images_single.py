"""Image models of one sequence of text and image tokens, and the one of text, sound and video."""

import math
from typing import Any

import torch
from diffusers.models.transformers import transformer_ideogram4 as ideogram4
from torch import Tensor

from tests.builders.zoo.base import (
    Grid,
    Tiny,
    build,
    change_tail,
    lengths,
    list_of_samples,
    noise,
    packed,
    positions,
    rows,
    text_mask,
    times,
)

CHANNELS = 4
TEXT, TEXT_WIDTH = 7, 12


def _latents(grid: Grid, batch: int, seed: int = 0) -> Tensor:
    return noise(batch, CHANNELS, 2 * grid[1], 2 * grid[2], seed=seed)


def _text(batch: int, text: int = TEXT) -> Tensor:
    return noise(batch, text, TEXT_WIDTH, seed=1)


def _z_image(grid: Grid, batch: int, ragged: bool = False) -> dict[str, Any]:
    texts = [6 + 32 * (sample % 2) if ragged else length for sample, length in enumerate(lengths(batch, TEXT))]
    return {
        "x": list(noise(batch, CHANNELS, 1, 2 * grid[1], 2 * grid[2])),
        "t": times(batch, 1.0),
        "cap_feats": [noise(text, TEXT_WIDTH, seed=5 + sample) for sample, text in enumerate(texts)],
    }


def _z_image_ragged(grid: Grid, batch: int) -> dict[str, Any]:
    return _z_image(grid, batch, ragged=True)


def _krea(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": packed(grid, batch, CHANNELS),
        "encoder_hidden_states": noise(batch, TEXT, 3, TEXT_WIDTH, seed=1),
        "encoder_attention_mask": text_mask(batch, TEXT),
        "timestep": times(batch, 1.0),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), positions(grid)]),
    }


def _lumina(grid: Grid, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[:, -2:] = False
    return {
        "hidden_states": _latents(grid, batch),
        "encoder_hidden_states": _text(batch),
        "encoder_attention_mask": mask,
        "timestep": times(batch, 1.0),
    }


def _lumina_ragged(grid: Grid, batch: int) -> dict[str, Any]:
    return {**_lumina(grid, batch), "encoder_attention_mask": text_mask(batch, TEXT)}


def _fibo2(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch),
        "encoder_hidden_states": torch.stack([noise(batch, TEXT, TEXT_WIDTH, seed=5 + layer) for layer in range(2)], 1),
        "encoder_attention_mask": text_mask(batch, TEXT),
        "timestep": times(batch, 1.0),
    }


def _fibo2_ragged(grid: Grid, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[1::2, 2:] = False
    return {**_fibo2(grid, batch), "encoder_attention_mask": mask}


def _fibo2_references(grid: Grid, batch: int) -> dict[str, Any]:
    return {**_fibo2(grid, batch), "context_latents": [_latents((1, 3, 5), batch, seed=3)]}


def _ideogram(grid: Grid, batch: int) -> dict[str, Any]:
    """Padding, text, image; the padding of a sample attends to itself alone."""
    image = math.prod(grid)
    kind = torch.full((batch, TEXT + image), ideogram4.OUTPUT_IMAGE_INDICATOR)
    segments = torch.ones(batch, TEXT + image, dtype=torch.long)
    ids = torch.zeros(batch, TEXT + image, 3, dtype=torch.long)
    ids[:, TEXT:] = positions(grid).long() + ideogram4.IMAGE_POSITION_OFFSET
    for sample, length in enumerate(lengths(batch, TEXT)):
        kind[sample, :TEXT], segments[sample, : TEXT - length] = 0, ideogram4.SEQUENCE_PADDING_INDICATOR
        kind[sample, TEXT - length : TEXT] = ideogram4.LLM_TOKEN_INDICATOR
        ids[sample, TEXT - length : TEXT] = torch.arange(length)[:, None]
    return {
        "hidden_states": torch.cat([torch.zeros(batch, TEXT, CHANNELS), packed(grid, batch, CHANNELS)], 1),
        "encoder_hidden_states": torch.cat([_text(batch), torch.zeros(batch, image, TEXT_WIDTH)], 1),
        "timestep": times(batch, 1.0),
        "position_ids": ids,
        "segment_ids": segments,
        "indicator": kind,
    }


def _omnigen(grid: Grid, batch: int) -> dict[str, Any]:
    """Two tokens of padding, causal text, the timestep's token, then the image, which attends to all but padding."""
    padding, image = 2, math.prod(grid)
    tokens = TEXT + 1 + image
    mask = torch.ones(tokens, tokens).tril()
    mask[-image:] = 1
    mask[:, :padding] = 0
    mask[:padding] = 1
    ids = torch.cat([torch.zeros(padding), torch.arange(tokens - padding)]).long()
    return {
        "hidden_states": _latents(grid, batch),
        "timestep": times(batch, 1.0),
        "input_ids": torch.randint(1, 16, (batch, TEXT), generator=torch.Generator().manual_seed(1)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.expand(batch, -1, -1),
        "position_ids": ids.expand(batch, -1),
    }


def _minimax(grid: Grid, batch: int) -> dict[str, Any]:
    """One layout for all samples: text, audio of two channels, video; ids are (time, row, column)."""
    audio, video = 2 * 4, math.prod(grid)
    place = torch.arange(TEXT + audio + video)
    text_at, audio_at, video_at = place.split([TEXT, audio, video])
    ids = torch.zeros(len(place), 3)
    ids[text_at, 0] = text_at.float()
    ids[audio_at, 0] = TEXT + torch.arange(4.0).repeat(2)
    ids[audio_at, 2] = torch.tensor([0.0, grid[2] - 1.0]).repeat_interleave(4)
    ids[video_at] = positions(grid) * torch.tensor([5 / 3, 1.0, 1.0]) + torch.tensor([TEXT, 0.0, 0.0])
    tags = torch.zeros(len(place), dtype=torch.long)
    tags[audio_at], tags[video_at] = 1, 2
    return {
        "hidden_states": noise(batch, video, 4 * CHANNELS),
        "audio_hidden_states": noise(batch, audio, 6, seed=2),
        "encoder_hidden_states": _text(batch),
        "timestep": torch.tensor([700.0]),
        "timestep_indices": torch.zeros_like(place),
        "token_tags": tags,
        "position_ids": ids,
        "video_indices": video_at,
        "audio_indices": audio_at,
        "text_indices": text_at,
    }


_Z_IMAGE = build(
    "ZImageTransformer2DModel",
    in_channels=CHANNELS,
    dim=32,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=TEXT_WIDTH,
    axes_dims=[4, 6, 6],
    axes_lens=[128, 16, 16],
)
_LUMINA = build(
    "Lumina2Transformer2DModel",
    sample_size=16,
    in_channels=CHANNELS,
    hidden_size=64,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=32,
    axes_dim_rope=(4, 6, 6),
    axes_lens=(16, 16, 16),
    cap_feat_dim=TEXT_WIDTH,
)
_FIBO2 = build(
    "BriaFibo2Transformer2DModel",
    in_channels=CHANNELS,
    dim=32,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    cap_feat_dim=TEXT_WIDTH,
    injection_layer_ids=(1,),
    perceiver_num_layers=1,
    min_num_gist_tokens=4,
    max_num_gist_tokens=8,
    gist_step=2,
    gist_min_text_len=2,
    gist_max_text_len=8,
    axes_dims=(4, 6, 6),
    axes_lens=(16, 16, 16),
)

ROWS = rows(
    Tiny(
        "ZImageTransformer2DModel",
        _Z_IMAGE,
        _z_image,
        latents="x",
        drawn=list_of_samples,
        note="image, padding to a multiple of 32, text, padding the same; none masked; time from 0 (noise) to 1",
    ),
    Tiny(
        "ZImageTransformer2DModel@ragged",
        _Z_IMAGE,
        _z_image_ragged,
        latents="x",
        drawn=list_of_samples,
        note="texts of 32 and 64 tokens with padding: a mask at the end, in a batch alone",
    ),
    Tiny(
        "Krea2Transformer2DModel",
        build(
            "Krea2Transformer2DModel",
            axes_dims_rope=(4, 6, 6),
            attention_head_dim=16,
            num_layers=2,
            in_channels=CHANNELS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            timestep_embed_dim=16,
            text_hidden_dim=TEXT_WIDTH,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
        ),
        _krea,
        note="text first, half as many key heads, gated attention",
    ),
    Tiny(
        "Lumina2Transformer2DModel",
        _LUMINA,
        _lumina,
        note="text without its padding first, half as many key heads; time from 0 (noise) to 1",
    ),
    Tiny(
        "Lumina2Transformer2DModel@ragged",
        _LUMINA,
        _lumina_ragged,
        note="texts of different lengths: the image starts at another token in every sample of a batch",
    ),
    Tiny("BriaFibo2Transformer2DModel", _FIBO2, _fibo2, note="summary of the text first; cross-attention too"),
    Tiny(
        "BriaFibo2Transformer2DModel@ragged",
        _FIBO2,
        _fibo2_ragged,
        note="summaries of different lengths: they are put after the image, with a mask, in a batch alone",
    ),
    Tiny(
        "BriaFibo2Transformer2DModel@references",
        _FIBO2,
        _fibo2_references,
        note="a reference after the image in context_latents",
    ),
    Tiny(
        "Ideogram4Transformer2DModel",
        build(
            "Ideogram4Transformer2DModel",
            in_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=48,
            adaln_dim=16,
            llm_features_dim=TEXT_WIDTH,
            mrope_section=(4, 2, 2),
        ),
        _ideogram,
        corner=change_tail,
        note="latents cover text and image; mask (batch, 1, tokens, tokens) of segments; time from 0 (noise) to 1",
    ),
    Tiny(
        "OmniGenTransformer2DModel",
        build(
            "OmniGenTransformer2DModel",
            in_channels=CHANNELS,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=48,
            num_layers=2,
            pad_token_id=0,
            vocab_size=16,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            pos_embed_max_size=12,
            time_step_dim=16,
        ),
        _omnigen,
        note="one float mask (batch, 1, tokens, tokens); it rotates all samples by the ids of the first",
    ),
    Tiny(
        "MiniMaxH3Transformer3DModel",
        build(
            "MiniMaxH3Transformer3DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=48,
            in_channels=CHANNELS,
            audio_in_channels=6,
            text_dim=TEXT_WIDTH,
            freq_dim=16,
            time_embed_hidden_dim=32,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        _minimax,
        grids=((2, 3, 4), (3, 4, 2)),
        note="video with sound: text, audio, video in one sequence of given places; no grid among its arguments",
    ),
)
