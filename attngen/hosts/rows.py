"""Rows of the core host: one a model class, the whole of what attngen has to know about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from attngen.hosts.family import (
    Core,
    Family,
    config_of,
    continuous,
    data_at_one,
    discrete,
    packed,
    steps_to_data,
)
from attngen.hosts.references import Reader as ReferenceReader
from attngen.hosts.references import packed_references, shaped_references

Arguments = dict[str, Any]
Reader = Callable[[nn.Module, Arguments], tuple[int, ...]]


def _patched(axes: str, patch: str = "patch_size", frames: str | None = None) -> Reader:
    """Grid of latents whose axes are the letters of `axes`, cut into patches.

    Args:
        axes: of `hidden_states`, such as "bcfhw".
        patch: entry of the configuration with the side of a patch, or with (frames, height, width).
        frames: entry with the frames of a patch where `patch` is one number; 1 without.
    """

    def read(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
        sizes, config = dict(zip(axes, arguments["hidden_states"].shape, strict=True)), config_of(model)
        side = config.get(patch, 1)
        if isinstance(side, int):
            side = (config.get(frames) or 1 if frames else 1, side, side)
        side = (1, *side) if len(side) == 2 else side
        return sizes.get("f", 1) // side[0], sizes["h"] // side[1], sizes["w"] // side[2]

    return read


def _shapes(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """The first of the shapes that Qwen's models are given: that of the image; references follow."""
    shape = arguments["img_shapes"]
    while isinstance(shape[0], (list, tuple)):
        shape = shape[0]
    return tuple(int(size) for size in shape)


def _named(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    return arguments["num_frames"], arguments["height"], arguments["width"]


def _packed(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    return (1, *packed(model, arguments))


def _long_cat(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """Rows and columns of LongCat's ids begin at an offset; the first id is 1 for the image and 2 for a reference."""
    ids = arguments["img_ids"].reshape(-1, 3)
    image = ids[ids[:, 0] == 1][:, 1:]
    height, width = (image.amax(dim=0) - image.amin(dim=0) + 1).int().tolist()
    return 1, height, width


def _krea(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """Text comes first, at position 0 in rows and columns; the image's ids end at its last row and column."""
    ids = arguments["position_ids"].reshape(-1, 3)[-int(arguments["hidden_states"].shape[1]) :]
    height, width = (ids[:, 1:].amax(dim=0) - ids[:, 1:].amin(dim=0) + 1).int().tolist()
    return 1, height, width


def _z_image(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    frames, height, width = arguments["x"][0].shape[1:]
    side, deep = arguments.get("patch_size") or 2, arguments.get("f_patch_size") or 1
    return frames // deep, height // side, width // side


def _row(
    grid: Reader,
    text: Literal["first", "last", "none"],
    layers: str,
    *,
    clock: Callable[[float], float] = discrete,
    rotary: bool = True,
    sample: str = "hidden_states",
    time: str = "timestep",
    encoder: str | None = None,
    references: ReferenceReader | None = None,
) -> Family:
    core = Core(layers, text)
    return Family(sample, time, None, clock, grid, text=encoder, rotary=rotary, core=core, references=references)


_TEXT = "encoder_hidden_states"
_IMAGE, _VIDEO = _patched("bchw"), _patched("bcfhw")
_WAN = _row(_VIDEO, "none", "blocks.*.attn1")
_FLUX = _row(
    _packed, "first", "*transformer_blocks.*.attn", clock=continuous, encoder=_TEXT, references=packed_references
)
_QWEN = _row(_shapes, "first", "*.attn", clock=continuous, encoder=_TEXT, references=shaped_references)
_HUNYUAN_DIT = _row(_IMAGE, "none", "*.attn1")

CORE_ROWS: dict[str, Family] = {
    # Images
    "Flux2Transformer2DModel": _FLUX,
    "ZImageTransformer2DModel": _row(_z_image, "last", "layers.*.attention", clock=data_at_one, sample="x", time="t"),
    "QwenImageTransformer2DModel": _QWEN,
    "QwenImageControlNetModel": _QWEN,
    "NucleusMoEImageTransformer2DModel": _QWEN,
    "ChromaTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "BriaFiboTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    # Its text may begin with a token of the control mode, and there are no references.
    "FluxControlNetModel": _row(_packed, "first", "*transformer_blocks.*.attn", clock=continuous),
    "LongCatImageTransformer2DModel": _row(
        _long_cat, "first", "*transformer_blocks.*.attn", clock=continuous, encoder=_TEXT, references=packed_references
    ),
    "Krea2Transformer2DModel": _row(_krea, "first", "transformer_blocks.*.attn", clock=continuous),
    "AuraFlowTransformer2DModel": _row(_IMAGE, "first", "*.attn", clock=continuous, rotary=False),
    "CogView3PlusTransformer2DModel": _row(_IMAGE, "first", "*.attn1", rotary=False),
    "CogView4Transformer2DModel": _row(_IMAGE, "first", "*.attn1"),
    "GlmImageTransformer2DModel": _row(_IMAGE, "first", "*.attn1"),
    "Lumina2Transformer2DModel": _row(_IMAGE, "first", "layers.*.attn", clock=data_at_one),
    "HunyuanImageTransformer2DModel": _row(_patched("bchw"), "last", "*transformer_blocks.*.attn"),
    "HunyuanDiT2DModel": _HUNYUAN_DIT,
    "HunyuanDiT2DControlNetModel": _HUNYUAN_DIT,
    "ErnieImageTransformer2DModel": _row(_IMAGE, "last", "*"),
    "PRXTransformer2DModel": _row(_IMAGE, "first", "*.attention"),
    "SD3ControlNetModel": _row(_IMAGE, "last", "*.attn", rotary=False),
    # Videos
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _row(_VIDEO, "none", "*blocks.*.attn1"),
    "WanAnimateTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "AnyFlowTransformer3DModel": _row(_patched("bfchw"), "none", "blocks.*.attn1"),
    "CosmosTransformer3DModel": _row(_VIDEO, "none", "*.attn1", clock=continuous),
    "AllegroTransformer3DModel": _row(_patched("bcfhw", frames="patch_size_t"), "none", "*.attn1"),
    "LTXVideoTransformer3DModel": _row(_named, "none", "*.attn1"),
    "LTX2VideoTransformer3DModel": _row(_named, "none", "transformer_blocks.*.attn1"),
    "HunyuanVideoTransformer3DModel": _row(
        _patched("bcfhw", frames="patch_size_t"), "last", "*transformer_blocks.*.attn"
    ),
    "HunyuanVideo15Transformer3DModel": _row(
        _patched("bcfhw", frames="patch_size_t"), "last", "transformer_blocks.*.attn"
    ),
    "MotifVideoTransformer3DModel": _row(
        _patched("bcfhw", frames="patch_size_t"), "last", "*transformer_blocks.*.attn"
    ),
    "EasyAnimateTransformer3DModel": _row(_VIDEO, "first", "*.attn1"),
    "MochiTransformer3DModel": _row(_VIDEO, "last", "*.attn1", clock=steps_to_data),
    "CogVideoXTransformer3DModel": _row(_patched("bfchw", frames="patch_size_t"), "first", "*.attn1"),
    "ConsisIDTransformer3DModel": _row(_patched("bfchw"), "first", "*.attn1"),
    "Kandinsky6Transformer3DModel": _row(_patched("bfhwc"), "none", "visual_transformer_blocks.*.self_attention"),
    "LatteTransformer3DModel": _row(_patched("bcxhw"), "none", "transformer_blocks.*.attn1", rotary=False),
}
