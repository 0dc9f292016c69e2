"""The official SiT, DiT and Attention-Mediators checkpoints and diffusers' DiT as ours: names, layouts, sizes."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Depth, heads and head size of the published sizes; patch sizes are 2, 4 and 8 (table 1 of arXiv 2212.09748).
SIZES: Mapping[str, Mapping[str, int]] = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}
PATCH_SIZES = (2, 4, 8)
IMAGENET_CLASSES = 1000

# Parts of names, replaced in this order.
_OFFICIAL = (
    ("x_embedder.proj", "patch_embed"),
    ("t_embedder.mlp.0", "time_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embedder.linear_2"),
    ("y_embedder.embedding_table", "class_embedder"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "modulation_out"),
    ("blocks.", "transformer_blocks."),
    ("attn.proj", "attn.to_out.0"),
    ("attn.dwc", "attn.mixer.dwc"),
    ("mlp.fc1", "ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
    ("adaLN_modulation.1", "modulation"),
)
_DIFFUSERS_DIT = (
    ("pos_embed.proj", "patch_embed"),
    ("proj_out_1", "modulation_out"),
    ("proj_out_2", "proj_out"),
    ("norm1.linear", "modulation"),
    ("attn1.", "attn."),
    ("timestep_embedder", "time_embedder"),
    ("class_embedder.embedding_table", "class_embedder"),
)
# The six tables of a mediator layer, brought to (heads, mediators, …).
_TABLES = {
    "an_bias": ("aggregation_bias.map", lambda t: t),
    "ah_bias": ("aggregation_bias.row", lambda t: t[0, :, :, :, 0]),
    "aw_bias": ("aggregation_bias.column", lambda t: t[0, :, :, 0, :]),
    "na_bias": ("broadcast_bias.map", lambda t: t),
    "ha_bias": ("broadcast_bias.row", lambda t: t[0, :, :, 0, :].transpose(1, 2)),
    "wa_bias": ("broadcast_bias.column", lambda t: t[0, :, 0, :, :].transpose(1, 2)),
}
# Parts that wrappers add to names: DistributedDataParallel and torch.compile.
_WRAPPERS = ("module", "_orig_mod")


def read_checkpoint(
    checkpoint: Mapping[str, Any] | str | os.PathLike[str], *, allow_pickle: bool = False
) -> dict[str, Tensor]:
    """The state dict in a mapping or file, without the names that DistributedDataParallel and torch.compile add.

    Of a training checkpoint it is the "ema" weights, else the "model".

    Raises:
        ValueError: if the file is missing, broken, pickled without `allow_pickle`, or holds no tensors.
    """
    is_mapping = isinstance(checkpoint, Mapping)
    content: Any = checkpoint if is_mapping else _read_file(Path(checkpoint), allow_pickle)
    for name in ("ema", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"{checkpoint} holds a {type(content).__name__}, not a state dict")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{'the checkpoint' if is_mapping else checkpoint} holds no tensors")
    return {".".join(part for part in n.split(".") if part not in _WRAPPERS): value for n, value in tensors.items()}


def _read_file(path: Path, allow_pickle: bool) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no checkpoint file {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if not allow_pickle:
        raise ValueError(f"{path} is a pickled file; pass allow_pickle=True to read it with weights_only=True")
    try:
        # Training checkpoints of the reference code carry their command line.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises errors of any kind for a damaged file
        raise ValueError(f"{path} cannot be read as weights: {error}") from error


def convert_original(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of `SiTTransformer2DModel` for an official state dict.

    The official code has a row for the null class only if it trained with label dropout. Without that row a row of
    zeros is added and `class_dropout_prob` is 0. See `SiTTransformer2DModel.from_original` for how that is decided.

    Args:
        state_dict: tensors under the official names.
        config: settings that override the ones inferred from the tensors.

    Raises:
        ValueError: if a tensor that decides a size is missing, the number of heads cannot be inferred, or the table of
            classes does not have `num_classes` rows, or one more.
    """
    settings = {**_infer_settings(state_dict, config), **config}
    weights: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name != "pos_embed":
            weights.update(_convert(name, tensor))
    table = weights["class_embedder.weight"]
    if len(table) == settings["num_classes"]:
        weights["class_embedder.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    return settings, weights


def is_original(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have the names of the official SiT, DiT or Attention-Mediators code."""
    return "x_embedder.proj.weight" in state_dict


def original_heads(state_dict: Mapping[str, Tensor]) -> int | None:
    """Attention heads of an official state dict, by its mediators or a published width; None for other widths."""
    if "blocks.0.attn.an_bias" in state_dict:
        return state_dict["blocks.0.attn.an_bias"].shape[0]
    heads = {s["num_attention_heads"] * s["attention_head_dim"]: s["num_attention_heads"] for s in SIZES.values()}
    return heads.get(len(state_dict["x_embedder.proj.weight"]))


def convert_diffusers_dit(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of `SiTTransformer2DModel` for diffusers' `DiTTransformer2DModel`.

    Its blocks have copies of DiT's embedders; those of the first block are taken. It computes the time's frequencies
    with i/127 (DiT: i/128) and its second norm with an epsilon of 1e-5 (DiT: 1e-6); ours are DiT's, so outputs differ
    slightly from diffusers'.

    Args:
        state_dict: the tensors of the model.
        config: its configuration.

    Raises:
        ValueError: if the model is one that DiT's layout does not cover: no variance, or embedders that differ between
            the blocks.
    """
    in_channels = config["in_channels"]
    if config.get("out_channels") != 2 * in_channels:
        raise ValueError(
            f"a DiT predicts noise and variance, {2 * in_channels} channels for {in_channels}, and this one has"
            f" {config.get('out_channels')}"
        )
    weights: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.startswith("pos_embed.") and "proj" not in name:
            continue  # the table of positions, which ours computes
        new = _renamed(name, _DIFFUSERS_DIT)
        if ".norm1.emb." in new:
            new = new.partition(".norm1.emb.")[2]
        if not torch.equal(weights.setdefault(new, tensor), tensor):
            raise ValueError(f"{name} differs from the first block's, and DiT has one embedder for all blocks")
    same = ("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim")
    settings = {name: config[name] for name in same}
    settings |= {"num_classes": config["num_embeds_ada_norm"], "learn_sigma": True, "predicts_variance": True}
    return settings, weights


def _renamed(name: str, replacements: Sequence[tuple[str, str]]) -> str:
    for old, new in replacements:
        name = name.replace(old, new)
    return name


def _convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One official tensor under our names: three for the fused projections, in another layout for a bias table."""
    stem, _, last = name.rpartition(".")
    new = _renamed(name, _OFFICIAL)
    if stem.endswith("attn.qkv"):
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {new.replace("qkv", f"to_{part}"): piece.contiguous() for part, piece in parts}
    if last in _TABLES:
        table, layout = _TABLES[last]
        return {new.replace(last, f"mixer.{table}"): layout(tensor).contiguous()}
    return {new: tensor}


def _infer_settings(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    def shape(name: str) -> torch.Size:
        if name not in state_dict:
            raise ValueError(f"this is not a SiT or DiT checkpoint: it has no tensor {name!r}")
        return state_dict[name].shape

    width, in_channels, patch_size, _ = shape("x_embedder.proj.weight")
    side = math.isqrt(shape("pos_embed")[1])
    heads = config.get("num_attention_heads") or original_heads(state_dict)
    if heads is None:
        raise ValueError(f"the number of heads cannot be inferred from a width of {width}; pass num_attention_heads=…")
    settings: dict[str, Any] = {
        "sample_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks.")),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight")[0] / width,
        "learn_sigma": shape("final_layer.linear.weight")[0] == 2 * in_channels * patch_size**2,
        **_classes(shape("y_embedder.embedding_table.weight")[0], config),
    }
    if "blocks.0.attn.an_bias" in state_dict:
        count = shape("blocks.0.attn.an_bias")[1]
        mediators = math.isqrt(count)  # of a side; the official code has square numbers alone
        # More than the tokens: the model would bring a plain count down to what the grid holds.
        settings |= {"attention": "mediator", "num_mediators": (mediators, mediators) if mediators > side else count}
    return settings


def _classes(rows: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The number of classes of a table with `rows` rows, and no label dropout if none of them is the null class."""
    classes, dropout = config.get("num_classes"), config.get("class_dropout_prob")
    if classes is None:
        has_null = rows != IMAGENET_CLASSES if dropout is None else dropout > 0
        classes = rows - has_null
    elif classes not in (rows - 1, rows):
        raise ValueError(
            f"num_classes={classes} does not fit a table of {rows} classes; pass {rows - 1} if the last row is the null"
            f" class, or {rows} if there is none"
        )
    return {"num_classes": classes} | ({"class_dropout_prob": 0.0} if classes == rows else {})
