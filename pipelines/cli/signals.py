"""Asked to stop: SIGTERM and Ctrl+C finish what is being done, save and end a run instead of losing it."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Any


class StopOnSignal:
    """Handles SIGTERM and SIGINT in a `with` block; a second Ctrl+C ends the program at once.

    Args:
        finishing: what is finished first, for the message after Ctrl+C.

    Attributes:
        by: number of the signal that came first, or None.
    """

    def __init__(self, finishing: str = "this step") -> None:
        self.finishing = finishing
        self.by: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.by is not None

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
        if self.by is None:
            self.by = number
        if number == signal.SIGINT:
            print(f"\nstopping after {self.finishing}, to save; Ctrl+C again stops at once", file=sys.stderr)
