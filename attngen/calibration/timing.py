"""The clock of a calibration."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def usual_clock(device: torch.device) -> Callable[[], float]:
    """CPU time of the calling thread where one CPU thread computes, which other processes do not add to; else time."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


class Stopwatch:
    """Measures the seconds that a computation takes.

    Args:
        device: that computes; the clock is read when it has finished.
        clock: gives seconds; None takes `usual_clock`.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        self.device, self.clock = device, clock or usual_clock(device)

    def __call__(self, compute: Callable[[], T]) -> tuple[T, float]:
        """The result of `compute`, and its seconds."""
        self._wait()
        start = self.clock()
        result = compute()
        self._wait()
        return result, self.clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
