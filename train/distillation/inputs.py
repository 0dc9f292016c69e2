"""What a denoiser is called with while it is distilled: calls of its own sampling, or noised data.

A call is a function of the seed and its number, so a run that was stopped and resumed sees the same ones.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attngen.hosts.families import family_of, slots
from attngen.sit.unet_pipeline import NOISE, UNetClassPipeline, class_condition
from pipelines.cli.seeds import generator_for, sample_order

DROPPED = 0.1
"""Share of conditions replaced by the empty one in noised data, which guidance asks for too."""

# For text models without a file of prompts; plain words for what such models are mostly asked.
PROMPTS = (
    "a photograph of a mountain lake in the morning",
    "portrait of an old fisherman, natural light",
    "a red bicycle leaning on a brick wall",
    "an oil painting of a storm at sea",
    "a bowl of ramen on a wooden table, close up",
    "a city street at night in the rain",
    "a cat asleep on a window sill",
    "the interior of a bright modern kitchen",
    "a watercolour of wild flowers",
    "an astronaut walking through a desert",
    "a steam locomotive crossing a viaduct",
    "a logo of a fox, flat colours",
)


class Call(NamedTuple):
    """The arguments of one call of a denoiser."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Enough(Exception):
    """Ends a pipeline when the call that was wanted has been recorded."""


@dataclass(frozen=True)
class Drawing:
    """How a pipeline is asked to draw.

    Attributes:
        pipe: the pipeline.
        model: its denoiser.
        choices: texts to draw from, or class numbers for a pipeline that takes labels; all classes if None.
        batch_size: pictures at a time.
        seed: of conditions and noise.
        steps: sampling steps.
        guidance_scale: None for the pipeline's default.
        size: (height, width) in pixels, None for the pipeline's default.
    """

    pipe: Any
    model: nn.Module
    choices: Sequence[Any] | None
    batch_size: int
    seed: int
    steps: int = 20
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None

    @property
    def takes_text(self) -> bool:
        return "prompt" in inspect.signature(self.pipe.__call__).parameters

    @property
    def num_classes(self) -> int:
        """Classes of a pipeline that takes labels; its null class has this number."""
        if isinstance(self.pipe, UNetClassPipeline):
            return self.pipe.num_classes
        config: Any = self.model.config
        return config.get("num_classes") or config.get("num_embeds_ada_norm")

    def conditions(self, *key: Any) -> list[Any]:
        """Prompts or class numbers for a batch, drawn by a key."""
        choices = range(self.num_classes) if self.choices is None else self.choices
        drawn = torch.randint(len(choices), (self.batch_size,), generator=generator_for(self.seed, "conditions", *key))
        return [choices[i] for i in drawn.tolist()]

    def record(self, conditions: Sequence[Any], *key: Any, most: int | None = None, **options: Any) -> list[Call]:
        """The calls that the pipeline makes to draw a batch, or the first `most` of them."""
        calls: list[Call] = []
        sample = slots(self.model)[_family(self.model).sample]

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            latents = sample.get(args, kwargs).detach().clone()
            calls.append(Call(*sample.put(args, kwargs, latents)))
            if len(calls) == most:
                raise _Enough

        settings: dict[str, Any] = {
            "num_inference_steps": self.steps,
            "generator": generator_for(self.seed, "noise", *key),
            "output_type": "latent",
            **({} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}),
            **({} if self.size is None else {"height": self.size[0], "width": self.size[1]}),
            **options,
        }
        settings["prompt" if self.takes_text else "class_labels"] = list(conditions)
        known = inspect.signature(self.pipe.__call__).parameters
        handle = self.model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        try:
            with torch.no_grad():
                self.pipe(**{name: value for name, value in settings.items() if name in known})
        except _Enough:
            pass
        finally:
            handle.remove()
        return calls


