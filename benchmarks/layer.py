"""One attention layer: softmax by every backend present against agents, mediators and linear attention.

    python -m benchmarks.layer --shapes 'sit-*-256' 'sit-s-512' --what block --agents 4 16 --threads 1
    python -m benchmarks.layer --shapes 'sd15-512-l0' --dtype bfloat16 --device cuda --pass forward training
    python -m benchmarks.layer --list

"core" is from queries, keys and values to the mixed values; "block" is from hidden states to hidden states, with the
projections. Every ratio is against the fastest softmax present at that shape, which the row names; each round measures
all of them in turn. Errors are against the same formula in float64, at a small size: agents against agents.
What is left out, because it is not here, does not fit or would take too long, is listed with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import options as cli

if TYPE_CHECKING:
    from benchmarks.attention import Candidate, Layer
    from benchmarks.shapes import Shape

DEFAULT_SHAPES = ("sd15-512-*", "sd15-1024-l0", "sdxl-1024-*", "sit-*-256", "sit-*-512")
VARIANTS = ("plain", "shortcut", "values", "input")


def main(argv: Sequence[str] | None = None) -> int:
    parser, options = _parse(argv)
    if options.show:
        print(table(cli.read(parser, options.show)))
        return 0
    from benchmarks import shapes

    if options.list:
        for shape in shapes.SHAPES.values():
            print(f"{shape.name:16} {shape.heads:2} heads of {shape.head_dim:3}, {shape.side} x {shape.side} tokens")
        return 0
    try:
        selected = shapes.select(options.shapes)
    except ValueError as error:
        parser.error(str(error))
    cli.prepare(parser, options)
    print(table(measure(options, selected)))
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = cli.parser("layer", __doc__)
    parser.add_argument("--shapes", nargs="+", default=list(DEFAULT_SHAPES), help="names or patterns, see --list")
    parser.add_argument("--list", action="store_true", help="print the known shapes, and stop")
    parser.add_argument("--what", nargs="+", default=["core", "block"], choices=["core", "block"])
    parser.add_argument("--agents", nargs="+", type=cli.at_least(1), default=[4, 16, 64, 256])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--paths", nargs="+", help="only these, and every softmax: sdpa, absorbed, triton, ...")
    parser.add_argument("--sparse", action="store_true", help="focal attention and tiles, too")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=cli.DTYPES)
    parser.add_argument("--batch", nargs="+", type=cli.at_least(1), default=[2])
    parser.add_argument("--pass", nargs="+", dest="passes", default=["forward"], choices=["forward", "training"])
    parser.add_argument("--rounds", type=cli.at_least(1), default=7)
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, help="FlexAttention, compiled; default: CUDA")
    parser.add_argument("--limit", type=float, default=20.0, help="leave out what takes more seconds a call")
    parser.add_argument("--minutes", type=float, help="start no further shape after so many minutes")
    parser.add_argument("--quick", action="store_true", help="three short rounds, no peak memory")
    options = cli.parse(parser, argv)
    if options.quick:
        options.rounds = min(options.rounds, 3)
    if options.flex is None:
        options.flex = options.device != "cpu"
    return parser, options


def measure(options: argparse.Namespace, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Run the comparison, writing `options.out` after every shape; returns what is in it."""
    from benchmarks.timing import copy_bandwidth
    from pipelines.cli.provenance import machine

    start = time.monotonic()
    result: dict[str, Any] = {
        "program": "layer",
        "command": options.command,
        "settings": cli.settings(options),
        "machine": machine(options.device),
        "copy_bandwidth": copy_bandwidth(options.device),
        "rows": [],
        "errors": errors(options, shapes),
        "skipped": [],
    }
    pace = _Pace(options)
    cases = itertools.product(shapes, options.dtype, options.batch, options.what, options.passes)
    for shape, dtype, batch, what, pass_ in cases:
        case = {"shape": shape.name, "dtype": dtype, "batch": batch, "what": what, "pass": pass_}
        if options.minutes and time.monotonic() - start > 60 * options.minutes:
            result["skipped"].append({**case, "candidate": "all", "reason": f"{options.minutes:g} minutes were over"})
            continue
        rows, skipped = _measure_case(options, shape, case, result["copy_bandwidth"], pace)
        result["rows"] += rows
        result["skipped"] += skipped
        cli.write(options.out, result)
    cli.write(options.out, result)
    return result


