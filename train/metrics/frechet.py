"""FD-emoji: Fréchet and kernel distances between sets of emoji, in the features of :mod:`train.emoji.features`.

The Fréchet distance of two Gaussians (Dowson and Landau, 1982, doi 10.1016/0047-259X(82)90077-X) between features of
pictures is the idea of FID (Heusel et al., arXiv 1706.08500); the kernel distance is that of KID (Binkowski et al.,
arXiv 1801.01401). With the features of a small network trained on emoji the values compare models of emoji with each
other only: they are not FID, and not comparable with papers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from attngen.files import write_file
from pipelines.cli.seeds import generator_for
from train.emoji.dataset import EmojiDataset, check_classes
from train.emoji.features import FeatureExtractor, default_extractor, features_of

METRIC = "FD-emoji"
FORMAT = "attngen-statistics-1"
MIN_PICTURES = 2
# The distance falls with the number of pictures; below this, or twice the number of features, it is mostly that.
ENOUGH_PICTURES = 2048
# Pairs of parts of the reference that the floor is the mean of.
FLOOR_DRAWS = 8
KERNEL_DEGREE = 3
# Rows and columns of a kernel matrix held at a time.
KERNEL_BLOCK = 1024
# Largest side of the pictures in the data set.
REFERENCE_SIZE = 64
# Shares of classes that differ by more than this make a distance of their own.
MIX_TOLERANCE = 0.05


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set's features, and the features themselves where they are kept.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, the unbiased one.
        num_pictures: number of pictures.
        extractor: name of the extractor and the first digits of its hash; empty for features of other origin.
        sha256: hash of the extractor's weights; empty likewise.
        features: (N, D) float64, or None; the kernel distance needs them.
    """

    mean: Tensor
    covariance: Tensor
    num_pictures: int
    extractor: str = ""
    sha256: str = ""
    features: Tensor | None = None

    @property
    def metric(self) -> str:
        """What a Fréchet distance between such statistics is called: `FD-emoji[emoji-cnn-v1-0123abcd]`."""
        return f"{METRIC}[{self.extractor}]"


class RunningStatistics:
    """Mean and covariance of features that come in batches, in one pass and double precision.

    Batches are merged about their own means (Chan, Golub and LeVeque, 1983), so that features far from zero lose no
    digits.
    """

    def __init__(self, keep_features: bool = True) -> None:
        """Start with nothing.

        Args:
            keep_features: whether to keep the features for kernel distances: 1 KiB a picture.
        """
        self.num_pictures = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)
        self._features: list[Tensor] | None = [] if keep_features else None

    def update(self, features: Tensor) -> None:
        """Add features.

        Args:
            features: (B, D), floating point; D as before.

        Raises:
            ValueError: if they have another shape or are not finite.
        """
        if features.ndim != 2 or (self.num_pictures and features.shape[1] != len(self._mean)):
            wanted = len(self._mean) if self.num_pictures else "D"
            raise ValueError(f"expected features (B, {wanted}), got {tuple(features.shape)}")
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            broken = int((~features.isfinite()).any(dim=1).sum())
            raise ValueError(f"features of {broken} of {len(features)} images are not finite")
        if not len(features):
            return
        if not self.num_pictures:
            self._mean = torch.zeros(features.shape[1], dtype=torch.float64)
            self._scatter = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
        self._merge(features)
        if self._features is not None:
            self._features.append(features)

    def _merge(self, features: Tensor) -> None:
        mean = features.mean(dim=0)
        centred = features - mean
        step = mean - self._mean
        total = self.num_pictures + len(features)
        between = self.num_pictures * len(features) / total
        self._scatter += centred.T @ centred + between * torch.outer(step, step)
        self._mean += step * (len(features) / total)
        self.num_pictures = total

    def finish(self, extractor: str = "", sha256: str = "") -> Statistics:
        """The statistics of all that was added.

        Args:
            extractor: name of the extractor, with the first digits of the hash.
            sha256: hash of its weights.

        Returns:
            The statistics.

        Raises:
            ValueError: if fewer than 2 pictures were added.
        """
        if self.num_pictures < MIN_PICTURES:
            raise ValueError(f"a distance needs at least {MIN_PICTURES} images, got {self.num_pictures}")
        covariance = self._scatter / (self.num_pictures - 1)
        features = torch.cat(self._features) if self._features is not None else None
        return Statistics(
            self._mean.clone(), (covariance + covariance.T) / 2, self.num_pictures, extractor, sha256, features
        )


