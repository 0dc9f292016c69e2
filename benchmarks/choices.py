"""How well kernel="auto" chooses on a machine that no table knows: against each kernel, and against softmax attention.

    python -m benchmarks.choices --threads 1 --out benchmarks/results/choices-cpu.json
    python -m benchmarks.choices --device cuda --out outputs/choices.json
    python -m benchmarks.choices --show benchmarks/results/choices-cpu.json

For each layer the choice is measured as in a first call, with an empty cache and no table. Then the layer's own
processor and each kernel run in turn, from hidden states to hidden states. "loses" is the time of the choice over that
of the fastest, "of softmax" over that of the layer's own processor; both are medians of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import options as cli

LAYERS = (
    *(("forward", "float32", "sd15-256-l2", agents) for agents in (4, 16)),
    *(("forward", "float32", "sd15-512-l2", agents) for agents in (16,)),
    *(("forward", "float32", "sd15-512-l1", agents) for agents in (4, 16, 64)),
    *(("forward", "float32", "sd15-512-l0", agents) for agents in (64,)),
    *(("forward", "float32", "sit-s-256", agents) for agents in (4, 16, 64)),
    *(("forward", "float32", "sit-s-512", agents) for agents in (16, 64)),
    *(("forward", "bfloat16", "sit-s-256", agents) for agents in (4, 16, 64)),
    *(("forward", "bfloat16", "sd15-512-l1", agents) for agents in (16, 64)),
    *(("forward", "bfloat16", "sit-s-512", agents) for agents in (64,)),
    *(("training", "float32", "sit-s-256", agents) for agents in (4, 16, 64)),
    *(("training", "float32", "sd15-256-l2", agents) for agents in (16,)),
    *(("training", "float32", "sd15-512-l1", agents) for agents in (64,)),
    *(("training", "float32", "sit-s-512", agents) for agents in (16,)),
)
"""Pass, dtype, shape and agents."""

NEAR, SLOWER = 1.05, 1.02
"""A choice may take this many times the time of the fastest, and a patched layer of softmax attention's."""

AUTO, EXACT = "auto", "softmax"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("choices", __doc__)
    parser.add_argument("--batch", type=cli.at_least(1), default=1)
    parser.add_argument("--rounds", type=cli.at_least(1), default=9)
    parser.add_argument("--tiny", action="store_true", help="two layers, to try the program")
    options = cli.parse(parser, argv)
    if options.show:
        print(table(cli.read(parser, options.show)))
        return 0
    cli.prepare(parser, options)
    result = measure(options)
    print(table(result))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """A row a layer, writing `options.out` after each; returns what is in it."""
    from pipelines.cli.provenance import machine

    result: dict[str, Any] = {
        "program": "choices",
        "command": options.command,
        "settings": cli.settings(options),
        "machine": machine(options.device),
        "rows": [],
    }
    for layer in LAYERS[7:9] if options.tiny else LAYERS:
        result["rows"].append(_row(options, *layer))
        cli.write(options.out, result)
    return result