def _measure_case(
    options: argparse.Namespace, shape: Shape, case: dict[str, Any], bandwidth: float, pace: _Pace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and skipped candidates of one shape, dtype, batch, what and pass."""
    import torch

    from benchmarks import attention, timing

    training, block = case["pass"] == "training", case["what"] == "block"
    dtype = getattr(torch, case["dtype"])
    size = dtype.itemsize * case["batch"] * shape.tokens * shape.channels
    if size * (40 if training else 16) > pace.free_bytes():
        return [], [{**case, "candidate": "all", "reason": f"tensors of {size / 2**30:.1f} GiB each do not fit"}]
    agents = [count for count in options.agents if 2 * count <= shape.tokens]
    layer = attention.Layer.random(shape, agents, dtype, options.device)
    found, missing = attention.candidates(
        layer, block, options.agents, options.variants, options.device, options.flex, options.sparse
    )
    found = [c for c in found if c.kind == "softmax" or not options.paths or c.path in options.paths]
    sets = timing.input_sets(size * (1 if block else 3), options.device)
    inputs = [_inputs(shape, case["batch"], dtype, options.device, block, training, seed) for seed in range(sets)]
    leaves = {c.name: attention.leaves(c, layer, block) for c in found}
    kept: dict[str, Candidate] = {}
    for candidate in found:
        reason = pace.why_not(candidate, layer, case, inputs[0], leaves[candidate.name])
        if reason is None:
            kept[candidate.name] = candidate
        else:
            missing[candidate.name] = reason
    skipped = [{**case, "candidate": name, "reason": reason} for name, reason in missing.items()]
    softmax = [name for name, candidate in kept.items() if candidate.kind == "softmax"]
    if not softmax:
        return [], [*skipped, {**case, "candidate": "all", "reason": "no softmax attention fits, so there is no ratio"}]
    functions: dict[str, Callable[..., Any]] = {name: candidate.function for name, candidate in kept.items()}
    timed = timing.compare(
        functions,
        inputs,
        baseline=softmax[0],
        device=options.device,
        rounds=options.rounds,
        training=training,
        leaves=leaves,
        min_seconds=0.01 if options.quick else None,
        memory=not options.quick,
    )
    baseline = timed.fastest(softmax)
    rows = [_row(timed.row(name, baseline), kept[name], case, shape, size, bandwidth, training) for name in kept]
    return rows, skipped


def _row(
    timed: dict[str, Any],
    candidate: Candidate,
    case: dict[str, Any],
    shape: Shape,
    size: int,
    bandwidth: float,
    training: bool,
) -> dict[str, Any]:
    row = {
        **case,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "tokens": shape.tokens,
        "candidate": candidate.name,
        "kind": candidate.kind,
        "variant": candidate.variant,
        "agents": candidate.agents,
        "path": candidate.path,
        **{key: value for key, value in timed.items() if key != "name"},
    }
    if candidate.units is not None and not training:
        row["least_bytes"] = int(candidate.units * size) + candidate.bias_bytes
        row["bandwidth_share"] = row["least_bytes"] / timed["median_seconds"] / bandwidth
    return row


def _inputs(
    shape: Shape, batch: int, dtype: Any, device: str, block: bool, training: bool, seed: int
) -> tuple[Any, ...]:
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)

    def draw() -> torch.Tensor:
        x = torch.randn(batch, shape.tokens, shape.channels, generator=generator, device=device, dtype=dtype)
        return x.requires_grad_(training)

    return (draw(),) if block else (draw(), draw(), draw())


class _Pace:
    """Decides before the measurement what would take too long or too much memory."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._rates: dict[str, float] = {}

    def free_bytes(self) -> int:
        import torch

        if self.options.device != "cpu":
            return torch.cuda.mem_get_info(self.options.device)[0]
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return 2**33

    def why_not(
        self, candidate: Candidate, layer: Layer, case: dict[str, Any], inputs: tuple[Any, ...], leaves: Sequence[Any]
    ) -> str | None:
        """Try the candidate once, unless it is clear that it does not fit; the reason to leave it out, or None."""
        import torch

        from benchmarks import timing

        training = case["pass"] == "training"
        needed = candidate.matrix_bytes * case["batch"] * (2 if training else 1)
        # CUDA graphs of all candidates live at the same time, each with its own memory.
        if needed > self.free_bytes() * (0.8 if self.options.device == "cpu" else 0.2):
            return f"it writes {needed / 2**30:.1f} GiB beside its output, which does not fit"
        work = candidate.flops * case["batch"] * (3 if training else 1)
        expected = work / self._rate(case["dtype"])
        if expected > 2 * self.options.limit:
            return f"about {expected:.0f} s a call, over the limit of {self.options.limit:g} s"
        call = timing.as_call(candidate.function, training, leaves)
        try:
            call(*inputs)
            start = time.perf_counter()
            call(*inputs)
            if self.options.device != "cpu":
                torch.cuda.synchronize()
        except Exception as error:  # a backend that refuses the shape says so in its own way
            if self.options.device != "cpu":
                torch.cuda.empty_cache()
            text = str(error).strip().splitlines()
            return f"{type(error).__name__}: {text[0][:160] if text else ''}"
        seconds = time.perf_counter() - start
        limit = self.options.limit
        return None if seconds <= limit else f"{seconds:.0f} s a call, over the limit of {limit:g} s"

    def _rate(self, dtype_name: str) -> float:
        """Operations a second of a small softmax attention, as a guess for the rest."""
        import torch
        import torch.nn.functional as F

        if dtype_name not in self._rates:
            dtype = getattr(torch, dtype_name)
            x = torch.ones(1, 8, 1024, 64, device=self.options.device, dtype=dtype)
            start = 0.0
            for _ in range(2):
                start = time.perf_counter()
                F.scaled_dot_product_attention(x, x, x)
                if self.options.device != "cpu":
                    torch.cuda.synchronize()
            self._rates[dtype_name] = 4 * 8 * 1024**2 * 64 / max(time.perf_counter() - start, 1e-6)
        return self._rates[dtype_name]


def errors(options: argparse.Namespace, shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """‖out - float64‖ / ‖float64‖ of each candidate, once for each head size and dtype, at 32 x 32 tokens or fewer."""
    from dataclasses import replace

    rows: list[dict[str, Any]] = []
    seen: set[tuple[int, str]] = set()
    for shape in shapes:
        small = replace(shape, side=min(shape.side, 32))
        for dtype, what in itertools.product(options.dtype, options.what):
            key = (shape.head_dim, f"{dtype} {what}")
            if key not in seen:
                seen.add(key)
                rows += _errors_at(options, small, dtype, what == "block")
    return rows


def _errors_at(options: argparse.Namespace, shape: Shape, dtype_name: str, block: bool) -> list[dict[str, Any]]:
    import torch

    from benchmarks import attention

    dtype = getattr(torch, dtype_name)
    agents = [count for count in options.agents if 2 * count <= shape.tokens]
    layer = attention.Layer.random(shape, agents, dtype, options.device)
    wide = layer.to(torch.float64)
    found, _ = attention.candidates(
        layer, block, options.agents, options.variants, options.device, False, options.sparse
    )
    inputs = _inputs(shape, 1, dtype, options.device, block, False, 0)
    rows = []
    for candidate in found:
        if options.paths and candidate.kind != "softmax" and candidate.path not in options.paths:
            continue
        with torch.no_grad():
            exact = attention.oracle(candidate, wide, block)(*(x.double() for x in inputs))
            try:
                output = candidate.function(*inputs).double()
            except RuntimeError:  # a backend that refuses the shape; the measurement lists why
                continue
        rows.append(
            {
                "shape": f"{shape.heads} heads of {shape.head_dim}, {shape.side} x {shape.side} tokens",
                "dtype": dtype_name,
                "what": "block" if block else "core",
                "candidate": candidate.name,
                "error": ((output - exact).norm() / exact.norm()).item(),
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """The measurements as Markdown tables, one for each shape, dtype, batch, pass and what."""
    lines: list[str] = []
    keys = ("what", "shape", "dtype", "batch", "pass")
    for case, group in itertools.groupby(result["rows"], key=lambda row: tuple(row[key] for key in keys)):
        rows = list(group)
        what, shape, dtype, batch, pass_ = case
        first = rows[0]
        tokens, heads, head_dim = first["tokens"], first["heads"], first["head_dim"]
        lines += [
            f"{what} {shape}: {tokens} tokens, {heads} heads of {head_dim}, batch {batch}, {dtype}, {pass_}; "
            f"baseline {first['baseline']}",
            "",
            "| candidate | times faster (quartiles) | µs | share of copy bandwidth | peak MiB |",
            "|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in rows]
        lines.append("")
    return "\n".join([*lines, *left_out(result["skipped"])]).rstrip()


def left_out(skipped: Sequence[dict[str, Any]]) -> list[str]:
    """What was not measured, one line a reason."""
    by_reason: dict[str, list[str]] = {}
    for item in skipped:
        where = f" of {item['shape']}, batch {item['batch']}" if item["candidate"] == "all" else ""
        by_reason.setdefault(item["reason"], []).append(item["candidate"] + where)
    lines = ["Left out:", ""] if by_reason else []
    for reason, names in sorted(by_reason.items()):
        distinct = list(dict.fromkeys(names))
        more = f" and {len(distinct) - 4} more" if len(distinct) > 4 else ""
        lines.append(f"- {reason}: {', '.join(distinct[:4])}{more}")
    return lines


def _line(row: dict[str, Any]) -> str:
    speedup = row["speedup"]
    share = f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else ""
    peak = f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else ""
    return (
        f"| {row['candidate']} | {speedup['median']:.2f} ({speedup['q1']:.2f} to {speedup['q3']:.2f}) "
        f"| {row['median_seconds'] * 1e6:.0f} | {share} | {peak} |"
    )


if __name__ == "__main__":
    sys.exit(main())
