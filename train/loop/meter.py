"""What a run reports: speed, loss by noise level, share of the machine's peak; in JSON lines and to trackers."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BUCKETS = 4
"""Equal parts of the noise level, 0 to 1, that the loss is also reported for."""


class Meter:
    """Collects the steps between two lines of the log.

    Args:
        images_per_step: pictures an optimiser step, over all processes.
        flops_per_image: operations of a training step for one picture, or None.
        peak_flops: operations a second that all processes' devices reach in a matrix product, or None.
    """

    def __init__(self, images_per_step: int, flops_per_image: float | None, peak_flops: float | None) -> None:
        import torch

        self.images_per_step, self.flops_per_image, self.peak_flops = images_per_step, flops_per_image, peak_flops
        self.started = self._last = time.monotonic()
        self._steps = self._skipped = 0
        self._sums = torch.zeros(2 * BUCKETS)
        self._loss = self._norm = self._waited = 0.0

    def add(self, loss: float, grad_norm: float, buckets: Tensor, waited: float) -> None:
        """Take in a step.

        Args:
            loss: mean over all processes.
            grad_norm: before it was limited; not finite in a step that float16's gradient scaler skipped.
            buckets: (2 · BUCKETS,) sums of the loss by noise level, and numbers of pictures.
            waited: seconds spent waiting for data since the run began.
        """
        self._steps += 1
        self._loss += loss
        if math.isfinite(grad_norm):
            self._norm += grad_norm
        else:
            self._skipped += 1
        self._sums += buckets
        self._total_waited = waited

    def line(self, step: int) -> dict[str, Any]:
        """What there is to say about the steps since the last line; starts anew."""
        now = time.monotonic()
        seconds, steps = max(now - self._last, 1e-9), max(self._steps, 1)
        rate = self.images_per_step * self._steps / seconds
        sums, counts = self._sums.split(BUCKETS)
        record: dict[str, Any] = {
            "step": step,
            "loss": round(self._loss / steps, 6),
            "grad_norm": round(self._norm / max(steps - self._skipped, 1), 6),
            "seconds": round(now - self.started, 2),
            "images_per_second": round(rate, 2),
            "waiting_share": round((self._total_waited - self._waited) / seconds, 4),
            "loss_by_noise": [round(float(s / c), 6) if c > 0 else None for s, c in zip(sums, counts, strict=True)],
        }
        if self.flops_per_image and self.peak_flops:
            record["mfu"] = round(rate * self.flops_per_image / self.peak_flops, 4)
        if self._skipped:
            record["skipped_steps"] = self._skipped
        self._last, self._waited = now, self._total_waited
        self._steps = self._skipped = 0
        self._loss = self._norm = 0.0
        self._sums.zero_()
        return record


def bucket_sums(losses: Tensor, noise_levels: Tensor) -> Tensor:
    """(2 · BUCKETS,) sums of the losses by noise level, from low to high, and how many there were."""
    import torch

    place = (noise_levels * BUCKETS).long().clamp(0, BUCKETS - 1)
    sums = torch.zeros(2, BUCKETS, device=losses.device)
    sums[0].scatter_add_(0, place, losses.float())
    sums[1].scatter_add_(0, place, torch.ones_like(losses, dtype=torch.float32))
    return sums.flatten()


def training_flops(model: nn.Module, inputs: Mapping[str, Any]) -> int | None:
    """Operations of a forward and backward pass for one picture: three forwards, counted by torch without computing.

    None for a network that cannot run without content.
    """
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        hollow = copy.deepcopy(model).to("meta").eval()
        given = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            hollow(**given)
    except (NotImplementedError, RuntimeError):
        return None
    return 3 * counter.get_total_flops()


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this device, measured in a moment: what a model can reach."""
    import torch

    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()
    return 2 * size**3 / min(seconds() for _ in range(3))


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON to a log: all of it or, on a full disk, nothing.

    Raises:
        OSError: if it cannot be written.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def trim_log(path: Path, step: int) -> None:
    """Drop lines of steps after a checkpoint, which a killed run has left and the one that goes on makes again."""
    from attngen.files import write_file

    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        write_file(path, b"".join(kept))


def _step_of(line: bytes) -> float:
    """The step of a line of the log; beyond all for one that is cut short."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, lists spread out: what trackers take."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            numbers |= {f"{name}/{i}": part for i, part in enumerate(value) if part is not None}
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[name] = value
    return numbers
