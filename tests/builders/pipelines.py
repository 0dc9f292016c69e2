"""A tiny pipeline of every class that attngen patches, with random weights, and one way to draw with each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy
import torch
from PIL import Image
from torch import Tensor, nn

import attngen
from attngen import (
    AgentAttention,
    DownsampledKV,
    FocalAttention,
    LinearAttention,
    Plan,
    SoftmaxAttention,
    Stage,
    TileAttention,
    TokenMerging,
)
from attngen.hosts.families import denoisers_of
from tests.builders.hosts import _CONTROLNET, _SD3, _SDXL, TEXT, fresh, normal, randomised, snapshot

AGENTS = AgentAttention(num_agents=4)
STAGES = Plan((Stage(1.0, {"*": TokenMerging(0.25, 4, 0.9)}), Stage(0.5, {"*": DownsampledKV(2)})))

METHODS: dict[str, Any] = {
    "softmax": SoftmaxAttention(),
    "agents": AGENTS,
    "merging": TokenMerging(0.5, random=True),
    "downsampled": DownsampledKV(2),
    "focal": FocalAttention(2, 1, 4),
    "tiles": TileAttention(2, 1, 0.2),
    "linear": LinearAttention("elu"),
    "stages": STAGES,
}
"""One of each kind, and a plan of stages."""

_OPTIONS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_CONTROL = {**_CONTROLNET, "conditioning_embedding_out_channels": (4, 8)}  # halves once, as the VAE here does
_CONTROL_XL = {**{k: v for k, v in {**_CONTROL, **_SDXL}.items() if k != "up_block_types"}}


@functools.cache
def _vae(channels: int) -> nn.Module:
    with torch.random.fork_rng():
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            sample_size=32,
            shift_factor=0.1,
            force_upcast=False,
        )
        return randomised(vae)


@functools.cache
def _control(xl: bool) -> nn.Module:
    with torch.random.fork_rng():
        return randomised(diffusers.ControlNetModel(**(_CONTROL_XL if xl else _CONTROL)))


@functools.cache
def _sd3_transformer() -> nn.Module:
    """Its pipelines take as many latent channels as its predictions have, which are 16."""
    with torch.random.fork_rng():
        return randomised(diffusers.SD3Transformer2DModel(**{**_SD3, "in_channels": 16}))


def picture(seed: int = 0, side: int = 32) -> Image.Image:
    return Image.fromarray((normal(side, side, 3, seed=seed).sigmoid().numpy() * 255).astype("uint8"))


def mask(side: int = 32) -> Image.Image:
    return Image.fromarray(numpy.tri(side, dtype="uint8") * 255)


def _text(batch: int) -> dict[str, Any]:
    """Encoded prompts, different for every picture."""
    one = normal(8, 5, TEXT, seed=1)[:batch]
    return {"prompt_embeds": one, "negative_prompt_embeds": 0.5 * one.flip(1)}


def _pooled(batch: int, width: int) -> dict[str, Any]:
    one = normal(8, width, seed=2)[:batch]
    return {"pooled_prompt_embeds": one, "negative_pooled_prompt_embeds": 0.5 * one}


def _stable(batch: int) -> dict[str, Any]:
    return {**_text(batch), "guidance_scale": 3.0}


def _xl(batch: int) -> dict[str, Any]:
    return {**_stable(batch), **_pooled(batch, TEXT)}


def _sd3(batch: int) -> dict[str, Any]:
    return {**_stable(batch), **_pooled(batch, 8)}


def _flux(batch: int) -> dict[str, Any]:
    return {"prompt_embeds": _text(batch)["prompt_embeds"], "pooled_prompt_embeds": normal(8, 8, seed=2)[:batch]}


def _pixart(batch: int) -> dict[str, Any]:
    keep = torch.ones(batch, 5, dtype=torch.long)
    keep[:, 3:] = 0
    masks = {"prompt_attention_mask": keep, "negative_prompt_attention_mask": keep}
    return {**_stable(batch), **masks, "use_resolution_binning": False, "prompt": None, "negative_prompt": None}


def _labels(batch: int) -> dict[str, Any]:
    return {"class_labels": [1 + i for i in range(batch)], "guidance_scale": 3.0}


def _images(batch: int, **extra: Any) -> dict[str, Any]:
    """Pictures to start from; one list entry for each prompt."""
    return {"image": [picture(seed=i) for i in range(batch)], **extra}


def _masked(batch: int) -> dict[str, Any]:
    return {**_images(batch), "mask_image": [mask()] * batch, "strength": 0.8}


@dataclass(frozen=True)
class Kind:
    """A pipeline class with its components and arguments.

    Attributes:
        cls: name of the class in diffusers, or attngen's.
        host: which of `tests.builders.hosts` is its denoiser.
        channels: of the latents.
        control: whether a ControlNet stands beside it.
        encoders: components that stay empty: prompts are given encoded.
        arguments: number of pictures -> arguments of the call.
        sized: whether the call takes height and width.
        callback: how the pipeline reports steps: "callback_on_step_end", "callback", or "" for not at all.
        discrete: whether it takes the schedulers of discrete time steps.
    """

    cls: str
    host: str
    arguments: Callable[[int], dict[str, Any]]
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")
    channels: int = 4
    control: bool = False
    sized: bool = True
    callback: str = "callback_on_step_end"
    discrete: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """A new pipeline; all of a kind have the same weights, and none of them in common."""
        cls = getattr(diffusers, self.cls, None) or getattr(attngen, self.cls)
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
        if not self.discrete:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        component = "unet" if self.host in ("sd15", "sdxl") else "transformer"
        denoiser = copy.deepcopy(_sd3_transformer()) if self.host == "sd3" else fresh(self.host)
        parts: dict[str, Any] = {component: denoiser, "vae": copy.deepcopy(_vae(self.channels))}
        if self.control:
            parts["controlnet"] = copy.deepcopy(_control(self.host == "sdxl"))
        pipe = cls(scheduler=scheduler, **parts, **dict.fromkeys(self.encoders), **self.options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def __call__(self, pipe: Any, batch: int = 1, seed: int = 0, dtype: torch.dtype | None = None, **kwargs) -> Tensor:
        """Pictures (batch, height, width, 3) in two steps, every one from a generator of its own."""
        images = self.call(pipe, batch, seed, dtype, **kwargs).images
        return images if isinstance(images, Tensor) else torch.from_numpy(numpy.asarray(images))

    def call(self, pipe: Any, batch: int = 1, seed: int = 0, dtype: torch.dtype | None = None, **kwargs) -> Any:
        """What the pipeline itself returns."""
        arguments = {**self.arguments(batch), "num_inference_steps": 2, "output_type": "np"}
        if self.sized:
            arguments |= {"height": 32, "width": 32}
        if "strength" in arguments:
            arguments["num_inference_steps"] = 3  # the first is left out
        arguments["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
        if dtype is not None:
            arguments = {k: v.to(dtype) if k.endswith("_embeds") else v for k, v in arguments.items()}
        return pipe(**{**arguments, **kwargs})

    def steps(self, note: Callable[[], Any]) -> dict[str, Any]:
        """Arguments by which `note` is called at the end of every step."""
        if self.callback == "callback":
            return {"callback": lambda *_: note()}
        return {"callback_on_step_end": lambda pipe, step, time, kwargs: note() or kwargs}


def _img2img(arguments: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    return lambda batch: {**arguments(batch), **_images(batch), "strength": 0.8}


def _inpaint(arguments: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    return lambda batch: {**arguments(batch), **_masked(batch)}


def _controlled(arguments: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    return lambda batch: {**arguments(batch), **_images(batch)}


_TWO = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_THREE = (*_TWO, "text_encoder_3", "tokenizer_3")
_FLUX = {"host": "flux", "encoders": _TWO, "channels": 1, "discrete": False}
_STABLE3 = {"host": "sd3", "encoders": _THREE, "channels": 16, "discrete": False}
_DITS = {"encoders": (), "sized": False, "callback": ""}

KINDS = {
    "sd": Kind("StableDiffusionPipeline", "sd15", _stable, options=_OPTIONS),
    "sd-img2img": Kind("StableDiffusionImg2ImgPipeline", "sd15", _img2img(_stable), sized=False, options=_OPTIONS),
    "sd-inpaint": Kind("StableDiffusionInpaintPipeline", "sd15", _inpaint(_stable), options=_OPTIONS),
    "sd-controlnet": Kind(
        "StableDiffusionControlNetPipeline", "sd15", _controlled(_stable), control=True, options=_OPTIONS
    ),
    "sdxl": Kind("StableDiffusionXLPipeline", "sdxl", _xl, _TWO),
    "sdxl-img2img": Kind("StableDiffusionXLImg2ImgPipeline", "sdxl", _img2img(_xl), _TWO, sized=False),
    "sdxl-inpaint": Kind("StableDiffusionXLInpaintPipeline", "sdxl", _inpaint(_xl), _TWO),
    "sdxl-controlnet": Kind("StableDiffusionXLControlNetPipeline", "sdxl", _controlled(_xl), _TWO, control=True),
    "pixart-alpha": Kind("PixArtAlphaPipeline", "pixart", _pixart, callback="callback"),
    "pixart-sigma": Kind("PixArtSigmaPipeline", "pixart", _pixart, callback="callback"),
    "sd3": Kind("StableDiffusion3Pipeline", arguments=_sd3, **_STABLE3),
    "sd3-img2img": Kind("StableDiffusion3Img2ImgPipeline", arguments=_img2img(_sd3), **_STABLE3),
    "sd3-inpaint": Kind("StableDiffusion3InpaintPipeline", arguments=_inpaint(_sd3), **_STABLE3),
    "flux": Kind("FluxPipeline", arguments=_flux, **_FLUX),
    "flux-img2img": Kind("FluxImg2ImgPipeline", arguments=_img2img(_flux), **_FLUX),
    "flux-inpaint": Kind("FluxInpaintPipeline", arguments=_inpaint(_flux), **_FLUX),
    "dit": Kind("DiTPipeline", "dit", _labels, **_DITS),
    "sit": Kind("SiTPipeline", "sit", lambda batch: {"class_labels": list(range(1, 1 + batch))}, (), discrete=False),
}


@functools.cache
def exact(name: str) -> Tensor:
    """The picture of a pipeline that was never patched."""
    return KINDS[name](KINDS[name].build())


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    return denoisers_of(pipe)


def snapshots(pipe: Any) -> dict[str, Any]:
    """All that a patch might leave behind in the denoisers, the pipeline and its other components."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {"pipeline": sorted(vars(pipe)), **{name: snapshot(model) for name, model in models.items()}}
