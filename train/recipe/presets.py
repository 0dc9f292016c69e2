"""Training recipes as a table: a preset is a whole configuration, and the command line can override every field."""

from __future__ import annotations

from collections.abc import Mapping

from train.recipe.config import TrainingConfig

# Classes whose pictures look alike enough for a small network.
_COHERENT = (
    *("face", "heart", "person", "animal", "plant", "fruit", "dish"),
    *("vehicle", "building", "sky", "clock", "sign", "flag"),
)

_EMOJI: dict[str, TrainingConfig] = {
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
    # The shipped UNet, with attention at 32 x 32 and 16 x 16.
    "emoji-unet": TrainingConfig(
        classes=("face", "heart", "clock", "flag"),
        augment=0.3,
        balance=0.5,
        architecture="unet",
        block_channels=(32, 64, 96),
        patch_size=1,
        num_layers=1,
        attention="softmax",
        mediator_counts=(),
        learning_rate=2e-3,
        warmup_steps=50,
        cooldown=0.3,
        ema_decay=0.995,
        batch_size=16,
        steps=1200,
        sample_every=300,
        save_every=100,
        sample_steps=25,
        log_every=10,
    ),
    # What `benchmarks.studies.experiment` compares kinds of attention with: 256 tokens, minutes on one CPU core.
    "emoji-experiment": TrainingConfig(
        classes=("face", "heart", "clock", "flag"),
        augment=0.3,
        balance=0.5,
        patch_size=2,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=32,
        attention="softmax",
        mediator_counts=(),
        warmup_steps=20,
        ema_decay=0.98,
        batch_size=16,
        steps=200,
        sample_every=0,
        save_every=50,
        sample_steps=4,
        guidance_scale=1.0,
        log_every=5,
        fd_pictures=1024,
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
        mixed_precision="bf16",
        compile=True,
        log_every=20,
    ),
}

# Depth, heads and head size (table 1 of arXiv 2212.09748).
_SIZES = {"s": (12, 6, 64), "b": (12, 12, 64), "l": (24, 16, 64), "xl": (28, 16, 72)}
# 80 epochs of ImageNet at 256 pixels, 20 at 512 and 5 at 1024 (arXiv 2408.05710): 400,000 steps of each.
_MEDIATOR_BATCH = {256: 256, 512: 64, 1024: 16}


def _published(model: str, size: str, patch_size: int, image_size: int, mediators: bool) -> TrainingConfig:
    """The recipe of the papers (2212.09748, 2401.08740, 2408.05710): AdamW at 1e-4, batch 256, 400,000 steps.

    The last of them goes on at 512 and 1024 pixels from the weights of half the size (`init_from`), in as many steps of
    smaller batches. Latents of an autoencoder that makes pictures eight times smaller; `data` has to be given.
    """
    num_layers, heads, head_dim = _SIZES[size]
    return TrainingConfig(
        data="",
        image_size=image_size,
        augment=0.0,
        patch_size=patch_size,
        num_layers=num_layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        attention="mediator" if mediators else "softmax",
        num_mediators=min(64, (image_size // 8 // patch_size) ** 2),
        mediator_counts=(),
        learn_sigma=True,
        objective="dit" if model == "dit" else "velocity",
        time_sampling="uniform",
        optimizer="adamw",
        learning_rate=1e-4,
        warmup_steps=0,
        cooldown=0.0,
        max_grad_norm=0.0,
        ema_decay=0.9999,
        batch_size=_MEDIATOR_BATCH[image_size] if mediators else 256,
        steps=400_000,
        workers=4,
        log_every=100,
        sample_every=25_000,
        save_every=10_000,
        guidance_scale=4.0,
    )


def _all_published() -> dict[str, TrainingConfig]:
    """ "sit-xl2-256", "dit-b4-512", "sit-s2-256-mediators", …"""
    presets = {}
    for model in ("sit", "dit"):
        for size in _SIZES:
            for patch_size in (2, 4, 8):
                for image_size in (256, 512, 1024):
                    for mediators in (False, True):
                        name = f"{model}-{size}{patch_size}-{image_size}{'-mediators' if mediators else ''}"
                        presets[name] = _published(model, size, patch_size, image_size, mediators)
    return presets


PRESETS: Mapping[str, TrainingConfig] = {**_EMOJI, **_all_published()}
