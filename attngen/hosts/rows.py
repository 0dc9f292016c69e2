"""Rows of the core host: one a model class, the whole of what attngen has to know about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from attngen.hosts.family import (
    Core,
    Family,
    Unreadable,
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


def _patched(axes: str, patch: str = "patch_size", frames: str | None = None, latents: str = "hidden_states") -> Reader:
    """Grid of latents whose axes are the letters of `axes`, cut into patches.

    Args:
        axes: of the latents, such as "bcfhw".
        patch: entry of the configuration with the side of a patch, or with (frames, height, width).
        frames: entry with the frames of a patch where `patch` is one number; 1 without.
        latents: the argument.
    """

    def read(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
        sizes, config = dict(zip(axes, arguments[latents].shape, strict=True)), config_of(model)
        side = config.get(patch) or 1
        if isinstance(side, int):
            side = (config.get(frames) or 1 if frames else 1, side, side)
        side = (1, *side) if len(side) == 2 else side
        return sizes.get("f", 1) // side[0], sizes["h"] // side[1], sizes["w"] // side[2]

    return read


def _shapes(argument: str = "img_shapes", which: int = 0) -> Reader:
    """One of the shapes (frames, height, width) that a model is given for each sample: that of the image."""

    def read(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
        shapes = arguments[argument]
        if not isinstance(shapes[0][0], (list, tuple)):
            shapes = [[shape] for shape in shapes]
        if len({tuple(sample[which]) for sample in shapes}) > 1:
            raise Unreadable("its batch has images of different sizes")
        frames, height, width = map(int, shapes[0][which])
        return frames, height, width

    return read


def _named(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    return arguments["num_frames"], arguments["height"], arguments["width"]


def _packed(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    return (1, *packed(model, arguments))


def _once(argument: str, read: Callable[[nn.Module, Arguments], Any]) -> Callable[[nn.Module, Arguments], Any]:
    """`read`, once for each tensor that is given as `argument`: to read ids waits for the GPU."""
    known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def found(model: nn.Module, arguments: Arguments) -> Any:
        ids = arguments[argument]
        if ids not in known:
            known[ids] = read(model, arguments)
        return known[ids]

    return found


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


def _of_ids(ids: Tensor) -> tuple[int, ...]:
    """The grid of tokens with ids (N, 3 or more) for frame, row and column, at any distance: how many differ."""
    frames, height, width = (len(ids[:, axis].unique()) for axis in range(3))
    if frames * height * width != len(ids):
        raise Unreadable("the ids of its image are not those of a grid")
    return frames, height, width


def _flux_3(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    return _of_ids(arguments["img_ids"].reshape(-1, arguments["img_ids"].shape[-1]))


def _hidream(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    if arguments.get("hidden_states_masks") is not None:
        raise Unreadable("its latents are in patches already, and padded")
    return _IMAGE(model, arguments)


def _items(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """JoyImage's latents have an axis of images; the last one is drawn, and put in front of the others."""
    frames, height, width = arguments["hidden_states"].shape[-3:]
    deep, *side = config_of(model)["patch_size"]
    return frames // deep, height // side[0], width // side[1]


def _slots(model: nn.Module, arguments: Arguments) -> int:
    """Tokens before the image in Qwen-Image 2.1: a slot of the text becomes four tokens of a reference."""
    references = arguments["hidden_states"].shape[1] - math.prod(arguments["img_shapes"][0][-1])
    text = arguments["encoder_hidden_states"].shape[1]
    return text + 3 * references // 4


def _gist(model: nn.Module, arguments: Arguments) -> int:
    """Tokens before the image in Fibo 2: a summary of the text, which follows the image where texts differ."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    mask, config = arguments.get("encoder_attention_mask"), config_of(model)
    text = arguments["encoder_hidden_states"]
    counts = compute_gist_count(
        [text.shape[2]] if mask is None else mask.sum(dim=1).tolist(),
        min_gist=config["min_num_gist_tokens"],
        max_gist=config["max_num_gist_tokens"],
        gist_step=config["gist_step"],
        min_text_len=config["gist_min_text_len"],
        max_text_len=config["gist_max_text_len"],
    )
    return max(counts) if min(counts) == max(counts) else 0


def _ideogram(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """Ideogram's sequence ends with the image, whose kind is that of the last token."""
    kinds, ids = arguments["indicator"], arguments["position_ids"]
    image = kinds == kinds[:, -1:]
    if not bool((image == image[:1]).all()):
        raise Unreadable("its batch has images of different sizes")
    return _of_ids(ids[0][image[0]])


