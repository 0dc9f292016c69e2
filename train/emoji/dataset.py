"""The emoji data set: small pictures with plain class names, read from ``train/data/emoji.zip``.

The file holds every emoji of Noto Color Emoji on white; :mod:`train.emoji.build` makes it. Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from train.emoji.build import FORMAT, SKIN_TONES, VERSION

DATA_FILE = Path(__file__).parents[1] / "data" / "emoji.zip"
SPLITS = ("train", "test", "all")

# Class name -> subgroups of emoji-test.txt. The order gives the label when no classes are chosen.
CLASSES: dict[str, tuple[str, ...]] = {
    "face": (
        "face-smiling",
        "face-affection",
        "face-tongue",
        "face-hand",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-unwell",
        "face-hat",
        "face-glasses",
        "face-concerned",
        "face-negative",
    ),
    "heart": ("heart",),
    "hand": ("hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands"),
    "person": ("person", "person-gesture", "person-role"),
    "athlete": ("person-activity", "person-sport"),
    "animal": (
        "cat-face",
        "monkey-face",
        "animal-mammal",
        "animal-bird",
        "animal-amphibian",
        "animal-reptile",
        "animal-marine",
        "animal-bug",
    ),
    "plant": ("plant-flower", "plant-other"),
    "fruit": ("food-fruit", "food-vegetable"),
    "dish": ("food-prepared", "food-asian", "food-sweet"),
    "drink": ("drink",),
    "building": ("place-building", "place-religious"),
    "vehicle": ("transport-ground", "transport-water", "transport-air"),
    "clock": ("time",),
    "sky": ("sky & weather",),
    "sport": ("sport",),
    "clothing": ("clothing",),
    "tool": ("tool",),
    "sign": ("transport-sign", "warning", "arrow", "religion", "zodiac", "av-symbol", "keycap", "alphanum"),
    "flag": ("flag", "country-flag", "subdivision-flag"),
}

# Names of emoji that Unicode files beside the pictures above but that nobody would call by the name of the class;
# their skin tones go with them.
STRAYS = frozenset(
    (
        *(f"{who} {what}" for who in ("person", "man", "woman") for what in ("getting massage", "getting haircut")),
        *(f"{who} in steamy room" for who in ("person", "man", "woman")),
        *("coral", "feather", "paw prints", "pig nose", "spider web", "wing"),
        *("empty nest", "nest with eggs"),
        *("ice",),
        *("brick", "rock", "wood"),
        *("anchor", "bus stop", "construction", "fuel pump", "horizontal traffic light", "motorway", "oil drum"),
        *("police car light", "railway track", "ring buoy", "seat", "stop sign", "vertical traffic light", "wheel"),
        *("closed umbrella", "droplet", "fire", "thermometer", "umbrella", "umbrella on ground"),
        *("umbrella with rain drops", "water wave", "snowman", "snowman without snow"),
        *("gem stone", "lipstick"),
        *("bomb",),
    )
)

# A mirrored letter, clock or national flag is another picture, or none; a flag in Noto is never at a slant.
NEVER_FLIPPED = frozenset(("clock", "sign", "flag"))
NEVER_ROTATED = frozenset(("clock", "sign", "flag"))
MAX_SHIFT = 0.06  # of the side
MAX_SCALE = 0.1
MAX_DEGREES = 8.0

# All that zipfile, json and Pillow raise on a damaged file.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)
# Members of a good file are far smaller; this keeps a crafted one from filling the memory.
MAX_MEMBER_BYTES = 64 * 2**20
TEST_SHARE = 10  # one base emoji in ten is held out
# Any text would do; with this one every class, the small ones too, has at least two held-out emoji.
SPLIT_SALT = "3728"


class EmojiDataset(Dataset[tuple[Tensor, int]]):
    """Emoji of chosen classes; item `i` is the pair (pixel values, label).

    Pixel values are float32 (3, image_size, image_size) in [-1, 1]. A label is the index in the list of chosen
    classes. Held-out emoji are chosen by base emoji, so a variant of a training picture is never in the test part,
    and the choice of classes does not change which they are.

    Attributes:
        pixel_values: All pictures, uint8 (N, 3, image_size, image_size).
        labels: All labels, int64 (N).
        names: The Unicode name of each picture.
        bases: The code points of each picture's base emoji.
        classes: The chosen class names.
        id2label: Class name by label.
        num_classes: Number of chosen classes.
    """

    def __init__(
        self,
        split: str = "train",
        image_size: int = 64,
        classes: Sequence[str] | None = None,
        skin_tones: bool = False,
        path: str | Path | None = None,
    ) -> None:
        """Read the file.

        Args:
            split: ``train``, ``test`` (about a tenth) or ``all``.
            image_size: Side of the pictures, in pixels, from 8 up to that of the file (64).
            classes: Class names, a selection of `CLASSES` in any order; all by default.
            skin_tones: Whether to include pictures with a skin tone, of which there are five per hand or person.
            path: Another data file.

        Raises:
            ValueError: If an argument has none of the accepted values or the file is not a whole emoji data file.
        """
        self.classes = check_classes(classes)
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        path = Path(path) if path is not None else DATA_FILE
        index, atlas = read_data_file(path)
        if not isinstance(image_size, int) or not 8 <= image_size <= index["size"]:
            raise ValueError(f"image_size is {image_size!r}; expected 8 to {index['size']}, the size held by {path}")
        label_of = {subgroup: label for label, name in enumerate(self.classes) for subgroup in CLASSES[name]}
        chosen = [
            (position, entry)
            for position, entry in enumerate(index["emoji"])
            if entry["subgroup"] in label_of
            and entry["name"].split(":")[0] not in STRAYS
            and (skin_tones or SKIN_TONES.isdisjoint(entry["codepoints"]))
            and (split == "all" or is_held_out(entry["base"]) == (split == "test"))
        ]
        self.split = split
        self.image_size = image_size
        self.pixel_values = cut_out(atlas, index, [position for position, _ in chosen], image_size)
        self.labels = torch.tensor([label_of[entry["subgroup"]] for _, entry in chosen], dtype=torch.long)
        self.names = [entry["name"] for _, entry in chosen]
        self.bases = [tuple(entry["base"]) for _, entry in chosen]
        self.id2label = dict(enumerate(self.classes))
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The picture, float32 (3, H, W) in [-1, 1], and the label."""
        return to_float(self.pixel_values[index]), int(self.labels[index])


