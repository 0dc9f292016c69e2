"""One model, one set of settings, pictures: what the engine does while it holds the model's lock."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines import cli
from pipelines.mediators import check_mediators, make_mediators
from pipelines.method_catalogue import MEDIATORS
from pipelines.methods import Use, find_method
from pipelines.models import CLASSES, Model
from pipelines.results import Progress, Result, describe
from pipelines.settings import Limits, Settings

if TYPE_CHECKING:
    from PIL import Image

    from attngen import Report

PREVIEW_SECONDS = 0.1  # at least so long between two previews


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
    guidance = model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    return replace(
        settings,
        height=height,
        width=width,
        sampler=settings.sampler or sampler_name(model.pipe.scheduler),
        steps=settings.steps or model.steps,
        guidance_scale=guidance if "guidance_scale" in model.takes else None,
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
                f"{name} must be a multiple of {model.unit} for {model.name}, got {side};"
                f" try {below} or {below + model.unit}"
            )
    if (height or 1) * (width or 1) > limits.pixels:
        raise cli.UserError(f"{width} x {height} is more than {limits.pixels:,} pixels, the most allowed here")
    if settings.height is not None and "height" not in model.takes and model.size != (height, width):
        raise cli.UserError(f"{type(model.pipe).__name__} draws one size only; leave height and width out")
    return height, width


def draw(
    model: Model,
    settings: Settings,
    tell: Callable[[Progress], None],
    stop: threading.Event,
    previews: bool = False,
    count_flops: bool = False,
) -> Result:
    """Draw fitted settings, here and now; the caller holds the model's lock. See `Engine.generate`."""
    import torch

    from pipelines.calls import CallWatch, Stopped
    from pipelines.memory import PeakMemory

    if model.threads is not None:
        torch.set_num_threads(model.threads)
    watch = CallWatch(stop, keep=count_flops)
    pictures: list[Image.Image] = []
    clock = _Clock(settings, tell, previews)
    if "callback_on_step_end" not in model.takes:
        watch.listener = clock.call
    with method_on(model, settings.use, watch) as report:
        peak = PeakMemory(model.device)
        start = time.perf_counter()
        for k in range(settings.images):
            clock.picture = k + 1
            pictures.append(_draw_one(model, settings, (settings.seed or 0) + k, clock))
            if stop.is_set():
                raise Stopped
        seconds = time.perf_counter() - start
        peak_bytes = peak.read()
        found = report()
        flops = _count_flops(model, settings, watch, found) if count_flops else None
    height, width = pictures[0].height, pictures[0].width
    done = replace(settings, height=height, width=width)
    return Result(
        settings=done,
        pictures=pictures,
        seconds=seconds,
        steps=(settings.steps or 1) * settings.images,
        peak_bytes=peak_bytes,
        memory_of="device" if model.device.type == "cuda" else "process",
        flops=None if flops is None else flops // settings.images,
        report=found,
        file_settings=[_file_settings(model, done, k) for k in range(settings.images)],
    )


@contextmanager
def method_on(model: Model, use: Use, watch: Any = None, kernel: str = "auto") -> Iterator[Callable[[], Report | None]]:
    """Within it the model draws by a method; afterwards it is bit for bit what it was. Gives what reports on it.

    Raises:
        UserError: if the method changes nothing in this model.
    """
    import attngen
    from pipelines.calls import watched

    plan = find_method(use.method).plan
    handle = None
    if plan is not None:
        try:
            handle = attngen.apply(model.pipe, plan(use.options), kernel=kernel)
        except ValueError as error:
            raise cli.UserError(f"method {use.method!r} is not for {model.name}: {error}") from error
    try:
        with ExitStack() as stack:
            if watch is not None:
                stack.enter_context(watched(model.pipe, watch))
            yield lambda: None if handle is None else handle.report()
    finally:
        if handle is not None:
            handle.remove()


def _count_flops(model: Model, settings: Settings, watch: Any, report: Report | None) -> int | None:
    stages = [stage for layer in report.patched for stage in layer.stages] if report is not None else []
    if not any(stage.kernel == "triton" for stage in stages):
        return watch.count_flops()
    # Triton's operations cannot be counted; the plain path does the same ones in torch.
    with method_on(model, settings.use, kernel="reference"):
        return watch.count_flops()


