"""Training of the feature extractor of FD-emoji: the network with its normalisation, its pictures, and its card."""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.cli.seeds import generator_for, sample_order
from train.emoji.dataset import CLASSES, DATA_FILE, EmojiDataset, augment
from train.emoji.features import (
    INPUT_SIZE,
    LAYERS,
    NAME,
    NUM_FEATURES,
    FeatureExtractor,
    card_path,
    load_extractor,
    prepare,
)
from train.loop.checkpoint import write_json, write_tensors

LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.1  # of the steps
LABEL_SMOOTHING = 0.1
DROPOUT = 0.2
# A class's pictures are drawn more often, the fewer they are: by its size to this power.
BALANCE = -0.5
# Small pictures are learnt as the data set resamples them and as the extractor reduces larger ones.
SIZES = (INPUT_SIZE, 64)


class TrainingNetwork(nn.Module):
    """The extractor with what only training needs: normalisation over the batch, and a classifier."""

    def __init__(self, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        # On no device, layers draw no weights from the global generator.
        with torch.device("meta"):
            self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, s, padding=1, bias=False) for i, o, s in LAYERS)
            self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in LAYERS)
            self.head = nn.Linear(NUM_FEATURES, num_classes)
        self.to_empty(device="cpu")
        for conv, norm in zip(self.convs, self.norms, strict=True):
            nn.init.kaiming_normal_(_weight(conv), nonlinearity="relu", generator=generator)
            norm.reset_parameters()  # pyright: ignore[reportCallIssue]
        nn.init.normal_(self.head.weight, std=NUM_FEATURES**-0.5, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, pictures: Tensor, kept: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            pictures: (B, 3, 32, 32).
            kept: (B, 128), factors on the features.

        Returns:
            (B, classes).
        """
        x = pictures.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        x = x.mean(dim=(2, 3))
        return self.head(x if kept is None else x * kept)

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The weights of the extractor: each normalisation is a part of its convolution."""
        tensors: dict[str, Tensor] = {}
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None and norm.running_mean is not None
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            tensors[f"convs.{i}.weight"] = _weight(conv) * factor[:, None, None, None]
            tensors[f"convs.{i}.bias"] = norm.bias - norm.running_mean * factor
        return tensors | {"head.weight": self.head.weight, "head.bias": self.head.bias}


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    return module.weight


def make_extractor(options: argparse.Namespace) -> dict[str, Any]:
    """Train, write the weights and the card; returns the card."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    start, processor = time.monotonic(), time.process_time()
    network = train(options.steps, options.batch_size, options.seed)
    tensors = {key: tensor.half() for key, tensor in network.folded().items()}
    write_tensors(options.out, tensors)
    content = options.out.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    extractor = FeatureExtractor(tensors, NAME, sha256)
    parts = {split: accuracy(extractor, split) for split in ("train", "test")}
    card = {
        "name": NAME,
        "sha256": sha256,
        "bytes": len(content),
        "weights": sum(tensor.numel() for tensor in tensors.values()),
        "dtype": "float16",
        "features": NUM_FEATURES,
        "input": f"square images of 16 to 128 pixels a side, reduced to {INPUT_SIZE}",
        "classes": list(CLASSES),
        "data": {"file": DATA_FILE.name, "sha256": hashlib.sha256(DATA_FILE.read_bytes()).hexdigest()},
        "pictures": {"train": parts["train"][1], "held_out": parts["test"][1]},
        "accuracy": {"train": parts["train"][0], "held_out": parts["test"][0]},
        "training": {
            "steps": options.steps,
            "batch_size": options.batch_size,
            "seed": options.seed,
            "threads": options.threads,
            "seconds": round(time.monotonic() - start, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()},
        "licence": "Apache-2.0; the images it has learnt from are under OFL-1.1",
    }
    write_json(card_path(options.out), card)
    load_extractor(options.out)
    return card


def train(steps: int, batch_size: int, seed: int) -> TrainingNetwork:
    """The trained network, in evaluation mode; a function of its arguments."""
    from tqdm import tqdm

    data, pictures = training_pictures()
    weights = torch.bincount(data.labels).double().pow(BALANCE)[data.labels]
    network = TrainingNetwork(data.num_classes, generator_for(seed, "features"))
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    order = sample_order(seed, weights, 0, steps * batch_size).split(batch_size)
    bar = tqdm(order, desc="training features", disable=None)
    for step, indices in enumerate(bar):
        generator = generator_for(seed, "features", step)
        size = torch.randint(len(SIZES), indices.shape, generator=generator)
        kept = (torch.rand(len(indices), NUM_FEATURES, generator=generator) >= DROPOUT) / (1.0 - DROPOUT)
        batch = augment(pictures[size, indices], data.labels[indices], generator, data.classes)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(step / steps)
        loss = F.cross_entropy(network(batch, kept), data.labels[indices], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return network.eval()


@lru_cache(maxsize=1)
def training_pictures() -> tuple[EmojiDataset, Tensor]:
    """The training part, and its pictures as each of `SIZES` leaves them, float32 (sizes, N, 3, 32, 32); shared."""
    parts = [EmojiDataset("train", size) for size in SIZES]
    return parts[0], torch.stack([prepare(part.pixel_values).float() for part in parts])


def rate(progress: float) -> float:
    """Share of the learning rate: up in a line, down in half a cosine."""
    if progress < WARMUP:
        return (progress + 1e-3) / (WARMUP + 1e-3)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1.0 - WARMUP))


def accuracy(extractor: FeatureExtractor, split: str) -> tuple[float, int]:
    """Share of a part of the emoji whose class the extractor's classifier finds, and the number of emoji."""
    data = EmojiDataset(split, INPUT_SIZE)
    found = extractor.logits(extractor(data.pixel_values)).argmax(dim=1)
    return round((found == data.labels).double().mean().item(), 4), len(data)
