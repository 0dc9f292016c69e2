"""A trained pipeline of classes as a denoising loop that is timed: the same noise every time, a copy of its model."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

GUIDANCE = 2.0


def load(options: argparse.Namespace) -> Any:
    """The pipeline of `options.pipeline`, on its device and in its dtype."""
    import torch
    from diffusers import DiffusionPipeline

    import attngen

    classes = {"UNetClassPipeline": attngen.UNetClassPipeline, "SiTPipeline": attngen.SiTPipeline}
    config: Any = DiffusionPipeline.load_config(options.pipeline)
    name = config["_class_name"]
    if name not in classes:
        raise ValueError(f"{options.pipeline} is a {name}; known: {', '.join(classes)}")
    pipe = classes[name].from_pretrained(options.pipeline, dtype=getattr(torch, options.dtype)).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Drawing:
    """One drawing of a pipeline, from the same noise every time.

    Attributes:
        pipe: a copy with a model of its own.
        target: what a method is applied to: the pipeline.
        model: the denoiser.
        call: arguments of the pipeline; may be changed.
        last: latents of the last drawing.
    """

    def __init__(self, options: argparse.Namespace, pipe: Any) -> None:
        self.pipe = self.target = copy.copy(pipe)
        self.name = "unet" if hasattr(pipe, "unet") else "transformer"
        self.model = copy.deepcopy(getattr(pipe, self.name))
        self.pipe.register_modules(**{self.name: self.model, "scheduler": copy.deepcopy(pipe.scheduler)})
        self.scheduler = self.pipe.scheduler
        self.kind = "unet" if self.name == "unet" else "sit"
        self.guided, self.steps, self.step = options.guidance, options.steps, 0
        self.last: Any = None
        self.time, self.device_time, self.gives_device_time = 1000.0, None, True
        self.resets: list[Callable[[], Any]] = []
        self.each_step: list[Callable[[int], Any]] = []
        self.call: dict[str, Any] = {
            "class_labels": [int(label) if label.isdigit() else label for label in options.labels],
            "num_inference_steps": options.steps,
            "guidance_scale": GUIDANCE if options.guidance else 1.0,
            "height": options.size,
            "width": options.size,
        }
        self.model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        value = float(timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep)
        self.time, self.device_time = value if self.kind == "unet" else 1000 * (1 - value), timestep
        for act in self.each_step:
            act(self.step)
        self.step += 1

    def __call__(self) -> Any:
        import torch
        from diffusers.models.cache_utils import CacheMixin

        for reset in self.resets:
            reset()
        self.step, self.time = 0, 1000.0
        generator = torch.Generator().manual_seed(0)
        with CacheMixin.cache_context(self.model, "loop"):
            self.last = self.pipe(**self.call, generator=generator, output_type="latent").images
        return self.last
