"""Compare the speed of callables in one process, in turn, so that a machine that gets slower meanwhile matters little.

    sets = [make_inputs(seed) for seed in range(input_sets(bytes_of_one, "cuda"))]
    timing = compare({"exact": exact, "agents": agents}, sets, baseline="exact", device="cuda")
    timing.row("agents")["speedup"]["median"]

Every round measures each callable once. The ratio of a round is the baseline's time of that round over the callable's;
medians and quartiles are of these ratios.

The clock on a CPU is the CPU time of the calling thread with one thread (what other processes do is not in it) and the
wall clock with several. On CUDA it is the time between two events around replays of one CUDA graph, which holds one
call on each of the input sets; where the capture fails the calls are launched one by one, and the row says so.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Inputs = Sequence[tuple[Any, ...]]


@dataclass
class Timing:
    """What `compare` measured.

    Attributes:
        seconds: by callable, the seconds of one call in each round.
        baseline: the callable that ratios are taken against.
        peak_bytes: by callable, see `peak_memory`; empty if not asked for.
        clock: "thread CPU time", "wall clock" or "CUDA events".
        launches: by callable, "graph" or "plain: reason" on CUDA; empty on a CPU.
    """

    seconds: dict[str, list[float]]
    baseline: str
    clock: str
    peak_bytes: dict[str, int] = field(default_factory=dict)
    launches: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, baseline: str | None = None) -> list[float]:
        """How many times faster than the baseline (or another callable), round by round."""
        paired = zip(self.seconds[baseline or self.baseline], self.seconds[name], strict=True)
        return [base / own for base, own in paired]

    def fastest(self, names: Sequence[str]) -> str:
        """The one of `names` with the lowest median."""
        return min(names, key=self.median)

    def row(self, name: str, baseline: str | None = None) -> dict[str, Any]:
        """Everything about one callable as JSON values."""
        row: dict[str, Any] = {
            "name": name,
            "baseline": baseline or self.baseline,
            "seconds": self.seconds[name],
            "median_seconds": self.median(name),
            "speedup": spread(self.ratios(name, baseline)),
        }
        if name in self.peak_bytes:
            row["peak_bytes"] = self.peak_bytes[name]
        if name in self.launches:
            row["launches"] = self.launches[name]
        return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [low, low, high]
    return {"median": statistics.median(ordered), "q1": quartiles[0], "q3": quartiles[2], "min": low, "max": high}


def compare(
    candidates: Mapping[str, Callable[..., Any]],
    inputs: Inputs,
    *,
    baseline: str,
    device: str = "cpu",
    rounds: int = 7,
    training: bool = False,
    leaves: Mapping[str, Sequence[torch.Tensor]] | None = None,
    min_seconds: float | None = None,
    graph: bool = True,
    uniform: bool = False,
    memory: bool = False,
    progress: bool = True,
) -> Timing:
    """Time every callable on every round, in turn.

    Args:
        candidates: by name; each is called with the arguments of an input set and returns a tensor (or a tuple or list
            of tensors). On CUDA it must not wait for the device.
        inputs: sets of arguments. A call of a CPU measurement takes one after another; a CUDA graph holds one call on
            each, so that with `input_sets` of them none is served from the cache.
        baseline: name of the candidate that ratios are taken against.
        device: "cpu" or a CUDA device.
        rounds: measurements of each candidate.
        training: measure the forward and the backward. Gradients of all tensors of the inputs that require grad, of the
            parameters of a candidate that is a module, and of `leaves`. Otherwise under `torch.no_grad`.
        leaves: by candidate, more tensors to differentiate by.
        min_seconds: shortest measurement; calls are repeated until it is reached. 0.02 on CUDA, 0.05 on a CPU if None.
        graph: capture CUDA graphs.
        uniform: launch all plainly where the capture of one fails, so that ratios compare the same thing.
        memory: measure peak memory too, see `peak_memory`.
        progress: show a bar where the standard error is a terminal.

    Raises:
        ValueError: for an unknown baseline, no inputs, or rounds below 1.
    """
    import torch
    from tqdm import tqdm

    if baseline not in candidates:
        raise ValueError(f"the baseline {baseline!r} is not among {', '.join(candidates)}")
    if not inputs or rounds < 1:
        raise ValueError(f"a comparison needs input sets and rounds, got {len(inputs)} and {rounds}")
    on_cpu = torch.device(device).type == "cpu"
    shortest = (0.05 if on_cpu else 0.02) if min_seconds is None else min_seconds
    result = Timing({name: [] for name in candidates}, baseline, _clock_name(on_cpu))
    bar = tqdm(total=len(candidates) * (rounds + 1), disable=not (progress and sys.stderr.isatty()), unit="measurement")
    meters: dict[str, Callable[[], float]] = {}
    calls: dict[str, Callable[..., Any]] = {}
    for name, candidate in candidates.items():
        call = as_call(candidate, training, (leaves or {}).get(name, ()))
        call(*inputs[0])  # compiles, tunes and allocates
        if memory:
            result.peak_bytes[name] = peak_memory(lambda call=call: call(*inputs[0]), device)
        if on_cpu:
            meters[name] = _cpu_meter(call, inputs, shortest)
        else:
            meters[name], result.launches[name] = _cuda_meter(call, inputs, shortest, graph)
        calls[name] = call
        bar.update()
    failed = [name for name, how in result.launches.items() if how != "graph"]
    if uniform and graph and failed:
        for name, call in calls.items():
            reason = result.launches[name] if name in failed else f"plain: like {failed[0]}"
            meters[name], result.launches[name] = _cuda_meter(call, inputs, shortest, False)[0], reason
    for _ in range(rounds):
        for name, meter in meters.items():
            result.seconds[name].append(meter())
            bar.update()
    bar.close()
    return result


def input_sets(bytes_per_set: int, device: str = "cpu", most: int = 64) -> int:
    """How many input sets it takes to exceed twice the L2 cache of a GPU; 1 on a CPU, and at most `most`.

    On a CPU the layer before leaves its output in the cache too, so one set is what happens in a model.
    """
    import torch

    if torch.device(device).type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(most, -(-2 * cache // max(1, bytes_per_set))))


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """Most bytes that one call has allocated at a time, on top of what is there before it.

    On CUDA `torch.cuda.max_memory_allocated`. On a CPU the running sum of the allocations and releases that torch's
    profiler records, so tensors only: scratch space inside of oneDNN and MKL is not in it.
    """
    import torch

    gc.collect()
    if torch.device(device).type != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _without_notices(),
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile,
    ):
        result = call()
    del result
    recorded: Any = profile.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def copy_bandwidth(device: str = "cpu", num_bytes: int | None = None, rounds: int = 11) -> float:
    """Bytes a second of a large copy, read and written bytes both counted: what a streaming kernel can reach.

    Args:
        device: "cpu" or a CUDA device.
        num_bytes: size of the source; 1 GiB on CUDA and 256 MiB on a CPU if None.
        rounds: copies; the median counts.
    """
    import torch

    on_cpu = torch.device(device).type == "cpu"
    size = num_bytes or (2**28 if on_cpu else 2**30)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = compare(
        {"copy": target.copy_}, [(source,)], baseline="copy", device=device, rounds=rounds, graph=False, progress=False
    )
    return 2 * size / timing.median("copy")


@contextmanager
def _without_notices() -> Iterator[None]:
    """Without what torch's profiler writes to the standard error by itself; exceptions pass."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _clock_name(on_cpu: bool) -> str:
    import torch

    if not on_cpu:
        return "CUDA events"
    return "thread CPU time" if torch.get_num_threads() == 1 else "wall clock"


