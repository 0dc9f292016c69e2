"""Compile every Triton kernel for GPUs that need not be here, as its launch code would, and judge the binaries.

    python -m benchmarks.compiled                                 # a covering set on all GPUs, about a minute
    python -m benchmarks.compiled --all --out outputs/compiled.json   # every size, dtype, branch, map and GPU
    python -m benchmarks.compiled --targets sm_90 --heads 72 --agents 64 --dtypes bfloat16 --branches all
    PYTHONPATH=<folder of another Triton> python -m benchmarks.compiled

The launch code itself runs, on tensors of the meta device: tiles, splits, strides and what Triton specialises on are
those of a real call. Only its last step is replaced: `JITFunction.run` compiles instead of launching, for a driver that
names a target and nothing else. Each binary is one row: registers and bytes of stack of a thread, shared memory of a
program, programs that fit a multiprocessor together. No time is measured.

The exit status is 1 if a kernel does not compile, needs more shared memory than the GPU gives a program, or has more
than --stack bytes of stack, which is where registers are spilt to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Target(NamedTuple):
    """A GPU of one compute capability.

    Attributes:
        arch: the capability, 90 for 9.0.
        program_kib: shared memory that one program may have.
        processor_kib: shared memory of a multiprocessor.
        threads: most threads of a multiprocessor.
        processors: how many multiprocessors there are.
    """

    arch: int
    program_kib: int
    processor_kib: int
    threads: int
    processors: int


TARGETS = {
    "sm_80": Target(80, 163, 164, 2048, 108),  # A100
    "sm_86": Target(86, 99, 100, 1536, 84),  # RTX 3090
    "sm_89": Target(89, 99, 100, 1536, 128),  # RTX 4090
    "sm_90": Target(90, 227, 228, 2048, 132),  # H100, H200
    "sm_100": Target(100, 227, 228, 2048, 148),  # B200
    "sm_120": Target(120, 99, 100, 1536, 170),  # RTX 5090
}
LAYERS = {
    # Head size -> batch, heads, grid of a layer that has it.
    32: (2, 32, (16, 16)),
    40: (2, 8, (64, 64)),
    64: (2, 10, (64, 64)),
    72: (2, 16, (32, 32)),
    80: (2, 8, (32, 32)),
    96: (2, 12, (48, 48)),
    128: (1, 24, (64, 64)),
    160: (2, 8, (16, 16)),
}
AGENTS = (4, 16, 49, 64)
DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "tf32": "float32"}
BRANCHES = ("plain", "bias", "all")
MAPS = ("elu", "relu", "focused", "identity")


class Case(NamedTuple):
    """One call, forward and backward.

    Attributes:
        target: name of the GPU.
        head_dim: D and E.
        dtype: name in `DTYPES`.
        agents: M, or 0 for linear attention.
        extra: what is added to plain agent attention, from `BRANCHES`, or the feature map of linear attention.
    """

    target: str
    head_dim: int
    dtype: str
    agents: int
    extra: str

    def __str__(self) -> str:
        kind = f"agent M{self.agents}" if self.agents else "linear"
        return f"{self.target:6} D{self.head_dim:<3} {self.dtype:8} {kind} {self.extra}"


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # kernels are cached by it

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling(target: Target, took: Callable[[Any, Any, float], None]) -> Iterator[None]:
    """While entered, launches compile for `target`; `took` receives kernel, binary or exception, and seconds."""
    import triton
    from triton.runtime.jit import JITFunction

    from attngen.kernels.triton import common

    run = JITFunction.run

    def compile_instead(kernel: Any, *arguments: Any, warmup: bool = False, **options: Any) -> None:
        start = time.perf_counter()
        try:
            made = run(kernel, *arguments, warmup=True, **options)
        except Exception as error:  # whatever the compiler raises is what this program looks for
            made = error
        took(kernel, made, time.perf_counter() - start)

    driver: Any = Driver(target.arch)
    triton.runtime.driver.set_active(driver)
    with (
        mock.patch.object(JITFunction, "run", compile_instead),
        mock.patch.object(common, "multiprocessors", lambda device: target.processors),
        mock.patch.object(common, "why_no_kernels", lambda tensors: None),  # they have no device
        mock.patch.dict(common.PLANS, clear=True),
    ):
        yield


def compile_case(case: Case) -> list[dict[str, Any]]:
    """A row for each binary of one call."""
    import torch

    target, rows, known = TARGETS[case.target], [], set()

    def took(kernel: Any, made: Any, seconds: float) -> None:
        row = {**case._asdict(), "kernel": kernel.__name__, "seconds": round(seconds, 2)}
        if isinstance(made, Exception):
            rows.append(row | {"error": f"{type(made).__name__}: {made}"[:400]})
        elif made.hash not in known:
            known.add(made.hash)
            rows.append(row | measure(made, target))

    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    with compiling(target, took):
        (call_agent if case.agents else call_linear)(case)
    return rows


def measure(binary: Any, target: Target) -> dict[str, int]:
    """Warps, stages, registers, bytes of stack and of shared memory, and programs that fit a multiprocessor."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (max(int(n) for n in re.findall(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK"))
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_memory = target.processor_kib * 1024 // (shared + 1024)
    return {
        "warps": warps,
        "stages": binary.metadata.num_stages,
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "programs": min(by_registers, by_memory, target.threads // (32 * warps), 32),
    }


def faults(row: dict[str, Any], stack: int) -> list[str]:
    """What is wrong with a row, in words."""
    if "error" in row:
        return [row["error"]]
    there, found = TARGETS[row["target"]].program_kib * 1024, []
    if row["shared"] > there:
        found.append(f"{row['shared']} bytes of shared memory where there are {there}")
    if row["stack"] > stack:
        found.append(f"{row['stack']} bytes of stack a thread")
    return found


# Calls. Heads are slices of a contiguous (batch, tokens, heads x size), as projections give them.


def dtype_of(case: Case) -> torch.dtype:
    """Of the inputs; "tf32" is single precision whose products are rounded."""
    import torch

    return getattr(torch, DTYPES[case.dtype])


def _heads(case: Case, tokens: int) -> Tensor:
    import torch

    batch, heads, _ = LAYERS[case.head_dim]
    shape = (batch, tokens, heads, case.head_dim)
    return torch.empty(shape, dtype=dtype_of(case), device="meta").transpose(1, 2)


def call_agent(case: Case) -> None:
    """Agent attention on meta tensors, forward and backward."""
    from attngen.kernels.triton import agent_launch as launch

    _, heads, grid = LAYERS[case.head_dim]
    tokens, scale = grid[0] * grid[1], case.head_dim**-0.5
    call = [_heads(case, size) for size in (tokens, tokens, tokens, case.agents)]
    learned, convolved = case.extra != "plain", case.extra == "all"
    if learned:
        call += [call[0].new_empty(heads, case.agents, tokens), call[0].new_empty(heads, tokens, case.agents)]
    if convolved:
        call += [call[0].new_empty(heads * case.head_dim, 1, 3, 3), call[0].new_empty(heads * case.head_dim)]
    tensors = [*call, *[None] * (8 - len(call))]
    numbers = (scale, scale, 0.1, 0.9) if convolved else (scale, scale, 0.0, 1.0)
    output, state = launch.forward(*tensors, numbers, grid)
    launch.backward(output, *tensors[:7], state, numbers, grid, (True, learned, learned))


def call_linear(case: Case) -> None:
    """Linear attention on meta tensors, forward and backward."""
    from attngen.kernels.triton import linear_launch

    tokens = LAYERS[case.head_dim][2][0] ** 2
    query, key, value = (_heads(case, tokens) for _ in range(3))
    output, state = linear_launch.forward(query, key, value, case.extra, 1e-6)
    linear_launch.backward(output.transpose(1, 2), query, key, value, state, case.extra, 1e-6)


# Choosing cases.


def every_case(options: argparse.Namespace) -> list[Case]:
    """All combinations of what the options list."""
    agent = itertools.product(options.targets, options.heads, options.dtypes, options.agents, options.branches)
    linear = itertools.product(options.targets, options.heads, options.dtypes, [0], options.maps)
    return [case for case in (Case(*values) for values in (*agent, *linear)) if is_taken(case)]


def is_taken(case: Case) -> bool:
    """Whether the kernels take such a call."""
    from attngen.kernels.triton.agent_call import why_not_size

    return not case.agents or why_not_size(case.agents, case.head_dim, dtype_of(case)) is None


def covering_cases(options: argparse.Namespace) -> list[Case]:
    """Five of all combinations a target, in which every head size, dtype, number of agents, branch and map occurs.

    One of them has the largest agents with all branches, and one a wide head of linear attention, which need most
    registers and shared memory.
    """
    cases, chosen, seen = every_case(options), [], set()
    for row, target in enumerate(options.targets):
        agent, linear = ([c for c in cases if c.target == target and bool(c.agents) is kind] for kind in (True, False))
        largest = sorted(agent, key=lambda c: (c.extra == BRANCHES[-1], padded_bytes(c)))[-6:]
        wide = [c for c in linear if c.head_dim > 64 and c.extra in ("focused", "elu")]
        for part in (largest[row % 6 :][:1], agent, agent, linear, wide[row * 7 % max(1, len(wide)) :][:1]):
            start = 37 * row % max(1, len(part))  # others for other targets where all is covered
            case = max(part[start:] + part[:start], key=lambda c: len(_values(c) - seen), default=None)
            if case is not None:
                chosen.append(case)
                seen |= _values(case)
    return list(dict.fromkeys(chosen))


def _values(case: Case) -> set[tuple[Any, ...]]:
    return {(bool(case.agents), name, getattr(case, name)) for name in ("head_dim", "dtype", "agents", "extra")}


def padded_bytes(case: Case) -> int:
    """What all agents of a head take on the chip."""
    from attngen.kernels.triton import common

    return common.padded(case.agents) * common.padded(case.head_dim) * dtype_of(case).itemsize


def line(row: dict[str, Any], stack: int) -> str:
    """A row of the table."""
    case = Case(*(row[name] for name in Case._fields))
    wrong = "; ".join(faults(row, stack))
    if "error" in row:
        return f"{case!s:40} {row['kernel']:24} FAILED: {wrong}"
    found = (
        f"{case!s:40} {row['kernel']:24} {row['warps']:2} warps {row['stages']} stages {row['registers']:3} registers "
        f"{row['stack']:4} stack {row['shared']:6} shared {row['programs']:2} programs"
    )
    return f"{found}  <- {wrong}" if wrong else found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--all", action="store_true", help="all combinations of the values below, not a covering set")
    made.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="compute capabilities")
    made.add_argument("--heads", nargs="+", type=int, choices=LAYERS, default=list(LAYERS), help="head sizes")
    made.add_argument("--agents", nargs="+", type=int, default=AGENTS, help="numbers of agents")
    made.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the inputs")
    made.add_argument("--branches", nargs="*", choices=BRANCHES, default=BRANCHES, help="of agent attention")
    made.add_argument("--maps", nargs="*", choices=MAPS, default=MAPS, help="feature maps of linear attention")
    made.add_argument("--stack", type=int, default=64, help="bytes of stack a thread that are no fault")
    made.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    made.add_argument("--faults", action="store_true", help="print only the rows that fall short")
    made.add_argument("--out", type=Path, help="write all rows as JSON")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    import triton

    options = parser().parse_args(argv)
    cases = every_case(options) if options.all else covering_cases(options)
    rows: list[dict[str, Any]] = []
    # Forked, so that torch, Triton and attngen are imported once.
    with ProcessPoolExecutor(options.jobs, get_context("fork")) as pool:
        for found in pool.map(compile_case, cases):
            rows += found
            for row in found:
                if not options.faults or faults(row, options.stack):
                    print(line(row, options.stack), flush=True)
    wrong = sum(bool(faults(row, options.stack)) for row in rows)
    print(f"Triton {triton.__version__}: {len(rows)} binaries of {len(cases)} calls, {wrong} fall short")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"triton": triton.__version__, "stack": options.stack, "rows": rows}) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
