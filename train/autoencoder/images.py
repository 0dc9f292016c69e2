"""The images that `python -m train.vae` trains on and the held-out ones that it is measured on, all in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.cli.seeds import generator_for, sample_order
from train.data.open import is_emoji, open_data
from train.emoji.dataset import DATA_FILE, SKIN_TONES, TEST_SHARE, cut_out, is_held_out, read_data_file, to_float


class Images(NamedTuple):
    """Images in two parts.

    Attributes:
        train: (N, 3, size, size), uint8.
        held_out: (M, 3, size, size), uint8.
        names: of the held-out ones.
        fingerprint: of the pixels of both parts; a run is resumed only with the same one.
    """

    train: Tensor
    held_out: Tensor
    names: list[str]
    fingerprint: str


def read_images(spec: str, image_size: int) -> Images:
    """Read all images of a data set.

    Emoji are held out by the project's rule, by their base; skin tones are left out, as in `EmojiDataset`, and
    emoji outside every class are taken in. Of other images a tenth is held out, by a hash of the pixels.

    Args:
        spec: "emoji", a file made by `train.emoji.build` (`….zip`), or images, as for `train.sit`.
        image_size: side of the images, in pixels.

    Raises:
        ValueError: if they cannot be read, or one of the parts would be empty.
    """
    images, names, held = _emoji(spec, image_size) if is_emoji(spec) else _others(spec, image_size)
    if held.all() or not held.any():
        raise ValueError(f"{spec} holds {len(names)} images, too few to hold some out; pass more")
    digest = hashlib.sha256(images.numpy().tobytes())
    held_names = [name for name, is_held in zip(names, held.tolist(), strict=True) if is_held]
    return Images(images[~held], images[held], held_names, f"images-{len(names)}-{digest.hexdigest()[:16]}")


def _emoji(spec: str, image_size: int) -> tuple[Tensor, list[str], Tensor]:
    path = DATA_FILE if spec == "emoji" else Path(spec)
    index, atlas = read_data_file(path)
    if image_size > index["size"]:
        raise ValueError(
            f"image_size is {image_size}, and {path} holds {index['size']} pixels; "
            f"python -m train.emoji.build --size {image_size} --no-skin-tones --out FILE.zip draws larger ones"
        )
    chosen = [(i, e) for i, e in enumerate(index["emoji"]) if SKIN_TONES.isdisjoint(e["codepoints"])]
    images = cut_out(atlas, index, [position for position, _ in chosen], image_size)
    held = torch.tensor([is_held_out(entry["base"]) for _, entry in chosen])
    return images, [entry["name"] for _, entry in chosen], held


def _others(spec: str, image_size: int) -> tuple[Tensor, list[str], Tensor]:
    data: Any = open_data(spec, image_size=image_size)
    if data.is_latent:
        raise ValueError(f"{spec} holds latents; an autoencoder is trained on images")
    chosen = [data.readable(i)[1] for i in range(len(data))]
    images = torch.stack([torch.from_numpy(data.picture(i).copy()) for i in chosen])
    draws = [int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()[:8], "big") for image in images]
    return images, data.names(chosen), torch.tensor([draw % TEST_SHARE == 0 for draw in draws])


def make_batch(images: Tensor, seed: int, step: int, batch_size: int, crop_size: int | None) -> Tensor:
    """The images of a step: a function of the seed and the step.

    Args:
        images: (N, 3, size, size), uint8.
        seed: of the run.
        step: steps done.
        batch_size: images in the batch.
        crop_size: side of a crop at a random place, or None for whole images.

    Returns:
        float32 (batch_size, 3, side, side) in [-1, 1], each mirrored with probability 1/2, in channels-last order.
    """
    indices = sample_order(seed, torch.ones(len(images)), step * batch_size, batch_size)
    side = crop_size or images.shape[-1]
    generator = generator_for(seed, "crops", step)
    places = torch.randint(images.shape[-1] - side + 1, (batch_size, 2), generator=generator).tolist()
    mirrored = (torch.rand(batch_size, generator=generator) < 0.5).tolist()
    batch = torch.stack(
        [images[i, :, y : y + side, x : x + side] for i, (y, x) in zip(indices.tolist(), places, strict=True)]
    )
    batch = torch.stack([image.flip(-1) if flip else image for image, flip in zip(batch, mirrored, strict=True)])
    return to_float(batch).contiguous(memory_format=torch.channels_last)
