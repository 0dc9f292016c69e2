"""Normalisation of a VAE's latents: what a network is trained on, from what the VAE encodes to, and back.

diffusers' VAEs name it in their configuration: one `scaling_factor` and `shift_factor` for all channels (SD, FLUX), or
`latents_mean` and `latents_std` for each (Wan, Qwen-Image); LTX also multiplies by a `scaling_factor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def normalize_latents(latents: Tensor, config: Any) -> Tensor:
    """(z - mean - shift) * scale / std: latents (B, C, h, w) of a VAE, as a network is trained on them.

    Args:
        latents: (B, C, h, w), encoded.
        config: of the VAE, a mapping or an object; entries that are missing or None normalise nothing.

    Raises:
        ValueError: for statistics that do not fit the channels, or a deviation or factor that is not above zero.
    """
    latents = latents - (_entry(config, "shift_factor") or 0.0)
    mean, std = _statistics(latents, config)
    if mean is not None:
        latents = latents - mean
    return latents * _factor(config) if std is None else latents * (_factor(config) / std)


def denormalize_latents(latents: Tensor, config: Any) -> Tensor:
    """The inverse of `normalize_latents`: latents (B, C, h, w) of a network, as the VAE decodes them.

    Args:
        latents: (B, C, h, w), sampled.
        config: of the VAE, as in `normalize_latents`.

    Raises:
        ValueError: as `normalize_latents`.
    """
    mean, std = _statistics(latents, config)
    latents = latents / _factor(config) if std is None else latents * (std / _factor(config))
    if mean is not None:
        latents = latents + mean
    return latents + (_entry(config, "shift_factor") or 0.0)


def check_normalization(config: Any, channels: int) -> None:
    """Raise ValueError if the normalisation in a VAE's configuration does not fit latents of `channels` channels."""
    _factor(config)
    _statistics(torch.empty(1, channels, 1, 1), config)


def encode_moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of images, not normalised; a plain autoencoder has deviation 0.

    Args:
        vae: of diffusers; `encode` returns a `latent_dist`, or a `latent` as `AutoencoderDC` does.
        pixels: (B, 3, H, W) in [-1, 1], on the device and in the dtype of the VAE.

    Returns:
        Two tensors (B, C, h, w) in float32.
    """
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent"):
        latents = encoded.latent.float()
        return latents, torch.zeros_like(latents)
    posterior = encoded.latent_dist
    return posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()


def _entry(config: Any, name: str) -> Any:
    """An entry of a mapping or of an object's attributes, None where there is none."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _factor(config: Any) -> float:
    factor = _entry(config, "scaling_factor")
    if factor is None:
        return 1.0
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"scaling_factor of the vae is {factor}; it must be a number above zero")
    return factor


def _statistics(latents: Tensor, config: Any) -> tuple[Tensor | None, Tensor | None]:
    """Mean and deviation of the channels, each (1, C, 1, 1) or None, like `latents` in device and at least float32."""
    found: list[Tensor | None] = []
    for name in ("latents_mean", "latents_std"):
        values: Sequence[float] | None = _entry(config, name)
        if values is not None and len(values) != latents.shape[1]:
            raise ValueError(
                f"{name} of the vae has {len(values)} values; the latents have {latents.shape[1]} channels"
            )
        dtype = torch.promote_types(torch.float32, latents.dtype)
        found.append(None if values is None else torch.tensor(values, dtype=dtype, device=latents.device))
    mean, std = (None if x is None else x.view(1, -1, 1, 1) for x in found)
    if std is not None and not bool((std > 0).all()):
        raise ValueError(f"latents_std of the vae is {_entry(config, 'latents_std')}; every value must be above zero")
    return mean, std
