"""Checkpoints as folders of safetensors and JSON: written beside, synced, renamed, so one is always whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from attngen.files import sync_folder, write_file

_NAME = re.compile(r"step-(\d{8})")
_MARKER = "state.json"


def write_json(path: Path, content: Any) -> None:
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_file(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"format": "pt"}))


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write `folder`/step-NNNNNNNN and then drop all but the newest `keep` and the milestones.

    Args:
        folder: the run's checkpoint folder, made if missing.
        step: optimiser steps done.
        tensors: file stem -> tensors by name.
        state: JSON values; written last, so a checkpoint with it is whole.
        keep: checkpoints to keep, at least 1.
        keep_every: those of steps that are multiples of it are kept for good; 0: none.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-step-{step:08d}"
    for leftover in folder.glob(".*-step-*"):  # of a run that was killed while it wrote or removed one
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for stem, named in tensors.items():
            write_tensors(temporary / f"{stem}.safetensors", named)
        write_json(temporary / _MARKER, {"step": step, **state})
        _remove(final)
        os.replace(temporary, final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there; renamed first, so that one that is half gone is not taken for whole."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f".old-{checkpoint.name}")
        os.replace(checkpoint, aside)
        shutil.rmtree(aside, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """Optimiser steps done at a checkpoint, from the name of its folder."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / _MARKER).is_file())


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors by file stem, and the state, of a checkpoint folder.

    Raises:
        ValueError: if it is not a whole checkpoint.
    """
    if not (path / _MARKER).is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no {_MARKER}")
    try:
        state = json.loads((path / _MARKER).read_text())
        if not isinstance(state, dict):
            raise ValueError(f"{_MARKER} is not a JSON object")
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except Exception as error:  # safetensors raises its own class, JSON another
        raise ValueError(
            f"the checkpoint {path} is damaged ({error}); delete it to resume from the one before it"
        ) from error
    return tensors, state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat tensors: "parameter index.name"."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(v) for i, values in state.items() for name, v in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put what `optimizer_tensors` gave back into an optimiser over the same parameters, in shards where they are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = place_like(tensor, like) if tensor.shape == like.shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def checkpoint_tensors(
    model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], ema: Any, averages: Sequence[Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[float, dict[str, Tensor]]]:
    """Everything to save of a run, gathered whole from its shards; every process has to call it.

    Args:
        model: the network, bare, compiled, or wrapped for several processes.
        optimizers: over its parameters.
        ema: diffusers' average.
        averages: `train.loop.averages.PowerAverage`s.

    Returns:
        File stem -> tensors by name, and the power-function averages by their width.
    """
    names = [clean_name(name) for name, _ in model.named_parameters()]

    def named(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        return {name: whole(tensor) for name, tensor in zip(names, tensors, strict=True)}

    tensors = {
        "model": {clean_name(name): whole(tensor) for name, tensor in model.state_dict().items()},
        "ema": named(ema.shadow_params),
        **{f"optimizer_{i}": {k: whole(t) for k, t in optimizer_tensors(o).items()} for i, o in enumerate(optimizers)},
        **{f"average_{i}": named(average.shadow) for i, average in enumerate(averages)},
    }
    return tensors, {average.std: tensors[f"average_{i}"] for i, average in enumerate(averages)}


def clean_name(name: str) -> str:
    """A parameter's name without what DDP and torch.compile put in front of it."""
    for prefix in ("module.", "_orig_mod."):
        while name.startswith(prefix):
            name = name[len(prefix) :]
    return name.replace("._orig_mod.", ".")


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards, or itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def place_like(value: Tensor, like: Tensor) -> Tensor:
    """`value` on the device of `like`, cut into shards as `like` is."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), mesh, like.placements)  # type: ignore[attr-defined]
