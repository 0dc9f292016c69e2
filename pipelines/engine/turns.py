"""One network at a time: whoever draws with one, or builds one, takes a turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.engine.results import Progress

Tell = Callable[[Progress], None]
POLL_SECONDS = 0.1


class Turns:
    """One thing at a time, in the order of arrival."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def taken(self, tell: Tell = lambda progress: None, stop: threading.Event | None = None) -> Iterator[None]:
        """One turn, waited for in a way that can be stopped; `tell` gets how many come first whenever that changes.

        Raises:
            Stopped: if `stop` is set before the turn comes.
        """
        ticket = object()
        with self._change:
            self._line.append(ticket)
        try:
            self._wait(ticket, tell, stop)
            yield
        finally:
            with self._change:
                self._line.remove(ticket)
                self._change.notify_all()

    def _wait(self, ticket: object, tell: Tell, stop: threading.Event | None) -> None:
        from pipelines.engine.calls import Stopped

        told = 0
        while before := self._before(ticket, told):
            if stop is not None and stop.is_set():
                raise Stopped
            if before != told:
                tell(Progress(f"waiting for another image, {before} before this one"))
                told = before

    def _before(self, ticket: object, told: int) -> int:
        """How many come before a ticket; where that was told already, after a change or a moment."""
        with self._change:
            if told and self._line.index(ticket) == told:
                self._change.wait(POLL_SECONDS)
            return self._line.index(ticket)


# Of this process. Building a network changes PyTorch's default dtype for all threads, so nothing is drawn meanwhile.
TURNS = Turns()
