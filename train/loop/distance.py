"""The Fréchet distance of a model in training: FD-emoji, or FID against a reference (`train.metrics`).

Pictures are drawn without guidance, classes in the data's own frequencies, each from a seed of its own, the same at
every step and for every number of mediators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.cli.seeds import generator_for, sample_order
from train.data.base import Data
from train.loop.preview import calls_to_steps, pipeline_of
from train.recipe.config import TrainingConfig
from train.recipe.objectives import Objective

if TYPE_CHECKING:
    from attngen.sit.model import SiTTransformer2DModel
    from attngen.sit.pipeline import SiTPipeline

BATCH_SIZE = 64


class Stopped(Exception):
    """Asked to stop before all pictures were drawn."""


def frechet_distances(
    model: SiTTransformer2DModel,
    objective: Objective,
    config: TrainingConfig,
    data: Data,
    inception: InceptionDistance | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """The distance by number of mediators where several are trained.

    Args:
        model: the network, in evaluation mode.
        objective: of the training; its sampler draws.
        config: of the training.
        data: of the training.
        inception: for FID; without it FD-emoji to the training pictures is measured.
        stopped: asked before every batch of pictures.

    Returns:
        Numbers by name, and `pictures`, how many were drawn.

    Raises:
        Stopped: if `stopped` said so.
    """
    from tqdm import tqdm

    pipe = pipeline_of(model, objective, data)
    measure = inception or EmojiDistance(config, data)
    found: dict[str, Any] = {}
    counts = (config.mediator_counts if config.attention == "mediator" else ()) or (None,)
    total = len(counts) * len(measure.labels)
    with tqdm(total=total, desc="measuring", unit=" pictures", leave=False, disable=None) as bar:

        def watched(batches: Iterator[Tensor]) -> Iterator[Tensor]:
            while not stopped():
                batch = next(batches, None)
                if batch is None:
                    return
                bar.update(len(batch))
                yield batch
            raise Stopped

        for count in counts:
            name, value, more = measure(watched(_batches(pipe, config, measure.labels, count)))
            found[name if count is None else f"{name} {count} mediators"] = round(value, 4)
            found |= more
    return {**found, "pictures": len(measure.labels)}


class EmojiDistance:
    """FD-emoji to the training pictures."""

    def __init__(self, config: TrainingConfig, data: Data) -> None:
        from train.metrics.frechet import reference_labels

        self.classes = list(data.id2label.values())
        self.labels = reference_labels(config.fd_pictures, self.classes)

    def __call__(self, batches: Iterator[Tensor]) -> tuple[str, float, dict[str, Any]]:
        """Name and value of the distance, and its floor."""
        from train.metrics.frechet import fd_emoji

        result = fd_emoji(torch.cat(list(batches)), self.classes, labels=self.labels)
        return result["name"], result["value"], {"floor": round(result["floor"], 4)}


class InceptionDistance:
    """FID to the reference that a configuration names.

    Args:
        config: of the training.
        data: of the training.
        device: to compute on.

    Raises:
        ValueError: if the reference cannot be measured, its pictures are of another size, the weights cannot be read,
            torch-fidelity is missing, or the autoencoder of latents is.
        OSError: if the weights cannot be downloaded.
    """

    def __init__(self, config: TrainingConfig, data: Data, device: torch.device) -> None:
        try:
            import torch_fidelity  # noqa: F401
        except ImportError as error:
            raise ValueError("FID needs torch-fidelity: pip install 'attngen[fid]' installs it") from error
        from train.fid import check_input
        from train.metrics.extractors import make_extractor
        from train.metrics.sets import open_input

        if data.vae is not None:
            from pipelines.engine.autoencoder import load_vae

            load_vae(data.vae["source"], data.vae.get("sha256"))
        self.labels = data.labels[sample_order(config.seed, torch.ones(len(data)), 0, config.fd_pictures)]
        self.reference = open_input(config.fd_reference, config.image_size)
        check_input(self.reference)
        self.extractor = make_extractor("inception", config.fd_weights or None, device)
        self._statistics: Any = None

    def __call__(self, batches: Iterator[Tensor]) -> tuple[str, float, dict[str, Any]]:
        """Name and value of the distance."""
        from train.metrics.frechet import RunningStatistics, frechet_distance
        from train.metrics.inception import GROUP
        from train.metrics.measure import default_cache, measure_input

        if self._statistics is None:
            self._statistics = measure_input(self.reference, self.extractor, default_cache()).statistics
        running = RunningStatistics(keep_features=False)
        for batch in batches:
            pixels = (batch * 127.5 + 127.5).round().clamp(0, 255).byte().numpy()
            for start in range(0, len(pixels), GROUP):
                running.update(self.extractor.features(pixels[start : start + GROUP])["features"])
        drawn = running.finish(self.extractor.label, self.extractor.sha256)
        return self.extractor.metric, frechet_distance(drawn, self._statistics, warn=False), {}


def open_distance(config: TrainingConfig, data: Data, device: torch.device) -> InceptionDistance | None:
    """What FID needs, before the training begins; None where the run measures none, or FD-emoji."""
    return InceptionDistance(config, data, device) if config.fd_every >= 0 and config.fd_reference else None


def _batches(pipe: SiTPipeline, config: TrainingConfig, labels: Tensor, count: int | None) -> Iterator[Tensor]:
    """One picture a label, (B, 3, H, W) in [-1, 1]; a picture depends on its number and label alone."""
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
