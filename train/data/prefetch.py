"""Batches made ahead of the training by threads, in order.

Threads rather than processes: Pillow decodes and resizes without holding the interpreter, the unreadable pictures are
counted in one place, and memory-mapped latents are not mapped again for each.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.data.base import EVERYTHING, Data, SampleError
from train.data.sources import shown

Schedule = Callable[[int], tuple[Tensor, torch.Generator]]
_POLL_SECONDS = 0.1


class Batch(NamedTuple):
    """What a step trains on.

    Attributes:
        step: number of the step.
        indices: of the whole batch, over all processes.
        clean: (b, C, H, W), the part of this process.
        labels: (b,) of the same.
        generator: the step's, after the draws of the data; for noise and times.
        draws: what the prefetcher's `draw` made of it.
    """

    step: int
    indices: Tensor
    clean: Tensor
    labels: Tensor
    generator: torch.Generator
    draws: Any = None


class Prefetcher(Iterator[Batch]):
    """Iterator over the batches of steps `start`, `start + 1`, …

    The batches do not depend on `workers` and `ahead`. Use it in a `with` block, or call :meth:`close`.

    Args:
        data: of `open_data`.
        schedule: step -> indices of the whole batch, and a new generator of that step.
        workers: threads that read samples; 0 makes each batch when it is asked for, in the calling thread.
        ahead: batches kept ready, at least 1.
        part: positions of a batch for this process, `slice(rank, None, world)`.
        start: first step.
        stop: step before which to end, or None for no end.
        draw: batch -> what else a step draws, noise and times, so that this is done ahead, too.

    Attributes:
        waited: seconds the training has waited for data so far.
    """

    def __init__(
        self,
        data: Data,
        schedule: Schedule,
        workers: int = 4,
        ahead: int = 2,
        *,
        part: slice = EVERYTHING,
        start: int = 0,
        stop: int | None = None,
        draw: Callable[[Batch], Any] | None = None,
    ) -> None:
        if workers < 0 or ahead < 1:
            raise ValueError(f"workers is {workers} and ahead {ahead}; expected at least 0 and at least 1")
        self.data, self.schedule, self.part, self.draw = data, schedule, part, draw
        self.next_step, self.stop = start, stop
        self.waited = 0.0
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures") if workers else None
        # Not a daemon: one that is torn down inside PyTorch at the end of the program aborts it.
        self._producer = threading.Thread(target=self._produce, args=(start,), name="batches")
        if workers:
            self._producer.start()

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            ValueError: if the data cannot be used, naming step and pictures.
            RuntimeError: for any other fault while the batch was made, naming the same.
        """
        if self._closed.is_set() or self.next_step == self.stop:
            self.close()
            raise StopIteration
        started = time.perf_counter()
        made = self._take() if self._pool else self._make(self.next_step)
        self.waited += time.perf_counter() - started
        if isinstance(made, Exception):
            self.close()
            raise made
        self.next_step += 1
        return made

    def _take(self) -> Batch | Exception:
        while True:
            try:
                return self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if not self._producer.is_alive() and self._ready.empty():
                    return RuntimeError(f"step {self.next_step + 1}: the thread that makes batches has ended")

    def _make(self, step: int) -> Batch | Exception:
        indices = None
        try:
            indices, generator = self.schedule(step)
            clean, labels = self.data.batch(indices, generator, part=self.part, pool=self._pool)
            batch = Batch(step, indices, clean, labels, generator)
            return batch if self.draw is None else batch._replace(draws=self.draw(batch))
        except Exception as error:  # raised where the batch is asked for, not in a thread nobody watches
            return self._described(step, indices, error)

    def _described(self, step: int, indices: Tensor | None, error: Exception) -> Exception:
        if isinstance(error, ValueError):
            described: Exception = ValueError(f"step {step + 1}: {error}")
        elif isinstance(error, SampleError):
            described = SampleError(f"step {step + 1}: {error}")
        else:
            names = "" if indices is None else f", images {shown(self._names(indices[self.part]))}"
            described = RuntimeError(f"step {step + 1}{names}: {type(error).__name__}: {error}")
        described.__cause__ = error
        return described

    def _names(self, indices: Tensor) -> list[str]:
        try:
            return self.data.names(indices)
        except Exception:  # an index out of range is one of the faults to describe
            return [str(i) for i in indices.tolist()]

    def _produce(self, step: int) -> None:
        while step != self.stop and self._is_wanted():
            made = self._make(step)
            if not self._offer(made) or isinstance(made, Exception):
                return
            step += 1

    def _is_wanted(self) -> bool:
        """False once closed, or when the program ends without closing."""
        return threading.main_thread().is_alive() and not self._closed.is_set()

    def _offer(self, made: Batch | Exception) -> bool:
        while self._is_wanted():
            try:
                self._ready.put(made, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def close(self) -> None:
        """End the threads. Batches that were made ahead are dropped."""
        self._closed.set()
        if self._pool:
            self._producer.join()
            self._pool.shutdown()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