class Inputs(ABC):
    """An endless sequence of calls, and a few others to measure with."""

    @abstractmethod
    def call(self, number: int) -> Call:
        """The call of a number, for training."""

    @abstractmethod
    def held_out(self, count: int) -> list[Call]:
        """Calls that training does not see."""


class OwnTrajectories(Inputs):
    """Calls that the model's own sampling makes: guidance, prompts and all. Needs no data.

    Args:
        drawing: how to draw.
        exactly: draws with the model's own attention: a context manager that holds while a trajectory is drawn.
    """

    def __init__(self, drawing: Drawing, exactly: Callable[[], Any]) -> None:
        self.drawing, self.exactly = drawing, exactly
        self._last: tuple[int, list[Call]] | None = None
        self._length = 0

    def call(self, number: int) -> Call:
        if not self._length:
            self._length = len(self._trajectory(0))
        trajectory, index = divmod(number, self._length)
        order = torch.randperm(self._length, generator=generator_for(self.drawing.seed, "order", trajectory))
        return self._trajectory(trajectory)[int(order[index])]

    def held_out(self, count: int) -> list[Call]:
        calls = self._draw("held out")
        chosen = torch.linspace(0, len(calls) - 1, min(count, len(calls))).round().int().tolist()
        return [calls[i] for i in chosen]

    def _trajectory(self, number: int) -> list[Call]:
        if self._last is None or self._last[0] != number:
            self._last = number, self._draw(number)
        return self._last[1]

    def _draw(self, key: Any) -> list[Call]:
        with self.exactly():
            return self.drawing.record(self.drawing.conditions(key), key)


