"""What every kind of training data has: labels, names of classes, and batches by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

from train.data.sources import shown

EVERYTHING = slice(None)


class SampleError(RuntimeError):
    """A fault while one sample was read, other than a damaged file; names the sample."""


class Data(ABC):
    """Pictures or latents with labels.

    Attributes:
        id2label: class name by label.
        channels: 3 for pictures, or those of the latents.
        sample_size: side of a sample, in pixels or latents.
        is_latent: whether samples are latents of an autoencoder.
        fingerprint: a short text; a run is resumed only with the same one.
        labels: (N,) int64.
        vae: None, or source, scaling_factor, shift_factor and sha256 of the autoencoder.
    """

    id2label: dict[int, str]
    channels: int = 3
    sample_size: int
    is_latent: bool = False
    fingerprint: str
    labels: Tensor
    vae: dict[str, Any] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.id2label)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.labels)

    @abstractmethod
    def names(self, indices: Iterable[int] | Tensor) -> list[str]:
        """What to call samples in a message."""

    @abstractmethod
    def batch(
        self,
        indices: Tensor,
        generator: torch.Generator,
        part: slice = EVERYTHING,
        pool: Executor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples and labels of a batch.

        Args:
            indices: (B,) of the whole batch, over all processes.
            generator: source of all randomness. It is drawn from for the whole batch, in the order of `indices`,
                whatever `part` is, and afterwards stands at the same place in every process.
            part: positions of the batch that are wanted, `slice(rank, None, world)` for one process of several.
            pool: threads to read with; None reads in this one.

        Returns:
            float32 (b, C, H, W), in [-1, 1] for pictures, and int64 (b,), where b positions are in `part`.

        Raises:
            ValueError: if more samples are broken than the limit allows.
        """


def choose_classes(
    spec: str, names: Sequence[str], labels: Tensor, classes: Sequence[str]
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """The samples of chosen classes.

    Args:
        spec: of the data, for messages.
        names: class name by label.
        labels: (N,) of all samples.
        classes: names of the classes wanted, or () for all.

    Returns:
        (n,) indices of the samples, (n,) their new labels, class name by new label.

    Raises:
        ValueError: for an unknown or repeated class, one without samples, or data of one class nobody named.
    """
    if not classes:
        if len(names) == 1:
            raise ValueError(f"{spec} holds one class, {names[0]!r}; choose it by --classes if that is meant")
        return torch.arange(len(labels)), labels, dict(enumerate(names))
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise ValueError(f"{spec} has no class {unknown[0]!r}; it has {shown(names, 20)}")
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes is {list(classes)}; expected each name once")
    new_label = torch.full((len(names),), -1)
    new_label[[names.index(name) for name in classes]] = torch.arange(len(classes))
    rows = (new_label[labels] >= 0).nonzero().flatten()
    present = new_label[labels].unique()
    empty = [name for label, name in enumerate(classes) if label not in present]
    if empty:
        raise ValueError(f"{spec} holds no sample of class {empty[0]!r}; leave it out")
    return rows, new_label[labels[rows]], dict(enumerate(classes))
