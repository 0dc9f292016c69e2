"""UNetClassPipeline: images of chosen classes from diffusers' UNet2DConditionModel, as a diffusers pipeline.

The UNet works on pixels in [-1, 1] and is trained by flow matching (Lipman et al., ICLR 2023, arXiv 2210.02747): its
timestep is 1000 times the noise level, and it predicts noise − data. `train.sit --architecture unet` trains one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from attngen.sit.classes import (
    Callback,
    ClassPipeline,
    Label,
    NetworkCall,
    OutputType,
    check_flow_scheduler,
    tensor_inputs_of,
)

# The UNet's timestep where there is only noise.
NOISE = 1000


def class_condition(labels: Tensor, num_embeds: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The condition of a UNet on classes.

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
    """Class-conditional images from a UNet, in pixel space.

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

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__(id2label, unet=unet, scheduler=scheduler)

    @property
    def num_classes(self) -> int:
        """Classes that can be generated."""
        return self.unet.config["num_class_embeds"] - 1

    @property
    def _network(self) -> UNet2DConditionModel:
        return self.unet

    @property
    def _size_unit(self) -> int:
        return 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    def _check_components(self, output_type: str) -> None:
        check_flow_scheduler(self.scheduler, "a UNet that predicts noise - data")
        embeds, tokens = self.unet.config["num_class_embeds"], self.unet.config["cross_attention_dim"]
        if embeds is None or embeds < 2 or tokens != embeds:
            raise ValueError(
                "the unet is not conditioned on classes: num_class_embeds and cross_attention_dim must both be the"
                f" number of classes and one for the null class, got {embeds} and {tokens}"
            )

    def _predict(self, latents: Tensor, call: NetworkCall, labels: Tensor, attention: dict[str, Any] | None) -> Tensor:
        """(B, C, H, W): noise − data, guided if the guidance scale asks for it."""
        guided, sample = self.do_classifier_free_guidance, latents
        if guided:
            null = torch.full_like(labels, self.num_classes)
            sample, labels = torch.cat([latents, latents]), torch.cat([null, labels])
        output = self.unet(
            sample.to(self.unet.dtype),
            torch.full((len(sample),), NOISE * call.level, dtype=torch.float32, device=sample.device),
            **class_condition(labels, self.num_classes + 1, self.unet.dtype),
            cross_attention_kwargs=attention,
            return_dict=False,
        )[0].to(latents.dtype)
        return self._guided(output) if guided else output

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
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image for each class label.

        Arguments, result and errors are those of `SiTPipeline`; in addition `cross_attention_kwargs` is passed to the
        attention processors. `latents` are pixels (B, C, H, W), in the end in [-1, 1].
        """
        tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(height, width, num_inference_steps, guidance_scale, output_type, tensor_inputs)
        labels, shape = self._begin(class_labels, height, width, guidance_scale, generator, latents)
        images = self._denoise(
            self.prepare_latents(shape, labels.device, generator, latents),
            self._set_timesteps(num_inference_steps, labels.device),
            lambda sample, call: self._predict(sample, call, labels, cross_attention_kwargs),
            generator=generator,
            output_type=output_type,
            callback=callback_on_step_end,
            tensor_inputs=tensor_inputs,
        )
        return ImagePipelineOutput(images=images) if return_dict else (images,)
