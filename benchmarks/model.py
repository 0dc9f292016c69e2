"""One forward pass of a full-size denoiser, softmax attention against each method, in turn in one process.

    python -m benchmarks.model --model sd15 --size 512 --out benchmarks/results/sd15-512-cpu.json
    python -m benchmarks.model --show benchmarks/results/sd15-512-cpu.json

Time is the median over rounds of the ratio to softmax in the same round, so that a machine that gets slower or faster
meanwhile matters little. Operations are counted by torch. The error is that of the output against softmax attention,
‖out - exact‖ / ‖exact‖; with random weights it says that a method changes the result, not how a picture looks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import MODELS, build_random

DEFAULT_METHODS = ("softmax", "agent", "agentsd", "tome", "todo", "linear")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sd15", choices=list(MODELS))
    parser.add_argument("--size", type=int, default=512, help="side of the picture, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), help="presets, or plan files")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    parser.add_argument("--show", type=Path, help="print the table of a file written before, and stop")
    options = parser.parse_args(argv)
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return 0
    result = measure(options)
    print(table(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison; returns what `--out` writes."""
    import torch
    from tqdm import tqdm

    import attngen

    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model: Any = build_random(options.model, dtype, options.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        raw = MODELS[options.model].inputs(model, options.size, options.batch)
    inputs = {k: _place(v, options.device, dtype) for k, v in raw.items()}
    seconds: dict[str, list[float]] = {name: [] for name in options.methods}
    rows: dict[str, dict[str, Any]] = {}
    exact = None
    rounds = tqdm(total=len(options.methods) * (options.rounds + 1), disable=not sys.stderr.isatty(), unit="pass")
    for round_number in range(options.rounds + 1):
        for name in options.methods:
            with torch.no_grad(), attngen.apply(model, name) as patch:
                if round_number == 0:  # warm-up: count operations and compare outputs
                    output, flops = _count(model, inputs)
                    exact = output if exact is None else exact
                    error = ((output - exact).norm() / exact.norm()).item()
                    active = sum(layer.is_active for layer in patch.report().patched)
                    rows[name] = {"method": name, "flops": flops, "error": error, "active_layers": active}
                else:
                    seconds[name].append(_seconds(model, inputs, options.device))
            rounds.update()
    rounds.close()
    base = options.methods[0]
    for name, row in rows.items():
        ratios = [b / s for b, s in zip(seconds[base], seconds[name], strict=True)]
        row["seconds"] = statistics.median(seconds[name])
        row["speedup"] = statistics.median(ratios)
        row["speedup_range"] = [min(ratios), max(ratios)]
        row["flops_ratio"] = rows[base]["flops"] / row["flops"]
    return {"settings": _settings(options), "machine": machine(options.device), "rows": list(rows.values())}


def _place(value: Any, device: str, dtype: Any) -> Any:
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def _count(model: Any, inputs: dict[str, Any]) -> tuple[Any, int]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # torch counts attention on GPUs only.
    extra = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_on_cpu}
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        output = model(**inputs, return_dict=False)[0]
    return output.float(), counter.get_total_flops()


def _seconds(model: Any, inputs: dict[str, Any], device: str) -> float:
    import torch

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    model(**inputs, return_dict=False)
    wait()
    return time.perf_counter() - start


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "size", "batch", "dtype", "device", "rounds", "threads")
    return {name: getattr(options, name) for name in names}


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured with."""
    import diffusers
    import torch

    import attngen

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "attngen": attngen.__version__,
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def table(result: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    settings, machine_ = result["settings"], result["machine"]
    lines = [
        "| method | times faster | times fewer FLOPs | output error | layers changed |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["speedup_range"]
        lines.append(
            f"| `{row['method']}` | {row['speedup']:.2f} ({low:.2f} to {high:.2f}) | {row['flops_ratio']:.2f} "
            f"| {row['error']:.3f} | {row['active_layers']} |"
        )
    lines.append("")
    lines.append(
        f"`{settings['model']}`, {settings['size']} px, batch {settings['batch']}, {settings['dtype']}, random weights,"
        f" one pass, median of {settings['rounds']} rounds; softmax {result['rows'][0]['seconds']:.1f} s; "
        f"{machine_['device']}, {machine_['threads']} threads, torch {machine_['torch']}, {machine_['date']}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
