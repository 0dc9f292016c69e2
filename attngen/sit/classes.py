"""What `SiTPipeline` and `UNetClassPipeline` share: labels by number or name, checks, noise, the denoising loop."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from attngen.checks import check_choice, check_count, check_number, plain_number
from attngen.sit.scheduler import InterpolantScheduler

Label = int | str
Generators = torch.Generator | list[torch.Generator]
OutputType = Literal["pil", "np", "pt", "latent"]
Callback = Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks


class NetworkCall(NamedTuple):
    """One evaluation of the network."""

    index: int  # into the scheduler's timesteps
    timestep: float  # the scheduler's
    level: float  # of the noise: 1 is noise, 0 is data


class ClassPipeline(DiffusionPipeline):
    """Base of pipelines that generate images of chosen classes.

    Attributes:
        id2label: names of the classes by number, or None; several names of one class are separated by commas.
    """

    _callback_tensor_inputs = ["latents"]

    scheduler: Any
    id2label: dict[int, str] | None

    def __init__(self, id2label: Mapping[int, str] | Mapping[str, str] | None, **modules: Any) -> None:
        super().__init__()
        self.register_modules(**modules)
        # JSON, where the names are saved, turns the numbers into strings.
        self.id2label = None if id2label is None else {int(number): name for number, name in id2label.items()}
        self.register_to_config(id2label=self.id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self._scale)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self._current_timestep: float | None = None

    # What differs between the pipelines

    @property
    def num_classes(self) -> int:
        """Classes that can be generated."""
        raise NotImplementedError

    @property
    def _network(self) -> Any:
        raise NotImplementedError

    @property
    def _scale(self) -> int:
        """Pixels a side of a latent pixel."""
        return 1

    @property
    def _size_unit(self) -> int:
        """Heights and widths in pixels are multiples of this."""
        raise NotImplementedError

    def _check_components(self, output_type: str) -> None:
        """Raise ValueError unless network, scheduler and output fit each other."""
        raise NotImplementedError

    def _to_pixels(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], float32."""
        return latents.float()

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
    def current_timestep(self) -> float | None:
        """On diffusers' clock, 1000 is noise and 0 is data, as its attention caches need it."""
        return self._current_timestep

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
            raise ValueError("class_labels is empty; give at least one class")
        return found

    def _label_id(self, label: Any) -> int:
        number = self._number_of(label) if isinstance(label, str) else plain_number(label)
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"class_labels must be whole numbers or names, got {label!r}")
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

    # Checks, all before any work

    def check_inputs(
        self,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str] | None,
    ) -> None:
        """Raise ValueError, with the way out, for arguments and components that `__call__` cannot use."""
        check_count("num_inference_steps", plain_number(num_inference_steps))
        check_number("guidance_scale", plain_number(guidance_scale))
        self._check_size("height", height)
        self._check_size("width", width)
        check_choice("output_type", output_type, get_args(OutputType))
        known = self._callback_tensor_inputs
        if unknown := set(callback_on_step_end_tensor_inputs or ()) - set(known):
            raise ValueError(f"callback_on_step_end_tensor_inputs may name {known}, got {sorted(unknown)}")
        self._check_components(output_type)

    def _check_size(self, name: str, size: int | None) -> None:
        unit, size = self._size_unit, plain_number(size)
        if size is None or (isinstance(size, int) and size >= unit and size % unit == 0):
            return
        if not isinstance(size, int):
            check_count(name, size)
        below = max(unit, size // unit * unit)
        nearest = f"{below} or {below + unit}" if size >= unit else f"{below}"
        raise ValueError(f"{name} must be a positive multiple of {unit} for this model, got {size}; try {nearest}")

    # Steps of a call

    def _begin(
        self,
        class_labels: Any,
        height: int | None,
        width: int | None,
        guidance_scale: float,
        generator: Generators | None,
        latents: Tensor | None,
    ) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Class numbers (B,) and the shape of the latents; the last checks."""
        numbers = self.get_label_ids(class_labels)
        if isinstance(generator, (list, tuple)):
            if len(generator) != len(numbers):
                raise ValueError(
                    f"{len(numbers)} images need {len(numbers)} generators, got a list of {len(generator)}"
                )
        elif generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")
        shape = self._latent_shape(len(numbers), height, width, latents)
        self._guidance_scale, self._interrupt = guidance_scale, False
        return torch.tensor(numbers, device=self._execution_device), shape

    def prepare_latents(
        self, shape: Sequence[int], device: torch.device, generator: Generators | None, latents: Tensor | None
    ) -> Tensor:
        """Noise of the shape (B, C, h, w), or the given latents, on `device`.

        The sampler runs in float32 (or float64, if the network does) whatever the network's dtype, because rounding
        errors of hundreds of small steps in half precision add up. With a generator for each image an image is the same
        in any batch.
        """
        dtype = torch.promote_types(torch.float32, self._network.dtype)
        if latents is not None:
            return latents.to(device=device, dtype=dtype)
        return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)

    def _latent_shape(
        self, batch_size: int, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, int, int, int]:
        """(B, C, h, w): of the height and width in pixels, else of the given latents, else of the training."""
        config = self._network.config
        if latents is None:
            trained = config["sample_size"]
            rows, columns = (trained, trained) if isinstance(trained, int) else trained
        elif latents.ndim == 4:
            rows, columns = latents.shape[2:]
            self._check_size("height (of the latents, in pixels)", rows * self._scale)
            self._check_size("width (of the latents, in pixels)", columns * self._scale)
        else:
            raise ValueError(f"latents must have 4 axes (B, C, h, w), got shape {tuple(latents.shape)}")
        rows = rows if height is None else height // self._scale
        columns = columns if width is None else width // self._scale
        shape = batch_size, config["in_channels"], rows, columns
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return shape

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> list[NetworkCall]:
        """Lay out the scheduler's timesteps, a flow-matching one's evenly from noise to data."""
        scheduler, grid = self.scheduler, {}
        if _is_flow_match(scheduler) and takes(scheduler.set_timesteps, "sigmas"):
            # The scheduler's own grid ends at 1/1000 and jumps to 0.
            grid = {"sigmas": np.linspace(1, 0, num_inference_steps + 1)[:-1]}
        scheduler.set_timesteps(num_inference_steps, device=device, **grid)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        is_ours, most = isinstance(scheduler, InterpolantScheduler), scheduler.config.num_train_timesteps
        steps = scheduler.timesteps.tolist()
        self._num_timesteps = len(steps)
        return [NetworkCall(i, step, 1 - step if is_ours else step / most) for i, step in enumerate(steps)]

    def _guided(self, output: Tensor) -> Tensor:
        """(2 · B, …) predictions, without and with the classes -> (B, …)."""
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _denoise(
        self,
        latents: Tensor,
        calls: Sequence[NetworkCall],
        predict: Callable[[Tensor, NetworkCall], Tensor],
        after_call: Callable[[Tensor, NetworkCall], None] | None = None,
        *,
        generator: Generators | None,
        output_type: str,
        callback: Callback | None,
        tensor_inputs: Sequence[str] | None,
    ) -> Any:
        """Run the scheduler over the calls, and decode; `predict` gives the scheduler's model output."""
        noise_source: dict[str, Any] = {"generator": generator} if takes(self.scheduler.step, "generator") else {}
        pipe: Any = self  # diffusers' progress_bar has a wrapper that pyright cannot bind
        try:
            with pipe.progress_bar(total=len(calls)) as progress_bar:
                for call in calls:
                    if self.interrupt:
                        continue
                    self._current_timestep = 1000 * call.level
                    timestep, output = self.scheduler.timesteps[call.index], predict(latents, call)
                    latents = self.scheduler.step(output, timestep, latents, **noise_source, return_dict=False)[0]
                    if callback is not None:
                        tensors = {"latents": latents} if "latents" in (tensor_inputs or ()) else {}
                        returned: Any = callback(pipe, call.index, timestep, tensors)
                        latents = (returned or {}).get("latents", latents).to(latents)
                    if after_call is not None:
                        after_call(latents, call)
                    progress_bar.update()
            return self._decode(latents, output_type)
        finally:
            self._current_timestep = None
            # After a failure too: caches must not carry features of one image into the next.
            self.maybe_free_model_hooks()

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents -> images of the wanted type; FloatingPointError if they are not finite."""
        if not torch.isfinite(latents).all():
            raise FloatingPointError(
                "the latents are not finite: run the network in float32 (pipe.to(torch.float32)), lower guidance_scale"
                f" ({self.guidance_scale:g}), or check the weights"
            )
        if output_type == "latent":
            return latents.to(self._network.dtype)
        return self.image_processor.postprocess(self._to_pixels(latents), output_type=output_type)


def tensor_inputs_of(callback: Callback | None, given: Sequence[str] | None) -> Sequence[str] | None:
    """The names of the tensors for a callback: its own where it is one of diffusers' callback objects."""
    return callback.tensor_inputs if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)) else given


def check_flow_scheduler(scheduler: Any, model: str, others: str = "") -> None:
    """Raise ValueError unless it is one of diffusers' flow-matching schedulers, without dynamic shifting.

    Args:
        scheduler: to check.
        model: which it is for, for the message.
        others: schedulers that fit as well, for the message.
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
            f"use_dynamic_shifting of {name} does not fit {model}; make the scheduler with use_dynamic_shifting=False"
        )


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters


def _is_flow_match(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch")


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