def statistics_of(
    pictures: Iterable[Tensor] | Tensor, extractor: FeatureExtractor | None = None, keep_features: bool = True
) -> Statistics:
    """Statistics of a stream of pictures, whatever its order and the sizes of its batches.

    Args:
        pictures: one tensor (N, 3, S, S), or batches (B, 3, S, S) and single pictures (3, S, S) in turn; uint8 or
            floating point in [-1, 1], sides of 16 to 128.
        extractor: the network; the one that comes with the code by default.
        keep_features: whether to keep the features for kernel distances: 1 KiB a picture.

    Returns:
        The statistics.

    Raises:
        ValueError: if an element is not pictures, or there are fewer than 2.
    """
    extractor = extractor or default_extractor()
    running = RunningStatistics(keep_features)
    for features in features_of(pictures, extractor):
        running.update(features)
    return running.finish(extractor.label, extractor.sha256)


def reference_statistics(
    image_size: int,
    classes: Sequence[str] | None = None,
    split: str = "train",
    extractor: FeatureExtractor | None = None,
) -> Statistics:
    """Statistics of the emoji themselves, each once and without augmentation; kept in memory.

    Args:
        image_size: side of the pictures they are compared with, so that both are resampled alike; sides above 64,
            which the data set does not have, get the statistics for 64.
        classes: class names in the order of the model's labels; all by default.
        split: `train`, `test` or `all`.
        extractor: the network; the one that comes with the code by default.

    Returns:
        The statistics. They are shared: do not change their tensors.

    Raises:
        ValueError: if an argument has none of the accepted values.
    """
    names = tuple(check_classes(classes))
    return _reference(min(image_size, REFERENCE_SIZE), names, split, extractor or default_extractor())


@lru_cache(maxsize=8)
def _reference(image_size: int, classes: tuple[str, ...], split: str, extractor: FeatureExtractor) -> Statistics:
    return statistics_of(EmojiDataset(split, image_size, classes).pixel_values, extractor)


def reference_labels(num_pictures: int, classes: Sequence[str] | None = None, split: str = "train") -> Tensor:
    """Labels in the reference's frequencies, to draw pictures for.

    A model asked for as many clocks as flags is far from a reference with nine times as many flags, however good its
    pictures. Counts are the reference's shares of `num_pictures`, rounded by largest remainder; the order spreads
    every class evenly, so that any first part has nearly the same shares.

    Args:
        num_pictures: number of labels, at least 1.
        classes: class names in the order of the model's labels; all by default.
        split: part of the emoji that is the reference.

    Returns:
        (num_pictures,) int64.

    Raises:
        ValueError: if an argument has none of the accepted values.
    """
    if num_pictures < 1:
        raise ValueError(f"num_pictures is {num_pictures}; expected at least 1")
    sizes = class_sizes(tuple(check_classes(classes)), split)
    exact = num_pictures * sizes.double() / sizes.sum()
    counts = exact.floor().long()
    missing = num_pictures - int(counts.sum())
    counts[torch.argsort(exact - counts, descending=True, stable=True)[:missing]] += 1
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    places = torch.cat([(torch.arange(int(count)) + 0.5) / max(int(count), 1) for count in counts])
    return labels[torch.argsort(places, stable=True)]


@lru_cache(maxsize=8)
def class_sizes(classes: tuple[str, ...], split: str) -> Tensor:
    """(classes,) number of emoji of each class in a part of the data set; shared, not to be changed."""
    return torch.bincount(EmojiDataset(split, 8, classes).labels, minlength=len(classes))


