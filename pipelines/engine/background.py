"""Work in a thread that tells how far it is and can be stopped; a model that one thread at a time draws with."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pipelines.engine.models import Model
from pipelines.engine.results import Progress

T = TypeVar("T")
Tell = Callable[[Progress], None]


def run_in_thread(
    work: Callable[[Tell, threading.Event], T], when_out_of_memory: Callable[[], None]
) -> Generator[Any, None, None]:
    """Yield what `work(tell, stop)` tells, and then what it returns; its exception is raised here.

    When the generator is closed `stop` is set and the thread is waited for. Where memory runs out
    `when_out_of_memory` is called, unreferenced memory is freed, and a MemoryError says what to do.
    """
    from pipelines.engine.memory import REMEDY, free_memory, is_out_of_memory

    events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        try:
            events.put(("result", work(lambda progress: events.put(("progress", progress)), stop)))
            return
        except BaseException as error:  # to be raised where it can be handled
            failure = MemoryError(f"out of memory: {REMEDY}") if is_out_of_memory(error) else error
        # The error that was caught is gone by here, and with it the frames that held the tensors of the failed step.
        if isinstance(failure, MemoryError):
            when_out_of_memory()
            free_memory()
        events.put(("error", failure))

    thread = threading.Thread(target=run, name="attngen-engine", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = events.get()
            if kind == "error":
                raise value
            yield value
            if kind == "result":
                return
    finally:
        stop.set()
        thread.join()


class Turns:
    """One thing at a time, in the order of arrival."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def taken(self, tell: Tell, stop: threading.Event) -> Iterator[None]:
        """One turn, waited for in a way that can be stopped; how many come first is told whenever it changes.

        Raises:
            Stopped: if `stop` is set before it comes.
        """
        from pipelines.engine.calls import Stopped

        ticket, told = object(), 0
        with self._change:
            self._waiting.append(ticket)
        try:
            while before := self._before(ticket, 0.1 if told else 0):
                if stop.is_set():
                    raise Stopped
                if before != told:
                    tell(Progress(f"waiting for another image, {before} before this one"))
                    told = before
            yield
        finally:
            with self._change:
                self._waiting.remove(ticket)
                self._change.notify_all()

    def _before(self, ticket: object, seconds: float) -> int:
        """How many come before a ticket, after so many seconds or a change."""
        with self._change:
            if seconds and self._waiting[0] is not ticket:
                self._change.wait(seconds)
            return self._waiting.index(ticket)


# One network draws, or is built, at a time: building one changes PyTorch's default dtype for every thread meanwhile.
TURNS = Turns()


@contextmanager
def held(model: Model, tell: Tell, stop: threading.Event) -> Iterator[None]:
    """A turn to draw with the model: no pipeline is thread-safe, and two at once are slower than one after the other."""
    with TURNS.taken(tell, stop), model.lock:
        yield
