"""Large pictures in stages: draw at the trained size, enlarge, add noise, denoise at the larger size, and again.

Each enlargement is SDEdit (arXiv 2108.01073) with diffusers' own image-to-image pipeline, on the same networks. The
picture is enlarged in pixels with Lanczos and encoded again, not in the latents: interpolated latents are no latents of
any picture, and need so much noise to become some that the composition is lost.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

import attngen
from attngen import Report
from pipelines.cli.seeds import generator_for
from pipelines.engine.memory import PeakMemory

Size = tuple[int, int]
STRENGTH = 0.4
# A side of this many latent pixels halves often enough for every UNet, and is a size that SDXL was trained on.
BASE_MULTIPLE = 8

StepCallback = Callable[[int, int, int, torch.Tensor], None]
"""(stage, step, number of steps, latents), stage and step counted from 0; raise from it to stop."""


@dataclass(frozen=True)
class LargePicture:
    """What to draw.

    Attributes:
        prompt: the text.
        sizes: (height, width) in pixels of each stage; from `stage_sizes`.
        strength: how much of the way from noise to picture an enlargement goes again, above 0 up to 1.
        steps: of the first stage; an enlargement takes `strength` of them. None for the pipeline's.
        guidance_scale: None for the pipeline's.
        negative_prompt: what not to draw.
        method: as for `attngen.apply`, for the enlargements only; None leaves attention as it is.
        tiling: whether the VAE works in tiles, of its own size and overlap.
        seed: of the first stage, which draws what the pipeline alone draws from it; the others' noise depends on it.
    """

    prompt: str
    sizes: tuple[Size, ...]
    strength: float = STRENGTH
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    method: Any = "agent"
    tiling: bool = True
    seed: int = 0


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    Attributes:
        index: 0 is the first.
        image: the picture, RGB.
        steps: calls of `on_step`, the denoising steps that were taken.
        seconds: of drawing, with encoding and decoding.
        peak_bytes: most memory, see `pipelines.engine.memory.PeakMemory`; None where nobody counts.
        report: what became of each attention layer, or None where attention was not changed.
    """

    index: int
    image: Image.Image
    steps: int
    seconds: float
    peak_bytes: int | None
    report: Report | None = field(default=None, repr=False)


def draw_large(
    pipe: Any,
    picture: LargePicture,
    *,
    image: Image.Image | None = None,
    on_step: StepCallback | None = None,
    enlarger: Any = None,
    before_stage: Callable[[Any, int], None] | None = None,
) -> Iterator[StageResult]:
    """Draw stage by stage; the last result is the picture.

    Between stages, after the last one, after an error, and when the iterator is closed, the pipeline's attention and
    tiling are what they were.

    Args:
        pipe: a text-to-image pipeline of diffusers.
        picture: what to draw.
        image: the first stage's picture, to go on from; None draws it.
        on_step: called after each denoising step.
        enlarger: `enlarging_pipeline(pipe)` where the caller has it.
        before_stage: called with (pipeline, stage) before each: to offload, or to name a progress bar.

    Raises:
        ValueError: before any work, for sizes, a strength or a method that do not fit; later for what the pipeline
            refuses.
        FloatingPointError: if a stage's picture is not finite.
    """
    enlarger = enlarger or enlarging_pipeline(pipe)
    picture = with_defaults(pipe, picture)
    check_picture(pipe, enlarger, picture)
    if picture.method is not None:
        attngen.apply(enlarger, picture.method).remove()  # says now what it would say after the first stage

    def stages() -> Iterator[StageResult]:
        last = image
        for index in range(0 if image is None else 1, len(picture.sizes)):
            running = enlarger if index else pipe
            if before_stage is not None:
                before_stage(running, index)
            result = _draw_stage(running, picture, index, last, on_step)
            last = result.image
            yield result

    return stages()