def frechet_distance(a: Statistics, b: Statistics, warn: bool = True) -> float:
    """The squared Fréchet distance of the Gaussians with these means and covariances.

    `|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2`. The last trace is the sum of the singular values of
    `S1^1/2 S2^1/2`, which are the roots of the eigenvalues of `S1^1/2 S2 S1^1/2` without the squaring, and so without
    the loss of half the digits, of directions in which one set hardly varies.

    Args:
        a: one set.
        b: the other.
        warn: of few pictures.

    Returns:
        The distance, 0 for equal statistics.

    Raises:
        ValueError: if the two come from different extractors or hold values that are not finite.
    """
    check_comparable(a, b)
    few = min(a.num_pictures, b.num_pictures)
    if warn and few < 2 * len(a.mean):
        warnings.warn(
            f"{few} images are fewer than twice the {len(a.mean)} features; the distance is mostly bias",
            stacklevel=2,
        )
    return _frechet(a, b)


def _frechet(a: Statistics, b: Statistics) -> float:
    between = torch.linalg.svdvals(square_root(a.covariance) @ square_root(b.covariance)).sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2.0 * between
    # Rounding can leave a difference of equal traces a little below 0.
    return max(float((a.mean - b.mean).square().sum() + spread), 0.0)


def square_root(covariance: Tensor) -> Tensor:
    """The symmetric root of a covariance (D, D); eigenvalues that are only rounding count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    least = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    values = torch.where(values > least, values, 0.0)
    return (vectors * values.sqrt()) @ vectors.T


def kernel_distance(a: Statistics, b: Statistics) -> float:
    """The squared maximum mean discrepancy with the kernel `(x.y / D + 1)^3`, estimated without bias.

    Over all pairs of pictures rather than subsets, so it is a function of the sets alone. Unlike the Fréchet distance
    it is right on average for any number of pictures, and negative at times for sets alike.

    Args:
        a: one set, with its features.
        b: the other, likewise.

    Returns:
        The distance.

    Raises:
        ValueError: if the two come from different extractors, or were made with `keep_features=False`.
    """
    check_comparable(a, b)
    if a.features is None or b.features is None:
        raise ValueError("a kernel distance needs the features; make the statistics with keep_features=True")
    return (
        _kernel_sum(a.features, a.features, without_self=True) / (a.num_pictures * (a.num_pictures - 1))
        + _kernel_sum(b.features, b.features, without_self=True) / (b.num_pictures * (b.num_pictures - 1))
        - 2.0 * _kernel_sum(a.features, b.features) / (a.num_pictures * b.num_pictures)
    )


def _kernel_sum(a: Tensor, b: Tensor, without_self: bool = False) -> float:
    width, columns = a.shape[1], b.split(KERNEL_BLOCK)
    total = sum(float(_kernel(rows @ part.T, width).sum()) for rows in a.split(KERNEL_BLOCK) for part in columns)
    return total - float(_kernel(a.square().sum(dim=1), width).sum()) if without_self else total


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1.0) ** KERNEL_DEGREE


def check_comparable(a: Statistics, b: Statistics) -> None:
    """Refuse statistics that no distance can be taken of.

    Raises:
        ValueError: if they come from different extractors or hold values that are not finite.
    """
    if (a.extractor, a.sha256) != (b.extractor, b.sha256) or a.mean.shape != b.mean.shape:
        raise ValueError(
            f"the statistics are of different extractors, {a.extractor or 'unnamed'} ({len(a.mean)} features) and "
            f"{b.extractor or 'unnamed'} ({len(b.mean)}); compute both with the same"
        )
    for statistics in (a, b):
        if statistics.num_pictures < MIN_PICTURES:
            raise ValueError(f"a distance needs at least {MIN_PICTURES} images, got {statistics.num_pictures}")
        if not (statistics.mean.isfinite().all() and statistics.covariance.isfinite().all()):
            raise ValueError(f"the statistics of {statistics.num_pictures} images are not finite")


def floor_distance(reference: Statistics, num_pictures: int) -> tuple[float, int]:
    """What the Fréchet distance is for pictures as good as the reference: that of two halves of it.

    The mean over draws of a half and, from the other half, as many pictures as are measured, or all of them. The
    draws are the same every time.

    Args:
        reference: statistics with features of at least 4 pictures.
        num_pictures: number of pictures measured.

    Returns:
        The distance and the size of the smaller part.

    Raises:
        ValueError: if the reference has no features or fewer than 4 pictures.
    """
    if reference.features is None or reference.num_pictures < 2 * MIN_PICTURES:
        raise ValueError(
            f"two halves need the features of at least {2 * MIN_PICTURES} images, got "
            f"{0 if reference.features is None else reference.num_pictures}"
        )
    half = reference.num_pictures // 2
    size = max(MIN_PICTURES, min(num_pictures, half))
    distances = []
    for draw in range(FLOOR_DRAWS):
        order = torch.randperm(reference.num_pictures, generator=generator_for("floor", draw))
        parts = [_of_features(reference.features[chosen]) for chosen in (order[:size], order[half:])]
        distances.append(_frechet(*parts))
    return sum(distances) / len(distances), size


def _of_features(features: Tensor) -> Statistics:
    running = RunningStatistics(keep_features=False)
    running.update(features)
    return running.finish()


def fd_emoji(
    pictures: Iterable[Tensor] | Tensor,
    classes: Sequence[str] | None = None,
    labels: Tensor | None = None,
    split: str = "train",
    extractor: FeatureExtractor | None = None,
) -> dict[str, Any]:
    """How far drawn pictures are from the emoji of the same classes.

    A value far above the floor means worse pictures or fewer kinds of them. One below it does not mean better ones than
    the emoji: the pictures are copies of the reference, which this distance rewards.

    Args:
        pictures: (N, 3, S, S) in [-1, 1] or uint8, or batches of them; sides of 16 to 128, the same for all. Draw
            them for the labels of :func:`reference_labels`.
        classes: class names in the order of the model's labels; all by default.
        labels: (N,) the labels they were drawn for, to check against the reference's frequencies.
        split: part of the emoji that is the reference.
        extractor: the network; the one that comes with the code by default.

    Returns:
        `name`, that of the number, with the extractor's; `value`; `floor`, what pictures as good as the
        reference would have, and `floor_n`, the number of pictures it is of; `kernel_distance`; `n` and `reference_n`,
        numbers of pictures; `extractor`.

    Raises:
        ValueError: if an argument cannot be, the sizes differ, or there are fewer than 2 pictures.

    Warns:
        UserWarning: for fewer than 2,048 pictures, or twice the number of features; for a reference of fewer than the
            latter; for labels in other frequencies than the reference's; for pictures without any value below 0, which
            may be in [0, 1].
    """
    names = check_classes(classes)
    watch = _Watch()
    drawn = statistics_of(watch(pictures), extractor)
    reference = reference_statistics(watch.side, names, split, extractor)
    if labels is not None:
        warn_of_mix(labels, drawn.num_pictures, names, split)
    if not watch.has_dark:
        warnings.warn("no image has a value below 0: are they in [0, 1] rather than [-1, 1]?", stacklevel=2)
    enough = max(ENOUGH_PICTURES, 2 * len(drawn.mean))
    if drawn.num_pictures < enough:
        warnings.warn(
            f"{drawn.num_pictures} images are fewer than {enough}: compare the value with its floor, and only with "
            "values of the same number of images",
            stacklevel=2,
        )
    if reference.num_pictures < 2 * len(drawn.mean):
        warnings.warn(
            f"the reference has {reference.num_pictures} emoji, fewer than twice the {len(drawn.mean)} features: "
            "measure more classes together",
            stacklevel=2,
        )
    floor, floor_pictures = floor_distance(reference, drawn.num_pictures)
    return {
        "name": drawn.metric,
        "value": _frechet(drawn, reference),
        "floor": floor,
        "floor_n": floor_pictures,
        "kernel_distance": kernel_distance(drawn, reference),
        "n": drawn.num_pictures,
        "reference_n": reference.num_pictures,
        "extractor": drawn.extractor,
    }


class _Watch:
    """Notes the side and the range of pictures that pass through."""

    def __init__(self) -> None:
        self.side = 0
        self.has_dark = False

    def __call__(self, pictures: Iterable[Tensor] | Tensor) -> Iterable[Tensor]:
        for batch in [pictures] if isinstance(pictures, Tensor) else pictures:
            if isinstance(batch, Tensor) and batch.ndim and batch.numel():
                if self.side not in (0, batch.shape[-1]):
                    raise ValueError(f"images have sides of {self.side} and {batch.shape[-1]}; expected one size")
                self.side = batch.shape[-1]
                self.has_dark |= batch.dtype == torch.uint8 or float(batch.min()) < 0.0
            yield batch


def warn_of_mix(labels: Tensor, num_pictures: int, classes: Sequence[str], split: str) -> None:
    """Warn of labels in other frequencies than the reference's.

    Args:
        labels: (num_pictures,) integers.
        num_pictures: number of pictures drawn.
        classes: class names in the order of the labels.
        split: part of the emoji that is the reference.

    Raises:
        ValueError: if there are more or fewer labels than pictures, or one has no class.
    """
    if labels.shape != (num_pictures,):
        raise ValueError(f"labels are {tuple(labels.shape)} for {num_pictures} images; expected one per image")
    labels = labels.detach().cpu().long()
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; expected 0 to {len(classes) - 1}"
        )
    sizes = class_sizes(tuple(classes), split).double()
    shares = torch.bincount(labels, minlength=len(classes)).double() / num_pictures
    # Half the sum of differences is the share of pictures that would have to be of another class.
    misplaced = float((shares - sizes / sizes.sum()).abs().sum()) / 2
    if misplaced > MIX_TOLERANCE + len(classes) / (2 * num_pictures):
        warnings.warn(
            f"{misplaced:.0%} of the images would have to be of another class for the reference's shares; "
            "draw labels with reference_labels",
            stacklevel=3,
        )


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write statistics as safetensors, with the extractor's name and hash.

    Args:
        path: the file; its folder must exist.
        statistics: to write.
    """
    tensors = {"mean": statistics.mean, "covariance": statistics.covariance}
    if statistics.features is not None:
        tensors["features"] = statistics.features
    facts = {
        "format": FORMAT,
        "extractor": statistics.extractor,
        "sha256": statistics.sha256,
        "num_pictures": statistics.num_pictures,
    }
    content = save({key: tensor.contiguous() for key, tensor in tensors.items()}, {"statistics": json.dumps(facts)})
    write_file(Path(path), content)