def as_call(candidate: Callable[..., Any], training: bool, leaves: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """The work of one measurement: the forward without gradients, or forward and backward. See `compare`."""
    import torch

    def forward(*arguments: Any) -> Any:
        with torch.no_grad():
            return candidate(*arguments)

    if not training:
        return forward
    own = list(candidate.parameters()) if isinstance(candidate, torch.nn.Module) else []
    fixed = [tensor for tensor in (*own, *leaves) if tensor.requires_grad]
    seeds: dict[Any, torch.Tensor] = {}

    def forward_and_backward(*arguments: Any) -> Any:
        with torch.enable_grad():
            output = candidate(*arguments)
            output = output[0] if isinstance(output, (tuple, list)) else output
            key = (output.shape, output.dtype)
            if key not in seeds:  # random, because a GPU draws less power and runs faster on constants
                generator = torch.Generator(device=output.device).manual_seed(0)
                seeds[key] = torch.empty_like(output, memory_format=torch.contiguous_format)
                seeds[key] = seeds[key].detach().normal_(generator=generator)
            given = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
            return torch.autograd.grad(output, [*given, *fixed], seeds[key], allow_unused=True)

    return forward_and_backward


def _cpu_meter(call: Callable[..., Any], inputs: Inputs, shortest: float) -> Callable[[], float]:
    import torch

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    position = 0

    def once(calls: int) -> float:
        nonlocal position
        start = clock()
        for _ in range(calls):
            call(*inputs[position % len(inputs)])
            position += 1
        return clock() - start

    calls = _repetitions(once, shortest)
    return lambda: once(calls) / calls


def _cuda_meter(
    call: Callable[..., Any], inputs: Inputs, shortest: float, graph: bool
) -> tuple[Callable[[], float], str]:
    import torch

    def over_all() -> None:
        for arguments in inputs:
            call(*arguments)

    launch, how = over_all, "plain: not asked for"
    if graph:
        launch, how = _captured(over_all)

    def once(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    calls = _repetitions(once, shortest)
    return lambda: once(calls) / (calls * len(inputs)), how


def _captured(run: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """`run` as the replay of a CUDA graph, or `run` itself and the reason why it cannot be one."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception as error:
        torch.cuda.synchronize()
        return run, f"plain: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return graph.replay, "graph"


def _repetitions(once: Callable[[int], float], shortest: float) -> int:
    """How many calls make a measurement of at least `shortest` seconds."""
    if shortest <= 0:
        return 1
    calls, seconds = 1, once(1)
    while seconds < shortest and calls < 10_000:
        calls = min(10_000, max(calls + 1, int(1.2 * calls * shortest / max(seconds, 1e-7))))
        seconds = once(calls)
    return calls
