"""Break the library on purpose, one fault at a time, and see that its tests notice: python -m tests.mutation

Every fault is made in a temporary copy of the repository, never in place; a fault that its tests do not notice is a
survivor. What was tried is kept in the output file, and only the rest is tried again; exit status 1 if any survived.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
KILLED, SURVIVED, STALE, SLOW = "killed", "survived", "stale", "timed out"
COPIED = ("attngen", "pipelines", "train", "benchmarks", "tests", "docs", ".ci")


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
    unknown = set(options.only or ()) - set(MUTATIONS)
    if unknown:
        parser.error(f"unknown fault {sorted(unknown)[0]!r}; --list prints them")
    return options


def copy_repository(folder: Path) -> None:
    """What the tests need, without the leftovers of earlier runs."""
    ignore = shutil.ignore_patterns("__pycache__", ".pytest_cache", "*.pyc", "outputs")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "constraints.txt"]:
        shutil.copy(file, folder)


def preload() -> None:
    """Import what all tests need and none of what is broken, so that every fork begins with it."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    import accelerate  # noqa: F401
    import diffusers
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401

    for name in ("StableDiffusionPAGPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "DiTPipeline", "hooks"):
        getattr(diffusers, name)
    assert not any(name.split(".")[0] == "attngen" for name in sys.modules)


def run_tests(folder: Path, mutation: Mutation, timeout: float) -> tuple[int | None, str]:
    """Run tests of a copy of the repository in a fork: pytest's exit status, None if they took too long, and output."""
    log = folder / "pytest.log"
    child = os.fork()
    if child == 0:
        os._exit(_in_the_fork(folder, mutation, log))
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, ""
        time.sleep(0.1)


def _in_the_fork(folder: Path, mutation: Mutation, log: Path) -> int:
    import pytest

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    selected = [*mutation.tests, *(["-k", mutation.only] if mutation.only else [])]
    code = pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *selected])
    sys.stdout.flush()
    return int(code)


def attempt(folder: Path, mutation: Mutation, timeout: float) -> tuple[str, str]:
    """Make one fault, run its tests, take it back; what became of it, and by which test."""
    file = folder / mutation.file
    whole = file.read_text() if file.is_file() else ""
    if whole.count(mutation.old) != 1:
        return STALE, f"{mutation.file} has the text {whole.count(mutation.old)} times"
    file.write_text(whole.replace(mutation.old, mutation.new))
    code, text = run_tests(folder, mutation, timeout)
    file.write_text(whole)
    if code is None:
        return SLOW, f"more than {timeout:g} s"
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code == 0:
        return SURVIVED, ""
    if not failed:  # no test ran: a name in the table is wrong
        return STALE, " ".join(text.split())[-200:]
    return KILLED, failed[0].split(" - ")[0]


def load_results(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    if options.again or not options.out.is_file():
        return {}
    found = json.loads(options.out.read_text())
    return {name: result for name, result in found.items() if name in MUTATIONS}


def save_results(path: Path, results: dict[str, dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, path)


def show(results: dict[str, dict[str, str]]) -> None:
    for name, result in results.items():
        print(f"{result['result']:9}  {name:34}  {result['by']}")
    counts = {kind: sum(r["result"] == kind for r in results.values()) for kind in (KILLED, SURVIVED, STALE, SLOW)}
    print(f"{len(MUTATIONS)} faults: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.list:
        for name, mutation in MUTATIONS.items():
            print(f"{name:34}  {mutation.file}")
        return 0
    results = load_results(options)
    preload()
    wanted = options.only or [name for name in MUTATIONS if results.get(name, {}).get("result") != KILLED]
    with tempfile.TemporaryDirectory(prefix="attngen-mutation-") as temporary:
        folder = Path(temporary)
        copy_repository(folder)
        for name in wanted:
            start = time.monotonic()
            result, by = attempt(folder, MUTATIONS[name], options.timeout)
            print(f"{result:9}  {name:34}  {time.monotonic() - start:5.0f} s  {by}", file=sys.stderr, flush=True)
            results[name] = {"result": result, "by": by}
            save_results(options.out, results)
    show(results)
    return int(any(results[name]["result"] != KILLED for name in results))


if __name__ == "__main__":
    sys.exit(main())
