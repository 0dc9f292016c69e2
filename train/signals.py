"""Asked to stop: SIGTERM and Ctrl+C finish the step, save and end a run instead of losing it."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Any


class StopOnSignal:
    """Handles SIGTERM and SIGINT in a `with` block; a second Ctrl+C ends the program at once.

    Attributes:
        requested: whether one came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread, where a caller handles signals
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if number == signal.SIGINT:
            print("\nstopping after this step, to save; Ctrl+C again stops at once", file=sys.stderr)
