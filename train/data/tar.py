"""Tar shards in the layout of WebDataset as a source of pictures.

The headers are read once, for the place of every picture; a picture is then read by its offset. So shards have random
access, and a run is resumed at any step without reading what came before. webdataset has that too, in
`wids.ShardListDataset`, from an index that is made beforehand; here there is none, and a shard that was cut is refused.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from train.data.pictures import SUFFIXES
from train.data.sources import MAX_FILE_BYTES, Source, fingerprint_of

CLASSES_FILE = "classes.txt"
MAX_LABEL_BYTES = 2**20


@dataclass(frozen=True)
class Member:
    """A file inside a shard: its extension (all after the first dot of the name), and where its bytes are."""

    extension: str
    offset: int
    size: int


class TarSource(Source):
    """Tar shards: files with one key are one sample, a picture ("0001.jpg") and its label.

    The label is a number in "0001.cls", or "label" in "0001.json". Class names are the lines of `classes.txt` beside
    the shards; without it, the numbers.

    Args:
        pattern: a folder of .tar files, a file, a glob pattern, or one with braces ("shards/{000..127}.tar").

    Raises:
        ValueError: if a shard is missing, compressed or damaged, or a sample has not one picture and one label.
    """

    def __init__(self, pattern: str) -> None:
        self.shards = find_shards(pattern)
        self.keys: list[str] = []
        places: list[tuple[int, int, int]] = []
        labels: list[int] = []
        for number, shard in enumerate(self.shards):
            for key, picture, label in _samples(shard):
                self.keys.append(key)
                places.append((number, picture.offset, picture.size))
                labels.append(label)
        if not labels:
            raise ValueError(f"{pattern} holds no samples; expected files such as 0001.jpg and 0001.cls in the shards")
        self.places = np.array(places, dtype=np.int64)
        self.labels = torch.tensor(labels, dtype=torch.long)
        self.class_names = self._class_names()
        parts = (f"{key} {size}" for key, size in zip(self.keys, self.places[:, 2].tolist(), strict=True))
        self.fingerprint = fingerprint_of("tar", self.class_names, self.labels, parts)

    def _class_names(self) -> list[str]:
        file, highest = self.shards[0].parent / CLASSES_FILE, int(self.labels.max())
        if not file.is_file():
            return [str(label) for label in range(highest + 1)]
        names = file.read_text(encoding="utf-8").splitlines()
        if highest >= len(names):
            raise ValueError(f"{file} names {len(names)} classes but a label is {highest}; expected one line per class")
        return names

    def name(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]]}:{self.keys[index]}"

    def open(self, index: int) -> BinaryIO:
        number, offset, size = self.places[index].tolist()
        if size > MAX_FILE_BYTES:
            raise ValueError(f"the file has {size:,} bytes, over the limit of {MAX_FILE_BYTES:,}")
        # Opened anew each time: a thousand shards kept open would exceed the usual limit on open files.
        with open(self.shards[number], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


def find_shards(pattern: str) -> list[Path]:
    """The shards a pattern means, in order.

    Raises:
        ValueError: if there are none, or one that is named does not exist or is compressed.
    """
    if Path(pattern).is_dir():
        found = sorted(Path(pattern).glob("*.tar"))
    else:
        found = []
        for part in expand_braces(pattern):
            found += sorted(Path(p) for p in glob.glob(part)) if glob.has_magic(part) else [Path(part)]
    if not found:
        raise ValueError(f"{pattern} matches no file; expected tar shards, as in 'shards/*.tar'")
    for path in found:
        if not path.is_file():
            raise ValueError(f"shard {path} does not exist; {pattern} means {len(found)} of them")
        if path.suffix != ".tar":
            raise ValueError(f"shard {path} is not a .tar; compressed shards have no random access, so decompress it")
    return found


def expand_braces(pattern: str) -> Iterator[str]:
    """ "a-{00..02}.tar" -> a-00.tar, a-01.tar, a-02.tar; "{x,y}.tar" -> x.tar, y.tar."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        choices = [str(n).zfill(len(numbers[1])) for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _samples(shard: Path) -> Iterator[tuple[str, Member, int]]:
    """Key, picture and label of every sample of a shard."""
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for key, group in itertools.groupby(_members(archive), lambda m: m[0]):
                members = [member for _, member in group]
                pictures = [m for m in members if f".{m.extension.lower()}" in SUFFIXES]
                if len(pictures) != 1:
                    raise ValueError(f"sample {key!r} has {len(pictures)} images ({', '.join(SUFFIXES)}), not one")
                # tarfile goes on from the offsets it keeps, so the file may be read elsewhere in between.
                yield key, pictures[0], _label(file, key, members)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"shard {shard}: {error}") from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, Member]]:
    """Key and place of every plain file; hidden files are left out."""
    while (info := archive.next()) is not None:
        folder, _, name = info.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not info.isreg() or info.issparse() or not stem:
            continue
        yield f"{folder}/{stem}".lstrip("/"), Member(extension, info.offset_data, info.size)
    # tarfile takes a cut between two files for the end; a whole archive has blocks of zeros there.
    file: Any = archive.fileobj
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError("the end-of-archive mark is missing; it was not written or copied whole")


def _label(file: BinaryIO, key: str, members: list[Member]) -> int:
    for member in sorted(members, key=lambda m: m.extension):  # .cls before .json
        if member.extension not in ("cls", "json") or member.size > MAX_LABEL_BYTES:
            continue
        file.seek(member.offset)
        content = file.read(member.size)
        try:
            label = int(content) if member.extension == "cls" else json.loads(content)["label"]
        except (KeyError, TypeError):
            continue  # JSON of something else
        except ValueError as error:
            raise ValueError(f"sample {key!r} has a label that is not a number: {content[:40]!r}") from error
        if not isinstance(label, int) or label < 0:
            raise ValueError(f"sample {key!r} has label {label!r}; expected 0, 1, 2, …")
        return label
    raise ValueError(f'sample {key!r} has no label; expected a number in {key}.cls, or "label" in {key}.json')
