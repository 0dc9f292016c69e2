"""Distances between sets of features beside the Fréchet and polynomial-kernel ones, their spread and their limit.

Functions of features (N, D) in double precision; nothing is random but for directions and resamples of a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from train.metrics.frechet import RunningStatistics, Statistics, frechet_distance

# Bandwidth and factor of CMMD (Jayasumana et al., arXiv 2401.09603), for features of length 1.
BANDWIDTH, SCALE = 10.0, 1000.0
DIRECTIONS = 1000
# Rows of a kernel matrix, and directions, held at a time: 50,000 images then need some hundred MB.
BLOCK, DIRECTION_BLOCK = 1024, 50
EXTRAPOLATION_SIZES = 15


def gaussian_mmd(a: Tensor, b: Tensor, bandwidth: float = BANDWIDTH, scale: float = SCALE) -> float:
    """The squared maximum mean discrepancy with the kernel exp(-|x - y|² / (2 · bandwidth²)), times `scale`.

    The estimate over all pairs, those of an element with itself included, as in CMMD (arXiv 2401.09603, section 4):
    never negative, 0 for equal sets.

    Args:
        a: (N, D), float64.
        b: (M, D).
        bandwidth: of the kernel.
        scale: factor of the result.
    """
    within = _kernel_mean(a, a, bandwidth) + _kernel_mean(b, b, bandwidth)
    return scale * (within - 2 * _kernel_mean(a, b, bandwidth))


def _kernel_mean(a: Tensor, b: Tensor, bandwidth: float) -> float:
    lengths = b.square().sum(dim=1)
    total = 0.0
    for rows in a.split(BLOCK):
        squares = rows.square().sum(dim=1, keepdim=True) + lengths - 2 * rows @ b.T
        total += float(torch.exp(squares.clamp(min=0) / (-2 * bandwidth**2)).sum())
    return total / (len(a) * len(b))


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """MIND (arXiv 2605.06797), a sliced Wasserstein distance: of order 2, squared, the mean over directions, times D.

    In one dimension the optimal transport joins equal quantiles, so it is found by sorting. The factor D, the number
    of features, is ours: it makes a shift of the mean count as in the Fréchet distance, by its squared length.

    Args:
        a: (N, D), float64.
        b: (M, D).
        directions: number of random unit vectors.
        seed: of the directions.
    """
    width = a.shape[1]
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(width, directions, dtype=torch.float64, generator=generator)
    vectors = vectors / vectors.norm(dim=0)
    parts, at_a, at_b = _couplings(len(a), len(b))
    total = 0.0
    for some in vectors.split(DIRECTION_BLOCK, dim=1):
        one, other = (a @ some).sort(dim=0).values, (b @ some).sort(dim=0).values
        total += float((parts @ (one[at_a] - other[at_b]).square()).sum())
    return width * total / directions


def _couplings(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of probability, and the sorted elements of both sets that each joins, of n and m equal weights."""
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # in units of 1 / (n m)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return (ends - starts).double() / (n * m), starts // m, starts // n


def moments(features: Tensor, like: Statistics) -> Statistics:
    """Statistics of features (N, D), of the extractor of `like`."""
    running = RunningStatistics(keep_features=False)
    running.update(features)
    return running.finish(like.extractor, like.sha256)


def bootstrap(measure: Callable[[Tensor], float], features: Tensor, resamples: int, seed: int = 0) -> float:
    """Standard deviation of a measure over resamples of the generated images, drawn with replacement.

    A distance of a resample is itself biased by the images drawn twice, so only the spread is taken from it.

    Args:
        measure: of features (N, D).
        features: of the generated images.
        resamples: how many, at least 2.
        seed: of the draws.

    Raises:
        ValueError: for fewer than two resamples.
    """
    if resamples < 2:
        raise ValueError(f"a spread needs at least 2 resamples, got {resamples}")
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(features), (len(features),), generator=generator) for _ in range(resamples))
    values = torch.tensor([measure(features[draw]) for draw in draws], dtype=torch.float64)
    return float(values.std())


def extrapolated_frechet(features: Tensor, reference: Statistics, seed: int = 0) -> float:
    """The Fréchet distance at infinitely many generated images: a line in 1/N, at 0 (Chong and Forsyth, 1911.07023).

    Args:
        features: (N, D) of the generated images, float64.
        reference: what they are compared with.
        seed: of the parts.

    Raises:
        ValueError: where a fifth of the images, the smallest part, is not more than the number of features: the
            distance is no line there.
    """
    count, width = features.shape
    smallest = count // 5
    if smallest <= width:
        raise ValueError(f"it needs more than {5 * width:,} images for {width:,} features, got {count:,}")
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(smallest, count, EXTRAPOLATION_SIZES).round().long().tolist()
    values = []
    for size in sizes:
        part = features[torch.randperm(count, generator=generator)[:size]]
        values.append(frechet_distance(moments(part, reference), reference, warn=False))
    return _at_infinity(sizes, values)


def _at_infinity(sizes: list[int], values: list[float]) -> float:
    """Where the least-squares line of values over 1 / size is at 0."""
    inverse = [1 / size for size in sizes]
    mean_x, mean_y = math.fsum(inverse) / len(inverse), math.fsum(values) / len(values)
    spread = math.fsum((x - mean_x) ** 2 for x in inverse)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(inverse, values, strict=True)) / spread
    return mean_y - slope * mean_x
