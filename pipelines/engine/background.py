"""Work in a thread that tells how far it is and can be stopped; a model that one thread at a time draws with."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pipelines.engine.models import Model
from pipelines.engine.turns import TURNS, Tell

T = TypeVar("T")


def run_in_thread(
    work: Callable[[Tell, threading.Event], T],
    when_out_of_memory: Callable[[], None],
    stop: threading.Event | None = None,
) -> Generator[Any, None, None]:
    """Yield what `work(tell, stop)` tells, and then what it returns; its exception is raised here.

    Where `stop` is set the work ends at the next call of the network, with `pipelines.engine.calls.Stopped`. When the
    generator is closed `stop` is set and the thread is waited for. Where memory runs out
    `when_out_of_memory` is called, unreferenced memory is freed, and a MemoryError says what to do.
    """
    from pipelines.engine.memory import REMEDY, free_memory, is_out_of_memory

    events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    stop = stop or threading.Event()

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
    kind = ""
    try:
        while kind != "result":
            kind, value = events.get()
            if kind == "error":
                raise value
            yield value
    finally:
        if kind == "progress":  # whoever listened has gone; else a caller's event stays as it is, for its next work
            stop.set()
        thread.join()


@contextmanager
def held(model: Model, tell: Tell, stop: threading.Event) -> Iterator[None]:
    """A turn to draw with the model: no pipeline is thread-safe, and two at once are slower than in turn."""
    with TURNS.taken(tell, stop), model.lock:
        yield