class _Clock:
    """Tells of steps: which one, how long yet, and now and then a preview."""

    def __init__(self, settings: Settings, tell: Callable[[Progress], None], previews: bool) -> None:
        self.settings, self.tell, self.previews = settings, tell, previews
        self.picture, self.calls = 1, 0
        self._start = time.perf_counter()
        self._shown = 0.0

    def begin(self, previewer: Any) -> None:
        """A new picture."""
        self.previewer, self.done, self.calls = previewer, 0, 0
        self.tell(Progress("drawing", 0, self.settings.steps or 0, self.picture, self.settings.images))

    def step(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """`callback_on_step_end` of any pipeline; changes nothing."""
        self.calls = index + 1
        # A solver that calls the network twice a step is told of in steps all the same.
        total = self.settings.steps or 1
        calls = max(getattr(pipe, "num_timesteps", None) or total, index + 1)
        self.done = math.ceil((index + 1) * total / calls)
        now = time.perf_counter()
        share = (self.picture - 1 + self.done / total) / self.settings.images
        left = (now - self._start) * (1 - share) / share
        preview = None
        if self.previews and now - self._shown >= PREVIEW_SECONDS and values.get("latents") is not None:
            preview = self.previewer.draw(index, values["latents"])
            self._shown = now
        self.tell(Progress("drawing", self.done, total, self.picture, self.settings.images, left, preview))
        return values

    def call(self) -> None:
        """For a pipeline that calls nobody back: its network is called."""
        self.step(None, self.calls, None, {})


def _draw_one(model: Model, settings: Settings, seed: int, clock: _Clock) -> Image.Image:
    """One picture; FloatingPointError if it is none."""
    import numpy as np
    import torch

    from pipelines.previews import Previewer
    from pipelines.samplers import make_sampler

    pipe, own = model.pipe, model.pipe.scheduler
    size = (settings.height, settings.width) if settings.height and settings.width else None
    pipe.scheduler = make_sampler(pipe, settings.sampler)
    clock.begin(Previewer(pipe, size))
    arguments = call_arguments(model, settings, clock)
    try:
        generator = torch.Generator().manual_seed(seed)
        image = pipe(**arguments, generator=generator, output_type="np").images
    except ValueError as error:
        raise cli.UserError(cli.first_line(error)) from error
    finally:
        pipe.scheduler = own
        pipe.maybe_free_model_hooks()  # after a stop or a failure the parts of an offloaded model go back too
    image = np.asarray(image)
    if not np.isfinite(image).all():
        raise FloatingPointError(
            f"the picture of {settings.prompt!r} is not finite, so it was thrown away; use float32 or bfloat16,"
            " less guidance, or the method 'none'"
        )
    return pipe.numpy_to_pil(image)[0]


def call_arguments(model: Model, settings: Settings, clock: _Clock | None = None) -> dict[str, Any]:
    """What the pipeline's call gets; with a clock also what it is to call back."""
    arguments: dict[str, Any] = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
        "negative_prompt": settings.negative_prompt or None,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None and name in model.takes}
    if model.kind == CLASSES:
        arguments["class_labels"] = [model.label_of(settings.prompt)]
    else:
        arguments["prompt"] = settings.prompt
    if settings.method == MEDIATORS:
        arguments["num_mediators"] = make_mediators(**settings.options)
    if clock is not None and "callback_on_step_end" in model.takes:
        arguments["callback_on_step_end"] = clock.step
        arguments["callback_on_step_end_tensor_inputs"] = ["latents"]
    return arguments


def _file_settings(model: Model, settings: Settings, k: int) -> dict[str, Any]:
    alone = replace(settings, seed=(settings.seed or 0) + k, images=1, model=cli.public_name(settings.model))
    denoiser = getattr(model.pipe, "transformer", None) or model.pipe.unet
    extra = {"model_hash": model.hash, "device": model.device.type, "dtype": str(denoiser.dtype).split(".")[-1]}
    if model.kind == CLASSES:
        extra["labels"] = [model.label_of(settings.prompt)]
    return describe(alone, extra)
