"""Tiny models and references for a dry run of `benchmarks.protocols`: everything real but the weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import attngen

SIDE, PICTURES, STEPS = 64, 12, 3
UNET: dict[str, Any] = {
    "sample_size": SIDE // 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VAE: dict[str, Any] = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
CLASSES = ("heron", "lighthouse", "teapot")


def make_tiny(options: argparse.Namespace, folder: Path) -> None:
    """Fill the options with tiny models, made in the folder where they are not there yet.

    Args:
        options: of `benchmarks.protocols`; what was given stays.
        folder: where to.
    """
    options.pictures, options.steps = options.pictures or PICTURES, options.steps or STEPS
    if options.protocol == "mediators":
        shipped = Path(attngen.__file__).parent / "assets" / "emoji"
        options.model, options.reference = options.model or str(shipped), options.reference or "emoji"
        options.measured = ("--extractor", "emoji", "--metrics", "fid", "is", "pr", "--no-cache")
        return
    folder.mkdir(parents=True, exist_ok=True)
    options.model = options.model or str(_stable_diffusion(folder / "model"))
    options.reference = options.reference or str(_reference(folder / "reference"))
    if not options.class_names:
        options.class_names = folder / "classes.txt"
        options.class_names.write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    if options.protocol == "linfusion" and not options.layers:
        options.layers = _layers(Path(options.model), folder / "layers.safetensors")
    options.drawn = ("--height", str(SIDE), "--width", str(SIDE))
    options.measured = ("--extractor", "emoji", "--metrics", "fid", "kid", "--image-size", str(SIDE), "--no-cache")


def _stable_diffusion(folder: Path) -> Path:
    """Stable Diffusion with random weights and a vocabulary of letters."""
    import diffusers
    import torch
    import transformers

    if (folder / "model_index.json").exists():
        return folder
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    text = transformers.CLIPTextConfig(vocab_size=len(words), **TEXT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel(**UNET),
            "vae": diffusers.AutoencoderKL(**VAE),
            "text_encoder": transformers.CLIPTextModel(text),
        }
    others: dict[str, Any] = {
        "tokenizer": transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True),
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipe = diffusers.StableDiffusionPipeline(**networks, **others, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


def _reference(folder: Path) -> Path:
    """Images of noise."""
    import numpy as np
    from PIL import Image

    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(2 * PICTURES):
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{index:04d}.png")
    return folder


def _layers(model: Path, path: Path) -> Path:
    """Untrained linear layers for the model, as `train.distill` writes trained ones."""
    import diffusers

    from attngen import LearnedLayers, LearnedLinear

    if not path.exists():
        unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet")
        LearnedLayers.create(unet, LearnedLinear()).save(path)
    return path
