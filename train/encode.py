"""Encode pictures to latents once: python -m train.encode --data pictures --vae stabilityai/sd-vae-ft-ema --out latents

Training then needs neither the pictures nor the autoencoder. A run that was killed goes on with the same command; whole
shards are kept. Under `accelerate launch`, or torchrun, each process makes its share of the shards.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from train.data.open import EmojiData, PictureData

CHECKED = 16


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = cli.Parser("train.encode", __doc__)
    add = parser.add_argument
    add("--data", required=True, help="images, as for train.sit: a folder, hf:NAME, tar shards or emoji")
    add("--vae", required=True, help="Hub id or folder of an autoencoder of diffusers, or of a pipeline that has one")
    add("--image-size", type=int, default=256, help="side of the images, in pixels (default %(default)s)")
    add("--out", type=Path, required=True, help="folder for the latents")
    add("--classes", nargs="*", default=[], help="class names to encode (default: all)")
    add("--no-flip", dest="flip", action="store_false", help="no mirrored images: half the size and time")
    add("--variants", type=int, default=1, help="of each emoji: itself and others, moved as in training (default 1)")
    add("--augment", type=float, default=0.3, help="how far variants are moved, 0 to 1 (default %(default)s)")
    add(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        default="fp32",
        help="precision of the autoencoder (default %(default)s)",
    )
    add(
        "--store",
        choices=["fp16", "fp32"],
        default="fp16",
        help="precision of the stored latents (default %(default)s)",
    )
    add("--batch-size", type=int, default=16, help="images per call (default %(default)s)")
    add("--shard-size", type=int, default=10_000, help="images per file (default %(default)s)")
    add("--workers", type=int, default=4, help="threads that decode images (default %(default)s)")
    add("--max-broken", default="0.01", help="unreadable images allowed, a count or a fraction (default %(default)s)")
    add("--cpu", action="store_true", help="do not use a GPU")
    add("--check", action="store_true", help=f"then decode {CHECKED} latents next to their images into OUT/check.png")
    options = parser.parse_args(argv)
    for name in ("image_size", "batch_size", "shard_size", "workers", "variants"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        return encode(options)
    except (ValueError, OSError) as error:
        print(f"train.encode: {error}", file=sys.stderr)
        return 2


def encode(options: argparse.Namespace) -> int:
    """Make the shards of this process, and the index if all are there; returns the exit code."""
    from pipelines.engine.autoencoder import load_vae
    from train.data.broken import parse_max_broken
    from train.data.encoder import DTYPES, Encoder, Settings
    from train.data.latents import INDEX_NAME, read_index
    from train.data.open import open_data

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    data: Any = open_data(
        options.data,
        image_size=options.image_size,
        classes=options.classes,
        augment=options.augment,
        max_broken=parse_max_broken(options.max_broken),
    )
    if data.is_latent:
        raise ValueError(f"{options.data} is already encoded; pass the images")
    vae, sha256 = load_vae(options.vae)
    settings = Settings.of(options, data, vae, sha256)
    if (options.out / INDEX_NAME).is_file() and read_index(options.out)["key"] != settings.key:
        raise ValueError(f"{options.out} holds latents made with other settings; pass another --out, or delete it")
    device = _device(options.cpu)
    vae = vae.to(device)
    if options.precision != "fp32":
        vae = vae.to(DTYPES[options.precision])
    encoder = Encoder(options, data, settings, vae)
    options.out.mkdir(parents=True, exist_ok=True)
    encoder.run(rank, world)
    if encoder.finish(rank) and options.check:
        print(write_check(options.out, data, options.vae, device))
    return 0


def _device(cpu: bool) -> torch.device:
    """This process's GPU, or the CPU."""
    import torch

    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def write_check(folder: Path, data: PictureData | EmojiData, vae_source: str, device: torch.device) -> str:
    """Decode the means of some latents beside the pictures they came from, into `folder`/check.png.

    A scaling factor, a crop or an order that went wrong is seen there at a glance. The latents go through the factors
    that training uses and back.

    Args:
        folder: of the latents.
        data: the pictures.
        vae_source: where the autoencoder is; its weights must be those of the index.
        device: to decode on.

    Returns:
        A line that says where the sheet is and how far pictures and decoded latents are apart.

    Raises:
        ValueError: if the autoencoder is another one.
    """
    import torch

    from pipelines.engine.autoencoder import load_vae
    from pipelines.images import grid, save_png
    from train.data.latents import LatentData, read_index, scale, unscale

    index = read_index(folder)
    latents = LatentData(folder, index["image_size"], flip=index["flip"] or index["variants"] > 1)
    assert latents.vae is not None
    vae = load_vae(vae_source, latents.vae["sha256"])[0].to(device)
    positions = torch.cat([shard.positions for shard in latents.shards])
    chosen = sorted({int(i) for i in torch.linspace(0, len(latents) - 1, CHECKED)})
    rows: list[list[Image.Image]] = []
    distance = 0.0
    for i in chosen:
        original = torch.from_numpy(data.picture(int(positions[i])).copy()) / 127.5 - 1.0
        mean = scale(torch.stack([latents.moments(i, view)[0] for view in range(len(latents.views))]), latents.vae)
        with torch.inference_mode():
            decoded = vae.decode(unscale(mean, latents.vae).to(device)).sample.cpu().clamp(-1, 1)
        distance += float((decoded[0] - original).square().mean()) / len(chosen)
        rows.append([_image(original), *(_image(picture) for picture in decoded)])
    labels = [latents.id2label[int(latents.labels[i])] for i in chosen]
    path = folder / "check.png"
    save_png(grid(rows, row_labels=labels), path, {"vae": vae_source, "image_size": index["image_size"]})
    return f"{path}: {len(chosen)} images and their decoded latents, {distance**0.5:.3f} apart (RMS; white - black = 2)"


def _image(pixels: Tensor) -> Image.Image:
    import torch
    from PIL import Image

    return Image.fromarray(((pixels + 1.0) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


if __name__ == "__main__":
    sys.exit(main())
