"""Where pictures lie: what a source of them offers, and the plainest one, a folder of class folders.

A source gives random access to encoded pictures and decodes none. It knows the label of every picture without reading
one, so that classes can be balanced.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from train.data.pictures import SUFFIXES

# Names that are parts of a data set, not classes of one.
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
# A picture file beyond this is not read; the pixels have their own bound.
MAX_FILE_BYTES = 2**28


class Source(ABC):
    """Pictures with labels, by position.

    Attributes:
        class_names: class name by label.
        labels: (N,) int64.
        fingerprint: changes when pictures or labels are added, removed, renamed or reordered.
    """

    class_names: list[str]
    labels: Tensor
    fingerprint: str

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call a picture in a message."""

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """The encoded picture, to read and close.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is too large, or missing.
        """


def fingerprint_of(kind: str, class_names: Sequence[str], labels: Tensor, parts: Iterable[str]) -> str:
    """A short text that pins what a data set holds: `kind`, number of pictures, and a hash of the rest."""
    digest = hashlib.sha256()
    for text in itertools.chain(class_names, ("",), parts):
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(labels.numpy().tobytes())
    return f"{kind}-{len(labels)}-{digest.hexdigest()[:16]}"


def shown(names: Sequence[str], limit: int = 8) -> str:
    """Names for a message: the first few, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


class FolderSource(Source):
    """A folder of class folders. Labels follow the sorted folder names; hidden files are left out.

    Raises:
        ValueError: if there is no class folder, one without pictures, or the folder holds splits.
    """

    def __init__(self, folder: Path) -> None:
        classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        if not classes:
            raise ValueError(self._no_classes(folder))
        splits = [name for name in classes if name.lower() in SPLIT_NAMES]
        if len(splits) == len(classes):
            raise ValueError(f"{folder} holds splits, not classes ({', '.join(splits)}); pass {folder / splits[0]}")
        self.folder, self.class_names = folder, classes
        self.files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = sorted(self._pictures(folder / name))
            if not found:
                raise ValueError(
                    f"{folder / name} holds no images ({', '.join(SUFFIXES)}); remove the folder or fill it"
                )
            self.files += found
            labels += [label] * len(found)
        self.labels = torch.tensor(labels, dtype=torch.long)
        self.fingerprint = fingerprint_of("folder", classes, self.labels, self.files)

    @staticmethod
    def _no_classes(folder: Path) -> str:
        loose = [entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(SUFFIXES)]
        if not loose:
            return f"{folder} is empty of images and class folders; expected {folder}/CLASS/PICTURE.jpg"
        return (
            f"{folder} holds {len(loose)} images but no class folders; move them into one folder per class, "
            f"as in {folder}/CLASS/{loose[0]}"
        )

    def _pictures(self, folder: Path) -> Iterator[str]:
        """Paths below a class folder, relative to the data folder and with forward slashes."""
        for where, inner, files in os.walk(folder):
            inner[:] = [name for name in inner if not name.startswith(".")]
            prefix = Path(where).relative_to(self.folder).as_posix()
            for name in files:
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                    yield f"{prefix}/{name}"

    def name(self, index: int) -> str:
        return str(self.folder / self.files[index])

    def open(self, index: int) -> BinaryIO:
        file = open(self.folder / self.files[index], "rb")
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            file.close()
            raise ValueError(f"the file has {size:,} bytes, over the limit of {MAX_FILE_BYTES:,}")
        return file
