"""What the tabs share: errors as messages, and events that one button starts and another stops."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import gradio as gr

from pipelines.cli import UserError
from pipelines.engine.results import Progress

EXPECTED = (UserError, FloatingPointError, MemoryError, OSError)
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
QUEUE = "model"  # all that draws waits in one line
STOPPED = "Stopped. Nothing was written."
# Late progress of a stopped event arrives after it; the message that stays is written after that.
SETTLE_SECONDS = 0.4
TELL_SECONDS = 0.1  # at least so long between two updates of the page


def message_of(error: BaseException) -> str:
    """One plain sentence of an expected error."""
    return " ".join(str(error).split()) or type(error).__name__


def as_gradio_error(error: BaseException) -> gr.Error:
    """For the toast and the API; text of users is escaped, for toasts may hold HTML."""
    return gr.Error(html.escape(message_of(error), quote=False), duration=15, print_exception=False)


def merged(before: Any, value: Any) -> Any:
    """An update of a component that does what two in a row would do."""
    if not isinstance(before, dict):
        return value
    return {**before, **(value if isinstance(value, dict) and "__type__" in value else {"value": value})}


def follow(
    events: Generator[Any, None, None],
    status: Any,
    show: Callable[[Progress], dict[Any, Any]],
    finish: Callable[[Any], dict[Any, Any]],
) -> Generator[dict[Any, Any], None, None]:
    """Updates of the page for the engine's events.

    Args:
        events: of the engine; closed, and with it the work stopped, when the page stops listening.
        status: the component that says how far it is.
        show: progress -> updates beside that of the status.
        finish: the result -> updates; it may raise what is expected.
    """
    told = 0.0
    try:
        with closing(events):
            for event in events:
                if not isinstance(event, Progress):
                    yield finish(event)
                elif event.preview is not None or time.monotonic() - told >= TELL_SECONDS:
                    told = time.monotonic()
                    yield {status: str(event), **show(event)}
    except EXPECTED as error:
        yield {status: f"Not done: {message_of(error)}"}
        raise as_gradio_error(error) from error


def started_and_stopped(
    triggers: Sequence[Any],
    run: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    start: gr.Button,
    stop: gr.Button,
    status: gr.Textbox,
) -> Any:
    """Wire a generator to its triggers and its Stop button; returns the event that follows it."""
    buttons = [start, stop]
    begun = gr.on(
        triggers,
        lambda: (gr.update(interactive=False), gr.update(interactive=True), "Waiting …"),
        None,
        [*buttons, status],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

    def run_and_free(*values: Any) -> Generator[Any, None, None]:
        try:
            yield from run(*values)
        except Exception:
            # An error ends the chain, and the page would wait for ever.
            yield dict(zip(buttons, _idle(), strict=True))
            raise

    running = begun.then(
        run_and_free,
        list(inputs),
        [*outputs, *buttons],
        concurrency_limit=1,
        concurrency_id=QUEUE,
        show_progress="minimal",
        show_progress_on=[status],
        api_visibility="private",
    )
    ended = running.then(_idle, None, buttons, queue=False, show_progress="hidden", api_visibility="private")
    stop.click(None, None, None, cancels=[running], api_visibility="private").then(
        _settled, None, [*buttons, status], queue=False, show_progress="hidden", api_visibility="private"
    )
    return ended


def _idle() -> tuple[Any, Any]:
    return gr.update(interactive=True), gr.update(interactive=False)


def _settled() -> tuple[Any, Any, str]:
    time.sleep(SETTLE_SECONDS)
    return *_idle(), STOPPED
