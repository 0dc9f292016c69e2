"""Training recipes as a table: a preset is a whole configuration, and the command line can override every field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a training run. Saved beside it as JSON.

    Attributes:
        image_size: side of the pictures, in pixels.
        classes: class names of the emoji data set, or () for all.
        augment: strength of the augmentation, 0 to 1.
        balance: 0 draws every picture equally often, 1 every class, 0.5 is between (a class by the root of its size).
        patch_size: side of a token, in pixels.
        num_layers: blocks.
        num_attention_heads: heads.
        attention_head_dim: size of a head.
        attention: "softmax", "mediator" or "linear".
        num_mediators: mediators the bias tables are stored for.
        mediator_counts: counts drawn from in every step (elastic mediators), or () for `num_mediators` always.
        class_dropout_prob: share of labels replaced by the null class, for guidance.
        path: interpolant, "linear", "gvp" or "vp".
        prediction_type: "velocity", "epsilon" or "score".
        time_sampling: "uniform", or "logit-normal" (middle times more often; SD3, arXiv 2403.03206).
        optimizer: "adamw", or "muon" (Muon for the blocks' matrices, AdamW for the rest).
        learning_rate: of AdamW.
        muon_learning_rate: of Muon.
        weight_decay: of both.
        warmup_steps: steps in which the learning rate rises from zero.
        cooldown: last share of the steps, in which it falls to zero.
        max_grad_norm: gradients are scaled down to this norm.
        ema_decay: of the averaged weights that are sampled and saved.
        batch_size: pictures a step, over all processes.
        steps: optimiser steps.
        seed: of weights, data order, noise and label dropout.
        sample_every: steps between sample grids; 0 for none before the end.
        save_every: steps between checkpoints; 0 for none before the end.
        keep: checkpoints kept.
        sample_steps: network calls for a sample.
        guidance_scale: of the samples.
    """

    image_size: int = 32
    classes: tuple[str, ...] = ()
    augment: float = 0.5
    balance: float = 0.0
    patch_size: int = 4
    num_layers: int = 8
    num_attention_heads: int = 5
    attention_head_dim: int = 32
    attention: str = "mediator"
    num_mediators: int = 16
    mediator_counts: tuple[int, ...] = (4, 9, 16, 25)
    class_dropout_prob: float = 0.1
    path: str = "linear"
    prediction_type: str = "velocity"
    time_sampling: str = "logit-normal"
    optimizer: str = "muon"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02
    weight_decay: float = 0.0
    warmup_steps: int = 100
    cooldown: float = 0.3
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    batch_size: int = 64
    steps: int = 5000
    seed: int = 0
    sample_every: int = 1000
    save_every: int = 500
    keep: int = 2
    sample_steps: int = 50
    guidance_scale: float = 2.0

    def __post_init__(self) -> None:
        choices = {
            "attention": ("softmax", "mediator", "linear"),
            "path": ("linear", "gvp", "vp"),
            "prediction_type": ("velocity", "epsilon", "score"),
            "time_sampling": ("uniform", "logit-normal"),
            "optimizer": ("adamw", "muon"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("batch_size", "steps", "keep", "sample_steps", "num_layers", "patch_size", "num_mediators"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("augment", "balance", "class_dropout_prob", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not divide pictures of {self.image_size} pixels")
        side = self.image_size // self.patch_size
        for count in self.mediator_counts:
            if not 1 <= count <= side * side:
                raise ValueError(f"mediator_counts must be 1 to {side * side} (the tokens), got {count}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Classes whose pictures look alike enough for a small network.
_COHERENT = (
    *("face", "heart", "person", "animal", "plant", "fruit", "dish"),
    *("vehicle", "building", "sky", "clock", "sign", "flag"),
)

PRESETS: Mapping[str, TrainingConfig] = {
    # The shipped model: about two hours on one CPU core.
    "emoji": TrainingConfig(classes=_COHERENT),
    # Seconds: shows that everything works.
    "emoji-tiny": TrainingConfig(
        image_size=16,
        classes=("face", "heart"),
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_mediators=4,
        mediator_counts=(1, 4),
        batch_size=8,
        steps=20,
        warmup_steps=2,
        sample_every=0,
        save_every=10,
        sample_steps=4,
    ),
    # For one GPU: 64 x 64 pixels, all classes, 256 tokens, 12 million weights.
    "emoji-64": TrainingConfig(
        image_size=64,
        num_layers=12,
        num_attention_heads=7,
        attention_head_dim=32,
        num_mediators=64,
        mediator_counts=(4, 16, 64),
        batch_size=256,
        steps=40000,
        warmup_steps=500,
        ema_decay=0.9995,
        sample_every=5000,
        save_every=5000,
    ),
}
