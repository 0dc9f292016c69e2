"""A finished set of pictures as tar shards and as the .npz file of ADM's evaluation, written in a stream."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from attngen.files import write_whole
from train.sampling.files import SampleFolder, read_shard
from train.sampling.subjects import Subject

if TYPE_CHECKING:
    import numpy as np

NPZ = "samples.npz"


def pack_shards(folder: SampleFolder, subjects: Sequence[Subject]) -> None:
    """Move the PNG files of a complete set into shards/NNNNN.tar, with labels and prompts beside each.

    Args:
        folder: of the set.
        subjects: what each picture shows.
    """
    for number in range(folder.num_shards):
        folder.shard(number).parent.mkdir(exist_ok=True)
        if not folder.shard(number).is_file():
            write_whole(folder.shard(number), lambda file, n=number: _fill_shard(file, folder, n, subjects))
        for index in folder.in_shard(number):
            folder.picture(index).unlink(missing_ok=True)
    shutil.rmtree(folder.path / "pictures", ignore_errors=True)


def _fill_shard(file: IO[bytes], folder: SampleFolder, number: int, subjects: Sequence[Subject]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for index in folder.in_shard(number):
            subject = subjects[index]
            members: dict[str, bytes] = {"png": folder.content(index)}
            if subject.label is not None:
                members["cls"] = str(subject.label).encode()
            if subject.prompt is not None:
                members["txt"] = subject.prompt.encode()
            for extension, content in members.items():
                # Owner and time are left at 0, so that equal sets are equal files.
                info = tarfile.TarInfo(f"{index:06d}.{extension}")
                info.size, info.mode = len(content), 0o644
                archive.addfile(info, io.BytesIO(content))


def contents(folder: SampleFolder) -> Iterator[bytes]:
    """Every picture's file in order, from folder or shards."""
    for number in range(folder.num_shards):
        if folder.shard(number).is_file():
            yield from (content for _, content in read_shard(folder.shard(number)))
        else:
            yield from (folder.content(index) for index in folder.in_shard(number))


def write_npz(folder: SampleFolder, subjects: Sequence[Subject]) -> Path:
    """Write samples.npz: `arr_0` uint8 (N, H, W, 3) and, of classes, `arr_1` int64 (N,).

    One picture is in memory at a time. Times in the file are fixed, so that equal sets are equal files.

    Args:
        folder: of a complete set.
        subjects: what each picture shows.

    Returns:
        The file.
    """
    path = folder.path / NPZ
    write_whole(path, lambda file: _fill_npz(file, folder, subjects))
    return path


def _fill_npz(file: IO[bytes], folder: SampleFolder, subjects: Sequence[Subject]) -> None:
    import numpy as np

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        pictures = (decode(content) for content in contents(folder))
        first = next(pictures)
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            _write_header(member, "|u1", (folder.count, *first.shape))
            member.write(first.tobytes())
            for picture in pictures:
                assert picture.shape == first.shape
                member.write(picture.tobytes())
        labels = [subject.label for subject in subjects]
        if None not in labels:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                _write_header(member, "<i8", (folder.count,))
                member.write(np.array(labels, dtype="<i8").tobytes())


def _write_header(member: Any, dtype: str, shape: tuple[int, ...]) -> None:
    import numpy as np

    np.lib.format.write_array_header_1_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})


def decode(content: bytes) -> np.ndarray:
    """Pixels of a PNG, uint8 (H, W, 3)."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))