def _history(model: nn.Module, arguments: Arguments) -> int:
    """Tokens before the frames that Framepack draws: those of earlier ones, in three resolutions."""
    count = 0
    for name, (deep, side) in {"clean": (1, 2), "history_2x": (2, 4), "history_4x": (4, 8)}.items():
        latents, indices = arguments.get(f"latents_{name}"), arguments.get(f"indices_latents_{name}")
        if latents is not None and indices is not None:
            frames, height, width = latents.shape[2:]
            count += -(-frames // deep) * -(-height // side) * -(-width // side)
    return count


def _among_sound(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    video = arguments["video_indices"]
    if int(video[-1]) - int(video[0]) + 1 != len(video):
        raise Unreadable("its video is in pieces")
    return _of_ids(arguments["position_ids"][video])


def _before_video(model: nn.Module, arguments: Arguments) -> int:
    return int(arguments["video_indices"][0])


def _video_tokens(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    shapes = arguments["vision_token_shapes"]
    if len(shapes) > 1:
        raise Unreadable("it draws several videos in one sequence")
    frames, height, width = map(int, shapes[0])
    return frames, height, width


def _kandinsky_5(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    if arguments.get("sparse_params") is not None:
        raise Unreadable("it was given sparse_params, so its own block-sparse attention runs")
    return _patched("bfhwc")(model, arguments)


def _codebook(model: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    height, width = arguments["input_ids"].shape[-2:]
    by = 2 if config_of(model)["downsample"] else 1
    return 1, -(-height // by), -(-width // by)


def _row(
    grid: Reader,
    text: Literal["first", "last", "around", "none"],
    layers: str,
    *,
    clock: Callable[[float], float] = discrete,
    rotary: bool = True,
    sample: str = "hidden_states",
    time: str | None = "timestep",
    encoder: str | Callable[[nn.Module, Arguments], int] | None = None,
    levels: bool = False,
    cross: bool = False,
    times_of: Literal["samples", "tokens"] = "samples",
    references: ReferenceReader | None = None,
) -> Family:
    core = Core(layers, text, levels, cross)
    more = {"core": core, "times_of": times_of, "references": references}
    return Family(sample, time, None, clock, grid, text=encoder, rotary=rotary, **more)


_TEXT = "encoder_hidden_states"
_IMAGE, _VIDEO = _patched("bchw"), _patched("bcfhw")
_WAN = _row(_VIDEO, "none", "blocks.*.attn1")
_FLUX = _row(
    _packed, "first", "*transformer_blocks.*.attn", clock=continuous, encoder=_TEXT, references=packed_references
)
_QWEN = _row(_shapes(), "first", "*.attn", clock=continuous, encoder=_TEXT, references=shaped_references)
_HUNYUAN_DIT = _row(_IMAGE, "none", "*.attn1")
_UNET = {"rotary": False, "sample": "sample", "levels": True}

CORE_ROWS: dict[str, Family] = {
    # Images
    "Flux2Transformer2DModel": _FLUX,
    "ZImageTransformer2DModel": _row(_z_image, "last", "layers.*.attention", clock=data_at_one, sample="x", time="t"),
    "QwenImageTransformer2DModel": _QWEN,
    "QwenImageControlNetModel": _QWEN,
    # Its queries are the image's alone.
    "NucleusMoEImageTransformer2DModel": _row(_shapes(), "last", "*.attn", clock=continuous),
    "QwenImage21Transformer2DModel": _row(_shapes(which=-1), "around", "*.attn", clock=continuous, encoder=_slots),
    "ChromaTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "BriaFiboTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    # Its text may begin with a token of the control mode, and there are no references.
    "FluxControlNetModel": _row(_packed, "first", "*transformer_blocks.*.attn", clock=continuous),
    "LongCatImageTransformer2DModel": _row(
        _once("img_ids", _long_cat),
        "first",
        "*transformer_blocks.*.attn",
        clock=continuous,
        encoder=_TEXT,
        references=packed_references,
    ),
    "Flux3Transformer2DModel": _row(
        _once("img_ids", _flux_3),
        "first",
        "mode_blocks.image.*.attn | single_transformer_blocks.*.attn",
        clock=continuous,
        encoder=_TEXT,
    ),
    "HiDreamImageTransformer2DModel": _row(_hidream, "last", "*.block.attn1", time="timesteps"),
    "BriaFibo2Transformer2DModel": _row(_IMAGE, "around", "layers.*.attention", clock=continuous, encoder=_gist),
    "Ideogram4Transformer2DModel": _row(
        _once("indicator", _ideogram), "first", "layers.*.attention", clock=data_at_one
    ),
    "OmniGenTransformer2DModel": _row(_IMAGE, "first", "layers.*.self_attn", clock=data_at_one, cross=True),
    "JoyImageEditTransformer3DModel": _row(_items, "last", "double_blocks.*.attn"),
    "JoyImageEditPlusTransformer3DModel": _row(_shapes("shape_list"), "last", "double_blocks.*.attn"),
    "LuminaNextDiT2DModel": _row(_IMAGE, "none", "layers.*.attn1", clock=data_at_one),
    "ZImageControlNetModel": _row(
        _z_image, "last", "control_layers.*.attention", clock=data_at_one, sample="x", time="t"
    ),
    "Krea2Transformer2DModel": _row(
        _once("position_ids", _krea), "first", "transformer_blocks.*.attn", clock=continuous
    ),
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
    # That of Stable Diffusion 3.5 has its latents embedded already; those of the condition have the same grid.
    "SD3ControlNetModel": _row(_patched("bchw", latents="controlnet_cond"), "last", "*.attn", rotary=False),
    # UNets whose layers take no arguments of the caller, or have processors of their own
    "UNet2DModel": _row(_patched("bchw", latents="sample"), "none", "*.attentions.*", **_UNET),
    "Kandinsky3UNet": _row(
        _patched("bchw", latents="sample"), "none", "*_blocks.*.attentions.0.attention", **_UNET, cross=True
    ),
    "StableCascadeUNet": _row(
        _patched("bchw", latents="sample"), "last", "*.attention", **_UNET, time="timestep_ratio", clock=continuous
    ),
    # A reference, right of the image in the same latents, is in its grid.
    "DreamLiteUNetModel": _row(_patched("bchw", latents="sample"), "none", "*.attn1", **_UNET),
    "DreamLiteTransformer2DModel": _row(_IMAGE, "none", "*.attn1", rotary=False),
    "UVit2DModel": _row(_codebook, "none", "transformer_layers.*.attn1", rotary=False, sample="input_ids", time=None),
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
    "Kandinsky5Transformer3DModel": _row(_kandinsky_5, "none", "visual_transformer_blocks.*.self_attention"),
    # The history comes before the frames that are drawn.
    "HeliosTransformer3DModel": _row(_VIDEO, "first", "blocks.*.attn1"),
    "HunyuanVideoFramepackTransformer3DModel": _row(
        _patched("bcfhw", frames="patch_size_t"), "around", "*transformer_blocks.*.attn", encoder=_history
    ),
    "CosmosControlNetModel": _row(
        _patched("bcfhw", latents="latents"), "none", "*.attn1", clock=continuous, sample="latents"
    ),
    "Cosmos3OmniTransformer": _row(
        _video_tokens,
        "first",
        "layers.*.self_attn",
        sample="vision_tokens",
        time="vision_timesteps",
        times_of="tokens",
    ),
    "MiniMaxH3Transformer3DModel": _row(
        _once("video_indices", _among_sound),
        "around",
        "transformer_blocks.*.attn",
        encoder=_once("video_indices", _before_video),
        times_of="tokens",
    ),
    "UNetSpatioTemporalConditionModel": _row(
        _patched("bxchw", latents="sample"), "none", "*.transformer_blocks.*.attn1", **_UNET
    ),
}

_LINEAR = "its attention over the image is linear already"
_FLEX = "it calls flex attention with a mask of blocks of its own, which no method replaces"

STAYS: dict[str, str] = {
    "SanaTransformer2DModel": _LINEAR,
    "SanaControlNetModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": f"{_LINEAR}, and its blocks of softmax attention have no module of their own",
    "AnyFlowFARTransformer3DModel": f"it draws frame by frame from a cache of keys: {_FLEX}",
    "WanAnimate2Transformer3DModel": f"it attends to a cache of the driving video's keys: {_FLEX}",
    "SanaWMLTX2RefinerTransformer3DModel": "it refines blocks of a video that come without their height and width",
    "Kandinsky6SRTransformer3DModel": f"its attention is sparse already: {_FLEX}",
    "TransformerTemporalModel": "it attends to the frames at one place of the image, a handful of tokens",
}
"""Classes of diffusers that draw and stay exact as a whole, and why."""
