"""Sets of pictures and statistics to measure: folders, tar shards, ADM's .npz files, our statistics, the emoji.

Every picture is read and decoded once before anything is computed, so that a broken one is named at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from train.data.pictures import SUFFIXES, read_picture, to_rgb, upright
from train.data.tar import find_shards
from train.metrics.frechet import FORMAT, MIN_PICTURES

EMOJI = "emoji"
STATISTICS = {"mu": 1, "sigma": 2, "mu_s": 1, "sigma_s": 2}
WORKERS = 4

Read = Callable[[], bytes]


class PictureSet:
    """Pictures in a fixed order, decoded anew on every pass.

    Attributes:
        name: what the user called it.
        sha256: of the files' contents, or of the pixels, in order.
        size: (height, width) of all pictures.
        count: number of pictures.
        duplicates: pictures that are copies of an earlier one.
    """

    def __init__(self, name: str, image_size: int | None = None, workers: int = WORKERS) -> None:
        self.name, self.image_size, self.workers = name, image_size, workers
        self.sha256, self.size, self.count, self.duplicates = "", (0, 0), 0, 0

    def pixels(self) -> Iterator[np.ndarray]:
        """Every picture, uint8 (3, H, W), in order."""
        for pixels, _ in self._decoded():
            yield pixels

    def _decoded(self) -> Iterator[tuple[np.ndarray, bytes]]:
        """Every picture with the digest of what it was made of."""
        raise NotImplementedError

    def names(self) -> Iterator[str]:
        """What to call the pictures in a message."""
        raise NotImplementedError

    def check(self, progress: Callable[[Any], Any] = iter) -> None:
        """Read everything once.

        Args:
            progress: passes pictures on and shows how many.

        Raises:
            ValueError: if a picture is broken or of another size than the first, or there are fewer than 2.
        """
        digest, seen = hashlib.sha256(), set()
        for (pixels, fingerprint), name in zip(progress(self._decoded()), self.names(), strict=True):
            size = pixels.shape[1], pixels.shape[2]
            if self.count and size != self.size:
                raise ValueError(
                    f"{name} has {size[1]} x {size[0]} pixels and the first image {self.size[1]} x {self.size[0]}; "
                    "measure images of one size, or crop all to squares by --image-size"
                )
            self.size = size
            self.count += 1
            self.duplicates += fingerprint in seen
            seen.add(fingerprint)
            digest.update(fingerprint)
        if self.count < MIN_PICTURES:
            raise ValueError(f"{self.name} has {self.count} images; a distance needs at least {MIN_PICTURES}")
        self.sha256 = digest.hexdigest()


class FileSet(PictureSet):
    """Pictures that are files, in folders or shards.

    Args:
        name: of the set.
        files: a name for messages, and a function that reads the file, for each picture in order.
        image_size: side to crop to as ADM does, or None to take pictures as they are.
        workers: threads that decode.
    """

    def __init__(
        self, name: str, files: Sequence[tuple[str, Read]], image_size: int | None = None, workers: int = WORKERS
    ) -> None:
        super().__init__(name, image_size, workers)
        self.files = files

    def names(self) -> Iterator[str]:
        return (name for name, _ in self.files)

    def _decoded(self) -> Iterator[tuple[np.ndarray, bytes]]:
        with ThreadPoolExecutor(self.workers) as pool:
            waiting = iter(self.files)
            # A few pictures ahead and no more: a set need not fit the memory.
            queue = [pool.submit(self._decode, *file) for file in islice(waiting, 4 * self.workers)]
            while queue:
                yield queue.pop(0).result()
                queue += [pool.submit(self._decode, *file) for file in islice(waiting, 1)]

    def _decode(self, name: str, read: Read) -> tuple[np.ndarray, bytes]:
        try:
            content = read()
            fingerprint = hashlib.sha256(content).digest()
            if self.image_size is not None:
                return read_picture(io.BytesIO(content), self.image_size), fingerprint
            return _whole_picture(content), fingerprint
        except (OSError, ValueError, tarfile.TarError) as error:
            raise ValueError(f"{name} cannot be read as an image: {error}") from error


def _whole_picture(content: bytes) -> np.ndarray:
    """A picture without any cropping, uint8 (3, H, W)."""
    from PIL import Image

    from train.data.pictures import FORMATS

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            return np.ascontiguousarray(np.asarray(to_rgb(upright(image))).transpose(2, 0, 1))
    except Exception as error:  # what Pillow's decoders raise on damaged files is not one family
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


class NpzSet(PictureSet):
    """`arr_0` of an .npz file, uint8 (N, H, W, 3), read in a stream: 50,000 pictures need not fit the memory."""

    def __init__(self, path: Path, image_size: int | None = None) -> None:
        super().__init__(str(path), image_size)
        self.path = path
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            self.shape = self._read_header(member)

    def _read_header(self, member: Any) -> tuple[int, ...]:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
            raise ValueError(f"{self.path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, 3)")
        return shape

    def names(self) -> Iterator[str]:
        return (f"{self.path}: image {index}" for index in range(self.shape[0]))

    def _decoded(self) -> Iterator[tuple[np.ndarray, bytes]]:
        from PIL import Image

        from train.data.pictures import center_crop

        count, *shape = self.shape
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            self._read_header(member)
            for index in range(count):
                content = _read_exactly(member, int(np.prod(shape)), f"{self.path}: image {index}")
                pixels = np.frombuffer(content, np.uint8).reshape(shape)
                if self.image_size is not None:
                    pixels = np.asarray(center_crop(Image.fromarray(pixels), self.image_size))
                yield np.ascontiguousarray(pixels.transpose(2, 0, 1)), hashlib.sha256(content).digest()


def _read_exactly(member: Any, size: int, name: str) -> bytes:
    try:
        content = member.read(size)
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    if len(content) != size:
        raise ValueError(f"{name} is cut short: {len(content)} of {size} bytes")
    return content


class EmojiSet(PictureSet):
    """The emoji that come with the code, each once and without augmentation."""

    def __init__(self, split: str, side: int, classes: Sequence[str] | None) -> None:
        from train.emoji.dataset import EmojiDataset

        super().__init__(f"{EMOJI}:{split}")
        self._pictures = EmojiDataset(split, side, classes).pixel_values.numpy()

    def names(self) -> Iterator[str]:
        return (f"{self.name}: image {index}" for index in range(len(self._pictures)))

    def _decoded(self) -> Iterator[tuple[np.ndarray, bytes]]:
        return ((pixels, hashlib.sha256(pixels.tobytes()).digest()) for pixels in self._pictures)


@dataclass(frozen=True)
class Given:
    """An input as it was found.

    Attributes:
        name: what the user called it.
        pictures: the pictures, if it holds any.
        arrays: mu, sigma, mu_s, sigma_s of an .npz of ADM, if it holds them.
        statistics: file of our statistics, if it is one.
    """

    name: str
    pictures: PictureSet | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    statistics: Path | None = None


def open_input(text: str, image_size: int | None = None, workers: int = WORKERS) -> Given:
    """What a command-line argument names.

    Args:
        text: a folder (searched to any depth), .npz, .safetensors, .tar, or a pattern of the last.
        image_size: side to crop pictures to, or None.
        workers: threads that decode.

    Raises:
        ValueError: if there is nothing to measure.
    """
    path = Path(text)
    if path.is_dir():
        return Given(text, _open_folder(path, image_size, workers))
    if text.endswith(".tar") or set(text) & set("*?[{"):
        return Given(text, FileSet(text, list(_tar_files(find_shards(text))), image_size, workers))
    if not path.is_file():
        raise ValueError(f"there is no file or folder {text!r}")
    if path.suffix == ".npz":
        return _open_npz(path, image_size)
    if path.suffix == ".safetensors":
        return Given(text, statistics=path)
    raise ValueError(f"{text} is neither a folder nor .tar, .npz or .safetensors")


def _open_folder(path: Path, image_size: int | None, workers: int) -> FileSet:
    manifest = path / "manifest.json"
    if manifest.is_file():
        _check_complete(path)
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if files:
        found = [(str(file), file.read_bytes) for file in files]
    else:
        shards = sorted(path.rglob("*.tar"))
        if not shards:
            raise ValueError(f"{path} holds no images ({', '.join(SUFFIXES)}) and no tar shards")
        found = list(_tar_files(shards))
    return FileSet(str(path), found, image_size, workers)


def _check_complete(path: Path) -> None:
    """Refuse an unfinished set of train.sample: it has fewer pictures, and of other classes, than the whole."""
    try:
        content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        unfinished = content["format"].startswith("attngen-samples") and not content["complete"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # somebody else's
    if unfinished:
        raise ValueError(f"{path} is an unfinished set; run its train.sample again before measuring it")


def _tar_files(shards: Sequence[Path]) -> Iterator[tuple[str, Read]]:
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as archive:
                members = [m for m in archive if m.isreg() and Path(m.name).suffix.lower() in SUFFIXES]
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"shard {shard}: {error}") from error
        for member in members:
            yield f"{shard}:{member.name}", _Slice(shard, member.offset_data, member.size)


@dataclass(frozen=True)
class _Slice:
    """Reads a part of a file."""

    path: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def _open_npz(path: Path, image_size: int | None) -> Given:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in STATISTICS if key in archive.files}
            has_pictures = "arr_0" in archive.files
        pictures = NpzSet(path, image_size) if has_pictures else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz: {error}") from error
    _check_arrays(path, arrays)
    if pictures is None and not arrays:
        raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
    return Given(str(path), pictures, arrays)


def _check_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in arrays) != (covariance in arrays):
            raise ValueError(f"{path} has only one of {mean} and {covariance}")
        if mean not in arrays:
            continue
        a, b = arrays[mean], arrays[covariance]
        if a.ndim != 1 or b.shape != (len(a), len(a)):
            raise ValueError(f"{path}: {mean} is {a.shape} and {covariance} {b.shape}; expected (D,) and (D, D)")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"{path}: {mean} or {covariance} is not finite")


def is_statistics(path: Path) -> bool:
    """Whether a safetensors file says that it holds our statistics."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["statistics"])["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