def load_statistics(path: str | Path, extractor: FeatureExtractor | None = None) -> Statistics:
    """Read what :func:`save_statistics` wrote.

    Args:
        path: the file.
        extractor: the network that they must come from; the one that comes with the code by default.

    Returns:
        The statistics.

    Raises:
        ValueError: if the file is missing, damaged, of another format or of another extractor.
    """
    extractor = extractor or default_extractor()
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["statistics"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        statistics = Statistics(
            tensors["mean"],
            tensors["covariance"],
            int(facts["num_pictures"]),
            str(facts["extractor"]),
            str(facts["sha256"]),
            tensors.get("features"),
        )
        known = facts["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} holds no statistics that can be read: {error}") from error
    if not known:
        raise ValueError(f"{path} is of the format {facts['format']!r}; expected {FORMAT!r}")
    if (statistics.extractor, statistics.sha256) != (extractor.label, extractor.sha256):
        raise ValueError(
            f"{path} is of the extractor {statistics.extractor or 'unnamed'}, not {extractor.label}; compute it again"
        )
    _check_shapes(path, statistics)
    return statistics


def _check_shapes(path: str | Path, statistics: Statistics) -> None:
    width = statistics.mean.shape[-1] if statistics.mean.ndim else 0
    wanted = {"mean": (width,), "covariance": (width, width), "features": (statistics.num_pictures, width)}
    for key, shape in wanted.items():
        tensor = getattr(statistics, key)
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != torch.float64):
            raise ValueError(f"{path}: {key} is {tensor.dtype} {tuple(tensor.shape)}; expected float64 {shape}")
