"""Training data from a short text: emoji, folders, Hugging Face data sets, tar shards, encoded latents.

A batch is a function of its indices and of the generator passed in, of nothing read before. So a run that was stopped
and resumed, or moved to another number of processes or threads, sees the same batches bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.data.base import EVERYTHING, Data, SampleError, choose_classes
from train.data.broken import MAX_BROKEN, Broken, check_max_broken
from train.data.latents import INDEX_NAME, SHARD_PATTERN, LatentData
from train.data.pictures import read_picture
from train.data.sources import FolderSource, Source, fingerprint_of


def open_data(
    spec: str,
    *,
    image_size: int,
    classes: Sequence[str] = (),
    augment: float = 0.5,
    flip: bool = True,
    max_broken: int | float = MAX_BROKEN,
) -> Data:
    """Open training data.

    Args:
        spec: "emoji", or a file made by `train.emoji.build` ("….zip"); a folder of class folders;
            "hf:NAME_OR_FOLDER[:SPLIT]"; tar shards as a folder, glob or brace pattern; or a folder written by
            `python -m train.encode`.
        image_size: side of the pictures, in pixels; for latents that of the pictures they were made from.
        classes: names of the classes to use, in the order of their labels, or () for all.
        augment: strength of shift, scale and rotation, for the emoji only; other pictures are cropped and mirrored.
        flip: mirror every second picture, drawn at random.
        max_broken: a run ends when more pictures than this are unreadable: an integer is a number of pictures, a
            floating-point number from 0 to 1 a share of them.

    Raises:
        ValueError: if there is no such data, or it cannot be used as asked.
    """
    if not 0.0 <= augment <= 1.0:
        raise ValueError(f"augment is {augment}; expected 0 to 1")
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size is {image_size!r}; expected a number of pixels, at least 1")
    check_max_broken(max_broken)
    if is_emoji(spec):
        return EmojiData(image_size, classes, augment, flip, None if spec == "emoji" else spec)
    if is_encoded(spec):
        return LatentData(Path(spec), image_size, classes, flip)
    return PictureData(open_source(spec), spec, image_size, classes, flip, max_broken)


def is_emoji(spec: str) -> bool:
    """Whether a text names the emoji of the repository or a file of them."""
    return spec == "emoji" or spec.endswith(".zip")


def is_encoded(spec: str) -> bool:
    """Whether a folder holds latents; half-made ones count, for they get an error of their own."""
    folder = Path(spec)
    return folder.is_dir() and ((folder / INDEX_NAME).is_file() or any(folder.glob(SHARD_PATTERN)))


def open_source(spec: str) -> Source:
    """The pictures that a text names.

    Raises:
        ValueError: if it names none.
    """
    path = Path(spec)
    if spec.startswith("hf:"):
        from train.data.hub import HubSource

        return HubSource(spec[3:])
    looks_like_shards = spec.endswith((".tar", ".tar.gz", ".tgz")) or bool(set(spec) & set("*?[{"))
    if any(path.glob("*.tar")) if path.is_dir() else looks_like_shards:
        from train.data.tar import TarSource

        return TarSource(spec)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        raise ValueError(f"{spec} was written by Hugging Face datasets; pass hf:{spec}")
    if path.is_dir():
        return FolderSource(path)
    raise ValueError(
        f"data is {spec!r}, which is not a folder; expected 'emoji', a folder of class folders, 'hf:NAME', tar shards "
        "('shards/*.tar') or a folder written by train.encode"
    )


class PictureData(Data):
    """Pictures of a source, decoded when they are wanted, cropped and mirrored.

    A picture that cannot be read is replaced by the next one that can, in the order of the data, with that one's
    label; so the replacement is the same in every run.

    Attributes:
        broken: the pictures found unreadable by this process.
    """

    def __init__(
        self,
        source: Source,
        spec: str,
        image_size: int,
        classes: Sequence[str] = (),
        flip: bool = True,
        max_broken: int | float = MAX_BROKEN,
    ) -> None:
        self.source, self.sample_size, self.flip = source, image_size, flip
        self.rows, self.labels, self.id2label = choose_classes(spec, source.class_names, source.labels, classes)
        self.fingerprint = source.fingerprint
        if classes:
            self.fingerprint = fingerprint_of("part", list(classes), self.labels, (source.fingerprint,))
        self.broken = Broken(max_broken, len(self))

    def names(self, indices: Iterable[int] | Tensor) -> list[str]:
        return [self.source.name(int(self.rows[i])) for i in indices]

    def picture(self, index: int) -> np.ndarray:
        """Picture `index`, uint8 (3, H, W).

        Raises:
            ValueError: if it cannot be read.
        """
        try:
            with self.source.open(int(self.rows[index])) as file:
                return read_picture(file, self.sample_size)
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from error

    def readable(self, index: int) -> tuple[np.ndarray, int]:
        """Picture `index` or the first readable one after it, and its index.

        Raises:
            ValueError: if too many pictures are broken.
        """
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self.picture(candidate), candidate
            except ValueError as error:
                self.broken.add(self.names([candidate])[0], str(error))
        raise ValueError(f"none of the {len(self)} images can be read: {self.broken}")

    def batch(
        self,
        indices: Tensor,
        generator: torch.Generator,
        part: slice = EVERYTHING,
        pool: Executor | None = None,
    ) -> tuple[Tensor, Tensor]:
        mirrored = (torch.rand(len(indices), generator=generator) < 0.5)[part].tolist()
        wanted = indices[part].tolist()
        for index in wanted:
            if not 0 <= index < len(self):
                raise IndexError(f"image {index} of {len(self)}")
        clean = np.empty((len(wanted), self.channels, self.sample_size, self.sample_size), dtype=np.float32)

        def fill(position: int) -> int:
            try:
                pixels, index = self.readable(wanted[position])
            except ValueError:
                raise
            except Exception as error:  # a fault of the program; threads would lose where it was
                raise SampleError(f"{self.names([wanted[position]])[0]}: {type(error).__name__}: {error}") from error
            if self.flip and mirrored[position]:
                pixels = pixels[:, :, ::-1]
            np.divide(pixels, np.float32(127.5), out=clean[position])
            clean[position] -= 1
            return index

        used = list((pool.map if pool else map)(fill, range(len(wanted))))
        return torch.from_numpy(clean), self.labels[torch.tensor(used, dtype=torch.long)]


class EmojiData(Data):
    """The emoji of this repository, mirrored, shifted, scaled and turned where that leaves the class alone.

    Args:
        image_size: side of the pictures, in pixels.
        classes: names of the classes to use, or () for all.
        augment: strength of shift, scale and rotation.
        flip: mirror every second picture, drawn at random.
        path: file made by `train.emoji.build`, or None for that of the repository.
    """

    def __init__(
        self,
        image_size: int,
        classes: Sequence[str] = (),
        augment: float = 0.5,
        flip: bool = True,
        path: str | Path | None = None,
    ) -> None:
        from train.emoji.dataset import EmojiDataset

        self.emoji = EmojiDataset("train", image_size=image_size, classes=classes or None, path=path)
        self.sample_size, self.augment, self.flip = image_size, augment, flip
        self.labels, self.id2label = self.emoji.labels, self.emoji.id2label
        pixels = hashlib.sha256(self.emoji.pixel_values.numpy().tobytes()).hexdigest()
        self.fingerprint = fingerprint_of("emoji", self.emoji.classes, self.labels, (*self.emoji.names, pixels))

    def names(self, indices: Iterable[int] | Tensor) -> list[str]:
        return [self.emoji.names[int(i)] for i in indices]

    def picture(self, index: int) -> np.ndarray:
        """Picture `index`, uint8 (3, H, W)."""
        return self.emoji.pixel_values[index].numpy()

    def batch(
        self,
        indices: Tensor,
        generator: torch.Generator,
        part: slice = EVERYTHING,
        pool: Executor | None = None,
    ) -> tuple[Tensor, Tensor]:
        from train.emoji.dataset import random_affine, to_float

        draws = torch.rand(len(indices), 5, generator=generator)[part]
        if not self.flip:
            draws[:, 0] = 1.0
        chosen = indices[part]
        images, labels = to_float(self.emoji.pixel_values[chosen]), self.labels[chosen]
        matrices = random_affine(draws, labels, self.emoji.classes, self.augment)
        grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
        # As in train.emoji.dataset.augment, which draws for what it moves; here a process moves its part of the draws.
        moved = F.grid_sample(images - 1.0, grid, mode="bicubic", padding_mode="zeros", align_corners=False) + 1.0
        return moved.clamp(-1.0, 1.0), labels
