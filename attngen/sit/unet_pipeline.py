"""UNetClassPipeline: pictures of chosen classes from diffusers' UNet2DConditionModel, as a diffusers pipeline.

The UNet works on pixels in [-1, 1] and is trained by flow matching (Lipman et al., ICLR 2023, arXiv 2210.02747): its
timestep is 1000 times the noise level, and it predicts noise − data. `train.sit --architecture unet` trains one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F

from attngen.sit.classes import (
    ClassPipeline,
    Generators,
    Label,
    check_callback_inputs,
    check_flow_scheduler,
    check_generator,
    check_guidance_scale,
    check_steps,
    names_by_number,
    run_callback,
    set_even_timesteps,
    takes,
    whole_number,
)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# The UNet's timestep where there is only noise.
NOISE = 1000


def class_condition(labels: Tensor, num_embeds: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a UNet is told of the classes.

    Args:
        labels: (B,) class numbers; `num_embeds` - 1 is the null class.
        num_embeds: classes and the null class.
        dtype: of the UNet.

    Returns:
        `class_labels` (B,), for the embedding that is added to the time's, and `encoder_hidden_states` (B, 1,
        num_embeds), a one-hot token, so that the projections of cross-attention are tables with a row a class.
    """
    return {"encoder_hidden_states": F.one_hot(labels, num_embeds).to(dtype).unsqueeze(1), "class_labels": labels}


