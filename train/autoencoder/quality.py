"""How well an autoencoder reconstructs images: PSNR, error on white, shift of colours; and a sheet to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.emoji.dataset import to_float

SHOWN = 32
"""Images of a sheet, in rows of 8, each above its reconstruction."""
COLUMNS = 8


@torch.no_grad()
def reconstruct(vae: Any, images: Tensor, batch_size: int = 16) -> Tensor:
    """What an autoencoder makes of images.

    Args:
        vae: an autoencoder of diffusers whose `encode` returns latents, without randomness.
        images: (N, 3, H, W), uint8.
        batch_size: images worked on together.

    Returns:
        (N, 3, H, W), uint8.
    """
    parts = []
    for part in images.split(batch_size):
        latents = vae.encode(to_float(part).to(vae.device, vae.dtype), return_dict=False)[0]
        decoded = vae.decode(latents, return_dict=False)[0].float().cpu()
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """(N,) peak signal-to-noise ratio of each image, in dB; of equal ones that of an error of half a level.

    Args:
        decoded: (N, 3, H, W), uint8.
        images: (N, 3, H, W), uint8.
    """
    error = (decoded.double() - images.double()).square().flatten(1).mean(dim=1).clamp(min=0.25)
    return 10 * torch.log10(255.0**2 / error)


def measure(decoded: Tensor, images: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Numbers on reconstructions.

    Args:
        decoded: (N, 3, H, W), uint8.
        images: (N, 3, H, W), uint8: the originals.
        names: of the images.

    Returns:
        `images`; `psnr`, its mean over images in dB; `psnr_worst_tenth`, which a tenth of them does not reach;
        `psnr_worst` and `worst`, the last image; `white_error`, the mean absolute error where all channels of the
        original are 255, in levels, or None without such a pixel; `colour_shift`, the mean over images and channels
        of the absolute value of the mean shift, in levels; `shift_rgb`, the mean shift of each channel.
    """
    found = psnr(decoded, images)
    difference = decoded.float() - images.float()
    white = (images == 255).all(dim=1, keepdim=True).expand_as(images)
    shift = difference.mean(dim=(2, 3))
    return {
        "images": len(images),
        "psnr": round(float(found.mean()), 3),
        "psnr_worst_tenth": round(float(found.quantile(0.1)), 3),
        "psnr_worst": round(float(found.min()), 3),
        "worst": names[int(found.argmin())],
        "white_error": round(float(difference[white].abs().mean()), 4) if white.any() else None,
        "colour_shift": round(float(shift.abs().mean()), 4),
        "shift_rgb": [round(x, 4) for x in shift.mean(dim=0).tolist()],
    }


def write_sheet(decoded: Tensor, images: Tensor, path: Path, settings: dict[str, Any]) -> None:
    """Images evenly chosen, in rows, each row above that of its reconstructions, as a PNG that holds `settings`.

    Args:
        decoded: (N, 3, H, W), uint8.
        images: (N, 3, H, W), uint8: the originals.
        path: of the file.
        settings: to keep in the file.
    """
    from PIL import Image

    from pipelines.images import grid, save_png

    count = min(SHOWN, len(images))
    chosen = torch.linspace(0, len(images) - 1, count).long().tolist()
    rows: list[list[Image.Image]] = []
    for start in range(0, count, COLUMNS):
        for rendered in (images, decoded):
            picked = [rendered[i].permute(1, 2, 0).contiguous().numpy() for i in chosen[start : start + COLUMNS]]
            rows.append([Image.fromarray(pixels) for pixels in picked])
    save_png(grid(rows), path, settings)
