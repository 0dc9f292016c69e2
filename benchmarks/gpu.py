"""Everything that has to be measured on a GPU, by one command in ten minutes.

    python -m benchmarks.gpu --out outputs/gpu
    python -m benchmarks.gpu --out outputs/gpu                     # again: the parts that are not done yet
    python -m benchmarks.gpu --out outputs/gpu --parts sd15-2048 sdxl-2048
    python -m benchmarks.gpu --split outputs/gpu/gpu.json --out benchmarks/results
    python -m benchmarks.gpu --tiny --device cpu --out outputs/tiny

First every kernel is compared with the formula in float64. Then the kernels' crossovers, what kernel="auto" chooses,
single layers, whole denoisers of random weights against the fastest softmax attention here, and training steps. Each
part is a program of its own with its own time limit, so one that fails or hangs leaves the others. After each part
everything measured so far is in one file, gpu.json, with device, driver, versions and commit; --split takes it apart
into the files that benchmarks.report reads. No part starts that would end after the minutes; the same command then goes
on where it stopped, as long as commit and device are the same. What the crossovers part measured is what kernel="auto"
goes by in the parts after it.

It needs torch, Triton and diffusers with its requirements, and pytest for the first part. Where there is no network,
download the wheels elsewhere (pip download --no-deps), install them by pip install --no-index --no-deps --target FOLDER
and put FOLDER on PYTHONPATH. Packages that are missing beside (tomesd, DeepCache, cache-dit, xformers) are named in the
results. --commit says what is measured where the copy has no .git.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import options as cli

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Part:
    """One program to run.

    Attributes:
        name: what it is called in the results.
        arguments: after `python -m`.
        limit: seconds after which it is ended.
        default: whether it runs without being asked for.
        tiny: arguments instead of these for --tiny, or None to leave it out there.
    """

    name: str
    arguments: str
    limit: int
    default: bool = True
    tiny: str | None = None


_BF16 = "--dtype bfloat16"
_TINY_MODEL = "--small --size 64 --rounds 1"
_SOFTMAX = "softmax softmax@flash softmax@cudnn softmax@efficient"
CORRECT = "tests"
"""The part that compares every kernel with the formula in float64."""


def _denoiser(model: str, size: int, limit: int, batch: int = 1, default: bool = True) -> Part:
    """A forward by softmax attention of every backend, and by 64 agents by the kernel chosen and by two others."""
    methods = f"{_SOFTMAX} plain:64 plain:64@triton plain:64@sdpa"
    arguments = f"benchmarks.model --model {model} --size {size} --batch {batch} {_BF16} --rounds 3 --methods {methods}"
    tiny = f"benchmarks.model --model {model} {_TINY_MODEL} --methods softmax softmax@math plain:4"
    if model == "wan":
        tiny = tiny.replace("--size 64", "--size 32")
    return Part(f"{model}-{size}", arguments, limit, default, tiny if default else None)


PARTS = (
    Part(
        CORRECT,
        "pytest -m gpu -q -x --no-header tests/kernels",
        110,
        tiny="pytest -m gpu -q --collect-only tests/kernels/test_absorbed.py",
    ),
    Part(
        "crossovers",
        "benchmarks.crossovers --dtypes bfloat16 --rounds 3 --min-seconds 0.003 --minutes 1.4",
        110,
        tiny="benchmarks.crossovers --tiny --rounds 1 --dtypes float32 --passes forward",
    ),
    Part("choices", "benchmarks.choices --batch 2 --rounds 5", 40, tiny="benchmarks.choices --tiny --rounds 1"),
    Part(
        "layer",
        "benchmarks.layer --shapes sd15-512-l0 sd15-1024-l0 sdxl-2048-l0 sit-xl-256 sit-xl-1024 sdxl-1024-l0 "
        f"{_BF16} --batch 2 --agents 4 64 --rounds 5 --limit 2 --minutes 0.8",
        65,
        tiny="benchmarks.layer --shapes sit-s-256 --quick --rounds 1 --agents 4 --what block --variants plain",
    ),
    _denoiser("sd15", 1024, 25, batch=2),
    _denoiser("sdxl", 1024, 30, batch=2),
    _denoiser("flux", 1024, 30),
    _denoiser("flux2", 1024, 30),
    _denoiser("qwen", 1024, 30),
    _denoiser("wan", 480, 40),
    Part(
        "sit-xl-256",
        f"benchmarks.model --model sit-xl --size 256 --batch 32 {_BF16} --rounds 3 "
        "--methods softmax plain:4@absorbed input:4@absorbed values:4@absorbed plain:4",
        30,
        tiny=f"benchmarks.model --model sit-s {_TINY_MODEL} --methods softmax values:4",
    ),
    Part(
        "layer-training",
        f"benchmarks.layer --shapes sit-s-256 sit-xl-256 {_BF16} --batch 64 --agents 4 --what block --pass training "
        "--rounds 5 --limit 2 --minutes 0.4 --no-flex",
        30,
        tiny="benchmarks.layer --shapes sit-s-256 --quick --rounds 1 --agents 4 --what block --variants plain "
        "--pass training",
    ),
    Part(
        "training-sit-xl",
        f"benchmarks.model --model sit-xl --size 256 --batch 32 {_BF16} --pass training --rounds 3 "
        "--methods softmax input:4@absorbed values:4@absorbed",
        30,
        tiny=f"benchmarks.model --model sit-s {_TINY_MODEL} --methods softmax values:4 --pass training",
    ),
    Part(
        "training-sit-s",
        f"benchmarks.model --model sit-s --size 256 --batch 64 {_BF16} --pass training "
        "--methods softmax input:4@absorbed values:4@absorbed",
        40,
        default=False,
    ),
    Part(
        "stack-sit-xl",
        f"benchmarks.stack --model sit-xl --size 512 --batch 4 {_BF16} --steps 20 --rounds 3 "
        "--method agent:16@absorbed",
        60,
        default=False,
        tiny="benchmarks.stack --model sit-s --size small --method agent:16 --steps 4 --rounds 1",
    ),
    Part(
        "stack-sd15",
        f"benchmarks.stack --model sd15 --size 1024 --method agent:64 --steps 20 --batch 1 {_BF16} --rounds 3",
        60,
        default=False,
    ),
    *(
        _denoiser(model, size, limit, 2, default=False)
        for model, size, limit in (
            ("sd15", 512, 60),
            ("sd15", 2048, 120),
            ("sdxl", 2048, 120),
            ("sdxl", 4096, 300),
            ("flux", 2048, 120),
        )
    ),
    *(
        Part(
            f"{model}-{size}-compiled",
            f"benchmarks.model --model {model} --size {size} --batch 2 {_BF16} --compile "
            "--methods softmax agent:64@triton agent:64",
            limit,
            default=False,
        )
        for model, size, limit in (("sd15", 512, 180), ("sd15", 1024, 180), ("sdxl", 1024, 300), ("sdxl", 2048, 300))
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("gpu", __doc__)
    parser.set_defaults(device="cuda")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these, in this order")
    parser.add_argument("--minutes", type=float, default=9.5, help="end by then; parts that are left are named")
    parser.add_argument("--again", action="store_true", help="run parts again that are done")
    parser.add_argument("--tiny", action="store_true", help="reduced models and shapes, to try the program")
    parser.add_argument("--commit", help="what is measured, where the copy has no .git")
    parser.add_argument("--split", type=Path, help="take a gpu.json apart into --out, and stop")
    options = cli.parse(parser, argv)
    if options.show:
        print(table(cli.read(parser, options.show)))
        return 0
    if options.split:
        if options.out is None:
            parser.error("--split needs a folder to write to, given by --out")
        for path in split(cli.read(parser, options.split), options.out):
            print(path)
        return 0
    options.out = options.out or Path(os.environ.get("OUT") or "outputs/gpu")
    print(table(measure(options)))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts, writing gpu.json in `options.out` after each; returns what is in it."""
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.commit:
        os.environ["BENCHMARK_COMMIT"] = options.commit
    result = _begun(options)
    for part in _selected(options):
        if any(row["name"] == part.name and row["status"] == "done" for row in result["rows"]):
            continue
        result["rows"] = [row for row in result["rows"] if row["name"] != part.name]
        left = 60 * options.minutes - (time.monotonic() - start)
        if left < 15:
            row = {"name": part.name, "status": "not started: the minutes were over", "seconds": 0.0}
            measured = None
        else:
            row, measured = _run(part, options, min(part.limit, left))
        result["rows"].append(row)
        if measured is not None:
            result["results"][part.name] = measured
            _use_crossovers(part, measured, options)
            result["machine"] = result["machine"] or measured.get("machine", {})
        cli.write(options.out / "gpu.json", result)
        print(f"{row['name']}: {row['status']}, {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    return result


def _begun(options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run of the same commit on the same device left in `options.out`, or a new result."""
    from pipelines.cli.provenance import commit

    result: dict[str, Any] = {
        "program": "gpu",
        "command": options.command,
        "settings": {**cli.settings(options), "python": sys.version.split()[0], "commit": commit()},
        "machine": {},
        "rows": [],
        "results": {},
    }
    try:
        before = json.loads((options.out / "gpu.json").read_text())
        same = all(before["settings"][key] == result["settings"][key] for key in ("device", "tiny", "commit"))
        kept = {key: before[key] for key in ("machine", "rows", "results")}
    except (OSError, ValueError, KeyError, TypeError):
        return result
    if options.again or not same:
        return result
    crossovers = options.out / "crossovers.json"
    if options.crossovers is None and not options.tiny and "crossovers" in kept["results"] and crossovers.exists():
        options.crossovers = crossovers.absolute()
    return {**result, **kept}


def _use_crossovers(part: Part, measured: dict[str, Any], options: argparse.Namespace) -> None:
    """Let the parts that follow choose their kernels by what was measured here."""
    if part.name == "crossovers" and options.crossovers is None and not options.tiny:
        options.crossovers = (options.out / "crossovers.json").absolute()
        cli.write(options.crossovers, measured)


def _selected(options: argparse.Namespace) -> list[Part]:
    by_name = {part.name: part for part in PARTS}
    parts = [by_name[name] for name in options.parts] if options.parts else [part for part in PARTS if part.default]
    return [part for part in parts if part.tiny] if options.tiny else parts


def _run(part: Part, options: argparse.Namespace, limit: float) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Run one part; what happened, and what it wrote."""
    arguments = ((part.tiny or "") if options.tiny else part.arguments).split()
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        if arguments[0].startswith("benchmarks."):
            arguments += ["--device", options.device, "--out", str(out)]
            if options.threads and part.name != "crossovers":  # which sets them itself
                arguments += ["--threads", str(options.threads)]
            if options.crossovers and part.name != "crossovers":
                arguments += ["--crossovers", str(options.crossovers)]
        command = [sys.executable, "-m", *arguments]
        start = time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
            status = _wait(process, limit)
        seconds = time.monotonic() - start
        said = log.read_text(errors="replace")
        # What was written before a limit counts too.
        measured = json.loads(out.read_text()) if out.exists() else None
    row = {"name": part.name, "command": "python -m " + part.arguments, "status": status, "seconds": seconds}
    if options.tiny:
        row["command"] = "python -m " + (part.tiny or "")
    return {**row, "log": said[-6000:]}, measured


def _wait(process: subprocess.Popen[bytes], limit: float) -> str:
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        # Its compile workers too: they are in the session that it leads.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"ended after its limit of {limit:.0f} s"
    return "done" if code == 0 else f"failed with {code}"


def split(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write what each part measured to a file of its own, and whether it ended by itself; returns the files."""
    written = []
    for row in result["rows"]:
        measured = result["results"].get(row["name"])
        if measured is None:
            continue
        path = folder / f"gpu-{row['name']}.json"
        cli.write(path, {**measured, "status": row["status"]} if "rows" in measured else measured)
        written.append(path)
    return written


def table(result: dict[str, Any]) -> str:
    """What ran, as a Markdown table, with the last line of what failed."""
    lines = ["| part | status | seconds |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['status']} | {row['seconds']:.0f} |" for row in result["rows"]]
    for row in result["rows"]:
        said = row.get("log", "").strip().splitlines()
        if row["status"] != "done" and said:
            lines += ["", f"{row['name']} said last: {said[-1]}"]
        elif row["name"] == "tests" and said:
            lines += ["", f"tests: {said[-1]}"]
    lines += [*_highlights(result)]
    return "\n".join(lines)


def _highlights(result: dict[str, Any]) -> list[str]:
    """The speed-ups that were measured, a line each."""
    lines: list[str] = [""]
    for name, measured in result["results"].items():
        if measured.get("program") == "model":
            found = ", ".join(f"{row['method']} {row['speedup']:.2f}" for row in measured["rows"][1:])
            lines.append(f"{name}: {found}")
        elif measured.get("program") == "stack":
            found = ", ".join(f"{s['cache']} {s['share']['median']:.2f}" for s in measured["stacks"])
            lines.append(f"{name}: share of the product kept: {found}")
        elif measured.get("program") == "layer":
            best: dict[tuple[Any, ...], dict[str, Any]] = {}
            for row in measured["rows"]:
                key = (row["what"], row["shape"], row["agents"])
                if row["kind"] == "agents" and (
                    key not in best or row["speedup"]["median"] > best[key]["speedup"]["median"]
                ):
                    best[key] = row
            for (what, shape, _), row in best.items():
                against = f"{row['speedup']['median']:.2f} times {row['baseline']}"
                lines.append(f"{name}: {what} {shape}: {row['candidate']} {against}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