class UNetClassPipeline(ClassPipeline):
    """Class-conditional pictures from a UNet, in pixel space.

    Args:
        unet (`UNet2DConditionModel`): with `num_class_embeds` and `cross_attention_dim` one more than there are
            classes; the last is the null class.
        scheduler (`FlowMatchEulerDiscreteScheduler`): or another flow-matching scheduler of diffusers.
        id2label (`dict[int, str]`, *optional*): names of the classes; several names of one class are separated by
            commas.

    Examples:

        >>> pipe = UNetClassPipeline.from_pretrained(folder)
        >>> attngen.apply(pipe, "agent")
        >>> pipe(["heart", 3], guidance_scale=2.0).images
    """

    model_cpu_offload_seq = "unet"

    unet: UNet2DConditionModel
    scheduler: Any

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.id2label = names_by_number(id2label)
        self.register_to_config(id2label=self.id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def num_classes(self) -> int:
        """Classes that can be drawn."""
        return self.unet.config["num_class_embeds"] - 1

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
        """Raise ValueError, with the way out, for what `__call__` cannot use."""
        check_steps(num_inference_steps)
        check_guidance_scale(guidance_scale)
        self._check_size("height", height)
        self._check_size("width", width)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
        check_flow_scheduler(self.scheduler, "a UNet that predicts noise - data")
        self._check_unet()
        check_callback_inputs(self, callback_on_step_end_tensor_inputs)

    def _check_size(self, name: str, size: int | None) -> None:
        unit = 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        if size is None or (whole_number(name, size) >= unit and size % unit == 0):
            return
        below = max(unit, size // unit * unit)
        nearest = f"{below} or {below + unit}" if size >= unit else f"{below}"
        raise ValueError(f"{name} must be a positive multiple of {unit} for this model, got {size}; try {nearest}")

    def _check_unet(self) -> None:
        embeds, tokens = self.unet.config["num_class_embeds"], self.unet.config["cross_attention_dim"]
        if embeds is None or embeds < 2 or tokens != embeds:
            raise ValueError(
                "the unet is not conditioned on classes: num_class_embeds and cross_attention_dim must both be the"
                f" number of classes and one for the null class, got {embeds} and {tokens}"
            )

    # Steps of a call

    def prepare_latents(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        device: torch.device,
        generator: Generators | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Noise to start from, or the given latents, on `device`, in float32 whatever the dtype of the network.

        Raises:
            ValueError: for latents of another shape.
        """
        trained = self.unet.config["sample_size"]
        rows, columns = (trained, trained) if isinstance(trained, int) else trained
        if latents is not None and latents.ndim == 4:
            rows, columns = latents.shape[2:]
        shape = batch_size, self.unet.config["in_channels"], height or rows, width or columns
        dtype = torch.promote_types(torch.float32, self.unet.dtype)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device=device, dtype=dtype)

    def _predict(self, latents: Tensor, timestep: Tensor, labels: Tensor, attention: dict[str, Any] | None) -> Tensor:
        """(B, C, H, W): noise − data, guided where asked for."""
        guided, sample = self.do_classifier_free_guidance, latents
        if guided:
            null = torch.full_like(labels, self.num_classes)
            sample, labels = torch.cat([latents, latents]), torch.cat([null, labels])
        clock = (timestep * (NOISE / self.scheduler.config.num_train_timesteps)).to(torch.float32)
        output = self.unet(
            sample.to(self.unet.dtype),
            clock.expand(len(sample)),
            **class_condition(labels, self.num_classes + 1, self.unet.dtype),
            cross_attention_kwargs=attention,
            return_dict=False,
        )[0].to(latents.dtype)
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _decode(self, sample: Tensor, output_type: str) -> Any:
        if not torch.isfinite(sample).all():
            raise FloatingPointError(
                "the result is not finite, so there is no picture: run the network in float32 (pipe.to(torch.float32)),"
                f" lower guidance_scale ({self.guidance_scale:g}), or check the weights"
            )
        if output_type == "latent":
            return sample.to(self.unet.dtype)
        return self.image_processor.postprocess(sample.float(), output_type=output_type)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture for each class label.

        Args:
            class_labels: numbers or names of classes (see `get_label_ids`), one a picture.
            height: of the pictures, in pixels; by default that of `latents` or the one trained on.
            width: likewise.
            num_inference_steps: steps of the scheduler.
            guidance_scale: s of unconditional + s (conditional − unconditional); guidance needs s > 1.
            generator: of all noise, one or one a picture. With one a picture a picture does not depend on the others
                of its batch.
            latents: (B, C, H, W) to start from instead of noise.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), both in [0, 1], or "latent", in [-1, 1].
            return_dict: return an `ImagePipelineOutput`, else a tuple.
            cross_attention_kwargs: passed to the attention processors.
            callback_on_step_end: called as (pipeline, index, timestep, kwargs) after every network call; may return
                {"latents": …} and set `_guidance_scale` and `_interrupt`.
            callback_on_step_end_tensor_inputs: what is in its kwargs: "latents".

        Returns:
            `.images`: a list of PIL images, an array or a tensor.

        Raises:
            ValueError: for an argument that cannot be used, before any work.
            FloatingPointError: if the result is not finite, before a picture is made.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        wanted = callback_on_step_end_tensor_inputs
        self.check_inputs(height, width, num_inference_steps, guidance_scale, output_type, wanted)
        numbers = self.get_label_ids(class_labels)
        check_generator(generator, len(numbers))
        device = self._execution_device
        sample = self.prepare_latents(len(numbers), height, width, device, generator, latents)
        labels = torch.tensor(numbers, device=device)
        self._guidance_scale, self._interrupt = guidance_scale, False
        set_even_timesteps(self.scheduler, num_inference_steps, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        noise_source: dict[str, Any] = {"generator": generator} if takes(self.scheduler.step, "generator") else {}

        try:
            with self.progress_bar(total=len(timesteps)) as progress_bar:  # pyright: ignore[reportCallIssue]
                for index, timestep in enumerate(timesteps):
                    if self.interrupt:
                        continue
                    output = self._predict(sample, timestep, labels, cross_attention_kwargs)
                    sample = self.scheduler.step(output, timestep, sample, **noise_source, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        sample = run_callback(callback_on_step_end, self, index, timestep, sample, wanted)
                    progress_bar.update()
            images = self._decode(sample, output_type)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
