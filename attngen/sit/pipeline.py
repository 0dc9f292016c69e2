"""SiTPipeline: pictures of chosen classes from a SiT or DiT model, as a diffusers pipeline.

Papers: SiT, Ma et al., ECCV 2024, arXiv 2401.08740; DiT, Peebles and Xie, ICCV 2023, arXiv 2212.09748. Works in the
latents of a VAE or, without one, on pixels: a SiT with the `InterpolantScheduler` or one of diffusers' flow-matching
schedulers, a DiT (`predicts_variance=True`) with diffusers' discrete ones (DDPM, DDIM, DPM-Solver …).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from attngen.checks import Grid
from attngen.sit.classes import (
    ClassPipeline,
    Generators,
    Label,
    check_callback_inputs,
    check_flow_scheduler,
    check_generator,
    check_guidance_scale,
    check_steps,
    is_number,
    is_whole,
    names_by_number,
    run_callback,
    set_even_timesteps,
    takes,
    whole_number,
)
from attngen.sit.latents import check_normalization, denormalize_latents
from attngen.sit.model import SiTTransformer2DModel, _token_grid
from attngen.sit.scheduler import InterpolantScheduler

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Channels of a picture that PIL can hold: grey, RGB, RGBA.
PICTURE_CHANNELS = (1, 3, 4)
# A DiT is guided in so many of its channels unless told otherwise, as its authors' code does.
DIT_GUIDANCE_CHANNELS = 3

# Steps that a DiT is trained on, by linear betas from 0.0001 to 0.02.
DIT_STEPS = 1000
LEARNED_VARIANCES = ("learned", "learned_range")


class _Call(NamedTuple):
    """One evaluation of the network."""

    index: int  # into the scheduler's timesteps
    time: float  # SiT's: 0 is noise, 1 is data
    timestep: float  # the network's own: the same for a SiT, 0 to 999 for a DiT
    ends_step: bool  # False for the first half of a two-call step


class SiTPipeline(ClassPipeline):
    """Class-conditional pictures from SiT or DiT.

    Args:
        transformer (`SiTTransformer2DModel`): the denoiser.
        scheduler (`InterpolantScheduler`): or a flow-matching scheduler of diffusers, for a model that predicts the
            velocity on the linear path; time and sign are converted. For a DiT a discrete scheduler of diffusers; one
            with `variance_type="learned_range"`, such as `DDPMScheduler`, draws with the predicted variance, the others
            do without it.
        vae (`AutoencoderKL`, *optional*): decoder of the latents, or another of diffusers' image autoencoders, such as
            `AutoencoderDC`. `latents_mean` and `latents_std` in its configuration, or `scaling_factor` and
            `shift_factor`, are undone before it decodes. Without one the model draws pixels in [-1, 1].
        id2label (`dict[int, str]`, *optional*): names of the classes; several names of one class are separated by
            commas, as ImageNet has them.

    Examples:

        >>> pipe = SiTPipeline.from_pretrained(folder)
        >>> pipe(["heart", 3], num_inference_steps=50, guidance_scale=2.0).images
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    transformer: SiTTransformer2DModel
    scheduler: Any
    vae: Any

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.id2label = names_by_number(id2label)
        self.register_to_config(id2label=self.id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_interval: tuple[float, float] | None = None
        self._current_timestep: float | None = None

    # What a callback reads and sets

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side of a latent pixel; 1 without a VAE."""
        vae = getattr(self, "vae", None)
        if vae is None:
            return 1
        return getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def current_timestep(self) -> float | None:
        """On diffusers' clock, 1000 is noise and 0 is data, which is what its attention caches ask for."""
        return self._current_timestep

    @property
    def num_classes(self) -> int:
        """Classes that can be drawn."""
        return self.transformer.config["num_classes"]

    # Checks, all before any work

    def check_inputs(
        self,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_channels: int | None,
        guidance_interval: tuple[float, float] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str] | None,
    ) -> None:
        """Raise ValueError, with the way out, for what `__call__` cannot use."""
        check_steps(num_inference_steps)
        self._check_guidance(guidance_scale, guidance_channels, guidance_interval)
        self._check_size("height", height)
        self._check_size("width", width)
        self._check_output(output_type)
        self._check_scheduler()
        check_callback_inputs(self, callback_on_step_end_tensor_inputs)

    def _check_guidance(self, scale: float, channels: int | None, interval: tuple[float, float] | None) -> None:
        check_guidance_scale(scale)
        available = self.transformer.config["in_channels"]
        if channels is not None and not 1 <= whole_number("guidance_channels", channels) <= available:
            raise ValueError(f"guidance_channels must be 1 to {available}, or None for all, got {channels}")
        if scale > 1 and self.transformer.config["class_dropout_prob"] == 0:
            logger.warning("guidance needs a null class, and the model was trained without one (class_dropout_prob=0)")
        if interval is None:
            return
        pair = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(is_number(t) for t in interval)
        if not pair or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, got {interval!r}")

    def _check_size(self, name: str, size: int | None) -> None:
        unit = self.transformer.config["patch_size"] * self.vae_scale_factor
        if size is None or (whole_number(name, size) >= unit and size % unit == 0):
            return
        below = max(unit, size // unit * unit)
        nearest = f"{below} or {below + unit}" if size >= unit else f"{below}"
        raise ValueError(f"{name} must be a positive multiple of {unit} for this model, got {size}; try {nearest}")

    def _check_output(self, output_type: str) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
        channels = self.transformer.config["in_channels"]
        if self.vae is None:
            if output_type == "pil" and channels not in PICTURE_CHANNELS:
                raise ValueError(
                    f"{channels} channels are no picture; give the pipeline a vae, or pass output_type='latent'"
                )
        elif self.vae.config.latent_channels != channels:
            raise ValueError(
                f"the vae has {self.vae.config.latent_channels} latent channels and the transformer {channels};"
                " they do not belong together"
            )
        else:
            check_normalization(self.vae.config, channels)

    @property
    def _is_dit(self) -> bool:
        """Whether the network predicts noise and variance at DiT's discrete steps."""
        return bool(self.transformer.config["predicts_variance"])

    def _check_scheduler(self) -> None:
        if self._is_dit:
            return self._check_discrete_scheduler()
        if isinstance(self.scheduler, InterpolantScheduler):
            return
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
                    f"variance_type='learned' of {name} does not fit a DiT, which predicts a place between two bounds;"
                    " make the scheduler with variance_type='learned_range'"
                )
        elif variance_type in LEARNED_VARIANCES and channels != 3:
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

    def _mediator_count(self, wanted: Any, grid: Grid) -> int | Grid | None:
        """`wanted` as the network takes it; ValueError unless so many mediators fit a token `grid`."""
        tokens = f"the {grid[0]} x {grid[1]} tokens of this picture"
        if wanted is None:
            return None
        if isinstance(wanted, (tuple, list)):
            fits = len(wanted) == 2 and all(
                is_whole(x) and 1 <= x <= most for x, most in zip(wanted, grid, strict=True)
            )
            if not fits:
                raise ValueError(f"num_mediators as (rows, columns) must fit {tokens}, got {tuple(wanted)}")
            return int(wanted[0]), int(wanted[1])
        if not is_whole(wanted) or not 1 <= wanted <= math.prod(grid):
            raise ValueError(f"num_mediators must be 1 to {math.prod(grid)}, {tokens}, got {wanted!r}")
        return int(wanted)

    # Steps of a call

    def prepare_latents(
        self, shape: Sequence[int], device: torch.device, generator: Generators | None, latents: Tensor | None
    ) -> Tensor:
        """Noise to start from, or the given latents, on `device`.

        The sampler runs in float32 (or float64, if the network does) whatever the network's dtype: hundreds of small
        steps in half precision would lose the picture. One generator a picture makes a picture the same in any batch.
        """
        dtype = torch.promote_types(torch.float32, self.transformer.dtype)
        if latents is not None:
            return latents.to(device=device, dtype=dtype)
        return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)

    def _latent_shape(
        self, batch_size: int, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, int, int, int]:
        """(B, C, h, w): the size in pixels asked for, else that of the given latents, else the trained size."""
        config = self.transformer.config
        if latents is None:
            trained = config["sample_size"]
            rows, columns = (trained, trained) if isinstance(trained, int) else trained
        elif latents.ndim == 4:
            rows, columns = latents.shape[2:]
        else:
            raise ValueError(f"latents must have 4 axes (B, C, h, w), got shape {tuple(latents.shape)}")
        rows = rows if height is None else height // self.vae_scale_factor
        columns = columns if width is None else width // self.vae_scale_factor
        shape = batch_size, config["in_channels"], rows, columns
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return shape

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> list[_Call]:
        """Lay out the scheduler's timesteps and translate them to SiT's clock."""
        set_even_timesteps(self.scheduler, num_inference_steps, device)
        steps = self.scheduler.timesteps.tolist()
        times = steps
        if not isinstance(self.scheduler, InterpolantScheduler):
            times = [1 - step / self.scheduler.config.num_train_timesteps for step in steps]
        self._num_timesteps = len(times)
        # A two-call step ends where the next one starts: at the same time.
        two_calls = getattr(self.scheduler, "order", 1) > 1
        return [
            _Call(
                index=i,
                time=time,
                timestep=step if self._is_dit else time,
                ends_step=not two_calls or i + 1 == len(times) or times[i + 1] == time,
            )
            for i, (time, step) in enumerate(zip(times, steps, strict=True))
        ]

    def _step_ended(self, call: _Call) -> bool:
        """Whether the sample after this call is that of a whole step of the scheduler."""
        if call.index + 1 == self._num_timesteps:
            return True
        # Two-call schedulers of diffusers whose halves lie at different times say so themselves.
        return getattr(self.scheduler, "state_in_first_order", call.ends_step)

    def _mediators_by_call(self, wanted: Any, calls: Sequence[_Call], grid: Grid) -> Callable[[int], Any]:
        """Number of mediators by index of the call; everything known beforehand is checked beforehand."""
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
        # A schedule's clock is the library's: 1 is noise. Float32 times get their decimals back.
        values = [wanted(round(1 - call.time, 6)) if callable(wanted) else wanted for call in calls]
        return [self._mediator_count(value, grid) for value in values].__getitem__

    def _predict(
        self, latents: Tensor, call: _Call, labels: Tensor, num_mediators: Any, guidance_channels: int | None
    ) -> Tensor:
        """The network's prediction, guided where asked for, in the dtype of `latents`.

        (B, C, h, w), or (B, 2 · C, h, w) with the variance, which is not guided.
        """
        low, high = self._guidance_interval or (0.0, 1.0)
        guided = self.do_classifier_free_guidance and low <= round(call.time, 6) <= high  # times are float32
        sample = latents
        if self._is_dit:
            sample = self.scheduler.scale_model_input(sample, self.scheduler.timesteps[call.index])
        sample = sample.to(self.transformer.dtype)
        if guided:
            # Null class first, as diffusers' caches expect it.
            null = torch.full_like(labels, self.transformer.config["num_classes"])
            sample, labels = torch.cat([sample, sample]), torch.cat([null, labels])
        options = {} if num_mediators is None else {"num_mediators": num_mediators}
        where = {"step_index": call.index, "num_inference_steps": self._num_timesteps, "sigma": 1 - call.time}
        with self.transformer.cache_context("cond_uncond" if guided else "cond", **where):
            output = self.transformer(
                hidden_states=sample,
                timestep=torch.full((len(sample),), call.timestep, dtype=torch.float32, device=sample.device),
                class_labels=labels,
                # A model left in training mode must not drop labels at random.
                drop_labels=torch.zeros(1, dtype=torch.bool, device=sample.device),
                return_dict=False,
                **options,
            )[0].to(latents.dtype)
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        guided_output = unconditional + self.guidance_scale * (conditional - unconditional)
        channels = self.transformer.config["in_channels"]
        if guidance_channels is None:
            guidance_channels = min(DIT_GUIDANCE_CHANNELS, channels) if self._is_dit else channels
        return torch.cat([guided_output[:, :guidance_channels], conditional[:, guidance_channels:]], dim=1)

    def _without_unused_variance(self, output: Tensor) -> Tensor:
        """(B, 2 · C, h, w) -> as it is for a scheduler that draws with the learned variance, else (B, C, h, w)."""
        if _uses_variance(self.scheduler) and self.scheduler.config.get("variance_type") == "learned_range":
            return output
        return output[:, : self.transformer.config["in_channels"]]

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents -> pictures of the wanted type; FloatingPointError if there is no picture in them."""
        if not torch.isfinite(latents).all():
            raise FloatingPointError(
                "the latents are not finite, so there is no picture: run the network in float32"
                f" (pipe.to(torch.float32)), lower guidance_scale ({self.guidance_scale:g}), or check the weights"
            )
        if output_type == "latent":
            return latents.to(self.transformer.dtype)
        if self.vae is None:
            return self.image_processor.postprocess(latents.float(), output_type=output_type)
        latents = denormalize_latents(latents, self.vae.config)
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        if not torch.isfinite(pixels).all():
            raise FloatingPointError(
                "the vae made no finite picture of finite latents: run it in float32 (pipe.vae.to(torch.float32))"
            )
        return self.image_processor.postprocess(pixels, output_type=output_type)

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
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture for each class label.

        Args:
            class_labels: numbers or names of classes (see `get_label_ids`), one a picture.
            height: of the pictures, in pixels; by default that of `latents` or the one trained on.
            width: likewise.
            num_inference_steps: steps of the scheduler; two-call solvers call the network more often.
            guidance_scale: s of unconditional + s (conditional − unconditional); guidance needs s > 1.
            guidance_channels: guide only so many of the first channels, and leave the conditional prediction in the
                rest; the references guide 3 of 4. None for all of a SiT, and for 3 of a DiT; the number of channels for
                all of a DiT. A predicted variance is never guided.
            guidance_interval: (low, high) in SiT's time, 0 is noise and 1 is data (for a DiT 1 - step / 1000): guide
                only where low <= t <= high (arXiv 2404.07724). Elsewhere a step costs half.
            num_mediators: for a model with mediator attention: a count, (rows, columns), a function of time (t = 1 is
                noise, as in `attngen.Schedule`), or an object with `reset`, `observe(latents)` and `value`
                (`attngen.ChangeSchedule`), which is shown the latents after each step. None for the trained count.
            generator: of all noise, one or one a picture. With one a picture a picture does not depend on the others
                of its batch.
            latents: (B, C, h, w) to start from instead of noise.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), both in [0, 1], or "latent".
            return_dict: return an `ImagePipelineOutput`, else a tuple.
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
        self.check_inputs(
            height,
            width,
            num_inference_steps,
            guidance_scale,
            guidance_channels,
            guidance_interval,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        numbers = self.get_label_ids(class_labels)
        check_generator(generator, len(numbers))
        shape = self._latent_shape(len(numbers), height, width, latents)
        grid = _token_grid(shape[2], shape[3], self.transformer.config["patch_size"])

        self._guidance_scale, self._guidance_interval = guidance_scale, guidance_interval
        self._interrupt = False
        device = self._execution_device
        calls = self._set_timesteps(num_inference_steps, device)
        mediators = self._mediators_by_call(num_mediators, calls, grid)
        labels = torch.tensor(numbers, device=device)
        sample = self.prepare_latents(shape, device, generator, latents)
        if self._is_dit:
            sample = sample * self.scheduler.init_noise_sigma
        noise_source: dict[str, Any] = {"generator": generator} if takes(self.scheduler.step, "generator") else {}
        observe = getattr(num_mediators, "observe", None)

        try:
            with self.progress_bar(total=len(calls)) as progress_bar:  # pyright: ignore[reportCallIssue]
                for call in calls:
                    if self.interrupt:
                        continue
                    self._current_timestep = 1000 * (1 - call.time)
                    output = self._predict(sample, call, labels, mediators(call.index), guidance_channels)
                    if self._is_dit:
                        output = self._without_unused_variance(output)
                    elif not isinstance(self.scheduler, InterpolantScheduler):
                        output = -output  # flow matching predicts noise − data, SiT data − noise
                    timestep = self.scheduler.timesteps[call.index]
                    sample = self.scheduler.step(output, timestep, sample, **noise_source, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        sample = run_callback(
                            callback_on_step_end,
                            self,
                            call.index,
                            timestep,
                            sample,
                            callback_on_step_end_tensor_inputs,
                        )
                    if observe is not None and self._step_ended(call):
                        observe(sample)
                    progress_bar.update()
            images = self._decode(sample, output_type)
        finally:
            self._current_timestep = None
            # After a failure too: caches must not carry one picture's features into the next.
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _uses_variance(scheduler: Any) -> bool:
    """Whether the scheduler can draw with a predicted variance, as DDPM does."""
    variance = getattr(scheduler, "_get_variance", None)
    return variance is not None and takes(variance, "predicted_variance")


def _has_dit_noise(scheduler: Any) -> bool:
    """Whether the noise levels are those of DiT's linear betas, up to rounding."""
    betas = torch.linspace(1e-4, 0.02, DIT_STEPS, dtype=torch.float64)
    levels = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
    return torch.allclose(levels, (1 - betas).cumprod(0), rtol=1e-3, atol=0)