def check_classes(classes: Sequence[str] | None) -> list[str]:
    """The chosen class names as a list.

    Args:
        classes: Class names, or None for all of `CLASSES`.

    Returns:
        The names in the given order.

    Raises:
        ValueError: If a name is unknown or comes twice, or there is none.
    """
    names = list(CLASSES) if classes is None else [classes] if isinstance(classes, str) else list(classes)
    unknown = [name for name in names if name not in CLASSES]
    if unknown:
        raise ValueError(f"unknown class {unknown[0]!r}; expected some of {', '.join(CLASSES)}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"classes is {names}; expected at least one name, each once")
    return names


def is_held_out(base: Sequence[int]) -> bool:
    """Whether an emoji belongs to the test part; depends on nothing but its base.

    Args:
        base: Code points of the base emoji.

    Returns:
        True for about one base in ten.
    """
    text = " ".join([SPLIT_SALT, *(f"{codepoint:X}" for codepoint in base)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % TEST_SHARE == 0


def read_data_file(path: str | Path) -> tuple[dict[str, Any], Image.Image]:
    """Read and check an emoji data file.

    Args:
        path: Path of the zip file.

    Returns:
        The index (``emoji.json``) and the decoded RGB atlas.

    Raises:
        ValueError: If the file is missing, damaged, or not of this format and version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in ("emoji.json", "atlas.webp"):
                member = archive.getinfo(name)
                if member.file_size > MAX_MEMBER_BYTES:
                    raise ValueError(f"{name} is larger than {MAX_MEMBER_BYTES >> 20} MiB")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{name} is compressed in a way that is not used here")
            index = check_index(json.loads(archive.read("emoji.json")))
            atlas = Image.open(io.BytesIO(archive.read("atlas.webp")), formats=["WEBP"])
        rows = -(-len(index["emoji"]) // index["columns"])
        expected = (index["columns"] * index["size"], rows * index["size"])
        if atlas.size != expected:
            raise ValueError(f"atlas.webp has {atlas.size} pixels instead of {expected}")
        return index, atlas.convert("RGB")
    except KeyError as error:
        raise ValueError(f"{path} is not an emoji data file: {error.args[0]}") from error
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a readable emoji data file: {error}") from error


def check_index(index: Any) -> dict[str, Any]:
    """Check the content of ``emoji.json``.

    Args:
        index: The parsed JSON.

    Returns:
        The same object.

    Raises:
        ValueError: If it is not an index of this format and version.
    """
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(f"emoji.json is not of the format {FORMAT}, version {VERSION}")
    if not all(type(index.get(key)) is int and 0 < index[key] <= 1024 for key in ("size", "columns")):
        raise ValueError("emoji.json has no usable size and columns")
    entries = index.get("emoji")
    if not isinstance(entries, list) or not entries or not all(map(is_entry, entries)):
        raise ValueError("emoji.json has no usable list of emoji")
    return index


def is_entry(entry: Any) -> bool:
    """Whether one element of ``emoji.json`` has the texts and code points that are used."""
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in ("name", "group", "subgroup"))
        and all(
            isinstance(entry.get(key), list) and all(type(codepoint) is int for codepoint in entry[key])
            for key in ("codepoints", "base")
        )
    )


def cut_out(atlas: Image.Image, index: dict[str, Any], positions: list[int], image_size: int) -> Tensor:
    """Cut pictures out of the atlas and resample each on its own, so that neighbours do not mix.

    Args:
        atlas: The RGB atlas.
        index: The index with ``size`` and ``columns``.
        positions: Positions of the pictures in the index.
        image_size: Side of the result, in pixels.

    Returns:
        uint8 (len(positions), 3, image_size, image_size).
    """
    size, columns = index["size"], index["columns"]
    pictures = np.empty((len(positions), image_size, image_size, 3), dtype=np.uint8)
    for picture, position in zip(pictures, positions, strict=True):
        left, top = position % columns * size, position // columns * size
        tile = atlas.crop((left, top, left + size, top + size))
        if image_size != size:
            tile = tile.resize((image_size, image_size), Image.Resampling.LANCZOS)
        picture[:] = np.asarray(tile)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_float(images: Tensor) -> Tensor:
    """Scale uint8 pictures, 0 to 255, to float32 in [-1, 1]; white is 1."""
    return images.to(torch.float32) / 127.5 - 1.0


def augment(
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    classes: Sequence[str] | None = None,
    amount: float = 1.0,
) -> Tensor:
    """Mirror, shift, scale and turn each picture a little, on white, where that leaves its class alone.

    Every picture gets its own draw: mirrored with probability 1/2, shifted by up to 6 % of the side, scaled by 0.9 to
    1.1 and turned by up to 8 degrees. Clocks, signs and flags are neither mirrored nor turned.

    Args:
        images: (B, 3, H, W), uint8 or floating point in [-1, 1].
        labels: Class of each picture, integers (B).
        generator: Source of all randomness, on any device; the global one is not used.
        classes: The class names by label, as in `EmojiDataset.classes`; all of `CLASSES` by default.
        amount: Factor on shift, scale and turn, from 0 to 1. Most emoji reach almost to the edge, so at 1 about half of
            the results lose a pixel or more there.

    Returns:
        float32 (B, 3, H, W) in [-1, 1], on the device of `images`.

    Raises:
        ValueError: If the shapes do not fit, a label has no class or `amount` is out of range.
    """
    names = check_classes(classes)
    if not 0.0 <= amount <= 1.0:
        raise ValueError(f"amount is {amount}; expected 0 to 1")
    if images.ndim != 4 or images.shape[1] != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"expected images (B, 3, H, W) and labels (B), got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    # On an accelerator this check would make every training step wait for the device.
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}; expected 0 to {len(names) - 1}")
    images = to_float(images) if images.dtype == torch.uint8 else images.to(torch.float32)
    draws = torch.rand(len(images), 5, generator=generator, device=generator.device).to(images.device)
    matrices = random_affine(draws, labels.to(images.device), names, amount)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    # grid_sample pads with 0, so white has to be 0 meanwhile. Cubic because bilinear blurs lines one pixel wide.
    moved = F.grid_sample(images - 1.0, grid, mode="bicubic", padding_mode="zeros", align_corners=False) + 1.0
    return moved.clamp(-1.0, 1.0)


def random_affine(draws: Tensor, labels: Tensor, names: Sequence[str], amount: float) -> Tensor:
    """The maps from output to input coordinates for :func:`augment`.

    Args:
        draws: Uniform numbers in [0, 1), (B, 5).
        labels: Class of each picture, integers (B), on the device of `draws`.
        names: Class name by label.
        amount: Factor on shift, scale and turn.

    Returns:
        (B, 2, 3) matrices for `affine_grid`, whose coordinates run from -1 to 1.
    """
    may_flip = torch.tensor([name not in NEVER_FLIPPED for name in names], device=draws.device)[labels]
    may_turn = torch.tensor([name not in NEVER_ROTATED for name in names], device=draws.device)[labels]
    symmetric = amount * (2.0 * draws - 1.0)
    flip = torch.where(may_flip & (draws[:, 0] < 0.5), -1.0, 1.0)
    angle = symmetric[:, 1] * math.radians(MAX_DEGREES) * may_turn
    scale = 1.0 + symmetric[:, 2] * MAX_SCALE
    shift = symmetric[:, 3:5] * (2.0 * MAX_SHIFT)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = torch.stack([flip * cos, -flip * sin, sin, cos], dim=1).reshape(-1, 2, 2)
    return torch.cat([rows, shift.unsqueeze(2)], dim=2)
