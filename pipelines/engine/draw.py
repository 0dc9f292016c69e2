"""One model, settings, pictures: what the engine does while it holds the model's lock."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines import cli
from pipelines.engine.models import CLASSES, Model
from pipelines.engine.results import Progress, Result, describe
from pipelines.engine.settings import Limits, Settings
from pipelines.methods.counts import check_mediators, make_mediators
from pipelines.methods.options import MEDIATORS
from pipelines.methods.uses import Use, find_method

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from attngen import Report
    from attngen.kernels.dispatch import Kernel

PREVIEW_SECONDS = 0.25  # at least so long between two previews, which a browser pays for too


def fit(settings: Settings, model: Model, limits: Limits) -> Settings:
    """Settings with everything that depends on the model checked and filled in.

    Raises:
        UserError: for an unknown class or sampler, a size that does not fit, a method that it cannot be drawn with, or
            something that its pipeline does not take.
    """
    from pipelines.samplers import sampler_name, sampler_names

    if settings.method in model.refused:
        raise cli.UserError(f"method {settings.method!r} is not for {model.name}: {model.refused[settings.method]}")
    if model.kind == CLASSES:
        settings = replace(settings, prompt=model.label_text(model.label_of(settings.prompt)))
        if settings.negative_prompt.strip():
            raise cli.UserError(f"{model.name} draws classes and takes no negative prompt; leave it out")
    elif not settings.prompt.strip():
        raise cli.UserError("write what to draw")
    if settings.sampler is not None and settings.sampler not in (known := sampler_names(model.pipe)):
        raise cli.UserError(f"unknown sampler {settings.sampler[:60]!r} for this model; known: {', '.join(known)}")
    for name in ("negative_prompt", "guidance_scale"):
        if getattr(settings, name) not in (None, "") and name not in model.takes:
            raise cli.UserError(f"{type(model.pipe).__name__} takes no {name}; leave it out")
    height, width = _size(settings, model, limits)
    if settings.method == MEDIATORS:
        check_mediators(model.pipe, make_mediators(**settings.options), height, width)
    return replace(
        settings,
        height=height,
        width=width,
        sampler=settings.sampler or sampler_name(model.pipe.scheduler),
        steps=settings.steps or model.steps,
        guidance_scale=model.default_guidance if settings.guidance_scale is None else settings.guidance_scale,
    )


def _size(settings: Settings, model: Model, limits: Limits) -> tuple[int | None, int | None]:
    if settings.height is None or settings.width is None:
        height, width = model.size or (None, None)
    else:
        height, width = settings.height, settings.width
    for name, side in (("height", height), ("width", width)):
        if side is not None and side % model.unit:
            below = max(model.unit, side // model.unit * model.unit)
            raise cli.UserError(
                f"{name} must be a positive multiple of {model.unit}, got {side}; try {below} or {below + model.unit}"
            )
    if (height or 1) * (width or 1) > limits.pixels:
        raise cli.UserError(f"{width} x {height} is more than {limits.pixels:,} pixels, the most allowed here")
    if settings.height is not None and "height" not in model.takes and model.size != (height, width):
        raise cli.UserError(f"{type(model.pipe).__name__} draws one size only; leave height and width out")
    return height, width


def draw(
    model: Model,
    sheet: Sequence[Settings],
    tell: Callable[[Progress], None],
    stop: threading.Event,
    previews: bool = False,
    count_flops: bool = False,
    batch: int = 1,
    patch: Any = None,
) -> Result:
    """Draw fitted settings, here and now; the caller holds the model's lock. See `Engine.draw`."""
    import torch

    from pipelines.engine.calls import CallWatch, Stopped
    from pipelines.engine.memory import PeakMemory

    if model.threads is not None:
        torch.set_num_threads(model.threads)
    first = sheet[0]
    wanted = [replace(one, seed=(one.seed or 0) + k, images=1) for one in sheet for k in range(one.images)]
    if first.options.get("follow") == "change":
        batch = 1  # such a schedule looks at the whole batch, and a picture must not depend on that
    watch = CallWatch(stop, keep=count_flops)
    pictures: list[Image.Image] = []
    clock = _Clock(first.steps or 1, len(wanted), tell, previews)
    if "callback_on_step_end" not in model.takes:
        watch.listener = clock.call
    with method_on(model, first.use, watch, patch=patch) as report:
        peak = PeakMemory(model.device)
        start = time.perf_counter()
        for done in range(0, len(wanted), batch):
            pictures += _draw_together(model, wanted[done : done + batch], done, clock)
            if stop.is_set():
                raise Stopped
        seconds = time.perf_counter() - start
        peak_bytes = peak.read()
        found = report()
        flops = _count_flops(model, first, watch, found, patch) if count_flops else None
    height, width = pictures[0].height, pictures[0].width
    return Result(
        settings=replace(first, height=height, width=width),
        pictures=pictures,
        seconds=seconds,
        steps=(first.steps or 1) * len(pictures),
        peak_bytes=peak_bytes,
        memory_of="device" if model.device.type == "cuda" else "process",
        flops=None if flops is None else flops // len(pictures),
        report=found,
        file_settings=[_file_settings(model, replace(one, height=height, width=width)) for one in wanted],
        latents=clock.latents if len(clock.latents) == len(pictures) else [],
    )


