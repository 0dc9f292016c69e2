"""The configuration of `python -m train.vae`; it imports no torch, for which --help would have to wait."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

FACTOR = 8
"""Pixels a side of a latent pixel."""


@dataclass(frozen=True)
class VaeConfig:
    """Everything that decides a training run of an autoencoder. Saved beside it as JSON.

    Attributes:
        data: emoji file made by `train.emoji.build`, or images, as for `train.sit`.
        image_size: side of the images, in pixels.
        latent_channels: channels of the latents, whose side is an eighth of the image's.
        channels: of the network at 1/2, 1/4 and 1/8 of the image's side.
        layers: residual blocks at the same three sizes, in the encoder and in the decoder.
        crop_size: side of the random crops, in pixels.
        crop_share: share of the run, from its beginning, that trains on crops; the rest trains on whole images.
        latent_noise: standard deviation of the noise on the latents that the decoder is trained with.
        batch_size: images a step.
        steps: optimiser steps, or 0 for a run of `minutes`.
        minutes: of a run whose schedule follows the time; 0 for one of `steps`. Only `steps` make equal runs.
        learning_rate: of AdamW, for biases and norms.
        muon_learning_rate: of Muon, for the kernels.
        constant_share: share of the run before the learning rate falls to zero, along a cosine.
        ema_decay: of the averaged weights that are measured and exported.
        mixed_precision: "bf16" or "no".
        seed: of weights, order, crops and noise.
        log_every: steps between lines of the log.
        eval_every: steps between measurements on held-out images.
        eval_images: held-out images measured before the end; at the end all are.
        save_every: steps between checkpoints.
        keep: checkpoints kept.
    """

    data: str = "emoji"
    image_size: int = 128
    latent_channels: int = 8
    channels: tuple[int, ...] = (32, 64, 128)
    layers: tuple[int, ...] = (1, 2, 2)
    crop_size: int = 64
    crop_share: float = 0.85
    latent_noise: float = 0.2
    batch_size: int = 8
    steps: int = 10_000
    minutes: float = 0.0
    learning_rate: float = 2e-3
    muon_learning_rate: float = 0.02
    constant_share: float = 0.3
    ema_decay: float = 0.998
    mixed_precision: str = "bf16"
    seed: int = 0
    log_every: int = 50
    eval_every: int = 1000
    eval_images: int = 64
    save_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("image_size", "crop_size"):
            if getattr(self, name) < FACTOR or getattr(self, name) % FACTOR:
                raise ValueError(f"{name} must be a positive multiple of {FACTOR}, got {getattr(self, name)}")
        if self.crop_size > self.image_size:
            raise ValueError(f"crop_size {self.crop_size} is larger than image_size {self.image_size}; make it smaller")
        for name in ("latent_channels", "batch_size", "log_every", "eval_every", "eval_images", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.channels) != 3 or len(self.layers) != 3 or min(self.layers) < 1:
            raise ValueError(
                f"channels and layers need three numbers of at least 1, got {self.channels}, {self.layers}"
            )
        for channels in self.channels:
            if channels < 4 or channels % 4:
                raise ValueError(f"channels must be multiples of 4, got {channels}")
        if any(4 * a % b or 4 * b % a for a, b in zip(self.channels, self.channels[1:], strict=False)):
            raise ValueError(f"each of channels must divide four times its neighbours, got {self.channels}")
        if self.channels[-1] % self.latent_channels:
            raise ValueError(
                f"latent_channels must divide the last of channels ({self.channels[-1]}), got {self.latent_channels}"
            )
        for name in ("crop_share", "constant_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("latent_noise", "learning_rate", "muon_learning_rate", "minutes", "steps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if (self.steps > 0) == (self.minutes > 0):
            raise ValueError(f"give steps or minutes, not both or none, got {self.steps} steps, {self.minutes} minutes")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, where it would not move, got {self.ema_decay}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision must be 'no' or 'bf16', got {self.mixed_precision!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done, in [0, 1], after `step` steps and `seconds` of training."""
        return min(1.0, step / self.steps if self.steps else seconds / (60 * self.minutes))

    def rate_factor(self, progress: float) -> float:
        """Factor on the learning rates: 1, then half a cosine to 0."""
        falling = (progress - self.constant_share) / max(1e-9, 1 - self.constant_share)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, falling))))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