def _row(options: argparse.Namespace, passes: str, dtype: str, shape: str, agents: int) -> dict[str, Any]:
    import torch

    from attngen.layers.call import Call
    from benchmarks.shapes import SHAPES
    from benchmarks.timing import compare

    training, described = passes == "training", SHAPES[shape]
    call = Call("0", described.grid)
    with unknown(), torch.set_grad_enabled(training):
        attn, x = _layer(options, described, getattr(torch, dtype), training)
        # As the rest is timed: what other processes do is not in it.
        now = time.thread_time if options.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        start = now()
        choice = _route(attn, AUTO, agents, x, call)[0]
        seconds = now() - start
        deciding = min(timeit.repeat(lambda: _route(attn, AUTO, agents, x, call), timer=now, number=20, repeat=5)) / 20
        found = [_route(attn, kernel, agents, x, call) for kernel in ("sdpa", "matmul", "absorbed", "triton")]
    own: Callable[..., Any] = partial(attn.processor, attn)
    timed = compare(
        {EXACT: own, **{name: run for name, run in found if name != EXACT}},
        [(x,)],
        baseline=EXACT,
        device=options.device,
        rounds=options.rounds,
        training=training,
        leaves=dict.fromkeys((EXACT, *dict(found)), list(attn.parameters())),
        min_seconds=0.0 if options.tiny else 0.02,
        graph=False,
        progress=False,
    )
    medians = {name: timed.median(name) for name in timed.seconds}
    fastest = min(medians, key=medians.__getitem__)
    return {
        "pass": passes,
        "dtype": dtype,
        "shape": shape,
        "agents": agents,
        "choice": choice,
        "fastest": fastest,
        "loses": statistics.median(timed.ratios(fastest, choice)),
        "of_softmax": statistics.median(timed.ratios(EXACT, choice)),
        "measuring_seconds": seconds,
        "deciding_seconds": deciding,
        "median_seconds": medians,
        "clock": timed.clock,
    }


def _layer(options: argparse.Namespace, shape: Any, dtype: Any, training: bool) -> tuple[Any, Any]:
    """An attention layer of diffusers, and hidden states."""
    import torch
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attn = Attention(shape.channels, heads=shape.heads, dim_head=shape.head_dim)
        x = torch.randn(options.batch, shape.tokens, shape.channels)
    processor: Any = AttnProcessor2_0()
    attn.set_processor(processor)
    attn = attn.to(options.device, dtype).requires_grad_(training)
    return attn, x.to(options.device, dtype).requires_grad_(training)


def _route(attn: Any, kernel: str, agents: int, x: Any, call: Any) -> tuple[str, Callable[..., Any]]:
    """What a layer patched with a kernel runs: its name, `EXACT` where the layer is exact, and a function of `x`."""
    from attngen import AgentAttention
    from attngen.layers.layer import FusedAttention, Layer

    layer = Layer(attn, FusedAttention(kernel), kernel)
    route = AgentAttention(agents).route(layer, call, layer.like(x))
    run = route.run
    return (EXACT, partial(attn.processor, attn)) if run is None else (route.kernel, lambda x: run(layer, x, call))


@contextmanager
def unknown() -> Iterator[None]:
    """As on a machine that no table knows, with an empty cache."""
    from attngen.kernels import crossovers, measured

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {measured.SWITCH: "1"}):
        with mock.patch.object(measured, "folder", lambda: Path(folder)), mock.patch.object(measured, "_known", {}):
            with mock.patch.object(crossovers, "_in_force", {"tables": {}}):
                yield


def table(result: dict[str, Any]) -> str:
    """The measurements as a Markdown table, and how many choices are good."""
    rows = result["rows"]
    lines = ["| layer | choice | fastest | loses | time, of softmax |", "|---|---|---|---|---|"]
    for row in rows:
        layer = f"{row['shape']}, {row['agents']} agents, {row['dtype']}, {row['pass']}"
        lines.append(
            f"| {layer} | {row['choice']} | {row['fastest']} | {row['loses'] - 1:.1%} | {row['of_softmax']:.3f} |"
        )
    near = sum(row["loses"] <= NEAR for row in rows)
    slow = sum(row["of_softmax"] > SLOWER for row in rows)
    spent = sorted(row["measuring_seconds"] for row in rows)
    lines += [
        "",
        f"{near} of {len(rows)} choices are within {NEAR - 1:.0%} of the fastest; {slow} layers are more than "
        f"{SLOWER - 1:.0%} slower than softmax attention. Measuring a shape took {statistics.median(spent):.2f} s, "
        f"at most {spent[-1]:.2f} s; finding it again takes "
        f"{statistics.median(row['deciding_seconds'] for row in rows) * 1e6:.0f} µs a call.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
