"""Features and statistics of a set of pictures, and their files: what is measured once need not be again.

A file is named by what it was made of: the pictures' contents, the extractor's weights and the treatment of pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipelines.images import write_file
from train.metrics.frechet import FORMAT, RunningStatistics, Statistics
from train.metrics.inception import GROUP, Extractor
from train.metrics.sets import Given, PictureSet

# Number of pictures of statistics that do not tell it.
UNKNOWN = 10**9


@dataclass(frozen=True)
class Measured:
    """A set, as the metrics see it.

    Attributes:
        name: what the user called it.
        statistics: of its features.
        features: (N, D), in the extractor's own precision, or None.
        logits: (N, classes), or None.
        spatial: statistics of Inception's spatial features, or None.
        size: (height, width) of its pictures, or None.
        sha256: of its pictures, or empty.
        duplicates: pictures that are copies of others.
    """

    name: str
    statistics: Statistics
    features: Tensor | None = None
    logits: Tensor | None = None
    spatial: Statistics | None = None
    size: tuple[int, int] | None = None
    sha256: str = ""
    duplicates: int = 0


def measure(pictures: PictureSet, extractor: Extractor, progress: Callable[[Any], Any] = iter) -> Measured:
    """Features and statistics of a set that was checked.

    Args:
        pictures: the set.
        extractor: the network.
        progress: passes pictures on and shows how many.
    """
    running = {key: RunningStatistics(keep_features=False) for key in ("features", "spatial") if key in extractor.keys}
    kept: dict[str, list[Tensor]] = {key: [] for key in ("features", "logits") if key in extractor.keys}
    for group in _groups(progress(pictures.pixels())):
        found = extractor.features(group)
        for key, statistics in running.items():
            statistics.update(found[key])
        for key, parts in kept.items():
            parts.append(found[key])
    finished = {key: r.finish(extractor.label, extractor.sha256) for key, r in running.items()}
    return Measured(
        pictures.name,
        finished["features"],
        torch.cat(kept["features"]),
        torch.cat(kept["logits"]) if "logits" in kept else None,
        finished.get("spatial"),
        pictures.size,
        pictures.sha256,
        pictures.duplicates,
    )


def _groups(pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """GROUP pictures at a time, (B, 3, H, W)."""
    iterator = iter(pictures)
    while group := list(islice(iterator, GROUP)):
        yield np.stack(group)


def measure_cached(
    pictures: PictureSet, extractor: Extractor, cache: Path | None, progress: Callable[[Any], Any] = iter
) -> Measured:
    """`measure`, or what the cache has of the same pictures, extractor and treatment.

    Args:
        pictures: the set.
        extractor: the network.
        cache: folder of the files, or None.
        progress: passes pictures on and shows how many.

    Warns:
        UserWarning: if the cache cannot be written, or a file in it is damaged.
    """
    import warnings

    if cache is None:
        return measure(pictures, extractor, progress)
    file = cache / f"{cache_key(pictures, extractor)}.safetensors"
    if file.is_file():
        try:
            return replace(read_measured(file, extractor), name=pictures.name)
        except ValueError as error:
            warnings.warn(f"{error}; it is computed again", stacklevel=2)
    found = measure(pictures, extractor, progress)
    try:
        write_measured(file, found)
    except OSError as error:
        warnings.warn(f"the cache {cache} cannot be written: {error}", stacklevel=2)
    return found


def cache_key(pictures: PictureSet, extractor: Extractor) -> str:
    """Hexadecimal digits of everything that decides the features of a set."""
    parts = [
        FORMAT,
        pictures.sha256,
        pictures.image_size,
        pictures.size,
        extractor.sha256,
        extractor.preprocessing,
        # Kernels and decoders, which round, are of these versions.
        torch.__version__,
        GROUP,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def default_cache() -> Path:
    """Where statistics are kept unless the user says otherwise."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "attngen" / "statistics"


