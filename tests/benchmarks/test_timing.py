"""The clock: what is timed, how often, and in which order."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from benchmarks import timing
from tests.benchmarks.programs import spin

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def test_times_and_ratios_are_of_the_work_done(one_thread):
    timed = timing.compare(
        {"slow": lambda: spin(0.02), "fast": lambda: spin(0.005)},
        [()],
        baseline="slow",
        rounds=3,
        min_seconds=0.0,
    )
    assert timed.clock == "thread CPU time"
    assert all(0.02 <= seconds < 0.03 for seconds in timed.seconds["slow"])
    row = timed.row("fast")
    assert row["baseline"] == "slow" and len(row["seconds"]) == 3
    assert 2.5 < row["speedup"]["median"] <= 4.01
    assert timed.ratios("slow") == [1.0] * 3 and timed.row("slow", "fast")["speedup"]["median"] < 0.4
    assert timed.fastest(["slow", "fast"]) == "fast"


def test_sleeping_is_no_cpu_time(one_thread):
    def sleep():
        time.sleep(0.03)
        return torch.zeros(1)

    timed = timing.compare({"sleep": sleep}, [()], baseline="sleep", rounds=1, min_seconds=0.0)
    assert timed.median("sleep") < 0.01


def test_rounds_are_interleaved_and_input_sets_take_turns(one_thread):
    calls = []

    def candidate(name):
        def run(x):
            calls.append((name, x))
            return torch.zeros(1)

        return run

    names = ("a", "b", "c")
    sets = [(1,), (2,)]
    timing.compare({n: candidate(n) for n in names}, sets, baseline="a", rounds=4, min_seconds=0.0, progress=False)
    # Each candidate: one call to warm up, then every round a, b, c.
    measured = calls[len(names) :]
    assert [name for name, _ in measured] == list("abc") * 4
    assert [x for name, x in measured if name == "b"] == [1, 2, 1, 2]


def test_short_calls_are_repeated(one_thread):
    count = 0

    def run():
        nonlocal count
        count += 1
        return spin(0.001)

    timed = timing.compare({"a": run}, [()], baseline="a", rounds=2, min_seconds=0.02)
    assert all(0.001 <= seconds < 0.002 for seconds in timed.seconds["a"]) and count > 2 * 18


def test_spread():
    assert timing.spread([3.0, 1.0, 2.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 5.0}
    assert timing.spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "max": 2.0}


def test_a_training_call_differentiates_by_inputs_parameters_and_leaves():
    x, weight = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    linear = torch.nn.Linear(3, 1)
    grads = timing.as_call(lambda x: x * weight, True, [weight])(x)
    assert len(grads) == 2 and torch.allclose(grads[0] / 2, grads[1])
    assert [tuple(grad.shape) for grad in timing.as_call(linear, True, ())(x)] == [(3,), (1, 3), (1,)]
    assert x.grad is None and linear.weight.grad is None
    assert not timing.as_call(lambda x: x * weight, False, [weight])(x).requires_grad


def test_peak_memory_is_that_of_live_tensors():
    megabyte = 2**18  # floats

    def two_at_a_time():
        total = torch.zeros(megabyte)
        for _ in range(4):
            total += torch.ones(megabyte)
        return total

    assert timing.peak_memory(two_at_a_time) == pytest.approx(2 * 2**20, rel=0.01)
    kept = torch.zeros(megabyte)
    assert timing.peak_memory(lambda: kept.add_(1)) < 2**16


def test_the_profiler_says_nothing(capfd):
    timing.peak_memory(lambda: torch.zeros(1))
    assert capfd.readouterr().err == ""
    print("still here", file=sys.stderr)
    assert capfd.readouterr().err == "still here\n"


def test_a_bad_comparison():
    with pytest.raises(ValueError, match="baseline 'b' is not among a"):
        timing.compare({"a": spin}, [(0.0,)], baseline="b")
    with pytest.raises(ValueError, match="got 0 and 3"):
        timing.compare({"a": spin}, [], baseline="a", rounds=3)


def test_copy_bandwidth_counts_both_ways(one_thread, monkeypatch):
    seen = {}

    def compare(candidates, inputs, **_):
        ((name, copy),) = candidates.items()
        seen["bytes"] = inputs[0][0].nbytes
        copy(*inputs[0])
        return timing.Timing({name: [0.5, 0.5]}, name, "wall clock")

    monkeypatch.setattr(timing, "compare", compare)
    assert timing.copy_bandwidth(num_bytes=1000) == 4000 and seen["bytes"] == 1000


@pytest.mark.gpu
def test_cuda_graphs_and_peak_memory_on_a_gpu():
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    functions = {"one": lambda x: x @ x, "four": lambda x: x @ x @ x @ x @ x}
    for training in (False, True):
        timed = timing.compare(functions, [(x,)], baseline="four", device="cuda", training=training, memory=True)
        assert set(timed.launches.values()) == {"graph"}
        assert 2 < timed.row("one")["speedup"]["median"] < 6
        assert timed.peak_bytes["one"] >= 4 * 1024**2
    waits = {"waits": lambda x: x * x.sum().item(), "fine": lambda x: x * 2}
    timed = timing.compare(waits, [(x,)], baseline="fine", device="cuda", uniform=True)
    assert all(how.startswith("plain") for how in timed.launches.values())
