"""The same pictures by several methods: what each costs, how far it is from the first, and where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.engine.paired import ERROR, LPIPS, MISSING, PSNR, SSIM, Paired, compare_methods, paired
from pipelines.engine.results import Result

if TYPE_CHECKING:
    from PIL import Image

WARM_UP_STEPS = 2
DIFFERENCE_GAIN = 4  # differences are shown so many times as bright
COLUMNS = ("method", "seconds", "times faster", "steps/s", "peak MiB", "GFLOP", "times fewer FLOPs", "error", "PSNR dB")


HEADS = {ERROR: "latent error", PSNR: "PSNR dB", SSIM: "SSIM", LPIPS: "LPIPS"}


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        label: a few words.
        result: its pictures and what they cost.
        speedup: times faster than the first method.
        flops_ratio: times fewer operations than the first; None where they were not counted.
        error: root mean square difference of the pixel values, 0 to 1, from the first method's pictures.
        psnr: in dB; infinite for equal pictures.
        paired: what the method changed, picture by picture.
    """

    label: str
    result: Result
    speedup: float
    flops_ratio: float | None
    error: float
    psnr: float
    paired: Paired

    def cells(self) -> list[str]:
        """For `COLUMNS`."""
        result = self.result
        return [
            self.label,
            f"{result.seconds:.2f}",
            f"{self.speedup:.2f}",
            f"{result.steps_per_second:.1f}",
            "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}",
            "" if result.flops is None else f"{result.flops / 1e9:.1f}",
            "" if self.flops_ratio is None else f"{self.flops_ratio:.2f}",
            f"{self.error:.4f}",
            "equal" if math.isinf(self.psnr) else f"{self.psnr:.1f}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `psnr` is None for equal pictures."""
        return {
            "label": self.label,
            **self.result.to_dict(),
            "speedup": round(self.speedup, 3),
            "flops_ratio": None if self.flops_ratio is None else round(self.flops_ratio, 3),
            "error": round(self.error, 6),
            "psnr": None if math.isinf(self.psnr) else round(self.psnr, 2),
            "paired": self.paired.to_dict(),
        }


@dataclass(frozen=True)
class Comparison:
    """Rows in the order asked for; the first is what the others are compared with."""

    rows: list[Row]

    def table(self) -> list[list[str]]:
        """Cells for `COLUMNS`, a row a method."""
        return [row.cells() for row in self.rows]

    def paired_table(self) -> list[list[str]]:
        """Means over pairs with intervals of 95%, with a head, a row a method but the first."""
        others = self.rows[1:]
        metrics = [name for name in HEADS if any(name in row.paired.estimates for row in others)]
        head = ["method", *(HEADS[name] for name in metrics), *(["verdict"] if LPIPS in metrics else [])]
        rows = [head]
        for row in others:
            cells = [str(row.paired.estimates.get(name, "")) for name in metrics]
            rows.append([row.label, *cells, *([row.paired.verdict or ""] if LPIPS in metrics else [])])
        return rows

    def paired_tests(self) -> list[str]:
        """Sentences on which of two methods is nearer to the first, each against the second row; empty without any."""
        sentences = []
        for row in self.rows[2:]:
            name = ERROR if ERROR in row.paired.estimates else PSNR
            base = self.rows[1]
            try:
                found = compare_methods(row.paired.estimates[name], base.paired.estimates[name])
            except ImportError:
                return [f"A paired t test {MISSING}"]
            if found is not None:
                what = f"{HEADS[name]} {found.mean:+.3g} against {base.label}"
                sentences.append(f"{row.label}: {what}, paired t = {found.t:.2f}, p = {found.p:.2g}")
        return sentences

    def difference(self, row: int, picture: int = 0) -> Image.Image:
        """Where a method's picture differs from the first method's, `DIFFERENCE_GAIN` times as bright."""
        return difference(self.rows[0].result.pictures[picture], self.rows[row].result.pictures[picture])

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "warm_up": f"{WARM_UP_STEPS} warm-up steps per method, not timed",
            "rows": [row.to_dict() for row in self.rows],
        }


def compare_results(results: Sequence[Result], lpips: bool = False) -> Comparison:
    """Compare each with the first; all hold the same pictures by other methods. For `lpips` see `paired`."""
    first = results[0]
    rows = []
    for result in results:
        error = rms_difference(first.pictures, result.pictures)
        ratio = first.flops / result.flops if first.flops and result.flops else None
        speedup = first.seconds / result.seconds if result.seconds else 1.0
        psnr = -20 * math.log10(error) if error else math.inf
        latents = (first.latents, result.latents) if len(first.latents) == len(result.latents) else None
        pairs = paired(first.pictures, result.pictures, latents, lpips=lpips)
        rows.append(Row(result.settings.use.label, result, speedup, ratio, error, psnr, pairs))
    return Comparison(rows)


def rms_difference(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> float:
    """Root mean square difference of the pixel values, 0 to 1, over all pictures."""
    import numpy as np

    pairs = [
        (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)) for a, b in zip(one, other, strict=True)
    ]
    squares = [float(np.square((a - b) / 255).mean()) for a, b in pairs]
    return math.sqrt(sum(squares) / len(squares))


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """The absolute difference of two pictures, `DIFFERENCE_GAIN` times as bright; black where they are equal."""
    import numpy as np
    from PIL import Image

    apart = np.abs(np.asarray(one.convert("RGB"), dtype=np.int16) - np.asarray(other.convert("RGB"), dtype=np.int16))
    return Image.fromarray(np.clip(apart * DIFFERENCE_GAIN, 0, 255).astype(np.uint8))
