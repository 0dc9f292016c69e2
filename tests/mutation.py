"""Break the library on purpose, one fault at a time, and see that its tests notice: python -m tests.mutation

Every fault is made in the memory of a fork, never in a file; a fault that its tests do not notice is a survivor. What
was tried is kept in the output file, and only the rest is tried again; exit status 1 if any survived.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.mutations import FAULTS, LATER, Fault

ROOT = Path(__file__).parents[1]
PACKAGES = ("attngen", "pipelines", "train", "benchmarks")
KILLED, SURVIVED, STALE, SLOW = "killed", "survived", "stale", "timed out"
NOT_MADE = 99
"""Exit status of a fork that could not make its fault."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description="Break the library on purpose.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults to try (default: all that were not)")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/mutation.json"), help="results; given again it goes on"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of one fault (default 600)")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    options = parser.parse_args(argv)
    unknown = set(options.only or ()) - set(FAULTS)
    if unknown:
        parser.error(f"unknown fault {sorted(unknown)[0]!r}; --list prints them")
    return options


def find(target: str) -> tuple[Any, str, Any]:
    """The module or class that has a fault's target, its name there, and the target as it stands there.

    Raises:
        ImportError, AttributeError or KeyError: if there is no such module, class or name.
    """
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for outer in classes:
        owner = getattr(owner, outer)
    return owner, name, vars(owner)[name]


def make(fault: Fault) -> None:
    """Put the replacement everywhere in this process: modules hold what they import, and tables what they list."""
    owner, name, original = find(fault.target)
    broken = fault.change(original)
    setattr(owner, name, broken)
    if isinstance(original, ModuleType):
        return
    ours = [module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES]
    tables = [value for module in ours for value in vars(module).values() if isinstance(value, dict)]
    for holder in [*map(vars, ours), *tables]:
        for key in [key for key, value in holder.items() if value is original]:
            holder[key] = broken


def preload() -> None:
    """Import what all tests need, so that every fork begins with it."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    import accelerate  # noqa: F401
    import diffusers
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401

    import attngen  # noqa: F401

    for name in ("StableDiffusionPAGPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "DiTPipeline", "hooks"):
        getattr(diffusers, name)


def run_tests(fault: Fault | None, selected: Sequence[str], log: Path, timeout: float) -> int | None:
    """Run tests in a fork, with a fault made before: the fork's exit status, or None if it took too long."""
    child = os.fork()
    if child == 0:
        os._exit(_in_the_fork(fault, selected, log))
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.1)


def _in_the_fork(fault: Fault | None, selected: Sequence[str], log: Path) -> int:
    import pytest

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    try:
        if fault is not None:
            make(fault)
    except Exception:  # whatever stops it, the fault was not made
        traceback.print_exc()
        sys.stderr.flush()
        return NOT_MADE
    code = pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *selected])
    sys.stdout.flush()
    return int(code)


def verdict(code: int | None, text: str) -> tuple[str, str]:
    """What became of a fault, and by which test, from the exit status and output of its tests."""
    last = " ".join(text.split())[-200:]
    if code is None:
        return SLOW, ""
    if code == 0:
        return (SURVIVED, "") if " passed" in text else (STALE, f"no test ran: {last}")
    failed = [line for line in text.splitlines() if line.startswith("FAILED ")]
    if code != 1 or not failed:  # a name in the table is wrong, or the tests could not be collected
        return STALE, last
    # A replacement that does not fit its callers any more fails by itself, whatever it was to break.
    misfit = re.search(
        r"^.*(tests/mutations\.py:\d+: (Type|Attribute|Name)Error|TypeError: .*<lambda>\(\)).*$", text, re.M
    )
    return (STALE, misfit[0]) if misfit else (KILLED, failed[0].removeprefix("FAILED ").split(" - ")[0])


def attempt(fault: Fault, timeout: float) -> tuple[str, str]:
    """Make one fault and run its tests; what became of it, and by which test, which must pass without the fault."""
    selected = [*fault.tests, *(["-k", fault.only] if fault.only else [])]
    with tempfile.TemporaryDirectory(prefix="attngen-mutation-") as folder:
        log = Path(folder) / "pytest.log"
        code = run_tests(fault, selected, log, timeout)
        result, by = verdict(code, log.read_text(errors="replace") if log.is_file() else "")
        if result == KILLED and run_tests(None, [by], log, timeout) != 0:
            return STALE, f"{by} fails without the fault"
        return result, by


def load_results(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    if options.again or not options.out.is_file():
        return {}
    found = json.loads(options.out.read_text())
    return {name: result for name, result in found.items() if name in FAULTS}


def save_results(path: Path, results: dict[str, dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, path)


def show(results: dict[str, dict[str, str]]) -> None:
    for name, result in results.items():
        print(f"{result['result']:9}  {name:38}  {result['by']}")
    counts = {kind: sum(r["result"] == kind for r in results.values()) for kind in (KILLED, SURVIVED, STALE, SLOW)}
    print(f"{len(FAULTS)} faults: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.list:
        for name, fault in FAULTS.items():
            print(f"{name:38}  {fault.target}")
        for name, (what, _) in LATER.items():
            print(f"{name:38}  to be written: {what}")
        return 0
    results = load_results(options)
    preload()
    wanted = options.only or [name for name in FAULTS if results.get(name, {}).get("result") != KILLED]
    for name in wanted:
        start = time.monotonic()
        result, by = attempt(FAULTS[name], options.timeout)
        print(f"{result:9}  {name:38}  {time.monotonic() - start:5.0f} s  {by}", file=sys.stderr, flush=True)
        results[name] = {"result": result, "by": by}
        save_results(options.out, results)
    show(results)
    return int(any(results[name]["result"] != KILLED for name in results))


if __name__ == "__main__":
    sys.exit(main())
