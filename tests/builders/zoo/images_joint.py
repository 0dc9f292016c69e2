"""Image models with joint attention over latents (batch, channels, height, width) and text, FLUX's family apart."""

from typing import Any

import torch
from torch import Tensor

from tests.builders.zoo.base import Grid, Tiny, build, lengths, noise, rows, text_mask, times

CHANNELS = 4
TEXT, TEXT_WIDTH = 7, 12
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": CHANNELS, "out_channels": CHANNELS}
_SD3 = {
    **_HEADS,
    "num_layers": 3,
    "sample_size": 16,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 12,
}
_COGVIEW = {**_HEADS, "num_layers": 2, "text_embed_dim": TEXT_WIDTH, "time_embed_dim": 16, "condition_dim": 8}


def _latents(grid: Grid, batch: int, patch: int = 2) -> Tensor:
    return noise(batch, CHANNELS, grid[1] * patch, grid[2] * patch)


def _text(batch: int, text: int = TEXT) -> Tensor:
    return noise(batch, text, TEXT_WIDTH, seed=1)


def _sd3(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch),
        "encoder_hidden_states": _text(batch),
        "pooled_projections": noise(batch, 6, seed=2),
        "timestep": times(batch),
    }


def _aura(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch),
        "encoder_hidden_states": _text(batch),
        "timestep": times(batch, 1.0),
    }


def _cogview(grid: Grid, batch: int) -> dict[str, Any]:
    size = torch.tensor([16.0 * grid[1], 16.0 * grid[2]]).expand(batch, -1)
    return {
        "hidden_states": _latents(grid, batch),
        "encoder_hidden_states": _text(batch),
        "timestep": times(batch),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2),
    }


def _cogview_masked(grid: Grid, batch: int) -> dict[str, Any]:
    return {**_cogview(grid, batch), "attention_mask": text_mask(batch, TEXT, torch.float32)}


def _glm(grid: Grid, batch: int) -> dict[str, Any]:
    tokens = grid[1] * grid[2]
    given = _cogview(grid, batch)
    del given["original_size"]
    return {
        **given,
        "prior_token_id": torch.randint(16, (batch, tokens), generator=torch.Generator().manual_seed(3)),
        "prior_token_drop": torch.zeros(batch, tokens, dtype=torch.bool),
    }


def _hidream(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch),
        "timesteps": times(batch),
        "encoder_hidden_states_t5": _text(batch, 5),
        "encoder_hidden_states_llama3": [noise(batch, TEXT, 10, seed=5 + layer) for layer in range(4)],
        "pooled_embeds": noise(batch, 6, seed=2),
    }


def _hunyuan(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch, 1),
        "timestep": times(batch),
        "encoder_hidden_states": _text(batch),
        "encoder_attention_mask": text_mask(batch, TEXT, torch.long),
        "encoder_hidden_states_2": noise(batch, 5, 10, seed=2),
        "encoder_attention_mask_2": text_mask(batch, 5, torch.long),
    }


def _prx(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch),
        "timestep": times(batch, 1.0),
        "encoder_hidden_states": _text(batch),
        "attention_mask": text_mask(batch, TEXT),
    }


def _ernie(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(grid, batch, 1),
        "timestep": times(batch),
        "text_bth": _text(batch),
        "text_lens": torch.tensor(lengths(batch, TEXT)),
    }


ROWS = rows(
    Tiny("SD3Transformer2DModel", build("SD3Transformer2DModel", **_SD3), _sd3, note="as SD3: no QK-norm"),
    Tiny("SD3Transformer2DModel@norm", build("SD3Transformer2DModel", **_SD3, qk_norm="rms_norm"), _sd3),
    Tiny(
        "SD3Transformer2DModel@dual",
        build("SD3Transformer2DModel", **_SD3, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        _sd3,
        note="as SD3.5 medium: blocks 0 and 1 have a second attention, attn2, over image tokens alone",
    ),
    Tiny(
        "AuraFlowTransformer2DModel",
        build(
            "AuraFlowTransformer2DModel",
            **_HEADS,
            sample_size=16,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=32,
            pos_embed_max_size=144,
        ),
        _aura,
        note="8 register tokens before the text",
    ),
    Tiny(
        "CogView3PlusTransformer2DModel",
        build("CogView3PlusTransformer2DModel", **_COGVIEW, pos_embed_max_size=12, sample_size=16),
        _cogview,
    ),
    Tiny(
        "CogView4Transformer2DModel",
        build("CogView4Transformer2DModel", **_COGVIEW, pos_embed_max_size=12, sample_size=16, rope_axes_dim=(16, 16)),
        _cogview,
        note="the rotary table of a size is stretched to 16 x 16",
    ),
    Tiny(
        "CogView4Transformer2DModel@masked",
        build("CogView4Transformer2DModel", **_COGVIEW, pos_embed_max_size=12, sample_size=16, rope_axes_dim=(16, 16)),
        _cogview_masked,
        note="no pipeline passes its mask; 0 and 1 as floats, (batch, 1, tokens, tokens), is added: 1 where both count",
    ),
    Tiny(
        "GlmImageTransformer2DModel",
        build("GlmImageTransformer2DModel", **_COGVIEW, prior_vq_quantizer_codebook_size=16),
        _glm,
        note="without the key-value cache that its pipeline keeps of given images",
    ),
    Tiny(
        "HiDreamImageTransformer2DModel",
        build(
            "HiDreamImageTransformer2DModel",
            **_HEADS,
            patch_size=2,
            num_layers=2,
            num_single_layers=2,
            caption_channels=[TEXT_WIDTH, 10],
            text_emb_dim=6,
            axes_dims_rope=(4, 6, 6),
            max_resolution=(14, 14),
            llama_layers=[0, 1, 2, 3],
        ),
        _hidream,
        grids=((1, 4, 6), (1, 6, 6)),
        note="not square: padded to 49 image tokens, whose keys are zero and not masked; square: neither",
    ),
    Tiny(
        "HunyuanImageTransformer2DModel",
        build(
            "HunyuanImageTransformer2DModel",
            **_HEADS,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=10,
            rope_axes_dim=(8, 8),
        ),
        _hunyuan,
        note="two texts, padding moved to the end; 4.2M weights are one projection of fixed size",
    ),
    Tiny(
        "PRXTransformer2DModel",
        build(
            "PRXTransformer2DModel",
            in_channels=CHANNELS,
            context_in_dim=TEXT_WIDTH,
            hidden_size=32,
            num_heads=2,
            depth=2,
            axes_dim=[8, 8],
        ),
        _prx,
        note="image queries alone, over the keys of text and image",
    ),
    Tiny(
        "ErnieImageTransformer2DModel",
        build(
            "ErnieImageTransformer2DModel",
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=48,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_in_dim=TEXT_WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
        _ernie,
        note="the model makes the text's mask from text_lens",
    ),
)
