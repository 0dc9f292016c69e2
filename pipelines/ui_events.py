"""What the tabs share: errors as messages, and events that one button starts and another stops."""

from __future__ import annotations

import html
import threading
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
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
WAITING, STOPPED, NOT_DONE = "Waiting …", "Stopped. Nothing was written.", "Not done"
TELL_SECONDS = 0.1  # at least so long between two updates of the page
IDLE = ("waiting", "loading")  # what progress of no work of its own begins with


def message_of(error: BaseException) -> str:
    """One plain sentence of an expected error."""
    return " ".join(str(error).split()) or type(error).__name__


def escaped(text: str) -> str:
    """For the corner of the page, whose messages may hold HTML."""
    return html.escape(text, quote=False)


def as_gradio_error(error: BaseException) -> gr.Error:
    """For handlers without a line of status."""
    return gr.Error(escaped(message_of(error)), duration=15, print_exception=False)


def merged(before: Any, value: Any) -> Any:
    """An update of a component that does what two in a row would do."""
    if not isinstance(before, dict):
        return value
    return {**before, **(value if isinstance(value, dict) and "__type__" in value else {"value": value})}


# Work that can be stopped


class Run:
    """Work of one visitor.

    Attributes:
        stop: set by the Stop button, and when the time is over.
        began: whether it has left Gradio's queue.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.began = False


RUNS: dict[str, Run] = {}
"""Work that waits or runs, by visitor and Stop button. A key travels to the work; a `Run` cannot be pickled."""


def stop_of(key: str) -> threading.Event:
    """What stops the work of that key; never set for a key that has none."""
    return RUNS[key].stop if key in RUNS else threading.Event()


def bounded(events: Generator[Any, None, None], stop: threading.Event, seconds: float) -> Generator[Any, None, None]:
    """The events; after so many seconds of work, waiting and loading apart, `stop` is set.

    Raises:
        UserError: when the work has ended for that reason.
    """
    from pipelines.engine.calls import Stopped

    begun, over = None, False
    try:
        with closing(events):
            for event in events:
                if begun is None and not str(event).startswith(IDLE):
                    begun = time.monotonic()
                over = begun is not None and time.monotonic() - begun > seconds
                if over and isinstance(event, Progress):
                    stop.set()
                yield event
    except Stopped:
        if not over:
            raise
        raise UserError(
            f"stopped after {seconds:.0f} s, the most for one request here; ask for fewer or smaller images, or fewer"
            " steps"
        ) from None


def follow(
    events: Generator[Any, None, None],
    status: Any,
    show: Callable[[Progress], dict[Any, Any]],
    finish: Callable[[Any], dict[Any, Any]],
    stopped: str = STOPPED,
) -> Generator[dict[Any, Any], None, None]:
    """Updates of the page for the engine's events.

    Args:
        events: of the engine; closed, and with it the work stopped, when the page stops listening.
        status: the component that shows how far it is.
        show: progress -> updates beside that of the status.
        finish: the result -> updates; it may raise what is expected.
        stopped: the status where the work was stopped.
    """
    from pipelines.engine.calls import Stopped

    told = 0.0
    try:
        with closing(events):
            for event in events:
                if not isinstance(event, Progress):
                    yield finish(event)
                elif event.preview is not None or time.monotonic() - told >= TELL_SECONDS:
                    told = time.monotonic()
                    yield {status: str(event), **show(event)}
    except Stopped:
        yield {status: stopped}
    except EXPECTED as error:
        yield refused(error, status)


def refused(error: BaseException, status: Any) -> dict[Any, Any]:
    """The update for an expected error, which is shown in the corner of the page too.

    It is not raised: Gradio would cover the line of status with the word "Error", until the next event.
    """
    gr.Warning(escaped(message_of(error)), duration=15)
    return {status: f"{NOT_DONE}: {message_of(error)}"}


class Buttons:
    """A start and a Stop button with their line of status: one piece of work at a time for each visitor.

    Args:
        start: the button that starts.
        stop: the button that stops.
        status: the line.
    """

    def __init__(self, start: gr.Button, stop: gr.Button, status: gr.Textbox) -> None:
        self.start, self.stop, self.status = start, stop, status
        # The work ends after its announcement has arrived, so that its own last line is the one that stays.
        stop.click(self._announce, None, [start, stop, status], **QUIET).then(self._stop, None, None, **QUIET)

    @property
    def idle(self) -> dict[Any, Any]:
        """Updates of the buttons when nothing runs."""
        return {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False)}

    def wire(
        self, triggers: Sequence[Any], run: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> Any:
        """Wire a generator, called with a key of `RUNS` and the inputs, to its triggers; returns its event.

        Gradio's own checks of the inputs are off: they name no field and end the event before it can free the buttons.
        """
        buttons = [self.start, self.stop]
        begun = gr.on(triggers, self._begin, None, [*buttons, self.status], **QUIET)

        def run_and_free(request: gr.Request, *values: Any) -> Generator[Any, None, None]:
            key = self._key(request)
            if key not in RUNS:  # stopped while it waited
                yield {**self.idle, self.status: STOPPED}
                return
            RUNS[key].began = True
            try:
                yield from run(key, *values)
            except Exception:
                yield {**self.idle, self.status: f"{NOT_DONE}: a fault of the program; its log has the details."}
                raise
            finally:
                RUNS.pop(key, None)
            yield self.idle

        return begun.success(
            run_and_free,
            list(inputs),
            list(dict.fromkeys([*outputs, self.status, *buttons])),
            preprocess=False,
            concurrency_id=QUEUE,
            show_progress="minimal",
            show_progress_on=[self.status],
            api_visibility="private",
        )

    def _key(self, request: gr.Request) -> str:
        return f"{request.session_hash} {self.stop.elem_id}"

    def _begin(self, request: gr.Request) -> dict[Any, Any]:
        if self._key(request) in RUNS:
            raise gr.Error("The last request is still running; Stop ends it.", duration=5, print_exception=False)
        RUNS[self._key(request)] = Run()
        return {self.start: gr.update(interactive=False), self.stop: gr.update(interactive=True), self.status: WAITING}

    def _announce(self, request: gr.Request) -> dict[Any, Any]:
        run = RUNS.get(self._key(request))
        if run is None or not run.began:
            RUNS.pop(self._key(request), None)
            return {**self.idle, self.status: STOPPED}
        return {self.stop: gr.update(interactive=False), self.status: "Stopping: the network ends its call …"}

    def _stop(self, request: gr.Request) -> None:
        if run := RUNS.get(self._key(request)):
            run.stop.set()
