"""Makes the shards of latents for `python -m train.encode`; :mod:`train.data.latents` reads them."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from attngen.sit.latents import check_normalization, encode_moments
from pipelines.cli.seeds import generator_for
from train.data.broken import Broken, parse_max_broken
from train.data.latents import FORMAT, INDEX_NAME, METADATA_KEY, VERSION, Shard, pack_names, shard_name, view_names
from train.data.open import EmojiData, PictureData
from train.data.pictures import CROP
from train.emoji.dataset import NEVER_FLIPPED
from train.loop import checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the values in the shards; `key` is its hash and is written into each."""

    data: str
    classes: tuple[str, ...]
    vae_sha256: str
    scaling_factor: float | None
    shift_factor: float | None
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None
    image_size: int
    crop: str
    flip: bool
    variants: int
    augment: float
    precision: str
    store: str
    shard_size: int

    @classmethod
    def of(cls, options: argparse.Namespace, data: PictureData | EmojiData, vae: Any, sha256: str) -> Settings:
        """The settings of a run.

        Raises:
            ValueError: if the autoencoder cannot encode pictures of this size, its normalisation does not fit its
                channels, or the data has no variants.
        """
        factor = compression_of(vae)
        if options.image_size % factor:
            raise ValueError(
                f"--image-size {options.image_size} is not a multiple of {factor}, the factor of {options.vae}"
            )
        check_normalization(vae.config, vae.config["latent_channels"])
        if options.variants > 1 and not isinstance(data, EmojiData):
            raise ValueError(f"--variants is for the emoji, and {options.data} are other images; leave it out")
        return cls(
            data=data.fingerprint,
            classes=tuple(data.id2label.values()),
            vae_sha256=sha256,
            scaling_factor=vae.config.get("scaling_factor"),
            shift_factor=vae.config.get("shift_factor"),
            latents_mean=_floats(vae.config.get("latents_mean")),
            latents_std=_floats(vae.config.get("latents_std")),
            image_size=options.image_size,
            crop=CROP,
            flip=options.flip and options.variants == 1,
            variants=options.variants,
            augment=options.augment if options.variants > 1 else 0.0,
            precision=options.precision,
            store=options.store,
            shard_size=options.shard_size,
        )

    @property
    def key(self) -> str:
        """Hash of all settings."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def compression_of(vae: Any) -> int:
    """Pixels a side of a latent pixel."""
    return getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)


def _floats(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


class Encoder:
    """Makes shards; which and how depends on nothing but the settings, so any process may make any."""

    def __init__(
        self, options: argparse.Namespace, data: PictureData | EmojiData, settings: Settings, vae: Any
    ) -> None:
        self.options, self.data, self.settings, self.vae = options, data, settings, vae
        self.count = -(-len(data) // options.shard_size)
        self.store = DTYPES[options.store]
        self.broken = Broken(parse_max_broken(options.max_broken), len(data))

    def path(self, number: int) -> Path:
        """Where shard `number` is."""
        return self.options.out / shard_name(number, self.count)

    def positions(self, number: int) -> range:
        """The pictures of shard `number`."""
        start = number * self.options.shard_size
        return range(start, min(start + self.options.shard_size, len(self.data)))

    def is_whole(self, number: int) -> bool:
        """Whether shard `number` is there and readable.

        Raises:
            ValueError: if it was made with other settings.
        """
        if not self.path(number).is_file():
            return False
        try:
            shard = Shard(self.path(number))
        except ValueError:
            return False  # torn, and made anew
        if shard.key != self.settings.key:
            raise ValueError(f"{shard.path} was made with other settings; pass another --out, or delete it")
        for name, reason in shard.broken.items():
            self.broken.add(name, reason)
        return True

    def run(self, rank: int, world: int) -> None:
        """Make every `world`-th shard, from `rank` on, that is not there."""
        mine = range(rank, self.count, world)
        total = sum(len(self.positions(n)) for n in mine)
        show = rank == 0 and sys.stderr.isatty()
        with (
            tqdm(total=total, unit="picture", disable=not show) as bar,
            ThreadPoolExecutor(self.options.workers) as pool,
        ):
            for number in mine:
                if self.is_whole(number):
                    bar.update(len(self.positions(number)))
                else:
                    self.make(number, pool, bar)

    def make(self, number: int, pool: Any, bar: Any) -> None:
        """Encode and write shard `number`."""
        kept: list[int] = []
        before = set(self.broken.reasons)
        parts: list[dict[str, Tensor]] = [{name: self._empty() for name in self._tensors()}]
        for indices, pixels in self._pictures(self.positions(number), pool):
            kept += indices
            if indices:
                parts.append(self._moments(indices, pixels))
            bar.update(self.options.batch_size)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in self._tensors()}
        tensors["labels"] = self.data.labels[kept]
        tensors["positions"] = torch.tensor(kept, dtype=torch.long)
        tensors["names"] = pack_names(self.data.names(kept))
        broken = {name: reason for name, reason in self.broken.reasons.items() if name not in before}
        info = {"key": self.settings.key, "broken": broken}
        checkpoint.write_file(self.path(number), save(tensors, {METADATA_KEY: json.dumps(info)}))

    def _tensors(self) -> list[str]:
        return view_names(self.settings.flip, self.settings.variants)

    def _empty(self) -> Tensor:
        side = self.options.image_size // compression_of(self.vae)
        return torch.empty(0, 2 * self.vae.config["latent_channels"], side, side, dtype=self.store)

    def _pictures(self, positions: range, pool: Any) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of readable pictures, uint8, with one batch decoded while another is encoded."""
        size = self.options.batch_size
        pieces = [positions[i : i + size] for i in range(0, len(positions), size)]
        pending = [pool.map(self._picture, piece) for piece in pieces[:1]]
        for number, piece in enumerate(pieces):
            if number + 1 < len(pieces):
                pending.append(pool.map(self._picture, pieces[number + 1]))
            results = list(pending.pop(0))
            for index, result in zip(piece, results, strict=True):
                if isinstance(result, ValueError):
                    self.broken.add(self.data.names([index])[0], str(result))
            good = [(i, r) for i, r in zip(piece, results, strict=True) if not isinstance(r, ValueError)]
            pixels = np.stack([r for _, r in good]) if good else np.empty((0, 3, 1, 1), dtype=np.uint8)
            yield [i for i, _ in good], torch.from_numpy(pixels)

    def _picture(self, index: int) -> Any:
        try:
            return self.data.picture(index)
        except ValueError as error:
            return error

    def _moments(self, indices: list[int], pixels: Tensor) -> dict[str, Tensor]:
        """Mean and standard deviation of pictures, and of their other views, as they are stored.

        Raises:
            ValueError: if a value is not finite, naming the picture.
        """
        clean = pixels.float() / 127.5 - 1.0
        found = {}
        for number, name in enumerate(self._tensors()):
            view = self._view(number, indices, clean)
            with torch.inference_mode():
                mean, std = encode_moments(self.vae, view.to(self.vae.device, self.vae.dtype))
            moments = torch.cat([mean, std], dim=1).to(self.store).cpu()
            finite = moments.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                first = self.data.names([indices[int((~finite).nonzero()[0])]])[0]
                raise ValueError(
                    f"the latents of {first} are not finite in {self.options.precision}, stored as "
                    f"{self.options.store}; pass --precision fp32 or --store fp32"
                )
            found[name] = moments
        return found

    def _view(self, number: int, indices: list[int], clean: Tensor) -> Tensor:
        """Pictures as they are (0), mirrored, or changed as in training; a variant depends on its picture alone."""
        if number == 0:
            return clean
        if self.settings.flip:
            may_flip = self._may_flip(indices)
            return torch.where(may_flip[:, None, None, None], clean.flip(-1), clean)
        draws = [generator_for("variant", number, index) for index in indices]
        return torch.cat([self.data.batch(torch.tensor([i]), draw)[0] for i, draw in zip(indices, draws, strict=True)])

    def _may_flip(self, indices: list[int]) -> Tensor:
        """(n,) whether a mirrored picture is still one of its class, which holds for all but some emoji."""
        if not isinstance(self.data, EmojiData):
            return torch.ones(len(indices), dtype=torch.bool)
        names = [self.data.id2label[label] for label in self.data.labels[indices].tolist()]
        return torch.tensor([name not in NEVER_FLIPPED for name in names])

    def finish(self, rank: int) -> bool:
        """Write the index if every shard is there; returns whether it did.

        The processes need not wait for each other: the last one to end finds all shards.
        """
        missing = [self.path(n) for n in range(self.count) if not self.is_whole(n)]
        if missing:
            done = self.count - len(missing)
            print(
                f"{done} of {self.count} shards are made; other processes, or the same command again, make the others"
            )
            return False
        temporary = self.options.out / f"rank-{rank}.{INDEX_NAME}"
        checkpoint.write_json(temporary, self._index())
        os.replace(temporary, self.options.out / INDEX_NAME)
        left_out = len(self.broken.reasons)
        print(f"{self.options.out}: {len(self.data) - left_out} images in {self.count} shards, {left_out} left out")
        return True

    def _index(self) -> dict[str, Any]:
        shards = [Shard(self.path(n)) for n in range(self.count)]
        settings = dataclasses.asdict(self.settings)
        vae = {name: settings.pop(name) for name in ("scaling_factor", "shift_factor")}
        statistics = {name: settings.pop(name) for name in ("latents_mean", "latents_std")}
        vae |= {name: values for name, values in statistics.items() if values is not None}
        return {
            "format": FORMAT,
            "version": VERSION,
            "key": self.settings.key,
            **settings,
            "vae": {"source": self.options.vae, **vae, "sha256": settings.pop("vae_sha256")},
            "count": sum(len(shard) for shard in shards),
            "broken": {name: reason for shard in shards for name, reason in shard.broken.items()},
            "shards": [{"file": shard.path.name, "count": len(shard)} for shard in shards],
        }