def apply_method(pipe: Any, method: Any, kernel: Kernel = "auto") -> Any:
    """Patch a pipeline; returns the handle.

    Args:
        pipe: the pipeline.
        method: a preset's name, a plan, or a plan file.
        kernel: see `attngen.apply`.

    Raises:
        UserError: if there is no such method, or it patches no layer of this pipeline.
    """
    import attngen

    try:
        return attngen.apply(pipe, method, kernel=kernel)
    except (ValueError, OSError) as error:
        network = getattr(pipe, "transformer", None)
        if "patched" in str(error) and dict(getattr(network, "config", {})).get("attention") == "mediator":
            raise cli.UserError(
                "this model already uses mediator attention; leave out the method, or set its number of mediators"
            ) from error
        raise cli.UserError(str(error)) from error


@contextmanager
def method_on(
    model: Model, use: Use, watch: Any = None, kernel: Kernel = "auto", patch: Any = None
) -> Iterator[Callable[[], Report | None]]:
    """Within it the model draws by a method; afterwards it is bit for bit what it was. Gives what reports on it.

    Args:
        model: that draws.
        use: the method.
        watch: a `CallWatch` to put on, or None.
        kernel: see `attngen.apply`.
        patch: what `attngen.apply` gets instead of the method.

    Raises:
        UserError: if the method changes nothing in this model.
    """
    from pipelines.engine.calls import watched

    plan = find_method(use.method).plan
    wanted = plan(use.options) if plan else patch
    handle = None if wanted is None else apply_method(model.pipe, wanted, kernel)
    try:
        with ExitStack() as stack:
            if watch is not None:
                stack.enter_context(watched(model.pipe, watch))
            yield lambda: None if handle is None else handle.report()
    finally:
        if handle is not None:
            handle.remove()


def _count_flops(model: Model, settings: Settings, watch: Any, report: Report | None, patch: Any) -> int | None:
    stages = [stage for layer in report.patched for stage in layer.stages] if report is not None else []
    if not any(stage.kernel == "triton" for stage in stages):
        return watch.count_flops()
    # Triton's operations cannot be counted; the plain path does the same ones in torch.
    with method_on(model, settings.use, kernel="reference", patch=patch):
        return watch.count_flops()


