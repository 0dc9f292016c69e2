"""Pictures of a model in training, and the trained model as a pipeline folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from train.presets import TrainingConfig

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from attngen.models.sit import SiTTransformer2DModel
    from attngen.schedulers.interpolant import InterpolantScheduler

PICTURES_PER_GROUP = 2
BATCH_SIZE = 32
# Sides of the pictures in a sample sheet, in screen pixels.
SHOWN_SIZE = 96


def ode_scheduler(path: str, prediction_type: str) -> InterpolantScheduler:
    """The sampler of samples and of the exported pipeline: the ODE by Heun's method, two network calls a step."""
    from attngen.schedulers.interpolant import InterpolantScheduler

    return InterpolantScheduler(path=path, prediction_type=prediction_type, sampler="ode", solver="heun")


def sample_grid(
    model: SiTTransformer2DModel,
    scheduler: InterpolantScheduler,
    config: TrainingConfig,
    id2label: Mapping[int, str],
    out: Path,
    step: int,
) -> Path:
    """Write `out`/samples/step-NNNNNNNN.png: a row a class, a group of columns for each number of mediators.

    Every picture starts from noise of its own seed, the same in every group and every step, so that sheets and groups
    can be compared.

    Args:
        model: the network, in evaluation mode.
        scheduler: of the training; its path and prediction type are what the ODE is solved for.
        config: of the training.
        id2label: class name by label.
        out: folder of the run.
        step: optimiser steps done.

    Returns:
        The file written.
    """
    from attngen.models.sit_pipeline import SiTPipeline
    from pipelines.images import grid, save_png

    sampler = ode_scheduler(scheduler.config["path"], scheduler.config["prediction_type"])
    pipe = SiTPipeline(model, sampler, id2label=dict(id2label))
    pipe.set_progress_bar_config(disable=True)
    counts = config.mediator_counts if config.attention == "mediator" else ()
    columns = [_draw(pipe, config, count, list(id2label)) for count in counts or (None,)]
    rows = [[image for group in columns for image in group[label]] for label in id2label]
    path = out / "samples" / f"step-{step:08d}.png"
    sheet = grid(
        rows,
        row_labels=list(id2label.values()),
        groups=[(f"{count} mediator{'s' if count > 1 else ''}", PICTURES_PER_GROUP) for count in counts],
        scale=max(1, SHOWN_SIZE // config.image_size),
    )
    settings = {"prompt": ", ".join(id2label.values()), "training_step": step, "sampler": "ode heun"}
    save_png(sheet, path, {**settings, "guidance_scale": config.guidance_scale, "seed": config.seed})
    return path


def _draw(pipe, config: TrainingConfig, count: int | None, labels: list[int]) -> dict[int, list[Image.Image]]:
    """PICTURES_PER_GROUP pictures of each class with `count` mediators."""
    wanted = [(label, number) for label in labels for number in range(PICTURES_PER_GROUP)]
    pictures: dict[int, list[Image.Image]] = {label: [] for label in labels}
    for start in range(0, len(wanted), BATCH_SIZE):
        part = wanted[start : start + BATCH_SIZE]
        images = pipe(
            [label for label, _ in part],
            num_inference_steps=max(1, config.sample_steps // 2),
            guidance_scale=config.guidance_scale,
            num_mediators=count,
            generator=[_generator(config.seed, label, number) for label, number in part],
        ).images
        for (label, _), image in zip(part, images, strict=True):
            pictures[label].append(image)
    return pictures


def _generator(seed: int, label: int, number: int) -> torch.Generator:
    from train.seeds import generator_for

    return generator_for(seed, "sample", label, number)


def export_pipeline(
    model: SiTTransformer2DModel, config: TrainingConfig, id2label: Mapping[int, str], folder: Path
) -> None:
    """Write a folder for `SiTPipeline.from_pretrained`, with weights in half precision; an old one is replaced whole.

    Args:
        model: the network; it is changed to half precision.
        config: of the training.
        id2label: class name by label.
        folder: to write.
    """
    from attngen.models.sit_pipeline import SiTPipeline

    pipe = SiTPipeline(model.half(), ode_scheduler(config.path, config.prediction_type), id2label=dict(id2label))
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
