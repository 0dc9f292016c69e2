"""The device that a measurement of speed belongs to, and the software between it and the kernels."""

from __future__ import annotations

import platform
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

from attngen.version import __version__


@lru_cache(maxsize=1)
def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of a CPU or of a CUDA device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def environment(device: torch.device) -> dict[str, str]:
    """All that a measured time depends on beside the call: the device, its driver, and versions."""
    on_cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "driver": _driver() if on_cuda else f"{platform.system()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "attngen": __version__,
    }


@lru_cache(maxsize=1)
def _driver() -> str:
    """The version of the driver where the system shows it, else of the interface that torch was built for."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return str(torch.version.hip or torch.version.cuda)
    return next((word for word in line.split() if word[0].isdigit() and "." in word), line)


@lru_cache(maxsize=4)
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
