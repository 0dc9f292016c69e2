"""The Fréchet distance of a model in training, on the emoji: see `train.frechet`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train.config import TrainingConfig
from train.data import Data
from train.objectives import Objective
from train.samples import calls_to_steps, pipeline_of
from train.seeds import generator_for

if TYPE_CHECKING:
    from attngen.models.sit import SiTTransformer2DModel
    from attngen.models.sit_pipeline import SiTPipeline

BATCH_SIZE = 64


def frechet_distances(
    model: SiTTransformer2DModel, objective: Objective, config: TrainingConfig, data: Data
) -> dict[str, Any]:
    """Distance to the training pictures, by number of mediators where several are trained.

    Pictures are drawn without guidance, classes in the data's own frequencies, each from a seed of its own, the same at
    every step and for every number of mediators.
    """
    from train.frechet import fd_emoji, reference_labels

    pipe = pipeline_of(model, objective, data)
    classes = list(data.id2label.values())
    labels = reference_labels(config.fd_pictures, classes)
    found: dict[str, Any] = {}
    for count in (config.mediator_counts if config.attention == "mediator" else ()) or (None,):
        result = fd_emoji(draw(pipe, config, labels, count), classes, labels=labels)
        name = result["name"] if count is None else f"{result['name']} {count} mediators"
        found[name] = round(result["value"], 4)
        found["floor"], found["pictures"] = round(result["floor"], 4), result["n"]
    return found


def draw(pipe: SiTPipeline, config: TrainingConfig, labels: Tensor, count: int | None) -> Tensor:
    """One picture a label, (N, 3, H, W) in [-1, 1]; a picture depends on its number and label alone."""
    return torch.cat(list(_batches(pipe, config, labels, count)))


def _batches(pipe: SiTPipeline, config: TrainingConfig, labels: Tensor, count: int | None) -> Iterator[Tensor]:
    for start in range(0, len(labels), BATCH_SIZE):
        part = labels[start : start + BATCH_SIZE].tolist()
        mediators: dict[str, Any] = {} if count is None else {"num_mediators": count}
        called: Any = pipe(
            part,
            num_inference_steps=calls_to_steps(pipe, config.sample_steps),
            guidance_scale=1.0,
            generator=[generator_for(config.seed, "evaluate", start + i) for i in range(len(part))],
            output_type="pt",
            **mediators,
        )
        yield called.images.float().cpu() * 2 - 1
