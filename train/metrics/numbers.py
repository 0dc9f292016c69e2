"""FID, sFID, IS, KID, precision, recall, MMD and MIND of measured sets.

The Fréchet distances are computed here, in double precision (`frechet`); the rest by torch-fidelity's functions,
with its own settings. Where torch-fidelity computes all of it, the numbers agree to 1e-6.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from train.metrics.distances import bootstrap, extrapolated_frechet, gaussian_mmd, moments, sliced_wasserstein
from train.metrics.frechet import ENOUGH_PICTURES, floor_distance, frechet_distance, kernel_distance
from train.metrics.inception import Extractor
from train.metrics.measure import UNKNOWN, Measured

METRICS = ("fid", "sfid", "is", "kid", "pr", "mmd", "mind")
KID_SUBSET_SIZE, IS_SPLITS, NEIGHBOURS = 1000, 10, 3
# Copies among so large a share of the pictures spoil precision and recall.
FEW_COPIES = 0.01


def compare(
    generated: Measured,
    reference: Measured,
    extractor: Extractor,
    metrics: Sequence[str] = METRICS,
    resamples: int = 0,
    extrapolate: bool = False,
) -> dict[str, Any]:
    """All numbers that the two sets allow.

    Args:
        generated: what a model drew.
        reference: what it should be like.
        extractor: of both.
        metrics: some of `METRICS`.
        resamples: of the generated images, for the spread of the distances; 0 for none.
        extrapolate: whether to extrapolate the Fréchet distance to infinitely many images.

    Returns:
        `values`: numbers by name, with those of spread and size; `skipped`: reason by metric; `floor` of FD-emoji;
        `spread`: standard deviation by metric, over resamples; `at_infinity`: the extrapolated distance.

    Raises:
        ValueError: if the sets are of different extractors.

    Warns:
        UserWarning: for fewer than 2,048 pictures, and for copies among pictures whose neighbours are asked for.
    """
    values: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    _warn_of_few(generated, reference)
    if "fid" in metrics:
        values[extractor.metric] = frechet_distance(generated.statistics, reference.statistics, warn=False)
    if "sfid" in metrics:
        _add_sfid(generated, reference, extractor, values, skipped)
    if "is" in metrics:
        _add_is(generated, extractor, values, skipped)
    if "kid" in metrics:
        _add_kid(generated, reference, extractor, values, skipped)
    if "pr" in metrics:
        _add_precision_recall(generated, reference, values, skipped)
    _add_distances(generated, reference, extractor, metrics, values, skipped)
    result: dict[str, Any] = {"extractor": extractor.label, "values": values, "skipped": skipped}
    if resamples:
        result["spread"] = _spreads(generated, reference, extractor, metrics, resamples, skipped)
    if extrapolate:
        _add_limit(generated, reference, extractor, result)
    if extractor.metric.startswith("FD-emoji") and reference.features is not None and len(reference.features) >= 4:
        whole = replace(reference.statistics, features=reference.features.double())
        floor, count = floor_distance(whole, generated.statistics.num_pictures)
        result["floor"] = {"value": floor, "pictures": count}
    return result


def _warn_of_few(generated: Measured, reference: Measured) -> None:
    for kind, measured in (("generated", generated), ("reference", reference)):
        count = measured.statistics.num_pictures
        if count < ENOUGH_PICTURES:
            warnings.warn(
                f"{count} {kind} images are fewer than {ENOUGH_PICTURES}: the distance is biased upwards; "
                "compare it only with values of the same number of images",
                stacklevel=3,
            )


def _add_sfid(
    generated: Measured, reference: Measured, extractor: Extractor, values: dict[str, Any], skipped: dict[str, str]
) -> None:
    if "spatial" not in extractor.keys:
        skipped["sFID"] = "sFID needs the Inception extractor"
    elif generated.spatial is None or reference.spatial is None:
        skipped["sFID"] = "the statistics have no spatial part"
    else:
        values["sFID"] = frechet_distance(generated.spatial, reference.spatial, warn=False)


def _add_is(generated: Measured, extractor: Extractor, values: dict[str, Any], skipped: dict[str, str]) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    name = extractor.metric.replace("FID", "IS").replace("FD-", "IS-")
    if generated.logits is None:
        skipped[name] = "there are no logits: statistics are only moments, and not every extractor classifies"
    elif len(generated.logits) < IS_SPLITS:
        skipped[name] = f"it needs {IS_SPLITS} images, one per split"
    else:
        found = isc_features_to_metric(generated.logits, splits=IS_SPLITS)
        values[name] = {"mean": found["inception_score_mean"], "std": found["inception_score_std"]}


def _add_kid(
    generated: Measured, reference: Measured, extractor: Extractor, values: dict[str, Any], skipped: dict[str, str]
) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    if generated.features is None or reference.features is None:
        skipped[extractor.kernel_metric] = "it needs the features of both, and statistics are only their moments"
        return
    size = min(KID_SUBSET_SIZE, len(generated.features), len(reference.features))
    found = kid_features_to_metric(generated.features, reference.features, kid_subset_size=size, verbose=False)
    values[extractor.kernel_metric] = {
        "mean": found["kernel_inception_distance_mean"],
        "std": found["kernel_inception_distance_std"],
        "subset_size": size,
    }
    if extractor.kernel_metric != "KID":
        sets = [
            replace(m.statistics, features=m.features.double())
            for m in (generated, reference)
            if m.features is not None
        ]
        values[extractor.kernel_metric]["all_pairs"] = kernel_distance(*sets)


def _add_distances(
    generated: Measured,
    reference: Measured,
    extractor: Extractor,
    metrics: Sequence[str],
    values: dict[str, Any],
    skipped: dict[str, str],
) -> None:
    """The kernel and the sliced distance, which need the features of both."""
    for metric, measure in (("mmd", gaussian_mmd), ("mind", sliced_wasserstein)):
        if metric not in metrics:
            continue
        name = distance_name(metric, extractor)
        if generated.features is None or reference.features is None:
            skipped[name] = "it needs the features of both, and statistics are only their moments"
        else:
            values[name] = measure(generated.features.double(), reference.features.double())


def distance_name(metric: str, extractor: Extractor) -> str:
    """CMMD is of CLIP's embeddings, MIND of Inception's features; with other features they have other names."""
    if metric == "mmd":
        return "CMMD" if extractor.label.startswith("clip-") else f"MMD[{extractor.label}]"
    return "MIND" if extractor.metric == "FID" else f"MIND[{extractor.label}]"


def _spreads(
    generated: Measured,
    reference: Measured,
    extractor: Extractor,
    metrics: Sequence[str],
    resamples: int,
    skipped: dict[str, str],
) -> dict[str, float]:
    """Standard deviations over resamples of the generated images."""
    if generated.features is None:
        skipped["spread"] = "it needs the features of the generated images"
        return {}
    found, features = {}, generated.features.double()
    if "fid" in metrics:
        statistics = reference.statistics

        def frechet(part: Tensor) -> float:
            return frechet_distance(moments(part, statistics), statistics, warn=False)

        found[extractor.metric] = bootstrap(frechet, features, resamples)
    for metric, measure in (("mmd", gaussian_mmd), ("mind", sliced_wasserstein)):
        if metric in metrics and reference.features is not None:
            against = partial(measure, b=reference.features.double())
            found[distance_name(metric, extractor)] = bootstrap(against, features, resamples)
    return found


def _add_limit(generated: Measured, reference: Measured, extractor: Extractor, result: dict[str, Any]) -> None:
    name = f"{extractor.metric} at infinity"
    if generated.features is None:
        result["skipped"][name] = "it needs the features of the generated images"
        return
    try:
        result["at_infinity"] = extrapolated_frechet(generated.features.double(), reference.statistics)
    except ValueError as error:
        result["skipped"][name] = str(error)


def _add_precision_recall(
    generated: Measured, reference: Measured, values: dict[str, Any], skipped: dict[str, str]
) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = generated.features, reference.features
    if a is None or b is None:
        skipped["precision, recall"] = "they need the features of both, and statistics are only their moments"
        return
    if min(len(a), len(b)) <= NEIGHBOURS:
        skipped["precision, recall"] = f"they need more than {NEIGHBOURS} images of each kind"
        return
    _warn_of_copies(reference)
    _warn_of_copies(generated)
    # Distances of 10,000 pictures to all others at a time: for all at once 50,000 pictures would take 40 GB.
    found = prc_features_to_metric(a, b, save_cpu_ram=True, verbose=False)
    values["precision"], values["recall"] = found["precision"], found["recall"]


def _warn_of_copies(measured: Measured) -> None:
    count = measured.statistics.num_pictures
    if measured.duplicates > FEW_COPIES * count:
        warnings.warn(
            f"{measured.duplicates} images of {measured.name} are copies of others: neighbours at no distance make "
            "precision and recall meaningless",
            stacklevel=4,
        )


def facts_of(measured: Measured) -> dict[str, Any]:
    """What a result says of a set: JSON values."""
    count = measured.statistics.num_pictures
    return {
        "name": measured.name,
        "pictures": None if count == UNKNOWN else count,
        "size": None if measured.size is None else f"{measured.size[1]}x{measured.size[0]}",
        "sha256": measured.sha256 or None,
        "duplicates": measured.duplicates,
    }


def library_versions() -> dict[str, str]:
    """Versions that the numbers depend on."""
    from importlib import metadata

    return {"torch": torch.__version__, "torch-fidelity": metadata.version("torch-fidelity")}
