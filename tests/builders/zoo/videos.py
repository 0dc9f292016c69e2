"""Video transformers with cross-attention to the text: Wan and what is built like it."""

from typing import Any

import torch

from tests.builders.zoo.base import Grid, Tiny, build, corner_of, noise, rows, times

VIDEOS: tuple[Grid, Grid] = ((2, 4, 6), (3, 6, 4))
"""Token grids of the video models, where a class does not need others."""

_TEXT, _IMAGE = 16, 24
_CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": _TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
_WITH_IMAGE: dict[str, Any] = {**_CONFIG, "in_channels": 12, "image_dim": _IMAGE, "added_kv_proj_dim": 24}

_PROMPT = 512
"""Text tokens next to image embeddings: the processors take all tokens before the last 512 for those of the image."""


def latents(grid: Grid, batch: int, channels: int = 4, patch: int = 2, seed: int = 1) -> torch.Tensor:
    """Latents (batch, channels, frames, height, width) with `patch` x `patch` pixels a token.

    Samples are drawn one by one: the first is the same in every batch, whatever their size.
    """
    shape = (channels, grid[0], patch * grid[1], patch * grid[2])
    return torch.stack([noise(*shape, seed=seed + 100 * sample) for sample in range(batch)])


def _text(grid: Grid, batch: int, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, batch, channels),
        "timestep": times(batch),
        "encoder_hidden_states": noise(batch, 7, _TEXT, seed=2),
    }


def _with_image(grid: Grid, batch: int) -> dict[str, Any]:
    # 4 channels of noise, 4 of a mask and 4 of the first frame, as the image-to-video pipeline concatenates them
    return {
        **_text(grid, batch, channels=12),
        "encoder_hidden_states": noise(batch, _PROMPT, _TEXT, seed=2),
        "encoder_hidden_states_image": noise(batch, 6, _IMAGE, seed=3),
    }


def _time_of_tokens(grid: Grid, batch: int) -> dict[str, Any]:
    # Wan 2.2 TI2V: the first frame is given, so its tokens have time 0
    tokens = grid[0] * grid[1] * grid[2]
    timestep = times(batch)[:, None].repeat(1, tokens)
    timestep[:, : grid[1] * grid[2]] = 0.0
    return {**_text(grid, batch), "timestep": timestep}


def _vace(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **_text(grid, batch),
        "control_hidden_states": latents(grid, batch, channels=6, seed=4),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5, 1.0]),
    }


def _animate(grid: Grid, batch: int) -> dict[str, Any]:
    # the first frame of latents is the reference; the face encoder makes one frame of latents of four faces
    faces = 4 * (grid[0] - 2) + 1
    return {
        **_with_image(grid, batch),
        "pose_hidden_states": latents((grid[0] - 1, *grid[1:]), batch, seed=5),
        "face_pixel_values": noise(batch, 3, faces, 8, 8, seed=6),
    }


_animate_model = build(
    "WanAnimateTransformer3DModel",
    **_WITH_IMAGE,
    latent_channels=4,
    motion_encoder_channel_sizes={"4": 8, "8": 8},
    motion_encoder_size=8,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=8,
    face_encoder_hidden_dim=8,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=1,
)


def _time_of_frames(grid: Grid, batch: int) -> torch.Tensor:
    return times(batch)[:, None] * torch.linspace(0.5, 1.0, grid[0])


def _forcing(grid: Grid, batch: int) -> dict[str, Any]:
    return {**_text(grid, batch), "timestep": _time_of_frames(grid, batch), "enable_diffusion_forcing": True}


def _anyflow(grid: Grid, batch: int) -> dict[str, Any]:
    timestep = _time_of_frames(grid, batch)
    text = _text(grid, batch)
    return {
        **text,
        "hidden_states": text["hidden_states"].transpose(1, 2).contiguous(),
        "timestep": timestep,
        "r_timestep": timestep / 2,
    }


def _helios(grid: Grid, batch: int) -> dict[str, Any]:
    # history in three resolutions: 4 frames at a quarter, 2 at a half, and the prefix and the last frame in full
    long, middle, short = 4, 2, 2
    index = torch.arange(long + middle + short + grid[0])[None].split([long, middle, short, grid[0]], 1)
    history = {
        f"latents_history_{name}": latents((frames, *grid[1:]), batch, seed=seed)
        for name, frames, seed in (("long", long, 7), ("mid", middle, 8), ("short", short, 9))
    }
    indices = {f"indices_latents_history_{name}": index[at] for at, name in enumerate(("long", "mid", "short"))}
    return {**_text(grid, batch), **history, **indices, "indices_hidden_states": index[3]}


ROWS = rows(
    Tiny("WanTransformer3DModel", build("WanTransformer3DModel", **_CONFIG), _text, VIDEOS),
    Tiny(
        "WanTransformer3DModel@image",
        build("WanTransformer3DModel", **_WITH_IMAGE),
        _with_image,
        VIDEOS,
        note="image embeddings in the cross-attention",
    ),
    Tiny(
        "WanTransformer3DModel@ti2v",
        build("WanTransformer3DModel", **_CONFIG),
        _time_of_tokens,
        VIDEOS,
        note="a timestep for every token, 0 in the first frame",
    ),
    Tiny(
        "WanVACETransformer3DModel",
        build("WanVACETransformer3DModel", **{**_CONFIG, "num_layers": 3}, vace_layers=[0, 1, 2], vace_in_channels=6),
        _vace,
        VIDEOS,
    ),
    Tiny(
        "WanAnimateTransformer3DModel",
        _animate_model,
        _animate,
        VIDEOS,
        note="the first frame of latents is the reference",
    ),
    Tiny("SkyReelsV2Transformer3DModel", build("SkyReelsV2Transformer3DModel", **_CONFIG), _text, VIDEOS),
    Tiny(
        "SkyReelsV2Transformer3DModel@forcing",
        build("SkyReelsV2Transformer3DModel", **_CONFIG),
        _forcing,
        VIDEOS,
        note="a timestep for every frame",
    ),
    Tiny(
        "SkyReelsV2Transformer3DModel@causal",
        build("SkyReelsV2Transformer3DModel", **_CONFIG, num_frame_per_block=2),
        _forcing,
        ((2, 4, 6), (4, 6, 4)),
        note="a causal mask over blocks of two frames on the self-attention",
    ),
    Tiny(
        "ChronoEditTransformer3DModel",
        build("ChronoEditTransformer3DModel", **_WITH_IMAGE, rope_temporal_skip_len=8),
        _with_image,
        VIDEOS,
        note="two frames (the first grid) are at temporal positions 0 and 7",
    ),
    Tiny(
        "AnyFlowTransformer3DModel",
        build("AnyFlowTransformer3DModel", **_CONFIG),
        _anyflow,
        VIDEOS,
        corner=corner_of("bfchw"),
        note="latents (batch, frames, channels, height, width), a timestep for every frame",
    ),
    Tiny(
        "HeliosTransformer3DModel",
        build("HeliosTransformer3DModel", **_CONFIG, rope_dim=(4, 4, 4)),
        _helios,
        VIDEOS,
        note="tokens of the history come before those that are drawn",
    ),
)