class _Clock:
    """Tells of steps: which one, how long yet, and now and then a preview."""

    def __init__(self, steps: int, pictures: int, tell: Callable[[Progress], None], previews: bool) -> None:
        self.tell, self.previews = tell, previews
        self.latents: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None
        self._told = Progress("drawing", 0, steps, pictures=pictures)
        self._calls = 0
        self._start = time.perf_counter()
        self._shown = 0.0

    def begin(self, previewer: Any, before: int, together: int) -> None:
        """New pictures, after so many others."""
        self._previewer, self._calls, self._last = previewer, 0, None
        self._told = replace(self._told, done=0, picture=before + 1, together=together, seconds_left=None, preview=None)
        self.tell(self._told)

    def end(self) -> None:
        """They are drawn."""
        if self._last is not None:
            self.latents += self._last.detach().float().cpu().unbind()

    def step(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """`callback_on_step_end` of any pipeline; changes nothing."""
        self._calls, self._last = index + 1, values.get("latents")
        # A solver that calls the network twice a step is told of in steps all the same.
        calls = max(getattr(pipe, "num_timesteps", None) or self._told.total, index + 1)
        now = time.perf_counter()
        preview = None
        if self.previews and now - self._shown >= PREVIEW_SECONDS and values.get("latents") is not None:
            preview = self._previewer.draw(index, values["latents"])
            self._shown = now
        self._told = replace(self._told, done=math.ceil((index + 1) * self._told.total / calls), preview=preview)
        left = (now - self._start) * (1 - self._told.share) / self._told.share
        self.tell(replace(self._told, seconds_left=left))
        return values

    def call(self) -> None:
        """For a pipeline that calls nobody back: its network is called."""
        self.step(None, self._calls, None, {})


def _draw_together(model: Model, wanted: Sequence[Settings], before: int, clock: _Clock) -> list[Image.Image]:
    """A picture of each by one call of the pipeline, after so many others; FloatingPointError if one is none."""
    import numpy as np
    import torch

    from pipelines.engine.previews import Previewer
    from pipelines.samplers import make_sampler

    pipe, own, first = model.pipe, model.pipe.scheduler, wanted[0]
    size = (first.height, first.width) if first.height and first.width else None
    pipe.scheduler = make_sampler(pipe, first.sampler)
    clock.begin(Previewer(pipe, size), before, len(wanted))
    arguments = call_arguments(model, wanted, clock)
    generators = [torch.Generator().manual_seed(one.seed or 0) for one in wanted]
    try:
        generator = generators[0] if len(wanted) == 1 else generators
        images = pipe(**arguments, generator=generator, output_type="np").images
        clock.end()
    except ValueError as error:
        raise cli.UserError(cli.first_line(error)) from error
    finally:
        pipe.scheduler = own
        pipe.maybe_free_model_hooks()  # after a stop or a failure the parts of an offloaded model go back too
    images = np.asarray(images)
    for one, image in zip(wanted, images, strict=True):
        if not np.isfinite(image).all():
            raise FloatingPointError(
                f"the image of {one.prompt!r} is not finite; try --dtype float32 or bfloat16, less guidance, or the"
                " method 'none'"
            )
    return pipe.numpy_to_pil(images)


def call_arguments(model: Model, wanted: Sequence[Settings], clock: _Clock | None = None) -> dict[str, Any]:
    """What the pipeline's call gets for a picture of each; with a clock also what it is to call back."""
    settings = wanted[0]
    arguments: dict[str, Any] = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
        "negative_prompt": settings.negative_prompt or None,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None and name in model.takes}
    if model.kind == CLASSES:
        arguments["class_labels"] = [model.label_of(one.prompt) for one in wanted]
    elif len(wanted) == 1:
        arguments["prompt"] = settings.prompt
    else:
        arguments["prompt"] = [one.prompt for one in wanted]
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [settings.negative_prompt] * len(wanted)
    if settings.method == MEDIATORS:
        arguments["num_mediators"] = make_mediators(**settings.options)
    if clock is not None and "callback_on_step_end" in model.takes:
        arguments["callback_on_step_end"] = clock.step
        arguments["callback_on_step_end_tensor_inputs"] = ["latents"]
    return arguments


def _file_settings(model: Model, settings: Settings) -> dict[str, Any]:
    denoiser = getattr(model.pipe, "transformer", None) or model.pipe.unet
    extra = {"model_hash": model.hash, "device": model.device.type, "dtype": str(denoiser.dtype).split(".")[-1]}
    if model.kind == CLASSES:
        extra["labels"] = [model.label_of(settings.prompt)]
    return describe(replace(settings, model=cli.public_name(settings.model)), extra)
