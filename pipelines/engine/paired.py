"""Paired quality: how far a method's images are from exact attention's, image by image on the same noise.

Images differ from each other by far more than methods do, so what is compared is the difference within a pair: means
with bootstrap intervals (Efron, 1987, bias-corrected and accelerated), and a paired t test between two methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

ERROR, PSNR, SSIM, LPIPS = "latent_error", "psnr", "ssim", "lpips"
CONFIDENCE = 0.95
RESAMPLES = 2000
# LPIPS to the exact run below which a run counts as the same trajectory, and above which as diverged: the bands that
# TensorRT-LLM's tests of diffusion models use.
SAME_TRAJECTORY, DIVERGED = 0.30, 0.55
SAME, CLOSE, FAR = "same trajectory", "close", "diverged"
SSIM_WINDOW = 11
MISSING = "needs packages of their own: pip install 'attngen[fid]'"


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs, with its interval of 95%.

    Attributes:
        mean: over the pairs that have a finite value.
        low: lower end; the mean itself where there are fewer than three values, or no spread.
        high: upper end.
        values: by pair; infinite where a PSNR is of equal images.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        if math.isinf(self.mean):
            return "equal"
        if self.low == self.high:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; None for what is infinite."""
        values = [self.mean, self.low, self.high, *self.values]
        mean, low, high, *pairs = [None if math.isinf(x) else round(x, 6) for x in values]
        return {"mean": mean, "low": low, "high": high, "values": pairs}


@dataclass(frozen=True)
class Paired:
    """What a method changed, over pairs.

    Attributes:
        estimates: by metric: `latent_error` is |z - z0| / |z0| of the last latents, `psnr` is in dB, `ssim` is 1 for
            equal images, `lpips` is 0.
        skipped: why a metric is not there.
        verdict: "same trajectory", "close" or "diverged" by the mean LPIPS, or None without it.
    """

    estimates: dict[str, Estimate]
    skipped: dict[str, str] = field(default_factory=dict)
    verdict: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **{name: estimate.to_dict() for name, estimate in self.estimates.items()},
            "skipped": self.skipped,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Difference:
    """A paired t test of the same metric of two methods.

    Attributes:
        mean: of the differences, the first method minus the second.
        t: statistic of the paired t test with n - 1 degrees of freedom; infinite where all differences are equal.
        p: probability of so large a |t| without a difference.
    """

    mean: float
    t: float
    p: float


def paired(
    exact: Sequence[Image.Image],
    other: Sequence[Image.Image],
    latents: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    *,
    lpips: bool = False,
) -> Paired:
    """Compare the images of two methods pair by pair; both drew each pair from the same noise.

    Args:
        exact: images of exact attention.
        other: as many of the method, of the same sizes.
        latents: the last latents of both, one tensor an image, where they are known.
        lpips: whether to compute LPIPS (Zhang et al., arXiv 1801.03924) with AlexNet, whose weights torchvision takes
            from torch.hub's cache or downloads.

    Raises:
        ValueError: if the numbers of images differ.
    """
    if len(exact) != len(other):
        raise ValueError(f"pairs need as many images of both, got {len(exact)} and {len(other)}")
    estimates: dict[str, Estimate] = {}
    skipped: dict[str, str] = {}
    if latents is not None and all(latents):
        estimates[ERROR] = estimate([_relative(a, b) for a, b in zip(*latents, strict=True)])
    else:
        skipped[ERROR] = "the latents were not kept"
    pairs = [(_pixels(a), _pixels(b)) for a, b in zip(exact, other, strict=True)]
    estimates[PSNR] = estimate([psnr(a, b) for a, b in pairs])
    _add(SSIM, lambda: [ssim(a, b) for a, b in pairs], estimates, skipped)
    if lpips:
        _add(LPIPS, lambda: _lpips(pairs), estimates, skipped)
    else:
        skipped[LPIPS] = "it was not asked for"
    return Paired(estimates, skipped, verdict(estimates.get(LPIPS)))


def _add(
    name: str, measure: Callable[[], list[float]], estimates: dict[str, Estimate], skipped: dict[str, str]
) -> None:
    try:
        estimates[name] = estimate(measure())
    except ImportError:
        skipped[name] = f"{name.upper()} {MISSING}"
    except OSError as error:
        skipped[name] = f"its weights are not in torch.hub's cache and cannot be downloaded ({error})"
    except (RuntimeError, ValueError) as error:  # images too small for it
        skipped[name] = str(error).strip().splitlines()[0]


def verdict(lpips: Estimate | None) -> str | None:
    """In words, by the mean LPIPS to the exact run; None without it."""
    if lpips is None:
        return None
    return SAME if lpips.mean < SAME_TRAJECTORY else CLOSE if lpips.mean <= DIVERGED else FAR


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images (1, C, H, W) in [0, 1]; infinite for equal ones."""
    square = float((one.double() - other.double()).square().mean())
    return math.inf if square == 0 else -10 * math.log10(square)


def ssim(one: Tensor, other: Tensor) -> float:
    """Structural similarity (Wang et al., 2004) with a Gaussian window of 11 pixels and a deviation of 1.5.

    Raises:
        ValueError: for images smaller than the window.
        ImportError: without torchmetrics.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(one.shape[-2:]) < SSIM_WINDOW:
        height, width = one.shape[-2:]
        raise ValueError(f"SSIM needs images of {SSIM_WINDOW} pixels a side or more, got {width} x {height}")
    found: Any = structural_similarity_index_measure(other.double(), one.double(), data_range=1.0)
    return float(found)


def _lpips(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    network: Any = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    return [float(network(b, a)) for a, b in pairs]


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of the finite values, with a bootstrap interval where there are three or more; always the same one.

    Without scipy there is no interval: its ends are the mean.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Estimate(math.inf, math.inf, math.inf, tuple(values))
    mean = math.fsum(finite) / len(finite)
    low, high = _interval(finite, mean)
    return Estimate(mean, low, high, tuple(values))


def _interval(values: Sequence[float], mean: float) -> tuple[float, float]:
    if len(values) < 3 or max(values) - min(values) <= 1e-12 * abs(mean):
        return mean, mean
    import numpy as np

    try:
        from scipy import stats
    except ImportError:
        return mean, mean
    found: Any = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, rng=np.random.default_rng(0)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def compare_methods(one: Estimate, other: Estimate) -> Difference | None:
    """A paired t test of one metric of two methods over the pairs that are finite in both.

    Returns:
        None for fewer than two such pairs.

    Raises:
        ImportError: without scipy.
    """
    from scipy import stats

    both = [(a, b) for a, b in zip(one.values, other.values, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(both) < 2:
        return None
    differences = [a - b for a, b in both]
    mean = math.fsum(differences) / len(differences)
    if max(differences) == min(differences):
        return Difference(mean, math.copysign(math.inf, mean) if mean else 0.0, 0.0 if mean else 1.0)
    found: Any = stats.ttest_rel([a for a, _ in both], [b for _, b in both])
    return Difference(mean, float(found.statistic), float(found.pvalue))


def _relative(exact: Tensor, other: Tensor) -> float:
    exact, other = exact.double(), other.double()
    return float((other - exact).norm() / exact.norm().clamp(min=1e-12))


def _pixels(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
