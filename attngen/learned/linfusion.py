"""The published weights of LinFusion (arXiv 2409.02097), read as learned layers.

They are a diffusers model's folder: config.json lists the layers, and weights are numbered by their place in that list.
Each layer has its own projections and, before those of queries and keys, a two-layer network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from attngen.learned.methods import LearnedLinear
from attngen.learned.modules import LayerSizes

MODEL_CLASS = "UNet2DConditionModel"
EPS = 1e-4

_KEY = re.compile(r"(\d+)\.(to_q|to_k|to_v|to_out\.0|to_q_\.\d|to_k_\.\d)\.(weight|bias)")
_NAMES = {
    **{name: f"projections.{name}" for name in ("to_q", "to_k", "to_v")},
    "to_out.0": "projections.to_out",
    **{f"to_q_.{i}": f"query_map.{i}" for i in (0, 1, 3)},
    **{f"to_k_.{i}": f"key_map.{i}" for i in (0, 1, 3)},
}


def is_layout(names: Sequence[str]) -> bool:
    """Whether tensors of these names are LinFusion's."""
    return bool(names) and all(_KEY.fullmatch(name) for name in names)


class Content(NamedTuple):
    """The content of the published files.

    Attributes:
        method: of all layers.
        sizes: by layer.
        tensors: by layer and name in its `LearnedCore`.
    """

    method: LearnedLinear
    sizes: dict[str, LayerSizes]
    tensors: dict[str, dict[str, Tensor]]


def read(path: Path, file: Any) -> Content:
    """The layers in an open safetensors file, by the config.json in its folder.

    Raises:
        ValueError: if that is missing, or disagrees with the tensors.
    """
    modules = _modules(path.parent / "config.json")
    by_number: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(modules))}
    for key in file.keys():
        match = _KEY.fullmatch(key)
        assert match is not None
        number, part, kind = int(match[1]), match[2], match[3]
        if number not in by_number or part not in _NAMES:
            raise ValueError(f"the tensor {key} belongs to none of the {len(modules)} layers in config.json")
        by_number[number][f"{_NAMES[part]}.{kind}"] = file.get_tensor(key)
    method = _method(modules)
    sizes, tensors = {}, {}
    for number, module in enumerate(modules):
        name, channels, weights = module["module_name"], module["dim_n"], by_number[number]
        biases = [f"projections.{part}.bias" in weights for part in ("to_q", "to_out")]
        sizes[name] = LayerSizes(channels, channels, module["heads"], (1, 1), 0, *biases)
        tensors[name] = weights
    return Content(method, sizes, tensors)


def _modules(path: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))["modules_list"]
        known = {(str, "module_name"), (int, "dim_n"), (int, "heads")}
        whole = all(isinstance(module[name], kind) for module in modules for kind, name in known)
        positive = whole and all(min(m["dim_n"], m["heads"]) > 0 and m["dim_n"] % m["heads"] == 0 for m in modules)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"these are weights of LinFusion, which need their config.json beside them; cannot read it: {error!r}"
        ) from error
    if not isinstance(modules, list) or not modules or not positive:
        raise ValueError(f"{path} does not list LinFusion's layers")
    return modules


def _method(modules: Sequence[dict[str, Any]]) -> LearnedLinear:
    """The one method of all layers: their hidden sizes must be the same share of their channels."""
    reductions = set()
    for module in modules:
        channels, hidden = module["dim_n"], module.get("projection_mid_dim")
        hidden = channels if hidden is None else hidden
        if hidden == -1:  # no network in front of the projections
            reductions.add(0)
        else:
            reductions.add(channels // hidden if isinstance(hidden, int) and hidden > 0 else -1)
    if len(reductions) > 1 or -1 in reductions:
        raise ValueError("config.json has projection_mid_dim of different shares of dim_n, which attngen cannot read")
    reduction = reductions.pop()
    maps = "input" if reduction else "none"
    return LearnedLinear("elu", maps, max(1, reduction), convolution=False, eps=EPS, own_projections=True)