def write_measured(path: Path, measured: Measured) -> None:
    """Write a set's statistics and features as safetensors; `frechet` reads those of the emoji extractor too."""
    tensors = {"mean": measured.statistics.mean, "covariance": measured.statistics.covariance}
    if measured.spatial is not None:
        tensors |= {"spatial_mean": measured.spatial.mean, "spatial_covariance": measured.spatial.covariance}
    tensors |= {
        key: tensor
        for key, tensor in (("features", measured.features), ("logits", measured.logits))
        if tensor is not None
    }
    facts = {
        "format": FORMAT,
        "extractor": measured.statistics.extractor,
        "sha256": measured.statistics.sha256,
        "num_pictures": measured.statistics.num_pictures,
        "size": measured.size,
        "pictures_sha256": measured.sha256,
        "duplicates": measured.duplicates,
    }
    content = save({key: tensor.contiguous() for key, tensor in tensors.items()}, {"statistics": json.dumps(facts)})
    write_file(path, content)


def read_measured(path: Path, extractor: Extractor) -> Measured:
    """Read what `write_measured`, or `train.metrics.frechet.save_statistics`, wrote.

    Raises:
        ValueError: if the file is damaged, or of another extractor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["statistics"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']!r}, not {FORMAT}")
        count, theirs = int(facts["num_pictures"]), (str(facts["extractor"]), str(facts["sha256"]))
        size = facts.get("size") and (int(facts["size"][0]), int(facts["size"][1]))
        _check_tensors(tensors, count)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} holds no statistics that can be read: {error}") from error
    if theirs != (extractor.label, extractor.sha256):
        raise ValueError(f"{path} is of the extractor {theirs[0]}, not {extractor.label}; compute it again")
    spatial = None
    if "spatial_mean" in tensors:
        spatial = Statistics(tensors["spatial_mean"], tensors["spatial_covariance"], count, *theirs)
    return Measured(
        str(path),
        Statistics(tensors["mean"], tensors["covariance"], count, *theirs),
        tensors.get("features"),
        tensors.get("logits"),
        spatial,
        size,
        str(facts.get("pictures_sha256", "")),
        int(facts.get("duplicates", 0)),
    )


def _check_tensors(tensors: dict[str, Tensor], count: int) -> None:
    for prefix in ("", "spatial_"):
        mean, covariance = tensors.get(f"{prefix}mean"), tensors.get(f"{prefix}covariance")
        if prefix and mean is None and covariance is None:
            continue
        if mean is None or covariance is None or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{prefix}mean and {prefix}covariance do not match")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{prefix}mean or {prefix}covariance is not finite")
    for key in ("features", "logits"):
        if key in tensors and (tensors[key].ndim != 2 or len(tensors[key]) != count):
            raise ValueError(f"{key} is {tuple(tensors[key].shape)} for {count} images")


def measure_input(
    given: Given, extractor: Extractor, cache: Path | None, progress: Callable[[Any], Any] = iter
) -> Measured:
    """A set of the command line, whose pictures were checked.

    ADM's files hold statistics of the whole data, which count for the distances, and pictures of a part of it, which
    count for precision, recall and KID.

    Raises:
        ValueError: if its statistics are of another extractor.
    """
    if given.statistics is not None:
        return replace(read_measured(given.statistics, extractor), name=given.name)
    of_pictures = None
    if given.pictures is not None:
        of_pictures = measure_cached(given.pictures, extractor, cache, progress)
    if "mu" not in given.arrays or (of_pictures is not None and "spatial" not in extractor.keys):
        if of_pictures is None:
            raise ValueError(f"{given.name} holds neither images nor mu and sigma")
        return of_pictures
    pool = _of_arrays(given, "mu", "sigma", extractor)
    spatial = _of_arrays(given, "mu_s", "sigma_s", extractor) if "mu_s" in given.arrays else None
    if of_pictures is None:
        return Measured(given.name, pool, spatial=spatial)
    return replace(of_pictures, statistics=pool, spatial=spatial)


def _of_arrays(given: Given, mean: str, covariance: str, extractor: Extractor) -> Statistics:
    a = torch.from_numpy(np.asarray(given.arrays[mean], dtype=np.float64))
    b = torch.from_numpy(np.asarray(given.arrays[covariance], dtype=np.float64))
    width = {"mu": 2048, "mu_s": 2023}[mean]
    if "spatial" not in extractor.keys or len(a) != width:
        raise ValueError(
            f"{given.name}: {mean} has {len(a)} features; {width} of Inception are expected, so measure with "
            "--extractor inception, or name images"
        )
    return Statistics(a, b, UNKNOWN, extractor.label, extractor.sha256)
