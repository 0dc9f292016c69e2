"""Reads the golden vectors of `tests/golden`."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden_cases(pattern: str) -> Iterator[tuple[str, dict[str, Tensor], dict]]:
    """Every case whose file name (without its ending) matches the glob `pattern`.

    Yields:
        The case's name, its tensors, and its metadata with each value decoded from JSON.
    """
    files = sorted(GOLDEN.glob(f"{pattern}.safetensors"))
    if not files:  # a mistyped pattern must not become a test that checks nothing
        raise FileNotFoundError(f"no golden case matches {pattern!r} in {GOLDEN}")
    for file in files:
        with safe_open(file, "pt") as handle:
            metadata = {name: json.loads(value) for name, value in (handle.metadata() or {}).items()}
            yield file.stem, {name: handle.get_tensor(name) for name in handle.keys()}, metadata


def state(tensors: dict[str, Tensor], prefix: str = "state.") -> dict[str, Tensor]:
    """The tensors under `prefix`, without it: the reference module's state dict."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
