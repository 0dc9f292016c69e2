"""Autoencoders of latents, with a hash of their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch


def load_vae(source: str, sha256: str | None = None) -> tuple[Any, str]:
    """An autoencoder in float32, and the hash of its weights.

    Args:
        source: Hub id or folder of an autoencoder of diffusers, such as `AutoencoderKL` or `AutoencoderDC`, or of a
            pipeline with one in its folder `vae`.
        sha256: hash that the weights must have, as in `Data.vae`; None takes any.

    Raises:
        ValueError: if there is none, or it has other weights.
    """
    import diffusers

    folder = Path(source)
    is_pipeline = folder.is_dir() and not (folder / "config.json").is_file() and (folder / "vae").is_dir()
    where = str(folder / "vae") if is_pipeline else source
    try:
        config: Any = diffusers.AutoencoderKL.load_config(where)
        # Of an older folder without the name of its class, the class that all of them had.
        name = config.get("_class_name", "AutoencoderKL")
        vae: Any = getattr(diffusers, name).from_pretrained(where, torch_dtype=torch.float32)
    except (OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"no autoencoder can be loaded from {source!r} ({reason}); expected a Hub id or a folder"
        ) from error
    if not (hasattr(vae, "encode") and hasattr(vae, "decode")):
        raise ValueError(f"{source!r} holds a {type(vae).__name__}, not an autoencoder")
    found = weights_hash(vae)
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"the autoencoder {source} has weights {found[:16]}…, and the latents were made with {sha256[:16]}…"
        )
    return vae.eval().requires_grad_(False), found


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of names, shapes, types and values of all weights; the same for any file format and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b"")
    return digest.hexdigest()
