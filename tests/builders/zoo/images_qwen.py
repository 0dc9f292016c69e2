"""Image models that take the shapes of their images: Qwen-Image, its kin, and JoyImage."""

import math
from typing import Any

import torch
from torch import Tensor

from tests.builders.zoo.base import (
    Grid,
    Tiny,
    build,
    change_tail,
    corner_of,
    noise,
    packed,
    rows,
    text_mask,
    times,
)

CHANNELS = 4
TEXT, TEXT_WIDTH = 7, 12
_AXES = {"axes_dims_rope": (4, 6, 6), "attention_head_dim": 16, "num_layers": 2}


def _packed(grid: Grid, batch: int, seed: int = 0) -> Tensor:
    return packed(grid, batch, CHANNELS, seed)


def _text(batch: int, text: int = TEXT) -> Tensor:
    return noise(batch, text, TEXT_WIDTH, seed=1)


def _qwen(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _packed(grid, batch),
        "encoder_hidden_states": _text(batch),
        "encoder_hidden_states_mask": text_mask(batch, TEXT, torch.long),
        "timestep": times(batch, 1.0),
        "img_shapes": [[grid] for _ in range(batch)],
    }


def _qwen_edit(grid: Grid, batch: int) -> dict[str, Any]:
    references = (1, 3, 5), (1, 2, 4)
    tokens = [_packed(reference, batch, seed=3 + place) for place, reference in enumerate(references)]
    given = _qwen(grid, batch)
    return {
        **given,
        "hidden_states": torch.cat([given["hidden_states"], *tokens], 1),
        "img_shapes": [[grid, *references] for _ in range(batch)],
    }


def _nucleus(grid: Grid, batch: int) -> dict[str, Any]:
    return {**_qwen(grid, batch), "img_shapes": [grid] * batch}


def _qwen21(grid: Grid, batch: int, reference: Grid | None = None) -> dict[str, Any]:
    """A slot of `img_mask` is a text token or four image tokens; those of a reference are within the text."""
    slots = torch.zeros(TEXT, dtype=torch.bool)
    latents, shapes = _packed(grid, batch), [grid]
    if reference is not None:
        slots = torch.cat([slots[:3], torch.ones(math.prod(reference) // 4, dtype=torch.bool), slots[3:]])
        latents, shapes = torch.cat([_packed(reference, batch, seed=3), latents], 1), [reference, grid]
    drawn = torch.ones(math.prod(grid) // 4, dtype=torch.bool)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": _text(batch, len(slots)),
        "encoder_hidden_states_mask": text_mask(batch, len(slots)),
        "timestep": times(batch, 1.0),
        "img_shapes": [shapes for _ in range(batch)],
        "img_mask": torch.cat([slots, drawn]).expand(batch, -1),
    }


def _qwen21_edit(grid: Grid, batch: int) -> dict[str, Any]:
    return _qwen21(grid, batch, (1, 2, 4))


def _joy(grid: Grid, batch: int) -> dict[str, Any]:
    _, height, width = grid
    return {
        "hidden_states": noise(batch, 3, CHANNELS, 1, 2 * height, 2 * width),
        "timestep": times(batch),
        "encoder_hidden_states": _text(batch),
    }


def _joy_corner(latents: Tensor, grid: Grid, last: bool) -> Tensor:
    return torch.cat([latents[:, :-1], corner_of("bcfhw")(latents[:, -1], grid, last)[:, None]], 1)


def _joy_plus(grid: Grid, batch: int) -> dict[str, Any]:
    """Patches of the sample, then of a reference whose size differs from sample to sample, then padding."""
    shapes = [[grid, (1, 3, 3 + sample % 2)] for sample in range(batch)]
    patches = math.prod(grid) + 12
    latents = noise(batch, patches, CHANNELS, 1, 2, 2)
    for sample, its in zip(latents, shapes, strict=True):
        sample[sum(math.prod(shape) for shape in its) :] = 0
    return {
        "hidden_states": latents,
        "timestep": times(batch),
        "encoder_hidden_states": _text(batch),
        "encoder_hidden_states_mask": text_mask(batch, TEXT, torch.float32),
        "shape_list": shapes,
    }


_QWEN = {**_AXES, "in_channels": CHANNELS, "num_attention_heads": 2, "joint_attention_dim": TEXT_WIDTH, "patch_size": 1}
_QWEN21 = build(
    "QwenImage21Transformer2DModel",
    **_AXES,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    num_attention_heads=2,
    context_in_dim=TEXT_WIDTH,
)
_JOY = {
    "in_channels": CHANNELS,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": TEXT_WIDTH,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}

ROWS = rows(
    Tiny("QwenImageTransformer2DModel", build("QwenImageTransformer2DModel", **_QWEN, out_channels=CHANNELS), _qwen),
    Tiny(
        "QwenImageTransformer2DModel@edit",
        build("QwenImageTransformer2DModel", **_QWEN, out_channels=CHANNELS, zero_cond_t=True),
        _qwen_edit,
        note="as Qwen-Image-Edit-2511: two references after the image, modulated by timestep 0",
    ),
    Tiny(
        "NucleusMoEImageTransformer2DModel",
        build(
            "NucleusMoEImageTransformer2DModel",
            **{**_QWEN, "num_attention_heads": 4},
            num_key_value_heads=2,
            mlp_ratio=3.0,
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=2.0,
        ),
        _nucleus,
        note="image queries alone, over the keys of image, then text; experts choose tokens, a step in the output",
    ),
    Tiny(
        "QwenImage21Transformer2DModel",
        _QWEN21,
        _qwen21,
        note="text is causal and does not see the image; one attention call for each of text and image",
    ),
    Tiny(
        "QwenImage21Transformer2DModel@edit",
        _QWEN21,
        _qwen21_edit,
        corner=change_tail,
        note="text, reference, text, image: block-causal; the pipeline caches keys and values of all but the image",
    ),
    Tiny(
        "JoyImageEditTransformer3DModel",
        build("JoyImageEditTransformer3DModel", **_JOY),
        _joy,
        corner=_joy_corner,
        note="items (batch, 3, channels, 1, height, width): the last is drawn and put first as a frame",
    ),
    Tiny(
        "JoyImageEditPlusTransformer3DModel",
        build("JoyImageEditPlusTransformer3DModel", **_JOY),
        _joy_plus,
        corner=corner_of("bn"),
        note="patches of the image, of a reference, padding (masked), then the text",
    ),
)
