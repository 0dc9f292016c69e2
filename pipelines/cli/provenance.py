"""What made a file or a number: versions, commit, machine, and a hash of the weights."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# The hash reads at most this many windows of this size from a file, so it takes no time for large models.
HASH_WINDOWS, HASH_WINDOW_BYTES = 64, 64 * 1024


def machine(device: str) -> dict[str, Any]:
    """Device, threads, versions, commit and date, as JSON values.

    The commit has "+changes" behind it where the working tree differs from it; results and documents do not count.
    """
    import torch

    import attngen
    from attngen.kernels.machine import environment

    around = environment(torch.device(device))
    return {
        "device": around["device"],
        "driver": around["driver"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "diffusers": version("diffusers"),
        "attngen": attngen.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide a sample, and of Pillow, which writes it."""
    import attngen

    packages = ("torch", "diffusers", "pillow")
    return {"attngen": attngen.__version__, **{name: version(name) or "unknown" for name in packages}}


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(*parts: str) -> str | None:
    """The short commit of this repository, or BENCHMARK_COMMIT, for copies without one.

    Args:
        parts: paths whose changes count; by default the library and the benchmarks.
    """
    parts = parts or ("attngen", "benchmarks/*.py")
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            ran = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    revision = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *parts)
    return f"{revision}+changes" if revision and changed else revision


def model_hash(model: str | Path) -> str | None:
    """Ten hexadecimal digits that tell models apart: of the weight files in a folder, or of a file; else None.

    Names, sizes and evenly spread windows of the files are hashed. A guard against mix-ups, not against tampering.
    """
    path = Path(model)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES and file.is_file())
    else:
        files = []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with open(file, "rb") as opened:
            for offset in _window_offsets(size):
                opened.seek(offset)
                digest.update(opened.read(HASH_WINDOW_BYTES))
    return digest.hexdigest()[:10]


def _window_offsets(size: int) -> list[int]:
    if size <= HASH_WINDOWS * HASH_WINDOW_BYTES:
        return list(range(0, size, HASH_WINDOW_BYTES))
    last = size - HASH_WINDOW_BYTES
    return [last * i // (HASH_WINDOWS - 1) for i in range(HASH_WINDOWS)]
