"""Weights to start from: official checkpoints of SiT, DiT and Attention-Mediators, folders of diffusers, our runs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attngen.sit.checkpoints import (
    convert_diffusers_dit,
    convert_original,
    is_original,
    original_heads,
    read_checkpoint,
)
from attngen.sit.model import SiTTransformer2DModel
from pipelines.engine.loading import missing_weights

_LISTED = 8


@dataclass(frozen=True)
class Source:
    """Weights to start from.

    Attributes:
        weights: tensors under the names of `SiTTransformer2DModel`.
        settings: arguments of that class, as far as the source tells them.
        id2label: names of its classes, if it has them.
        dropped: tensors of the file that have no place in the model, by name.
    """

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    id2label: dict[int, str] | None = None
    dropped: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def read_source(
    source: str | os.PathLike[str],
    *,
    weights: str = "ema",
    allow_pickle: bool = False,
    default_heads: int | None = None,
    **settings: Any,
) -> Source:
    """The weights and what is known of their model.

    Args:
        source: a checkpoint file of the official SiT, DiT or Attention-Mediators code, or with the tensors of
            `SiTTransformer2DModel` (.safetensors, or .pt with `allow_pickle`); a folder of diffusers: a pipeline or a
            transformer, ours or a `DiTTransformer2DModel`; or a folder of a training run, or one of its checkpoints.
        weights: of a training run, "ema" (the averaged ones) or "model".
        allow_pickle: read a pickled file, with `weights_only=True`.
        default_heads: attention heads of an official checkpoint of an unpublished width, which does not tell them.
        settings: what the source does not tell or tells wrongly, such as `predicts_variance` of an official checkpoint.

    Raises:
        ValueError: if there is nothing to read.
    """
    path = Path(source)
    if path.is_file():
        return _read_file(path, allow_pickle, default_heads, settings)
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path}")
    readers: tuple[tuple[str, Callable[[], Source]], ...] = (
        ("model_index.json", lambda: _read_pipeline(path)),
        ("state.json", lambda: _read_training_checkpoint(path, path.resolve().parents[1], weights)),
        ("checkpoints", lambda: _read_run(path, weights)),
        ("config.json", lambda: _read_transformer(path)),
    )
    for marker, read in readers:
        if (path / marker).exists():
            found = read()
            return dataclasses.replace(found, settings={**found.settings, **settings})
    raise ValueError(
        f"{path} is not a folder to start from: it has none of {', '.join(marker for marker, _ in readers)}"
        " (a diffusers pipeline, a training checkpoint, a training run, a diffusers model)"
    )


def _read_file(path: Path, allow_pickle: bool, default_heads: int | None, settings: dict[str, Any]) -> Source:
    state_dict = read_checkpoint(path, allow_pickle=allow_pickle)
    if not is_original(state_dict):
        if "patch_embed.weight" not in state_dict:
            names = ", ".join(list(state_dict)[:_LISTED])
            raise ValueError(f"{path} holds no SiT or DiT: its tensors begin with {names}")
        return Source(state_dict, dict(settings))
    if default_heads is not None and original_heads(state_dict) is None:
        settings = {"num_attention_heads": default_heads, **settings}
    try:
        found, weights = convert_original(state_dict, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    found["convolution"] = "values"
    dropped = {"pos_embed": state_dict["pos_embed"]} if "pos_embed" in state_dict else {}
    return Source(weights, found, dropped=dropped)


def _read_pipeline(path: Path) -> Source:
    index = _read_json(path / "model_index.json")
    if not (path / "transformer").is_dir():
        raise ValueError(f"{path} is a {index.get('_class_name')} without a transformer, so it is not a SiT or DiT")
    names = index.get("id2label")
    found = _read_transformer(path / "transformer")
    return dataclasses.replace(found, id2label=None if names is None else {int(k): v for k, v in names.items()})


def _read_transformer(path: Path) -> Source:
    from diffusers import DiTTransformer2DModel

    kind = _read_json(path / "config.json").get("_class_name")
    classes: dict[str, Any] = {cls.__name__: cls for cls in (SiTTransformer2DModel, DiTTransformer2DModel)}
    if kind not in classes:
        raise ValueError(f"{path} holds a {kind}; known are {', '.join(classes)}")
    try:
        with torch.random.fork_rng(devices=[]):
            model = classes[kind].from_pretrained(path)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if missing := missing_weights(model):
        raise ValueError(f"{path} lacks weights: {', '.join(missing[:_LISTED])}")
    if isinstance(model, DiTTransformer2DModel):
        settings, weights = convert_diffusers_dit(model.state_dict(), model.config)
        return Source(weights, settings)
    return Source(dict(model.state_dict()), dict(model.config))


def _read_run(path: Path, weights: str) -> Source:
    from train.loop.checkpoint import list_checkpoints

    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise ValueError(f"the run {path} has no complete checkpoint yet")
    return _read_training_checkpoint(found[-1], path, weights)


def _read_training_checkpoint(path: Path, run: Path, weights: str) -> Source:
    from train.loop.checkpoint import load_checkpoint

    tensors, state = load_checkpoint(path)
    if weights not in tensors:
        raise ValueError(f"{path} has no weights {weights!r}; it has {', '.join(tensors)}")
    config = state.get("config", {})
    known = {"convolution": "values", **{field: config[field] for field in _SHARED_SETTINGS if field in config}}
    objective = config.get("objective", config.get("prediction_type"))
    if objective is not None:
        known["predicts_variance"] = objective == "dit"
    saved = _read_json(run / "config.json") if (run / "config.json").is_file() else {}
    names = state.get("id2label") or saved.get("id2label")
    return Source(tensors[weights], known, None if names is None else {int(k): v for k, v in names.items()})


_SHARED_SETTINGS = (
    "patch_size",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "attention",
    "num_mediators",
    "feature_map",
    "convolution",
)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
