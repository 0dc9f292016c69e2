"""What a row of the quality table costs: operations of a picture, those of its attention layers, and time."""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attngen import Report
    from attngen.kernels.dispatch import Kernel
    from benchmarks.studies.quality_rows import Row
    from pipelines.engine.calls import Call, CallWatch


def costs(sampler: Any, rows: Sequence[Row], options: argparse.Namespace, baseline: Row) -> dict[str, dict[str, Any]]:
    """Operations and time of each row that can be drawn; for another, stderr says why it is left out.

    Returns:
        By the row's name: `gflop`, of one picture; `attention_gflop`, of its patched layers, and `attention_exact`,
        what they would take with softmax, both None for a model with attention of its own; `seconds`, of a picture,
        and `speedup`, the median over rounds of the baseline's time through the row's, measured in turn.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        try:
            found[row.name] = operations(sampler, row, options)
        except ValueError as error:
            print(f"benchmarks.studies.quality: {row.name} is left out: {error}", file=sys.stderr)
    by_name = {row.name: row for row in [baseline, *rows] if row is baseline or row.name in found}
    times: dict[str, list[float]] = {name: [] for name in by_name}
    for round_number in range(options.rounds + 1):
        for name, row in by_name.items():
            seconds = _seconds(sampler, row, options)
            if round_number:  # the first is the warm-up
                times[name].append(seconds)
    for name in found:
        ratios = [a / b for a, b in zip(times[baseline.name], times[name], strict=True)]
        found[name] |= {"seconds": statistics.median(times[name]), "speedup": statistics.median(ratios)}
    return found


def operations(sampler: Any, row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Operations of one picture, guidance included.

    Raises:
        ValueError: if the row's plan changes nothing in the model.
    """
    from pipelines.engine.calls import CallWatch, watched

    watch = CallWatch(threading.Event(), keep=True)
    with drawn_with(sampler, row) as report, watched(sampler.pipe, watch):
        draw(sampler, row, options)
        seen = report()
    with drawn_with(sampler, row, kernel="reference"):
        flops = watch.count_flops()
    now, exact = _attention(seen, watch)
    return {"gflop": None if flops is None else flops / 1e9, "attention_gflop": now, "attention_exact": exact}


def _attention(report: Report | None, watch: CallWatch) -> tuple[float | None, float | None]:
    """GFLOP of the patched layers over all calls of a picture, as they are and exact."""
    if report is None:
        return None, None
    now = exact = 0.0
    for kind, calls in watch.counts.items():
        stage, samples = kind[1], calls * _samples(watch.calls[kind])
        now += samples * report.flops[int(stage or 0)]
        exact += samples * report.flops_exact
    return now / 1e9, exact / 1e9


def _samples(call: Call) -> int:
    """Samples in a call of the network: two a picture where the pipeline guides it, whoever chose the scale."""
    tensors = (x for x in (*call.args, *call.kwargs.values()) if hasattr(x, "ndim"))
    return next(len(x) for x in tensors if x.ndim >= 3)


@contextmanager
def drawn_with(sampler: Any, row: Row, kernel: Kernel = "auto") -> Iterator[Callable[[], Report | None]]:
    """Within it the model draws as the row says; gives what reports on it."""
    import attngen

    if row.plan is None:
        yield lambda: None
        return
    with attngen.apply(sampler.pipe, row.plan, kernel=kernel) as handle:
        yield handle.report


def draw(sampler: Any, row: Row, options: argparse.Namespace) -> None:
    """Draw one picture; the result is discarded."""
    import torch

    from train.sampling.model import make_mediators

    subject = {"class_labels": [0]} if sampler.draws_classes else {"prompt": "a photo"}
    arguments = dict(sampler.arguments)
    if row.mediators is not None:
        arguments["num_mediators"] = make_mediators(row.mediators)
    generator = torch.Generator().manual_seed(0)
    sampler.pipe(
        **subject, **arguments, generator=[generator] if sampler.draws_classes else generator, output_type="np"
    )


def _seconds(sampler: Any, row: Row, options: argparse.Namespace) -> float:
    import torch

    on_gpu = sampler.pipe.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time  # on a CPU other programs should not count
    with drawn_with(sampler, row):
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        draw(sampler, row, options)
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - start
