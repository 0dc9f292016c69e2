"""Host time of the Triton kernels' launch code beside two calls of torch's fused attention, with the launches removed.

    python -m benchmarks.host

On a GPU an eager call is over no sooner than its Python is, whatever the kernels take. Here `JITFunction.run`, the last
step of a launch, does nothing, so that what is left is checks, tiles, buffers and autograd, on tensors so small that
torch's own operations on them take no time. Times are CPU time of this thread, medians of rounds in turn; a ratio is
the median of the rounds' ratios. What Triton's own launcher adds for each launch is not in them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from torch import Tensor


def tensors(tokens: int, trained: bool) -> list[Tensor]:
    """Query, key, value and 16 agents of one head, of size 16, in bfloat16."""
    import torch

    heads = [torch.zeros(1, n, 1, 16, dtype=torch.bfloat16).transpose(1, 2) for n in (tokens, tokens, tokens, 16)]
    return [x.requires_grad_(trained) for x in heads]


def call_of(function: Callable[..., Tensor], inputs: Sequence[Tensor], trained: bool) -> Callable[[], Any]:
    """A call without arguments: forward, or forward and backward."""
    import torch

    if not trained:
        return lambda: function(*inputs)
    gradient = torch.zeros_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)


def calls(trained: bool) -> dict[str, Callable[[], Any]]:
    """What is timed; "sdpa" is what the others are compared with.

    1024 tokens are several splits, so that all kernels are launched; fused attention computes on its 16.
    """
    from attngen.kernels import sdpa
    from attngen.kernels.reference import AgentScales
    from attngen.kernels.triton import agent, linear

    scales = AgentScales(0.25, 0.25)
    few, many = tensors(16, trained), tensors(1024, trained)
    return {
        "sdpa": call_of(lambda q, k, v, a: sdpa.agent_attention(q, k, v, a, scales), few, trained),
        "triton agent": call_of(lambda q, k, v, a: agent.agent_attention(q, k, v, a, scales), many, trained),
        "triton linear": call_of(lambda q, k, v: linear.linear_attention(q, k, v, "elu", 1e-6), many[:3], trained),
    }


def thread_time(call: Callable[[], Any], repeats: int) -> float:
    """Microseconds of CPU time a call."""
    start = time.thread_time_ns()
    for _ in range(repeats):
        call()
    return (time.thread_time_ns() - start) / repeats / 1000


def measure(trained: bool, rounds: int, repeats: int) -> dict[str, tuple[float, float, int]]:
    """Name of a call -> median microseconds, ratio to "sdpa", and launches."""
    import torch
    from triton.runtime.jit import JITFunction

    # Before the environment says otherwise, so that their kernels are not interpreted.
    from attngen.kernels.triton import agent_launch, common, linear_launch  # noqa: F401

    launches = []
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *arguments, **options: launches.append(kernel)),
        mock.patch.object(common, "multiprocessors", lambda device: 132),
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # takes tensors on the CPU; no kernel is interpreted
        torch.set_grad_enabled(trained),
    ):
        timed = calls(trained)
        counts = {}
        for name, call in timed.items():
            launches.clear()
            call()
            counts[name] = len(launches)
            thread_time(call, repeats)
        times = [{name: thread_time(call, repeats) for name, call in timed.items()} for _ in range(rounds)]
    return {
        name: (
            statistics.median(round_[name] for round_ in times),
            statistics.median(round_[name] / round_["sdpa"] for round_ in times),
            counts[name],
        )
        for name in timed
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=21, help="medians are over so many")
    made.add_argument("--repeats", type=int, default=200, help="calls a round")
    options = made.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    for trained in (False, True):
        for name, (taken, ratio, launches) in measure(trained, options.rounds, options.repeats).items():
            what = "forward and backward" if trained else "forward"
            print(f"{what:20} {name:14} {taken:7.1f} us {ratio:5.2f} x two SDPA calls, {launches} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