def enlarging_pipeline(pipe: Any) -> Any:
    """The image-to-image pipeline on the same networks.

    Raises:
        ValueError: if diffusers has none for this pipeline.
    """
    from diffusers import AutoPipelineForImage2Image

    name = type(pipe).__name__
    try:
        enlarger = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(f"diffusers has no image-to-image pipeline for {name}, so it cannot enlarge") from error
    if "strength" not in inspect.signature(enlarger.__call__).parameters:
        raise ValueError(f"{type(enlarger).__name__} takes no strength, so it cannot enlarge")
    enlarger.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return enlarger


# Sizes


def trained_side(pipe: Any) -> int:
    """Side in pixels of the square that the pipeline draws by default."""
    side = getattr(pipe, "default_sample_size", None)
    if side is None:
        denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        side = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if side is None:
        raise ValueError(f"{type(pipe).__name__} does not say at what size it was trained")
    return int(side if isinstance(side, int) else max(side)) * int(pipe.vae_scale_factor)


def size_multiple(pipe: Any) -> int:
    """Pixels of which a side is a multiple: a latent pixel of a UNet, a token of two by two of a transformer."""
    return int(pipe.vae_scale_factor) * (1 if getattr(pipe, "unet", None) is not None else 2)


def stage_sizes(
    target: Size, base: int | Size, multiple: int, stages: int | None = None, coarse: int | None = None
) -> tuple[Size, ...]:
    """Sizes from the first stage to the target, each the same number of times as large as the one before.

    Args:
        target: (height, width) in pixels.
        base: the first stage: the side of a square whose area it has in the target's shape, or its (height, width).
        multiple: of which the target's sides must be multiples.
        stages: number of enlargements; None for so many that none more than doubles the sides.
        coarse: of which the sides of the other stages are made multiples; None for `multiple`.

    Returns:
        At least two sizes, growing.

    Raises:
        ValueError: for a target that is not larger than the base or no multiple, or too many stages.
    """
    for name, side in zip(("height", "width"), target, strict=True):
        if side < 1 or side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise ValueError(f"{name} must be a multiple of {multiple}, got {side}; the nearest is {near}")
    square = base * base if isinstance(base, int) else base[0] * base[1]
    factor = math.sqrt(target[0] * target[1] / square)
    if factor <= 1:
        first = (base, base) if isinstance(base, int) else base
        raise ValueError(
            f"{shown(target)} is not larger than the {shown(first)} of the first stage; ask for more, or draw it in one"
            " go with python -m pipelines.text2image"
        )
    count = stages or max(1, math.ceil(math.log2(factor) - 1e-6))
    step = coarse or multiple
    sizes = [_rounded(target, factor ** (i / count) / factor, step) for i in range(count)] + [target]
    if not isinstance(base, int):
        sizes[0] = base
    for small, large in zip(sizes, sizes[1:], strict=False):
        if small[0] * small[1] >= large[0] * large[1]:
            raise ValueError(
                f"{count} enlargements are too many from {shown(sizes[0])} to {shown(target)}: sides are whole {step}s"
            )
    return tuple(sizes)


def shown(size: Size) -> str:
    """(height, width) as people write it: 1920x1080 is wide."""
    return f"{size[1]}x{size[0]}"


def _rounded(target: Size, share: float, multiple: int) -> Size:
    height, width = (max(multiple, round(side * share / multiple) * multiple) for side in target)
    return height, width


def enlarge_to(image: Image.Image, size: Size) -> Image.Image:
    """The picture at (height, width): Lanczos, nothing stretched; what does not fit the shape is cut off evenly."""
    return ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS)


# One stage


