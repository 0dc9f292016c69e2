"""The page's named endpoints, for programs: /generate and /compare, whose arguments are plain values."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.engine.results import Progress, save
from pipelines.engine.session import Engine
from pipelines.engine.settings import Settings
from pipelines.methods.uses import Use, parse_use
from pipelines.ui_events import EXPECTED, QUEUE, Wrap, as_gradio_error


def add_endpoints(engine: Engine, folder: Path, wrap: Wrap) -> None:
    """Add both to the page that is being built.

    Args:
        engine: that draws.
        folder: where pictures are written.
        wrap: put around each function that draws.
    """
    gr.api(wrap(_generate(engine, folder)), api_name="generate", concurrency_limit=1, concurrency_id=QUEUE)
    gr.api(wrap(_compare(engine, folder)), api_name="compare", concurrency_limit=1, concurrency_id=QUEUE)


def _generate(engine: Engine, folder: Path) -> Callable[..., Any]:
    # gr.api reads the types at run time, so they are written as objects, not as the strings that annotations become.
    def generate(
        prompt,
        model=engine.default_model,
        method="none",
        options=None,
        negative_prompt="",
        sampler=None,
        steps=None,
        guidance_scale=None,
        height=None,
        width=None,
        seed=0,
        images=1,
        keep_settings=True,
    ):
        """Draw pictures.

        Returns their files, and what they cost as JSON. A seed of None is a new one; None elsewhere is the model's own.
        For a model of classes the prompt is the name or the number of a class.
        """
        given = Settings(
            prompt=prompt,
            negative_prompt=negative_prompt,
            model=model,
            method=method,
            options=options or {},
            sampler=sampler,
            steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            seed=seed,
            images=images,
        )
        for event in _told(engine.generate(given, previews=False)):
            if isinstance(event, Progress):
                yield [], {"progress": str(event), "share": event.share}
            else:
                done = save(event, folder, keep_settings)
                yield [_file(path) for path in done.files], {**done.to_dict(), "files": [f.name for f in done.files]}

    generate.__annotations__ = {
        "prompt": str,
        "model": str,
        "method": str,
        "options": dict | None,
        "negative_prompt": str,
        "sampler": str | None,
        "steps": int | None,
        "guidance_scale": float | None,
        "height": int | None,
        "width": int | None,
        "seed": int | None,
        "images": int,
        "keep_settings": bool,
        "return": tuple[list[gr.FileData], dict],
    }
    return generate


def _compare(engine: Engine, folder: Path) -> Callable[..., Any]:
    def compare(
        prompt,
        methods,
        model=engine.default_model,
        steps=None,
        guidance_scale=None,
        height=None,
        width=None,
        seed=0,
        images=1,
    ):
        """Draw the same pictures by two or more methods, such as ["none", "agent num_agents=64", "tome"].

        Returns the files in the order of the methods, and a row for each as JSON: time, steps/s, memory, FLOPs, error.
        """
        base = Settings(
            prompt=prompt,
            model=model,
            steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            seed=seed,
            images=images,
        )
        try:
            uses: list[Use] = [parse_use(str(typed)) for typed in methods]
        except EXPECTED as error:
            raise as_gradio_error(error) from error
        for event in _told(engine.compare(base, uses, previews=False)):
            if isinstance(event, Progress):
                yield [], {"progress": str(event), "share": event.share}
            else:
                files = [path for row in event.rows for path in save(row.result, folder).files]
                yield [_file(path) for path in files], event.to_dict()

    compare.__annotations__ = {
        "prompt": str,
        "methods": list[str],
        "model": str,
        "steps": int | None,
        "guidance_scale": float | None,
        "height": int | None,
        "width": int | None,
        "seed": int | None,
        "images": int,
        "return": tuple[list[gr.FileData], dict],
    }
    return compare


def _told(events: Generator[Any, None, None]) -> Generator[Any, None, None]:
    try:
        with closing(events):
            yield from events
    except EXPECTED as error:
        raise as_gradio_error(error) from error


def _file(path: Path) -> Any:
    return {"path": str(path), "orig_name": path.name, "mime_type": "image/png", "meta": {"_type": "gradio.FileData"}}
