"""Pictures of a model in training, and the trained model as a pipeline folder."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from attngen.sit.pipeline import SiTPipeline
from pipelines.cli.seeds import generator_for
from pipelines.images import grid, save_png
from train.data.base import Data
from train.recipe.config import TrainingConfig
from train.recipe.objectives import Objective
from train.recipe.unet import ClassUNet

if TYPE_CHECKING:
    from attngen.sit.model import SiTTransformer2DModel
    from attngen.sit.unet_pipeline import UNetClassPipeline

PICTURES_PER_GROUP = 2
BATCH_SIZE = 32
MOST_ROWS = 16
# Sides of the pictures in a sample sheet, in screen pixels.
SHOWN_SIZE = 96


def sample_grid(
    model: SiTTransformer2DModel, objective: Objective, config: TrainingConfig, data: Data, out: Path, step: int
) -> Path:
    """Write `out`/samples/step-NNNNNNNN.png: a row a class, a group of columns for each number of mediators.

    Every picture starts from noise of its own seed, the same in every group and every step, so that sheets and groups
    can be compared. Of many classes the first ones are drawn. Latents are decoded by the autoencoder they were made
    with; where that cannot be loaded their first three channels are shown.

    Args:
        model: the network, in evaluation mode.
        objective: of the training; its sampler draws.
        config: of the training.
        data: of the training.
        out: folder of the run.
        step: optimiser steps done.

    Returns:
        The file written.
    """
    shown = {label: name for label, name in data.id2label.items() if label in list(data.id2label)[:MOST_ROWS]}
    pipe = pipeline_of(model, objective, data)
    counts = config.mediator_counts if config.attention == "mediator" else ()
    columns = [_draw(pipe, config, count, list(shown), data.channels) for count in counts or (None,)]
    rows = [[image for group in columns for image in group[label]] for label in shown]
    path = out / "samples" / f"step-{step:08d}.png"
    sheet = grid(
        rows,
        row_labels=list(shown.values()),
        groups=[(f"{count} mediator{'s' if count > 1 else ''}", PICTURES_PER_GROUP) for count in counts],
        scale=max(1, SHOWN_SIZE // config.image_size),
    )
    settings = {"prompt": ", ".join(shown.values()), "training_step": step, "sampler": type(pipe.scheduler).__name__}
    save_png(sheet, path, {**settings, "guidance_scale": config.guidance_scale, "seed": config.seed})
    return path


def pipeline_of(model: SiTTransformer2DModel, objective: Objective, data: Data) -> Any:
    """The pipeline that draws from a model in training, without a progress bar."""
    if isinstance(model, ClassUNet):
        pipe = model.pipeline(dict(data.id2label))
    else:
        vae = _autoencoder(data, model.device)
        pipe = SiTPipeline(model, objective.sampling_scheduler(), vae=vae, id2label=dict(data.id2label))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def describe_pipeline(model: Any, objective: Objective, data: Data) -> dict[str, Any]:
    """What `pipelines.engine.runs` makes the pipeline of beside the weights: JSON values.

    Args:
        model: the network, without what accelerate and torch.compile put around it.
        objective: of the training; its sampler draws.
        data: of the training.
    """
    if isinstance(model, ClassUNet):
        network, scheduler = model.unet, FlowMatchEulerDiscreteScheduler()
    else:
        network, scheduler = model, objective.sampling_scheduler()
    vae = None if data.vae is None else {"source": data.vae["source"], "sha256": data.vae.get("sha256")}
    return {"network": _config(network), "scheduler": _config(scheduler), "vae": vae}


def _config(part: Any) -> dict[str, Any]:
    """The class and the configuration of a network or scheduler of diffusers."""
    return {"_class_name": type(part).__name__, **{k: v for k, v in part.config.items() if not k.startswith("_")}}


def _autoencoder(data: Data, device: torch.device) -> Any:
    if data.vae is None:
        return None
    from pipelines.engine.autoencoder import load_vae

    try:
        vae, _ = load_vae(data.vae["source"], data.vae.get("sha256"))
    except ValueError as error:
        print(f"train.sit: latents are shown undecoded: {error}", file=sys.stderr)
        return None
    return vae.to(device)


def calls_to_steps(pipe: SiTPipeline | UNetClassPipeline, calls: int) -> int:
    """Sampling steps for a number of network calls: Heun's method makes two a step."""
    two = pipe.scheduler.config.get("solver") == "heun" and pipe.scheduler.config.get("sampler") == "ode"
    return max(1, calls // 2 if two else calls)


def _draw(
    pipe: SiTPipeline | UNetClassPipeline, config: TrainingConfig, count: int | None, labels: list[int], channels: int
) -> dict[int, list[Image.Image]]:
    """PICTURES_PER_GROUP pictures of each class with `count` mediators."""
    wanted = [(label, number) for label in labels for number in range(PICTURES_PER_GROUP)]
    pictures: dict[int, list[Image.Image]] = {label: [] for label in labels}
    shown = getattr(pipe, "vae", None) is not None or channels == 3
    for start in range(0, len(wanted), BATCH_SIZE):
        part = wanted[start : start + BATCH_SIZE]
        mediators: dict[str, Any] = {} if count is None else {"num_mediators": count}
        called: Any = pipe(
            [label for label, _ in part],
            num_inference_steps=calls_to_steps(pipe, config.sample_steps),
            guidance_scale=config.guidance_scale,
            generator=[generator_for(config.seed, "sample", label, number) for label, number in part],
            output_type="pil" if shown else "pt",
            **mediators,
        )
        for (label, _), image in zip(part, called.images, strict=True):
            pictures[label].append(image if isinstance(image, Image.Image) else _undecoded(image))
    return pictures


def _undecoded(latents: Tensor) -> Image.Image:
    """The first three channels of latents (C, H, W) as colours."""
    colours = latents[:3].float().clamp(-3, 3).add(3).mul(255 / 6).byte()
    return Image.fromarray(colours.permute(1, 2, 0).cpu().numpy())


def export_pipeline(model: SiTTransformer2DModel, objective: Objective, data: Data, folder: Path) -> None:
    """Write a folder for `SiTPipeline.from_pretrained`, with weights in half precision; an old one is replaced whole.

    Args:
        model: the network; it is changed to half precision.
        objective: of the training; its sampler goes with the model.
        data: of the training; the autoencoder of latents goes with the model too.
        folder: to write.
    """
    pipe = pipeline_of(model.half(), objective, data)
    if getattr(pipe, "vae", None) is not None:
        pipe.vae.half()
    write_pipeline(pipe, folder)


def write_pipeline(pipe: Any, folder: Path) -> None:
    """Save a pipeline or a model of diffusers so that a reader sees the old folder or the new one, never half of it."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        pipe.save_pretrained(temporary)
        _make_readable(temporary)
        # A folder cannot replace a full one in one step: the old one stays beside it until the new one is there.
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Modes 0755 and 0644: safetensors writes files that only their owner can read."""
    for path in (folder, *folder.rglob("*")):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
