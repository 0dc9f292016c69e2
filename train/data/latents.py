"""Latents of an autoencoder, encoded once by `python -m train.encode` and read from memory-mapped shards.

A shard holds the mean and standard deviation of the posterior, not a sample of it; training draws a new sample every
time, as it would with the autoencoder at hand.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from attngen.sit.latents import denormalize_latents, normalize_latents
from train.data.base import EVERYTHING, Data, choose_classes

INDEX_NAME = "index.json"
SHARD_PATTERN = "latents-*-of-*.safetensors"
FORMAT = "attngen-latents"
VERSION = 1
# One key for all: safetensors writes several in random order, and equal shards shall have equal bytes.
METADATA_KEY = "attngen"


def shard_name(number: int, count: int) -> str:
    """File name of shard `number` of `count`."""
    return f"latents-{number:05d}-of-{count:05d}.safetensors"


def view_names(flip: bool, variants: int = 1) -> list[str]:
    """Tensors of a shard that hold the same pictures: as they are, then mirrored, or changed as in training.

    Args:
        flip: whether there are mirrored pictures.
        variants: of each picture, the first of them the picture itself; more than one come without `flip`.
    """
    if variants > 1:
        return ["moments", *(f"moments_{i}" for i in range(1, variants))]
    return ["moments", "moments_flip"] if flip else ["moments"]


class Shard:
    """One file of latents, mapped into memory: nothing but the header is read until a sample is.

    Raises:
        ValueError: if it is missing, not whole, or no shard of latents; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path} is missing; run train.encode again, which makes missing shards")
        try:
            self.file: Any = safe_open(path, framework="pt")
            self.info: dict[str, Any] = json.loads((self.file.metadata() or {})[METADATA_KEY])
            self.shape: list[int] = self.file.get_slice("moments").get_shape()
            self.moments = {n: self.file.get_slice(n) for n in self.file.keys() if n.startswith("moments")}
            self.labels: Tensor = self.file.get_tensor("labels")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is not a whole shard of latents ({error}); delete it and run train.encode again"
            ) from error

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """Names of the pictures."""
        return unpack_names(self.file.get_tensor("names"))

    @property
    def positions(self) -> Tensor:
        """(n,) places of the pictures in the data they come from."""
        return self.file.get_tensor("positions")

    @property
    def broken(self) -> dict[str, str]:
        """Pictures that could not be read and are left out, with the reason."""
        return self.info["broken"]

    @property
    def key(self) -> str:
        """Hash of the settings it was made with."""
        return self.info["key"]

    def read(self, row: int, view: str = "moments") -> Tensor:
        """(2 C, H, W): mean and standard deviation of one picture in one of `view_names`, as stored."""
        return self.moments[view][row]


def pack_names(names: Sequence[str]) -> Tensor:
    """Names as bytes, each ended by a zero, uint8: a tensor is read when it is wanted, and metadata always."""
    joined = "".join(f"{name}\0" for name in names).encode("utf-8", "replace")
    return torch.tensor(list(joined), dtype=torch.uint8)


def unpack_names(packed: Tensor) -> list[str]:
    """The names that :func:`pack_names` packed."""
    return packed.numpy().tobytes().decode().split("\0")[:-1]


class LatentData(Data):
    """A folder written by `python -m train.encode`.

    Args:
        folder: with index.json and shards.
        image_size: side of the pictures that were encoded, to check.
        classes: names of the classes to use, or () for all.
        flip: use the mirrored pictures too. Variants, made by `--variants`, are mirrored already and always used.

    Raises:
        ValueError: if the folder is not whole, or was made for other pictures than asked for.
    """

    is_latent = True

    def __init__(self, folder: Path, image_size: int, classes: Sequence[str] = (), flip: bool = True) -> None:
        self.index = read_index(folder)
        if self.index["image_size"] != image_size:
            made = self.index["image_size"]
            raise ValueError(
                f"{folder} was encoded from {made}-pixel images, not {image_size}; set image_size to {made}"
            )
        variants = self.index.get("variants", 1)
        if flip and not self.index["flip"] and variants == 1:
            raise ValueError(f"{folder} has no mirrored images; turn mirroring off or encode again without --no-flip")
        if not flip and variants > 1:
            raise ValueError(f"{folder} has variants, some mirrored; leave mirroring on or encode without --variants")
        self.views = view_names(flip, variants)
        self.shards = [self._open(folder / entry["file"], entry["count"]) for entry in self.index["shards"]]
        self.starts = list(itertools.accumulate((len(shard) for shard in self.shards[:-1]), initial=0))
        labels = torch.cat([shard.labels for shard in self.shards])
        self.rows, self.labels, self.id2label = choose_classes(str(folder), self.index["classes"], labels, classes)
        self.channels, self.sample_size = self.shards[0].shape[1] // 2, self.shards[0].shape[2]
        self.vae = self.index["vae"]
        self.fingerprint = f"latents-{len(self)}-{self.index['key'][:16]}"
        if classes:
            self.fingerprint += "-" + hashlib.sha256(repr(tuple(classes)).encode()).hexdigest()[:16]

    def _open(self, path: Path, count: int) -> Shard:
        shard = Shard(path)
        if shard.key != self.index["key"]:
            raise ValueError(
                f"{path} was made with another autoencoder or other settings than index.json says; encode again"
            )
        if len(shard) != count:
            raise ValueError(f"{path} holds {len(shard)} images, and index.json says {count}; encode again")
        return shard

    def names(self, indices: Iterable[int] | Tensor) -> list[str]:
        places = (self._place(int(i)) for i in indices)
        return [shard.names[row] for shard, row in places]

    def _place(self, index: int) -> tuple[Shard, int]:
        """The shard of a sample, and its row there."""
        row = int(self.rows[index])
        number = bisect.bisect_right(self.starts, row) - 1
        return self.shards[number], row - self.starts[number]

    def moments(self, index: int, view: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of one sample's posterior in one of `views`, float32 (C, H, W), not scaled."""
        shard, row = self._place(index)
        mean, std = shard.read(row, self.views[view]).float().chunk(2)
        return mean, std

    def batch(
        self,
        indices: Tensor,
        generator: torch.Generator,
        part: slice = EVERYTHING,
        pool: Executor | None = None,
    ) -> tuple[Tensor, Tensor]:
        count = len(self.views)
        views = (count - 1 - (torch.rand(len(indices), generator=generator) * count).long())[part].tolist()
        shape = (len(indices), self.channels, self.sample_size, self.sample_size)
        draws = torch.randn(shape, generator=generator)[part]
        chosen = indices[part]
        places = [self._place(i) for i in chosen.tolist()]
        stored = [s.read(row, self.views[view]) for (s, row), view in zip(places, views, strict=True)]
        mean, std = torch.stack(stored).float().chunk(2, dim=1)
        assert self.vae is not None
        return scale(mean + std * draws, self.vae), self.labels[chosen]


def scale(latents: Tensor, vae: dict[str, Any]) -> Tensor:
    """What the network is trained on, from what the autoencoder gives: see `attngen.sit.latents`."""
    return normalize_latents(latents, vae)


def unscale(latents: Tensor, vae: dict[str, Any]) -> Tensor:
    """What the autoencoder decodes, from what the network gives."""
    return denormalize_latents(latents, vae)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of latents.

    Raises:
        ValueError: if there is none, or it is damaged or of another version.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing: the encoding was not finished; run train.encode again to continue")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        known = index["format"] == FORMAT and index["version"] == VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run train.encode again") from error
    if not known:
        raise ValueError(f"{path} is of format {index['format']!r} {index['version']!r}, not {FORMAT!r} {VERSION}")
    return index
