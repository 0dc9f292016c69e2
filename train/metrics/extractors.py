"""The feature extractor that a command line names."""

from __future__ import annotations

from typing import Any

from train.emoji.features import load_extractor
from train.metrics.hub import CLIP, DINOV2, ClipExtractor, DinoExtractor
from train.metrics.inception import EmojiExtractor, Extractor, InceptionExtractor

EXTRACTORS = ("inception", "emoji", "dinov2", "clip")


def split_extractor(text: str) -> tuple[str, str | None]:
    """An extractor as it is typed: a name, and after "=" its weights, or None.

    Raises:
        ValueError: for an unknown name.
    """
    name, _, weights = text.partition("=")
    if name not in EXTRACTORS:
        raise ValueError(f"{name!r} is not an extractor; expected one of {', '.join(EXTRACTORS)}, with =WEIGHTS or not")
    return name, weights or None


def make_extractor(name: str, weights: str | None, device: Any) -> Extractor:
    """The extractor of a command line.

    Args:
        name: one of `EXTRACTORS`.
        weights: a file of Inception's or the emoji network's weights, a folder or hub id of the others; None for the
            usual ones.
        device: where to compute.

    Raises:
        ValueError: if the weights cannot be read.
        OSError: if they cannot be downloaded.
    """
    if name == "inception":
        return InceptionExtractor(weights, device)
    if name == "dinov2":
        return DinoExtractor(weights or DINOV2, device)
    if name == "clip":
        return ClipExtractor(weights or CLIP, device)
    return EmojiExtractor(load_extractor(weights) if weights else None, device)
