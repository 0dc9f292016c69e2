"""What the pipelines that draw pictures of chosen classes share: labels by number or name, checks, callbacks."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

Label = int | str
Generators = torch.Generator | list[torch.Generator]


class ClassPipeline(DiffusionPipeline):
    """Base of pipelines that draw pictures of chosen classes.

    Attributes:
        id2label: names of the classes by number, or None; several names of one class are separated by commas.
    """

    _callback_tensor_inputs = ["latents"]

    id2label: dict[int, str] | None

    def __init__(self) -> None:
        super().__init__()
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def num_classes(self) -> int:
        """Classes that can be drawn."""
        raise NotImplementedError

    # What a callback reads and sets

    @property
    def guidance_scale(self) -> float:
        """Of the running call; read in every step, so a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the guidance scale asks for guidance."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Network calls of the running call (with guidance each of them on twice the batch)."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to leave out the rest of the steps."""
        return self._interrupt

    # Labels

    def get_label_ids(self, labels: Any) -> list[int]:
        """Class numbers of names and numbers.

        Args:
            labels: a number, a name, a tensor of numbers, or a list of these. A name may be the whole label or one of
                its comma-separated parts, in any case.

        Raises:
            ValueError: for a name or number that is no class, or a name of several classes.
        """
        found = [self._label_id(label) for label in _flatten(labels)]
        if not found:
            raise ValueError("class_labels is empty, so there is nothing to draw; give at least one class")
        return found

    def _label_id(self, label: Any) -> int:
        number = self._number_of(label) if isinstance(label, str) else whole_number("class_labels", label)
        count = self.num_classes
        if not 0 <= number < count:
            raise ValueError(f"class label {number} is out of range; the model's {count} classes are 0 to {count - 1}")
        return number

    def _number_of(self, name: str) -> int:
        if not self.id2label:
            raise ValueError(f"the pipeline has no names of classes, so {name!r} is unknown; give class numbers")
        wanted = _fold(name)
        whole = {number for number, label in self.id2label.items() if _fold(label) == wanted}
        parts = {n for n, label in self.id2label.items() if wanted in (_fold(part) for part in label.split(","))}
        found = sorted(whole or parts)
        if len(found) > 1:
            choices = ", ".join(f"{number} ({self.id2label[number]})" for number in found)
            raise ValueError(f"{name!r} names several classes: {choices}; give the number")
        if not found:
            raise ValueError(f"unknown class {name!r}; {_nearest(wanted, self.id2label)}")
        return found[0]


def names_by_number(id2label: Mapping[int, str] | Mapping[str, str] | None) -> dict[int, str] | None:
    """The names by number: JSON, where they are saved, turns the numbers into strings."""
    return None if id2label is None else {int(number): name for number, name in id2label.items()}


# Checks


def check_steps(num_inference_steps: Any) -> None:
    """Raise ValueError unless it is a number of steps."""
    if whole_number("num_inference_steps", num_inference_steps) < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")


def check_flow_scheduler(scheduler: Any, model: str, others: str = "") -> None:
    """Raise ValueError unless it is one of diffusers' flow-matching schedulers, without dynamic shifting.

    Args:
        scheduler: to check.
        model: what it is for, for the message.
        others: what else would fit, for the message.
    """
    name, config = type(scheduler).__name__, scheduler.config
    flows = config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
    if not (_is_flow_match(scheduler) or flows):
        raise ValueError(
            f"{name} does not fit {model}; use {others}a flow-matching scheduler such as"
            " FlowMatchEulerDiscreteScheduler"
        )
    if config.get("use_dynamic_shifting", False):
        raise ValueError(
            f"use_dynamic_shifting of {name} is not for {model}; make the scheduler with use_dynamic_shifting=False"
        )


def set_even_timesteps(scheduler: Any, num_inference_steps: int, device: torch.device) -> None:
    """Lay out a scheduler's timesteps; a flow-matching one's evenly from noise to data.

    diffusers' own grid ends at 1/1000 and jumps to 0.
    """
    grid = {}
    if _is_flow_match(scheduler) and takes(scheduler.set_timesteps, "sigmas"):
        grid = {"sigmas": np.linspace(1, 0, num_inference_steps + 1)[:-1]}
    scheduler.set_timesteps(num_inference_steps, device=device, **grid)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def check_guidance_scale(scale: Any) -> None:
    """Raise ValueError unless guidance can have this scale."""
    if not is_number(scale) or not math.isfinite(scale) or scale < 0:
        raise ValueError(f"guidance_scale must be a finite number of at least 0 (1 is none), got {scale!r}")


def check_callback_inputs(pipe: ClassPipeline, names: Sequence[str] | None) -> None:
    """Raise ValueError unless a callback can be given these."""
    unknown = set(names or ()) - set(pipe._callback_tensor_inputs)
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs may name {pipe._callback_tensor_inputs}, got {sorted(unknown)}"
        )


def check_generator(generator: Any, batch_size: int) -> None:
    """Raise ValueError unless it is None, a generator, or one a picture."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch_size:
            raise ValueError(f"{batch_size} pictures need {batch_size} generators, got a list of {len(generator)}")
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")


def run_callback(
    callback: Callable[..., Any],
    pipe: ClassPipeline,
    index: int,
    timestep: Tensor,
    latents: Tensor,
    wanted: Sequence[str] | None,
) -> Tensor:
    """Call a `callback_on_step_end`; the latents to go on with."""
    returned = callback(pipe, index, timestep, {"latents": latents} if "latents" in (wanted or ()) else {})
    return (returned or {}).get("latents", latents).to(latents)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, True and False not counted."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, True and False not counted."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def whole_number(name: str, value: Any) -> int:
    """The value as int; ValueError with the argument's name unless it is a whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def _flatten(labels: Any) -> list[Any]:
    """Numbers and names out of nested lists, tensors and arrays."""
    if isinstance(labels, (Tensor, np.ndarray)):
        return labels.reshape(-1).tolist()
    if isinstance(labels, Iterable) and not isinstance(labels, (str, Mapping)):
        return [label for item in labels for label in _flatten(item)]
    return [labels]


def _fold(name: str) -> str:
    return name.strip().casefold()


def _nearest(wanted: str, id2label: Mapping[int, str]) -> str:
    """Names like the wanted one, for a message; all of them where they are few."""
    names = [label.split(",")[0].strip() for label in id2label.values()]
    every_name = {_fold(part): part.strip() for label in id2label.values() for part in label.split(",")}
    near = [every_name[name] for name in difflib.get_close_matches(wanted, every_name, n=3)]
    if len(names) <= 20:
        return ("nearest: " + ", ".join(near) + "; " if near else "") + "known: " + ", ".join(names)
    return f"nearest: {', '.join(near)}" if near else f"known are {len(names)} classes, such as {', '.join(names[:5])}"


def _is_flow_match(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch")


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters
