"""The folder of a set of pictures: its settings, the pictures, what is done, and what a resumed run finds.

    manifest.json      settings and versions, and whether the set is complete
    pictures.jsonl     a line a picture: file, label or prompt, seed, SHA-256
    pictures/          PNG files, in folders of 1,000 where there are more
    shards/            or tar files of 1,000, in the layout of WebDataset
    .journal/          a file a process, with the hash of each picture it has written

No picture of ours carries settings: the manifest has them, and equal pictures are equal files.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cli import UserError
from pipelines.images import write_file
from train.sampling.subjects import Subject, picture_seed

if TYPE_CHECKING:
    import numpy as np

FORMAT = "attngen-samples-1"
MANIFEST, LIST, JOURNAL = "manifest.json", "pictures.jsonl", ".journal"
PER_FOLDER = 1000


def png_bytes(pixels: np.ndarray) -> bytes:
    """A PNG without any text of a picture, uint8 (H, W, 3)."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class SampleFolder:
    """The folder, as one process sees it.

    Attributes:
        path: the folder.
        count: pictures of the set.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        self._hashes: dict[int, str] = {}

    # Names

    def picture(self, index: int) -> Path:
        """File of a picture."""
        folder = self.path / "pictures"
        if self.count > PER_FOLDER:
            folder /= f"{index // PER_FOLDER:05d}"
        return folder / f"{index:06d}.png"

    def shard(self, number: int) -> Path:
        """Tar file of pictures `number` * 1,000 onwards."""
        return self.path / "shards" / f"{number:05d}.tar"

    @property
    def num_shards(self) -> int:
        return -(-self.count // PER_FOLDER)

    def in_shard(self, number: int) -> range:
        """Numbers of the pictures in a shard."""
        return range(number * PER_FOLDER, min(self.count, (number + 1) * PER_FOLDER))

    # The manifest

    def open(self, settings: Mapping[str, Any], write: bool) -> None:
        """Begin the set, or go on with it.

        Args:
            settings: of the run.
            write: whether this process writes the manifest.

        Raises:
            UserError: if the folder holds a set with other settings, or other things.
        """
        file = self.path / MANIFEST
        if file.exists():
            check_settings(read_manifest(self.path), settings)
        elif write:
            others = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
            if others:
                raise UserError(f"{self.path} holds {others[0]!r} and no {MANIFEST}; choose a new or empty folder")
            self.write_manifest(settings, complete=False)
        self._hashes = read_hashes(self.path)

    def write_manifest(self, settings: Mapping[str, Any], complete: bool) -> None:
        content = {"format": FORMAT, "complete": complete, "pictures": self.count, "settings": dict(settings)}
        write_file(self.path / MANIFEST, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    # The pictures

    def present(self, indices: Sequence[int]) -> set[int]:
        """Which pictures are there whole, by their hashes."""
        found = {index for index in indices if self._is_whole(index)}
        for number in sorted({index // PER_FOLDER for index in indices if index not in found}):
            if self.shard(number).is_file():
                packed = self._in_tar(number)
                found |= {i for i in indices if i in packed and packed[i] == self._hashes.get(i)}
        return found

    def _is_whole(self, index: int) -> bool:
        try:
            return sha256(self.picture(index).read_bytes()) == self._hashes.get(index)
        except OSError:
            return False

    def _in_tar(self, number: int) -> dict[int, str]:
        try:
            return {index: sha256(content) for index, content in read_shard(self.shard(number))}
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(
                f"{self.shard(number)} is damaged: {error}; delete it and its images are drawn again"
            ) from error

    def hash_of(self, index: int) -> str | None:
        """The hash in the journals, whether or not the file is there."""
        return self._hashes.get(index)

    def add(self, process: str, pictures: Mapping[int, bytes]) -> None:
        """Write pictures, then note their hashes.

        Args:
            process: name of this one, for its journal.
            pictures: files' contents by number.
        """
        for index, content in pictures.items():
            write_file(self.picture(index), content)
        journal = self.path / JOURNAL / f"{process}.jsonl"
        journal.parent.mkdir(exist_ok=True)
        with open(journal, "a", encoding="utf-8") as file:
            for index, content in pictures.items():
                self._hashes[index] = sha256(content)
                # A line cut short by a crash must not swallow the next one.
                file.write(f'\n{{"index": {index}, "sha256": "{self._hashes[index]}"}}')

    def content(self, index: int) -> bytes:
        """A picture's file, which must not be in a shard."""
        return self.picture(index).read_bytes()

    def reload(self) -> None:
        """Read what other processes have noted."""
        self._hashes = read_hashes(self.path)

    def drop_journal(self) -> None:
        """Remove the journals, once pictures.jsonl has what they hold."""
        shutil.rmtree(self.path / JOURNAL, ignore_errors=True)

    def missing(self) -> list[int]:
        """Pictures that no process has noted."""
        return [index for index in range(self.count) if index not in self._hashes]

    def write_list(self, subjects: Sequence[Subject], seed: int, id2label: Mapping[int, str], packed: bool) -> None:
        """Write pictures.jsonl, a line a picture in their order."""
        lines = []
        for index, subject in enumerate(subjects):
            shown = {key: value for key, value in asdict(subject).items() if value is not None}
            if subject.label is not None and subject.label in id2label:
                shown["class"] = id2label[subject.label]
            file = self.shard(index // PER_FOLDER) if packed else self.picture(index)
            line = {"index": index, "file": file.relative_to(self.path).as_posix(), **shown}
            line |= {"seed": picture_seed(seed, index), "sha256": self._hashes[index]}
            lines.append(json.dumps(line, ensure_ascii=False))
        write_file(self.path / LIST, ("\n".join(lines) + "\n").encode())


def read_shard(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each picture of a shard of ours."""
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.name.endswith(".png"):
                file = archive.extractfile(member)
                assert file is not None
                yield int(member.name.removesuffix(".png")), file.read()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a set.

    Raises:
        UserError: if it cannot be read.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
        dict(content["settings"])
        return content
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not a manifest of a set of images: {error}") from error


def check_settings(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings.

    Raises:
        UserError: naming the first setting that differs, with both values.
    """
    before, now = manifest["settings"], json.loads(json.dumps(dict(settings)))
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise UserError(
                f"the folder's images were drawn with {name} = {before.get(name)!r}, not {now.get(name)!r}; "
                "use the same value, or another --out"
            )


def read_hashes(folder: Path) -> dict[int, str]:
    """Hashes by number, of all journals and the list."""
    found: dict[int, str] = {}
    files = sorted((folder / JOURNAL).glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    for file in (folder / LIST, *files):
        if not file.is_file():
            continue
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                found[int(entry["index"])] = str(entry["sha256"])
            except (ValueError, KeyError, TypeError):  # empty, or cut short when a run was killed
                continue
    return found
