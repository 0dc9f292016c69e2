"""SiTPipeline: images of chosen classes from a SiT or DiT model, as a diffusers pipeline.

Papers: SiT, Ma et al., ECCV 2024, arXiv 2401.08740; DiT, Peebles and Xie, ICCV 2023, arXiv 2212.09748. Works in the
latents of a VAE or, without one, on pixels: a SiT with the `InterpolantScheduler` or one of diffusers' flow-matching
schedulers, a DiT (`predicts_variance=True`) with diffusers' discrete ones (DDPM, DDIM, DPM-Solver …).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from torch import Tensor

from attngen.checks import Grid, check_count, check_number, plain_number
from attngen.sit.classes import (
    Callback,
    ClassPipeline,
    Label,
    NetworkCall,
    OutputType,
    check_flow_scheduler,
    takes,
    tensor_inputs_of,
)
from attngen.sit.latents import check_normalization, denormalize_latents
from attngen.sit.model import SiTTransformer2DModel, _token_grid
from attngen.sit.scheduler import InterpolantScheduler

logger = logging.get_logger(__name__)

# Channels of an image that PIL can hold: grey, RGB, RGBA.
IMAGE_CHANNELS = (1, 3, 4)
# A DiT is guided in so many of its channels by default, as in its authors' code.
DIT_GUIDANCE_CHANNELS = 3
# Steps that a DiT is trained on, by linear betas from 0.0001 to 0.02.
DIT_STEPS = 1000


class SiTPipeline(ClassPipeline):
    """Class-conditional images from SiT or DiT.

    Args:
        transformer (`SiTTransformer2DModel`): the denoiser.
        scheduler (`InterpolantScheduler`): or a flow-matching scheduler of diffusers, for a model that predicts the
            velocity on the linear path; time and sign are converted. For a DiT a discrete scheduler of diffusers; one
            with `variance_type="learned_range"`, such as `DDPMScheduler`, uses the predicted variance, the others drop
            it.
        vae (`AutoencoderKL`, *optional*): decoder of the latents, or another of diffusers' image autoencoders, such as
            `AutoencoderDC`. `latents_mean` and `latents_std` in its configuration, or `scaling_factor` and
            `shift_factor`, are undone before it decodes. Without one the model generates pixels in [-1, 1].
        id2label (`dict[int, str]`, *optional*): names of the classes; several names of one class are separated by
            commas, as in ImageNet.

    Examples:

        >>> pipe = SiTPipeline.from_pretrained(folder)
        >>> pipe(["heart", 3], num_inference_steps=50, guidance_scale=2.0).images
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    transformer: SiTTransformer2DModel
    vae: Any

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__(id2label, transformer=transformer, scheduler=scheduler, vae=vae)
        self._guidance_interval: tuple[float, float] | None = None

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side of a latent pixel; 1 without a VAE."""
        vae = getattr(self, "vae", None)
        if vae is None:
            return 1
        return getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def num_classes(self) -> int:
        """Classes that can be generated."""
        return self.transformer.config["num_classes"]

    @property
    def _network(self) -> SiTTransformer2DModel:
        return self.transformer

    @property
    def _scale(self) -> int:
        return self.vae_scale_factor

    @property
    def _size_unit(self) -> int:
        return self.transformer.config["patch_size"] * self.vae_scale_factor

    @property
    def _is_dit(self) -> bool:
        """Whether the network predicts noise and variance at DiT's discrete steps."""
        return bool(self.transformer.config["predicts_variance"])

    # Checks, all before any work

    def _check_guidance(self, scale: float, channels: int | None, interval: tuple[float, float] | None) -> None:
        if channels is not None:
            check_count("guidance_channels", plain_number(channels), 1, self.transformer.config["in_channels"])
        if scale > 1 and self.transformer.config["class_dropout_prob"] == 0:
            logger.warning(
                f"guidance_scale={scale:g} needs the null class, and the model was trained without it"
                " (class_dropout_prob=0); pass guidance_scale=1, or fine-tune the model with label dropout"
            )
        if interval is None:
            return
        if not isinstance(interval, (tuple, list)) or len(interval) != 2:
            raise ValueError(f"guidance_interval must be (low, high), got {interval!r}")
        for time in interval:
            check_number("guidance_interval", plain_number(time))
        if not interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance_interval must have 0 <= low <= high <= 1, got {interval!r}")

    def _check_components(self, output_type: str) -> None:
        channels = self.transformer.config["in_channels"]
        if self.vae is None:
            if output_type == "pil" and channels not in IMAGE_CHANNELS:
                raise ValueError(
                    f"cannot make an image from {channels} channels; give the pipeline a vae, or pass"
                    " output_type='latent'"
                )
        elif self.vae.config.latent_channels != channels:
            raise ValueError(
                f"the vae has {self.vae.config.latent_channels} latent channels and the transformer {channels}; use the"
                " vae that the transformer was trained with"
            )
        else:
            check_normalization(self.vae.config, channels)
        if self._is_dit:
            self._check_discrete_scheduler()
        elif not isinstance(self.scheduler, InterpolantScheduler):
            check_flow_scheduler(self.scheduler, "SiT", "InterpolantScheduler, or ")

    def _check_discrete_scheduler(self) -> None:
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if config.get("use_flow_sigmas", False) or not hasattr(self.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{name} does not fit a DiT: the transformer predicts noise and variance at {DIT_STEPS} steps"
                " (predicts_variance=True); use a discrete scheduler, such as DDPMScheduler with"
                " variance_type='learned_range', DDIMScheduler or DPMSolverMultistepScheduler"
            )
        for setting, wanted in (("prediction_type", "epsilon"), ("num_train_timesteps", DIT_STEPS)):
            if config.get(setting, wanted) != wanted:
                raise ValueError(
                    f"{setting}={config[setting]!r} of {name} does not fit a DiT; make the scheduler with"
                    f" {setting}={wanted!r}"
                )
        variance_type, channels = config.get("variance_type"), self.transformer.config["in_channels"]
        if _uses_variance(self.scheduler):
            if variance_type == "learned":
                raise ValueError(
                    f"variance_type='learned' of {name} does not fit a DiT, which predicts a position between two"
                    " bounds; make the scheduler with variance_type='learned_range'"
                )
        elif variance_type in ("learned", "learned_range") and channels != 3:
            # diffusers' solvers then cut every prediction down to three channels.
            raise ValueError(
                f"variance_type={variance_type!r} of {name} is for 3 channels, and the model has {channels}; make it by"
                f" {name}.from_config(pipe.scheduler.config, variance_type=None)"
            )
        if self.vae is not None and config.get("clip_sample", False) and config.get("clip_sample_range", 1.0) <= 1:
            logger.warning(f"{name} clips latents to [-1, 1], which is for pixels; make it with clip_sample=False")
        if not _has_dit_noise(self.scheduler):
            logger.warning(
                f"the noise levels of {name} are not DiT's; make it with beta_start=0.0001, beta_end=0.02 and"
                " beta_schedule='linear', unless the model was trained otherwise"
            )

    # Mediators

    def _mediator_count(self, wanted: Any, grid: Grid) -> int | Grid | None:
        """`wanted` in the network's form; ValueError unless so many mediators fit a token `grid`."""
        if wanted is None:
            return None
        tokens = f"the {grid[0]} x {grid[1]} tokens of this image"
        if not isinstance(wanted, (tuple, list)):
            count, most = plain_number(wanted), math.prod(grid)
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
                raise ValueError(f"num_mediators must be 1 to {most}, {tokens}, got {wanted!r}")
            return count
        sides = [plain_number(side) for side in wanted]
        whole = len(sides) == 2 and all(isinstance(side, int) and side >= 1 for side in sides)
        if not whole or sides[0] > grid[0] or sides[1] > grid[1]:
            raise ValueError(f"num_mediators as (rows, columns) must fit {tokens}, got {tuple(wanted)}")
        return sides[0], sides[1]

    def _mediators_by_call(self, wanted: Any, calls: Sequence[NetworkCall], grid: Grid) -> Callable[[int], Any]:
        """Number of mediators by index of the call; as far as they are known beforehand they are checked beforehand."""
        if wanted is None:
            return lambda index: None
        kind = self.transformer.config["attention"]
        if kind != "mediator":
            raise ValueError(
                f"num_mediators was given, but the model has {kind} attention; leave it out, or use a model trained"
                " with attention='mediator'"
            )
        if hasattr(wanted, "observe") and hasattr(wanted, "reset"):
            levels = getattr(wanted, "values", ())
            if levels is None:
                raise ValueError(f"num_mediators={wanted!r} has no values; give it one number of mediators a level")
            for value in levels:
                self._mediator_count(value, grid)
            wanted.reset()
            return lambda index: self._mediator_count(wanted.value, grid)
        # Rounded, because the scheduler's times are float32.
        values = [wanted(round(call.level, 6)) if callable(wanted) else wanted for call in calls]
        return [self._mediator_count(value, grid) for value in values].__getitem__

    # Steps of a call

    def _predict(
        self, latents: Tensor, call: NetworkCall, labels: Tensor, num_mediators: Any, guidance_channels: int | None
    ) -> Tensor:
        """The network's prediction, guided if asked for, in the dtype of `latents`.

        (B, C, h, w), or (B, 2 · C, h, w) with the variance, which is not guided.
        """
        low, high = self._guidance_interval or (0.0, 1.0)
        time = 1 - call.level
        guided = self.do_classifier_free_guidance and low <= round(time, 6) <= high  # times are float32
        sample = latents
        if self._is_dit:
            sample = self.scheduler.scale_model_input(sample, self.scheduler.timesteps[call.index])
            time = call.timestep
        sample = sample.to(self.transformer.dtype)
        if guided:
            # Null class first, as diffusers' caches expect it.
            null = torch.full_like(labels, self.num_classes)
            sample, labels = torch.cat([sample, sample]), torch.cat([null, labels])
        options = {} if num_mediators is None else {"num_mediators": num_mediators}
        where = {"step_index": call.index, "num_inference_steps": self._num_timesteps, "sigma": call.level}
        with self.transformer.cache_context("cond_uncond" if guided else "cond", **where):
            output = self.transformer(
                hidden_states=sample,
                timestep=torch.full((len(sample),), time, dtype=torch.float32, device=sample.device),
                class_labels=labels,
                # A model left in training mode must not drop labels at random.
                drop_labels=torch.zeros(1, dtype=torch.bool, device=sample.device),
                return_dict=False,
                **options,
            )[0].to(latents.dtype)
        if not guided:
            return output
        channels = self.transformer.config["in_channels"]
        if guidance_channels is None:
            guidance_channels = min(DIT_GUIDANCE_CHANNELS, channels) if self._is_dit else channels
        conditional = output.chunk(2)[1]
        return torch.cat([self._guided(output)[:, :guidance_channels], conditional[:, guidance_channels:]], dim=1)

    def _for_scheduler(self, output: Tensor) -> Tensor:
        """The network's prediction as the scheduler expects it: its sign, and the variance only if it is used."""
        if isinstance(self.scheduler, InterpolantScheduler):
            return output
        if not self._is_dit:
            return -output  # flow matching predicts noise − data, SiT data − noise
        if _uses_variance(self.scheduler) and self.scheduler.config.get("variance_type") == "learned_range":
            return output
        return output[:, : self.transformer.config["in_channels"]]

    def _to_pixels(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents.float()
        latents = denormalize_latents(latents, self.vae.config)
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        if not torch.isfinite(pixels).all():
            raise FloatingPointError("the VAE produced NaN or inf; run it in float32 (pipe.vae.to(torch.float32))")
        return pixels

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_mediators: Any = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image for each class label.

        Args:
            class_labels: numbers or names of classes (see `get_label_ids`), one for each image.
            height: of the images, in pixels; by default that of `latents` or of the training.
            width: likewise.
            num_inference_steps: steps of the scheduler; two-call solvers call the network more often.
            guidance_scale: s of unconditional + s (conditional − unconditional); guidance needs s > 1.
            guidance_channels: guide only so many of the first channels, and keep the conditional prediction in the
                rest; the references guide 3 of 4. None for all of a SiT, and for 3 of a DiT; the number of channels for
                all of a DiT. A predicted variance is never guided.
            guidance_interval: (low, high) in SiT's time, 0 is noise and 1 is data (for a DiT 1 - step / 1000): guide
                only where low <= t <= high (arXiv 2404.07724). Elsewhere a step costs half.
            num_mediators: for a model with mediator attention: a count, (rows, columns), a function of time (t = 1 is
                noise, as in `attngen.Schedule`), or an object with `reset`, `observe(latents)` and `value`
                (`attngen.ChangeSchedule`), which observes the latents after each step. None for the trained count.
            generator: of all noise, one, or one for each image, which then does not depend on the rest of the batch.
            latents: (B, C, h, w) to start from instead of noise.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), both in [0, 1], or "latent".
            return_dict: return an `ImagePipelineOutput`, else a tuple.
            callback_on_step_end: called as (pipeline, index, timestep, kwargs) after every network call; may return
                {"latents": …} and set `_guidance_scale` and `_interrupt`.
            callback_on_step_end_tensor_inputs: names of the tensors in its kwargs: "latents".

        Returns:
            `.images`: a list of PIL images, an array or a tensor.

        Raises:
            ValueError: for an argument that cannot be used, before any work.
            FloatingPointError: if the result is not finite, before an image is made.
        """
        tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(height, width, num_inference_steps, guidance_scale, output_type, tensor_inputs)
        self._check_guidance(guidance_scale, guidance_channels, guidance_interval)
        labels, shape = self._begin(class_labels, height, width, guidance_scale, generator, latents)
        grid = _token_grid(shape[2], shape[3], self.transformer.config["patch_size"])
        calls = self._set_timesteps(num_inference_steps, labels.device)
        mediators = self._mediators_by_call(num_mediators, calls, grid)
        observe = getattr(num_mediators, "observe", None)
        self._guidance_interval = guidance_interval
        sample = self.prepare_latents(shape, labels.device, generator, latents)
        if self._is_dit:
            sample = sample * self.scheduler.init_noise_sigma

        def predict(sample: Tensor, call: NetworkCall) -> Tensor:
            output = self._predict(sample, call, labels, mediators(call.index), guidance_channels)
            return self._for_scheduler(output)

        def after_call(sample: Tensor, call: NetworkCall) -> None:
            # False between the two calls of a two-call step; the last call of diffusers' ones has no second half.
            whole = getattr(self.scheduler, "state_in_first_order", True) or call.index + 1 == len(calls)
            if observe is not None and whole:
                observe(sample)

        images = self._denoise(
            sample,
            calls,
            predict,
            after_call,
            generator=generator,
            output_type=output_type,
            callback=callback_on_step_end,
            tensor_inputs=tensor_inputs,
        )
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _uses_variance(scheduler: Any) -> bool:
    """Whether the scheduler can use a predicted variance, as DDPM does."""
    variance = getattr(scheduler, "_get_variance", None)
    return variance is not None and takes(variance, "predicted_variance")


def _has_dit_noise(scheduler: Any) -> bool:
    """Whether the noise levels are those of DiT's linear betas, up to rounding."""
    betas = torch.linspace(1e-4, 0.02, DIT_STEPS, dtype=torch.float64)
    levels = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
    return torch.allclose(levels, (1 - betas).cumprod(0), rtol=1e-3, atol=0)