def check_picture(pipe: Any, enlarger: Any, picture: LargePicture) -> None:
    """Raise ValueError for what would fail later."""
    if not 0 < picture.strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {picture.strength!r}")
    steps = with_defaults(pipe, picture).steps or 1
    if int(steps * picture.strength) < 1:
        least = math.ceil(1 / picture.strength)
        raise ValueError(
            f"a strength of {picture.strength:g} leaves none of {steps} steps to an enlargement; take {least} steps or"
            " a higher strength"
        )
    if getattr(pipe, "vae", None) is None:
        raise ValueError(f"{type(pipe).__name__} draws without a VAE; large images are drawn through one")
    if picture.tiling and not hasattr(pipe.vae, "enable_tiling"):
        raise ValueError(f"{type(pipe).__name__} has a VAE that cannot work in tiles; turn tiling off")
    for each in (pipe, enlarger):
        taken = inspect.signature(each.__call__).parameters
        for name in call_arguments(picture):
            if name not in taken:
                raise ValueError(f"{type(each).__name__} takes no {name}; leave it out")


def with_defaults(pipe: Any, picture: LargePicture) -> LargePicture:
    """The picture with the pipeline's steps and guidance where it names none, so that all stages have the same."""
    taken = inspect.signature(pipe.__call__).parameters
    steps, guidance = (
        taken[name].default if value is None and name in taken else value
        for name, value in (("num_inference_steps", picture.steps), ("guidance_scale", picture.guidance_scale))
    )
    return replace(picture, steps=steps, guidance_scale=guidance)


def call_arguments(picture: LargePicture) -> dict[str, Any]:
    """What every stage passes to its pipeline."""
    given = {
        "prompt": picture.prompt,
        "negative_prompt": picture.negative_prompt,
        "num_inference_steps": picture.steps,
        "guidance_scale": picture.guidance_scale,
    }
    return {name: value for name, value in given.items() if value is not None}


def _draw_stage(
    pipe: Any, picture: LargePicture, index: int, last: Image.Image | None, on_step: StepCallback | None
) -> StageResult:
    start, steps, peak = time.perf_counter(), 0, PeakMemory(pipe._execution_device)

    def count(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps
        steps = step + 1
        if on_step is not None:
            on_step(index, step, int(getattr(pipe, "num_timesteps", 0)), tensors["latents"])
        return {}

    height, width = picture.sizes[index]
    arguments = call_arguments(picture)
    arguments |= {"generator": stage_generator(picture.seed, index), "callback_on_step_end": count, "output_type": "np"}
    with ExitStack() as undo:
        undo.callback(pipe.maybe_free_model_hooks)
        undo.enter_context(vae_tiling(pipe.vae, picture.tiling))
        patch = None
        if index:
            assert last is not None
            arguments |= {"image": enlarge_to(last, (height, width)), "strength": picture.strength}
            if picture.method is not None:
                patch = undo.enter_context(attngen.apply(pipe, picture.method))
        if "height" in inspect.signature(pipe.__call__).parameters:
            arguments |= {"height": height, "width": width}
        image = _finished(pipe, pipe(**arguments), picture.sizes[index])
        report = patch.report() if patch is not None else None
    return StageResult(index, image, steps, time.perf_counter() - start, peak.read(), report)


def stage_generator(seed: int, index: int) -> torch.Generator:
    """Of each stage its own, so that a stage does not depend on how many numbers those before it drew."""
    return torch.Generator().manual_seed(seed) if index == 0 else generator_for(seed, "enlargement", index)


@contextmanager
def vae_tiling(vae: Any, on: bool) -> Iterator[None]:
    """Tiles on or off within it; afterwards as before."""
    before = getattr(vae, "use_tiling", None)
    if before is None and not on:
        yield
        return
    vae.enable_tiling() if on else vae.disable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before


def _finished(pipe: Any, output: Any, size: Size) -> Image.Image:
    """The picture of a pipeline's output.

    Raises:
        FloatingPointError: if it is not finite.
        ValueError: if the model's safety checker blacked it out.
    """
    if not np.isfinite(output.images).all():
        raise FloatingPointError(
            f"the image of {shown(size)} is not finite; try --dtype float32 or bfloat16, or --method none"
        )
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        raise ValueError(
            f"the model's safety checker blacked out the image of {shown(size)}; try another seed or prompt"
        )
    return pipe.numpy_to_pil(output.images)[0].convert("RGB")
