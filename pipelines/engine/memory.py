"""The most memory that a piece of work took."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

REMEDY = "draw smaller or fewer images, choose a method with fewer agents, or start with --dtype float16 or --offload"


class PeakMemory:
    """Starts to watch when it is made.

    On a CUDA device: of what torch allocated there, weights included. On a CPU: of the whole process, as Linux counts
    it; memory that was freed but not given back counts too.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        except OSError:
            pass

    def read(self) -> int | None:
        """The peak so far, in bytes; None where nobody counts."""
        import torch

        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if self.device.type != "cpu":
            return None
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        found = [line for line in lines if line.startswith("VmHWM:")]
        return int(found[0].split()[1]) * 1024 if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, or PyTorch's on any device."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def free_memory() -> None:
    """Give back what nobody holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
