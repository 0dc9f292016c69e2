"""The page's named endpoints, for programs: /generate and /compare, whose arguments are plain values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.engine.results import Progress, Result, save
from pipelines.engine.rounds import Measured, measure
from pipelines.engine.session import Engine
from pipelines.engine.settings import Settings
from pipelines.ui_compare import parse_methods
from pipelines.ui_events import EXPECTED, QUEUE, Wrap, bounded, message_of

# gr.api reads the types at run time, so they are written as objects, not as the strings that annotations become.
SHARED: dict[str, Any] = {
    "model": str,
    "negative_prompt": str,
    "sampler": str | None,
    "steps": int | None,
    "guidance_scale": float | None,
    "height": int | None,
    "width": int | None,
    "seed": int | None,
    "images": int,
    "return": tuple[list[gr.FileData], dict],
}
ARGUMENTS = """model: one that ships, a hub id, a folder or a file
    negative_prompt: what not to draw; for models of texts only
    sampler: None for the model's own
    steps: sampling steps; None for the model's usual number
    guidance_scale: 1 is off; None for the model's usual one
    height: in pixels, with width; None for the trained size
    width: in pixels, with height
    seed: of the first image, the next has the next seed; None for a new one
    images: number of images
"""
GENERATE = f"""Draw images.

Args:
    prompt: what to draw; for a model of classes the name or the number of a class
    method: of attention, such as none, mediators or agent
    options: of the method, by name
    keep_settings: whether the files hold what made them
    {ARGUMENTS}
Returns:
    The files, and their settings and cost as JSON.
"""
COMPARE = f"""Draw the same images by two to eight methods, and time them in rounds.

Args:
    prompt: what to draw; for a model of classes the name or the number of a class
    methods: such as none, agent num_agents=64, mediators 4; the others are compared with the first
    {ARGUMENTS}
Returns:
    The files in the order of the methods, and a row for each as JSON: seconds, operations, differences, speed.
"""


def add_endpoints(engine: Engine, folder: Path, wrap: Wrap) -> None:
    """Add both to the page that is being built.

    Args:
        engine: that draws.
        folder: where pictures are written.
        wrap: put around each function that draws.
    """
    for name, make in (("generate", _generate), ("compare", _compare)):
        function = make(engine, folder)
        # Gradio's list of the endpoints has no place for what an argument means, but for the text of the whole.
        about = "\n".join(line.strip() for line in str(function.__doc__).splitlines())
        gr.api(wrap(function), api_name=name, api_description=about, concurrency_id=QUEUE)


def _generate(engine: Engine, folder: Path) -> Callable[..., Any]:
    def generate(
        prompt, model=engine.default_model, method="none", options=None, negative_prompt="", sampler=None, steps=None,
        guidance_scale=None, height=None, width=None, seed=0, images=1, keep_settings=True,
    ):  # fmt: skip
        stop = threading.Event()
        given = Settings(
            prompt, negative_prompt, model, method, options or {}, sampler, steps, guidance_scale, height, width, seed,
            images,
        )  # fmt: skip

        def finish(result: Result) -> tuple[list[Any], dict[str, Any]]:
            done = save(result, folder, keep_settings)
            return [_file(path) for path in done.files], {**done.to_dict(), "files": [f.name for f in done.files]}

        events = engine.generate(given, previews=False, stop=stop)
        yield from _told(bounded(events, stop, engine.limits.seconds), finish)

    generate.__doc__ = GENERATE
    generate.__annotations__ = {"prompt": str, "method": str, "options": dict | None, "keep_settings": bool, **SHARED}
    return generate


def _compare(engine: Engine, folder: Path) -> Callable[..., Any]:
    def compare(
        prompt, methods, model=engine.default_model, negative_prompt="", sampler=None, steps=None, guidance_scale=None,
        height=None, width=None, seed=0, images=1,
    ):  # fmt: skip
        stop = threading.Event()
        base = Settings(
            prompt, negative_prompt, model, sampler=sampler, steps=steps, guidance_scale=guidance_scale, height=height,
            width=width, seed=seed, images=images,
        )  # fmt: skip

        def finish(found: Measured) -> tuple[list[Any], dict[str, Any]]:
            saved = [save(row.result, folder).files for row in found.comparison.rows]
            told = found.comparison.to_dict()
            for i, (row, files) in enumerate(zip(told["rows"], saved, strict=True)):
                speed = found.speed(i)
                row |= {"files": [file.name for file in files], "seconds": round(found.median_seconds(i), 3)}
                row["speedup"] = {**speed._asdict(), "differs": speed.differs}
            return [_file(path) for files in saved for path in files], told

        def events() -> Generator[Any, None, None]:
            yield from measure(engine, base, parse_methods(methods), stop=stop)

        yield from _told(bounded(events(), stop, engine.limits.seconds), finish)

    compare.__doc__ = COMPARE
    compare.__annotations__ = {"prompt": str, "methods": list[str], **SHARED}
    return compare


def _told(events: Generator[Any, None, None], finish: Callable[[Any], Any]) -> Generator[Any, None, None]:
    """Progress as JSON, and at last what `finish` makes of the result."""
    try:
        with closing(events):
            for event in events:
                if isinstance(event, Progress):
                    yield [], {"progress": str(event), "share": event.share}
                else:
                    yield finish(event)
    except EXPECTED as error:
        raise gr.Error(message_of(error), print_exception=False) from error


def _file(path: Path) -> Any:
    return {"path": str(path), "orig_name": path.name, "mime_type": "image/png", "meta": {"_type": "gradio.FileData"}}
