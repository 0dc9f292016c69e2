"""From the official SiT, DiT and Attention-Mediators checkpoints and diffusers' DiT to ours: names, layouts, sizes."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
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

_NAMES = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embedder.linear_1",
    "t_embedder.mlp.2": "time_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "modulation_out",
}
_BLOCK_NAMES = {
    "attn.proj": "attn.to_out.0",
    "attn.dwc": "attn.mixer.dwc",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "modulation",
}
# The six tables of a mediator layer, brought to (heads, mediators, …).
_TABLES = {
    "an_bias": ("aggregation_bias.map", lambda t: t),
    "ah_bias": ("aggregation_bias.row", lambda t: t[0, :, :, :, 0]),
    "aw_bias": ("aggregation_bias.column", lambda t: t[0, :, :, 0, :]),
    "na_bias": ("broadcast_bias.map", lambda t: t),
    "ha_bias": ("broadcast_bias.row", lambda t: t[0, :, :, 0, :].transpose(1, 2)),
    "wa_bias": ("broadcast_bias.column", lambda t: t[0, :, 0, :, :].transpose(1, 2)),
}


def read_checkpoint(
    checkpoint: Mapping[str, Any] | str | os.PathLike[str], *, allow_pickle: bool = False
) -> dict[str, Tensor]:
    """The state dict in a mapping or file; a training checkpoint gives its "ema", else its "model".

    Raises:
        ValueError: if the file is missing, broken, pickled without `allow_pickle`, or holds no tensors.
    """
    content: Any = checkpoint if isinstance(checkpoint, Mapping) else _read_file(Path(checkpoint), allow_pickle)
    for name in ("ema", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"{checkpoint} holds a {type(content).__name__}, not a state dict")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            "the checkpoint holds no tensors" if isinstance(checkpoint, Mapping) else f"{checkpoint} holds no tensors"
        )
    return {name.removeprefix("module."): value for name, value in tensors.items()}


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
    except Exception as error:  # what a damaged file raises in torch's reader is of any kind
        raise ValueError(f"{path} cannot be read as weights: {error}") from error


def convert_original(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of `SiTTransformer2DModel` for an official state dict.

    Args:
        state_dict: tensors under the official names.
        config: settings that override what the tensors say.

    Raises:
        ValueError: if a tensor that decides a size is missing, or the number of heads cannot be told.
    """
    settings = {**_infer_settings(state_dict, config), **config}
    weights: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name != "pos_embed":
            weights.update(_convert(name, tensor))
    return settings, weights


def is_original(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have the names of the official SiT, DiT or Attention-Mediators code."""
    return "x_embedder.proj.weight" in state_dict


def original_heads(state_dict: Mapping[str, Tensor]) -> int | None:
    """The number of attention heads, if an official state dict tells it: by mediators, or by a published width."""
    if "blocks.0.attn.an_bias" in state_dict:
        return state_dict["blocks.0.attn.an_bias"].shape[0]
    heads = {s["num_attention_heads"] * s["attention_head_dim"]: s["num_attention_heads"] for s in SIZES.values()}
    return heads.get(len(state_dict["x_embedder.proj.weight"]))


def convert_diffusers_dit(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of `SiTTransformer2DModel` for diffusers' `DiTTransformer2DModel`.

    Each of its blocks has embedders of its own, copies of DiT's single ones; those of the first block are taken. Its
    frequencies of time, i/127 for DiT's i/128, and its second norm's epsilon of 1e-5 for 1e-6 are no weights, and ours
    are DiT's, so outputs differ slightly from diffusers'.

    Args:
        state_dict: the tensors of the model.
        config: its configuration.

    Raises:
        ValueError: if the model is one that DiT's layout does not cover: no variance, or embedders that differ between
            the blocks.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        stem, _, kind = name.rpartition(".")
        new = _diffusers_name(stem)
        if new is None:
            continue
        key = f"{new}.{kind}"
        if key in weights and not torch.equal(weights[key], tensor):
            raise ValueError(f"{name} differs from the first block's, and DiT has one embedder for all blocks")
        weights[key] = tensor
    in_channels = config["in_channels"]
    if config.get("out_channels") != 2 * in_channels:
        raise ValueError(
            f"this DiT gives {config.get('out_channels')} channels for {in_channels}; known are those that predict"
            f" noise and variance, {2 * in_channels}"
        )
    settings = {
        "sample_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": in_channels,
        "num_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "attention_head_dim": config["attention_head_dim"],
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": True,
        "predicts_variance": True,
    }
    return settings, weights


def _diffusers_name(stem: str) -> str | None:
    """Our name of a module of diffusers' DiT; None for its table of positions, which ours computes."""
    outer = {"pos_embed.proj": "patch_embed", "proj_out_1": "modulation_out", "proj_out_2": "proj_out"}
    if not stem.startswith("transformer_blocks."):
        return outer.get(stem)
    _, index, inner = stem.split(".", 2)
    embedder = inner.removeprefix("norm1.emb.")
    if embedder != inner:
        return {
            "timestep_embedder.linear_1": "time_embedder.linear_1",
            "timestep_embedder.linear_2": "time_embedder.linear_2",
            "class_embedder.embedding_table": "class_embedder",
        }[embedder]
    inner = inner.replace("norm1.linear", "modulation").replace("attn1.", "attn.")
    return f"transformer_blocks.{index}.{inner}"


def _convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
    stem, _, kind = name.rpartition(".")
    if not name.startswith("blocks."):
        return {f"{_NAMES.get(stem, stem)}.{kind}": tensor}
    _, index, inner = name.split(".", 2)
    prefix = f"transformer_blocks.{index}"
    if inner.startswith("attn.qkv."):
        parts = zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True)
        return {f"{prefix}.attn.{part}.{kind}": piece.contiguous() for part, piece in parts}
    table = _TABLES.get(inner.removeprefix("attn."))
    if table is not None:
        return {f"{prefix}.attn.mixer.{table[0]}": table[1](tensor).contiguous()}
    inner_stem = inner.rpartition(".")[0]
    return {f"{prefix}.{_BLOCK_NAMES.get(inner_stem, inner_stem)}.{kind}": tensor}


def _infer_settings(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    def shape(name: str) -> torch.Size:
        if name not in state_dict:
            raise ValueError(f"this is not a SiT or DiT checkpoint: it has no tensor {name!r}")
        return state_dict[name].shape

    width, in_channels, patch_size, _ = shape("x_embedder.proj.weight")
    side = math.isqrt(shape("pos_embed")[1])
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    settings: dict[str, Any] = {
        "sample_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": depth,
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight")[0] / width,
        "num_classes": shape("y_embedder.embedding_table.weight")[0] - 1,
        "learn_sigma": shape("final_layer.linear.weight")[0] == 2 * in_channels * patch_size**2,
    }
    if "blocks.0.attn.an_bias" in state_dict:
        settings.update(attention="mediator", num_mediators=shape("blocks.0.attn.an_bias")[1])
    heads = config.get("num_attention_heads") or original_heads(state_dict)
    if heads is None:
        raise ValueError(f"a checkpoint of width {width} does not tell its number of heads; pass num_attention_heads=…")
    settings.update(num_attention_heads=heads, attention_head_dim=width // heads)
    return settings
