"""Loading what draws a set of pictures, and calling it: models of classes and of texts, behind one call."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import cli
from pipelines.engine.loading import LoadOptions, draws_classes, load_pipeline
from pipelines.engine.runs import resolve
from pipelines.engine.shipped import DEFAULT_MODEL, shipped_models
from train.sampling.subjects import Subject

# Pictures in a call on a CPU: rows of a matrix product round alike for any of these, and more are no faster.
CLASS_GROUP, CLASS_GROUP_GPU = 16, 64
TEXT_GROUP, TEXT_GROUP_GPU = 1, 4


class Sampler:
    """A pipeline with its attention and sampler set, which draws groups of pictures.

    Attributes:
        pipe: the diffusers pipeline.
        name: of the model, as it may be published.
        hash: of its weights, or None for a model of the hub.
        draws_classes: whether it draws class labels, not texts.
        id2label: names of the classes.
        arguments: of every call of the pipeline, beside what to draw.
        device: where it draws.
    """

    def __init__(self, options: argparse.Namespace, device: Any) -> None:
        """Load the model.

        Args:
            options: of the command line.
            device: where to draw.

        Raises:
            UserError: if there is no such model, or it does not take an option.
            OSError: if it cannot be loaded.
        """
        from pipelines.cli.provenance import model_hash

        source = find_model(options.model)
        self.pipe = load(source, options, device)
        self.name = cli.public_name(options.model) if options.model else "emoji (shipped)"
        self.hash = model_hash(source)
        self.draws_classes = draws_classes(self.pipe)
        self.id2label = class_names(self.pipe)
        self.pipe.set_progress_bar_config(disable=True)
        self.arguments = call_arguments(self.pipe, options, self.draws_classes)
        self.device = device

    @property
    def dtype(self) -> Any:
        """Number format of the network."""
        return (getattr(self.pipe, "transformer", None) or self.pipe.unet).dtype

    @property
    def num_classes(self) -> int:
        """Number of classes.

        Raises:
            UserError: if the model does not tell.
        """
        network = getattr(self.pipe, "transformer", None) or getattr(self.pipe, "unet", None)
        config: Mapping[str, Any] = getattr(network, "config", {})
        found = len(self.id2label) or config.get("num_classes") or config.get("num_embeds_ada_norm")
        if not found:
            raise cli.UserError(f"{self.name} has no number of classes; give labels by a file")
        return int(found)

    def find_label(self, text: str) -> int:
        """Number of a class from its name or number.

        Raises:
            UserError: if there is no such class.
        """
        names = {part.strip().casefold(): n for n, name in self.id2label.items() for part in (name, *name.split(","))}
        if text.casefold() in names:
            return names[text.casefold()]
        if text.isdigit() and int(text) < self.num_classes:
            return int(text)
        known = ", ".join(name.split(",")[0] for name in list(self.id2label.values())[:20])
        raise cli.UserError(
            f"{text!r} is not a class of {self.name}; expected 0 to {self.num_classes - 1}"
            + (f" or a name ({known}{' …' if len(self.id2label) > 20 else ''})" if known else "")
        )

    def draw(self, subjects: Sequence[Subject], seeds: Sequence[int]) -> Any:
        """Pictures of one group.

        Args:
            subjects: what to draw.
            seeds: one a picture.

        Returns:
            uint8 (B, H, W, 3).

        Raises:
            UserError: for arguments that the pipeline refuses.
            FloatingPointError: if a picture is not finite, with its place in the group as the second argument.
        """
        import numpy as np
        import torch

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            called = self.pipe(
                **self._subject_arguments(subjects), generator=generators, output_type="np", **self.arguments
            )
        except ValueError as error:
            raise cli.UserError(cli.first_line(error)) from error
        images = np.asarray(called.images)
        finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
        if not finite.all():
            raise FloatingPointError("an image is not finite", int(np.flatnonzero(~finite)[0]))
        levels = (images * 255).round().clip(0, 255).astype(np.uint8)
        return np.repeat(levels, 3, axis=3) if levels.shape[3] == 1 else levels

    def _subject_arguments(self, subjects: Sequence[Subject]) -> dict[str, Any]:
        if self.draws_classes:
            return {"class_labels": [subject.label for subject in subjects]}
        found: dict[str, Any] = {"prompt": [subject.prompt for subject in subjects]}
        if any(subject.negative_prompt for subject in subjects):
            found["negative_prompt"] = [subject.negative_prompt or "" for subject in subjects]
        return found


def find_model(name: str | None) -> str:
    """A pipeline folder, the checkpoint of a training run, a file or a hub id.

    Raises:
        UserError: if it names a checkpoint that the run does not have.
    """
    return os.fspath(shipped_models()[DEFAULT_MODEL]) if name is None else resolve(name)


def load(source: str, options: argparse.Namespace, device: Any) -> Any:
    """The pipeline on its device, with the scheduler and the attention that the command line names."""
    from pipelines.engine.draw import apply_method
    from pipelines.samplers import choose_scheduler

    pipe = load_pipeline(source, LoadOptions.of(options), device)
    pipe.scheduler = choose_scheduler(pipe, options)
    if options.method:
        apply_method(pipe, options.method)
    return pipe


def call_arguments(pipe: Any, options: argparse.Namespace, draws_classes: bool) -> dict[str, Any]:
    """What of the command line goes to the pipeline; what was not given is left to it.

    Raises:
        UserError: for something that the pipeline does not take.
    """
    from pipelines.methods.counts import check_mediators

    steps, scale = (25, 1.0) if draws_classes else (None, None)
    given = {
        "num_inference_steps": options.steps or steps,
        "guidance_scale": scale if options.guidance_scale is None else options.guidance_scale,
        "guidance_channels": options.guidance_channels,
        "guidance_interval": options.guidance_interval,
        "num_mediators": make_mediators(options.mediators),
        "height": options.height,
        "width": options.width,
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    taken = inspect.signature(pipe.__call__).parameters
    for name in arguments:
        if name not in taken:
            raise cli.UserError(f"{type(pipe).__name__} takes no {name}; leave it out")
    check_mediators(pipe, arguments.get("num_mediators"), options.height, options.width)
    return arguments


def make_mediators(text: str | None) -> Any:
    """Mediators of "16", "1:4,0.5:16" (by time) or "change:4,16,25:0.8,0.5" (by change of the latents).

    Raises:
        UserError: if it is none of these.
    """
    from attngen.schedule import ChangeSchedule
    from pipelines.methods.counts import make_mediators as make_schedule

    if text is None:
        return None
    try:
        if not text.startswith("change:"):
            return make_schedule(text)
        counts, *ratios = text.removeprefix("change:").split(":")
        values = [int(part) for part in counts.split(",")]
        if not ratios:
            return ChangeSchedule(values=values)
        return ChangeSchedule(values=values, ratios=[float(part) for part in ratios[0].split(",")])
    except (ValueError, cli.UserError) as error:
        raise cli.UserError(f"--mediators {text!r}: {error}") from error


def class_names(pipe: Any) -> dict[int, str]:
    """Names of a pipeline's classes by number; empty where it has none."""
    names = getattr(pipe, "id2label", None) or getattr(pipe.config, "id2label", None)
    if not names:  # diffusers' DiTPipeline has the numbers of names
        numbers: Mapping[str, int] = getattr(pipe, "labels", None) or {}
        names = {number: ", ".join(name for name in numbers if numbers[name] == number) for number in numbers.values()}
    return {int(number): str(names[number]) for number in sorted(names, key=int)}


def default_group(sampler: Sampler, options: argparse.Namespace) -> int:
    """Pictures in one call of the network unless the command line says otherwise."""
    if options.mediators and options.mediators.startswith("change:"):
        return 1  # the schedule looks at the whole batch
    on_cpu = sampler.device.type == "cpu"
    if sampler.draws_classes:
        return CLASS_GROUP if on_cpu else CLASS_GROUP_GPU
    return TEXT_GROUP if on_cpu else TEXT_GROUP_GPU
