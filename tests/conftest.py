"""Settings and fixtures for all tests: two threads, no network, no GPU tests without a GPU."""

import os

# Two threads, or one in each of several processes (pytest -n): threads that wait for each other's cores are slow.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub, which reads it once
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["ATTNGEN_MEASURE"] = "0"  # the same kernels on every machine; tests of measuring turn it on

from pathlib import Path

import pytest
import torch

# Files that take minutes, longest first: where several processes share the tests, none is left with one of them at the
# end while the others have nothing to do.
LONG = (
    "train/test_sit_training.py",
    "kernels/triton/test_agent.py",
    "app/test_page.py",
    "benchmarks/test_compiled.py",
    "hosts/test_compile.py",
    "kernels/triton/test_linear.py",
)

torch.set_num_threads(min(int(os.environ["OMP_NUM_THREADS"]), torch.get_num_threads()))


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(config, items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    if "slow" not in config.option.markexpr:
        reasons["slow"] = "takes over a minute; run with -m slow"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def unmeasured(monkeypatch):
    """No path's speed is known: the tests' tiny layers, on which every method loses time, are not warned about."""
    from attngen.kernels import crossovers

    monkeypatch.setattr(crossovers, "_in_force", {"tables": {}})


@pytest.fixture
def global_rng_untouched():
    """Fails the test if it leaves PyTorch's global random state other than it found it."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global random state was touched"
