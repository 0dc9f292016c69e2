"""Seconds of calls that compete, taken in turn within a limit, as they run: eagerly, or as replays of a graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

_SHORTEST = 5e-4
"""Seconds of a measurement; shorter calls are repeated."""

_MOST_ROUNDS = 15


def in_turn(calls: Mapping[str, Callable[[], object]], device: torch.device, limit: float) -> dict[str, float]:
    """Fewest seconds of each call in rounds that take each once: what other processes add is no part of it.

    A call that raises is left out.

    Args:
        calls: by name.
        device: that they run on; a GPU is waited for at the end of each measurement, so that the time is the longer of
            the host's and the device's.
        limit: seconds after which no further round begins; two are measured in any case.
    """
    now, meters = _clock(device), dict[str, Callable[[], float]]()
    start = now()
    for name, call in calls.items():
        try:
            meters[name] = _meter(call, device, now)
        except Exception:  # a kernel that does not take this shape, or no memory for it
            continue
    found: dict[str, list[float]] = {name: [] for name in meters}
    for done in range(_MOST_ROUNDS):
        if done >= 2 and now() - start > limit:
            break
        for name, meter in meters.items():
            found[name].append(meter())
    return {name: min(seconds) for name, seconds in found.items()}


def as_graphs(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Callable[[], None]]:
    """The calls as replays of CUDA graphs; those that cannot be captured are left out."""
    found: dict[str, Callable[[], None]] = {}
    for name, call in calls.items():
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        try:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                call()
        except Exception:
            torch.cuda.synchronize(device)
            continue
        found[name] = graph.replay
    return found


def _clock(device: torch.device) -> Callable[[], float]:
    """What other processes do is not in the time of a thread; with several threads, or a GPU, it has to be."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _meter(call: Callable[[], object], device: torch.device, now: Callable[[], float]) -> Callable[[], float]:
    """A measurement of the call, which is warm after this and repeated as often as its time asks for."""

    def seconds(times: int) -> float:
        _wait(device)
        start = now()
        for _ in range(times):
            call()
        _wait(device)
        return (now() - start) / times

    seconds(1)
    times = max(1, min(100, round(_SHORTEST / max(seconds(1), 1e-7))))
    return lambda: seconds(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
