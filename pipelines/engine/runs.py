"""Training runs as models: RUN and RUN@STEP, also of a run that is still training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cli import UserError, first_line
from pipelines.engine.shipped import shipped_models

if TYPE_CHECKING:
    import torch

STATE = "state.json"
"""File of a checkpoint that is written last and describes its pipeline."""
CHECKPOINTS, PIPELINE = "checkpoints", "pipeline"
# Class of the network -> its name in the pipeline, and the class of that.
NETWORKS = {
    "SiTTransformer2DModel": ("transformer", "SiTPipeline"),
    "UNet2DConditionModel": ("unet", "UNetClassPipeline"),
}
_STEP = re.compile(r"step-(\d+)")
_AT = re.compile(r"(.+)@(\d+)")


def resolve(name: str) -> str:
    """The folder or file that a model's name means; a hub id, or a name that is none, comes back as it is.

    Args:
        name: pipeline folder, single file, hub id, the name of a model that ships, RUN (a folder of `train.sit`: its
            pipeline, or its newest checkpoint until it has one) or RUN@STEP (that checkpoint).

    Raises:
        UserError: if the run has no such checkpoint.
    """
    if Path(name).exists():
        return _newest(Path(name)) if _is_run(Path(name)) else name
    match = _AT.fullmatch(name)
    if match is None or not Path(match[1]).is_dir():
        return str(shipped_models().get(name, name))
    return str(checkpoint_of(Path(match[1]), int(match[2])))


def _is_run(folder: Path) -> bool:
    """Whether a folder was written by `train.sit` and is not itself a pipeline or a model."""
    return (folder / CHECKPOINTS).is_dir() or (folder / PIPELINE / "model_index.json").is_file()


def _newest(run: Path) -> str:
    pipeline = run / PIPELINE
    return str(pipeline if (pipeline / "model_index.json").is_file() else checkpoint_of(run))


def steps_of(run: Path) -> list[int]:
    """Steps of a run's whole checkpoints, in order."""
    found = (run / CHECKPOINTS).glob(f"step-*/{STATE}")
    matches = (_STEP.fullmatch(file.parent.name) for file in found)
    return sorted(int(match[1]) for match in matches if match)


def checkpoint_of(run: Path, step: int | None = None) -> Path:
    """The folder of a run's checkpoint, by default of the newest.

    Raises:
        UserError: if the run has no checkpoint, or none of that step.
    """
    steps = steps_of(run)
    if not steps:
        raise UserError(f"the run {run} has no checkpoint yet; it writes one every --save-every steps")
    if step is not None and step not in steps:
        kept = ", ".join(map(str, steps))
        raise UserError(f"the run {run} has no checkpoint of step {step}; it has {kept} (--keep-every keeps more)")
    return run / CHECKPOINTS / f"step-{steps[-1] if step is None else step:08d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a training run."""
    return (folder / STATE).is_file() and _STEP.fullmatch(folder.name) is not None


def describe(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its pipeline: `network`, `scheduler`, `vae` and `id2label`.

    Raises:
        UserError: if it cannot be read, or does not describe a pipeline.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        described = {**state["pipeline"], "id2label": {int(k): v for k, v in state["id2label"].items()}}
        if described["network"]["_class_name"] not in NETWORKS:
            raise ValueError(f"a network of class {described['network']['_class_name']}")
    except KeyError as error:
        raise UserError(f"{checkpoint} does not describe a pipeline: its {STATE} has no {error}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint} cannot be read: {first_line(error)}") from error
    return described


def pipeline_name(checkpoint: Path) -> str:
    """Class of the pipeline that a checkpoint makes. Raises as `describe`."""
    return NETWORKS[describe(checkpoint)["network"]["_class_name"]][1]


def read_checkpoint(checkpoint: Path, dtype: torch.dtype, weights: str = "ema") -> Any:
    """The pipeline of a checkpoint.

    Args:
        checkpoint: its folder.
        dtype: of all weights.
        weights: "ema" (the averaged ones) or "model".

    Raises:
        UserError: if it cannot be read.
    """
    from safetensors.torch import load_file

    described, file = describe(checkpoint), checkpoint / f"{weights}.safetensors"
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors raises its own class
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    return build_pipeline(described, tensors, dtype)


def build_pipeline(described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """A pipeline from its description and the weights of its network.

    Args:
        described: as `describe` returns it.
        tensors: weights by the names of training, where a UNet's begin with "unet.".
        dtype: of all weights.

    Raises:
        UserError: if the weights are not those of the network, or its autoencoder cannot be loaded.
    """
    import diffusers
    import torch

    import attngen

    network_config, scheduler_config = dict(described["network"]), dict(described["scheduler"])
    kind = network_config.pop("_class_name")
    with torch.random.fork_rng(devices=[]):
        network = (getattr(attngen, kind, None) or getattr(diffusers, kind)).from_config(network_config)
    try:
        network.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise UserError(f"the weights do not fit the {kind} that the checkpoint describes: {error}") from error
    name = scheduler_config.pop("_class_name")
    scheduler = (getattr(attngen, name, None) or getattr(diffusers, name)).from_config(scheduler_config)
    part, pipeline = NETWORKS[kind]
    parts = {part: network.eval(), "scheduler": scheduler, "id2label": described["id2label"]}
    if described["vae"] is not None:
        from pipelines.engine.autoencoder import load_vae

        try:
            parts["vae"], _ = load_vae(described["vae"]["source"], described["vae"]["sha256"])
        except ValueError as error:
            raise UserError(str(error)) from error
    return getattr(attngen, pipeline)(**parts).to(dtype)