class NoisedData(Inputs):
    """Pictures or latents at random times.

    Args:
        drawing: how the pipeline is called.
        data: what `train.data.open.open_data` opened.
        labels: label in the data -> the model's class number, for a pipeline that takes labels.

    Raises:
        ValueError: if the data do not have the model's number of channels.
    """

    def __init__(self, drawing: Drawing, data: Any, labels: Mapping[int, int]) -> None:
        self.drawing, self.data, self.labels = drawing, data, labels
        config: Any = drawing.model.config
        if data.channels != config["in_channels"]:
            raise ValueError(
                f"the data has {data.channels} channels and the model {config['in_channels']}; latents for it are made"
                " by train.encode with its autoencoder"
            )
        self.noising = _noising(drawing)

    def call(self, number: int) -> Call:
        return self._call("train", number)

    def held_out(self, count: int) -> list[Call]:
        return [self._call("held out", number) for number in range(count)]

    def _call(self, *key: Any) -> Call:
        drawing, batch_size = self.drawing, self.drawing.batch_size
        generator = generator_for(drawing.seed, "noised", *key)
        order = drawing.seed if key[0] == "train" else drawing.seed + 1
        indices = sample_order(order, torch.ones(len(self.data)), key[1] * batch_size, batch_size)
        clean, labels = self.data.batch(indices, generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy, times = self.noising(clean, noise, generator)
        drop = torch.rand(len(clean), generator=generator) < DROPPED
        conditions = drawing.conditions(*key) if drawing.takes_text else [self.labels[i] for i in labels.tolist()]
        if drawing.takes_text:
            conditions = ["" if dropped else text for text, dropped in zip(conditions, drop.tolist(), strict=True)]
        (template,) = drawing.record(conditions, *key, most=1, num_inference_steps=1, guidance_scale=1.0)
        return self._filled(template, noisy, times, drop)

    def _filled(self, template: Call, noisy: Tensor, times: Tensor, drop: Tensor) -> Call:
        """A call that the pipeline made, with other latents and times; null classes where labels are dropped."""
        model, family = self.drawing.model, _family(self.drawing.model)
        sample = slots(model)[family.sample]
        before = sample.get(*template)
        if before.shape != noisy.shape:
            raise ValueError(
                f"the pipeline draws {tuple(before.shape[1:])} and the data are {tuple(noisy.shape[1:])}; set --size"
            )
        call = Call(*sample.put(*template, noisy.to(before)))
        call = Call(*slots(model)[family.time].put(*call, times.to(before.device)))
        if not self.drawing.takes_text:
            place = slots(model)["class_labels"]
            labels = place.get(*call)
            labels = labels.masked_fill(drop.to(labels.device), self.drawing.num_classes)
            call = Call(*place.put(*call, labels))
            if isinstance(self.drawing.pipe, UNetClassPipeline):
                condition = class_condition(labels, self.drawing.num_classes + 1, before.dtype)
                call = Call(call.args, {**call.kwargs, **condition})
        return call


def _noising(drawing: Drawing) -> Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]:
    """(clean, noise, generator) -> noisy samples and their times, as the model was trained to see them."""
    scheduler: Any = drawing.pipe.scheduler
    config: Any = scheduler.config
    if hasattr(drawing.model, "token_grid"):  # SiT's class
        from train.recipe.objectives import make_objective

        model_config: Any = drawing.model.config
        if model_config["predicts_variance"]:
            objective = make_objective("dit")
        else:
            objective = make_objective(config.get("prediction_type", "velocity"), path=config.get("path", "linear"))

        def interpolate(clean: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            times = objective.draw_times(len(clean), generator)
            return objective.add_noise(clean, noise, times), times

        return interpolate

    if isinstance(drawing.pipe, UNetClassPipeline):

        def mix(clean: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            levels = torch.rand(len(clean), generator=generator)
            by_picture = levels.view(-1, 1, 1, 1)
            return (1 - by_picture) * clean + by_picture * noise, NOISE * levels

        return mix

    if "beta_schedule" not in config:
        raise ValueError(f"noise of {type(scheduler).__name__} cannot be added to data; use --data self")
    from diffusers import DDPMScheduler

    diffusion = DDPMScheduler.from_config(config)

    def diffuse(clean: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        steps = torch.randint(int(config["num_train_timesteps"]), (len(clean),), generator=generator)
        return diffusion.add_noise(clean, noise, steps), steps  # type: ignore[arg-type]

    return diffuse


def open_inputs(spec: str, drawing: Drawing, exactly: Callable[[], Any]) -> Inputs:
    """The inputs that a text names: "self", or data as `train.data.open.open_data` takes them.

    Raises:
        ValueError: if the data cannot be used for the model.
    """
    if spec == "self":
        return OwnTrajectories(drawing, exactly)
    from train.data.latents import read_index
    from train.data.open import is_encoded, open_data

    config: Any = drawing.model.config
    if is_encoded(spec):
        from pathlib import Path

        side = read_index(Path(spec))["image_size"]
    elif getattr(drawing.pipe, "vae", None) is not None:
        raise ValueError(f"{spec} are images and the model draws latents; encode them first with train.encode")
    else:
        side = config["sample_size"]
    names = getattr(drawing.pipe, "id2label", None)
    known = {} if not names else {label: int(number) for number, label in names.items()}
    data = open_data(spec, image_size=side, classes=tuple(known) if spec == "emoji" else ())
    return NoisedData(drawing, data, {} if drawing.takes_text else _labels(data, known, drawing.num_classes))


def _labels(data: Any, known: Mapping[str, int], num_classes: int) -> dict[int, int]:
    """Label in the data -> class of the model: by name, or by number where all names are missing in the model."""
    named = {number: known[name] for number, name in data.id2label.items() if name in known}
    if len(named) == len(data.id2label):
        return named
    if not named and data.num_classes == num_classes:
        return {number: number for number in data.id2label}
    missing = next(name for name in data.id2label.values() if name not in known)
    raise ValueError(f"class {missing!r} of the data is unknown to the model; it has {', '.join(known) or num_classes}")


def _family(model: nn.Module) -> Any:
    family = family_of(model)
    assert family is not None
    return family


def latents_of(model: nn.Module, call: Call) -> Tensor:
    """What a call gives the denoiser to denoise."""
    return slots(model)[_family(model).sample].get(*call)
