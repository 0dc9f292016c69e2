"""Model card of a training run: python -m train.card --run runs/emoji --pipeline attngen/assets/emoji

Every number comes from the run's own files: its configuration, its log and the pictures beside the nearest training picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.checkpoint import write_file, write_json


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.card", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that train.sit wrote")
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the pipeline; the card goes into it")
    parser.add_argument("--commands", nargs="+", required=True, help="the commands that made the run, in order")
    parser.add_argument("--pictures", type=int, default=130, help="pictures drawn to look for copies")
    options = parser.parse_args(argv)
    facts = {**training_facts(options.run), **copying_facts(options.pipeline, options.run, options.pictures)}
    facts["commands"] = options.commands
    write_json(options.pipeline / "training.json", facts)
    write_file(options.pipeline / "README.md", card(facts).encode())
    return 0


def training_facts(run: Path) -> dict[str, Any]:
    """How long, on what, with what loss: from the run's configuration and log."""
    config = json.loads((run / "config.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in log]
    # The seconds count from the start of a process, so they fall where a run was resumed.
    seconds = [record["seconds"] for record in log]
    ends = [now for now, after in zip(seconds, [*seconds[1:], 0.0], strict=True) if after < now]
    hours = sum(ends) / 3600
    window = max(1, min(200, len(log) // 10))
    losses = [record["loss"] for record in log]
    return {
        "config": config,
        "steps": max(steps),
        "images": len(set(steps)) * config["batch_size"],
        "hours": round(hours, 2),
        "loss_first": round(statistics.mean(losses[:window]), 4),
        "loss_last": round(statistics.mean(losses[-window:]), 4),
        "loss_window": window,
    }


def copying_facts(pipeline: Path, run: Path, pictures: int) -> dict[str, Any]:
    """How near the model's pictures are to training pictures, against how near held-out ones are.

    Distances are mean squared errors over pixels in [-1, 1] to the nearest training picture of the same class.
    """
    import torch

    from attngen import SiTPipeline
    from train.emoji import EmojiDataset, to_float

    config = json.loads((run / "config.json").read_text())
    pipe: Any = SiTPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    weights: torch.nn.Module = pipe.transformer
    weights.float()
    train, test = (
        EmojiDataset(split, image_size=config["image_size"], classes=config["classes"] or None)
        for split in ("train", "test")
    )
    labels = [i % train.num_classes for i in range(pictures)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(pictures)]
    drawn = pipe(
        labels, num_inference_steps=25, guidance_scale=config["guidance_scale"], generator=generators, output_type="pt"
    ).images
    nearest = _nearest(drawn * 2 - 1, torch.tensor(labels), train)
    held_out = _nearest(to_float(test.pixel_values), test.labels, train)
    return {
        "parameters": sum(parameter.numel() for parameter in pipe.transformer.parameters()),
        "pictures": pictures,
        "nearest_training_picture": round(nearest.median().item(), 4),
        "nearest_of_held_out": round(held_out.median().item(), 4),
        "near_copies": round((nearest < 0.01).float().mean().item(), 3),
        "held_out_near_copies": round((held_out < 0.01).float().mean().item(), 3),
    }


def _nearest(images: Any, labels: Any, train: Any) -> Any:
    import torch

    from train.emoji import to_float

    known = to_float(train.pixel_values).flatten(1)
    distances = []
    for image, label in zip(images.float().flatten(1), labels, strict=True):
        same_class = known[train.labels == label]
        distances.append((same_class - image).square().mean(dim=1).min())
    return torch.stack(distances)


def card(facts: dict[str, Any]) -> str:
    """The card as Markdown."""
    config = facts["config"]
    classes = ", ".join(config["id2label"].values())
    counts = ", ".join(map(str, config["mediator_counts"]))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    commands = "\n".join(facts["commands"])
    side = config["image_size"]
    return f"""---
license: apache-2.0
library_name: attngen
tags: [diffusers, sit, attention-mediators, emoji]
---

# SiT for emoji, {side} x {side} pixels, elastic mediators

A small diffusion transformer that draws emoji by class. It ships with attngen so that everything can be tried without a
download. It is a demonstration, not a product: the pictures are tiny, and it knows {len(config["id2label"])} classes.

![Samples: a row a class, groups of columns with different numbers of mediators](samples.png)

| | |
|---|---|
| network | SiT in pixel space, {config["num_layers"]} blocks of width {width}, {config["num_attention_heads"]} heads, patches of \
{config["patch_size"]} ({(side // config["patch_size"]) ** 2} tokens), {facts["parameters"] / 1e6:.1f} million weights, half precision |
| attention | mediators; their number was drawn from {counts} in every step, and any number works at sampling |
| classes | {classes} |
| data | the training part of attngen's [emoji](../../../train/data/README.md): Noto Color Emoji on white, without skin tones |
| objective | {config["objective"]} on the {config["path"]} path, {config["time_sampling"]} times, labels dropped with \
probability {config["class_dropout_prob"]:g} |
| optimiser | {config["optimizer"]} ({config["muon_learning_rate"]:g} for the blocks' matrices, {config["learning_rate"]:g} for the rest), \
batches of {config["batch_size"]}, moving average {config["ema_decay"]:g} |
| length | {facts["steps"]:,} steps, {facts["images"]:,} pictures, {facts["hours"]:.1f} hours on one busy CPU core, no GPU |
| loss | {facts["loss_first"]:.3f} over the first {facts["loss_window"]} steps, {facts["loss_last"]:.3f} over the last |

```bash
{commands}
```

## What it can and cannot do

Faces, hearts, clocks, flags, people, fruit, plants, buildings and vehicles are recognised at a glance. Signs are signs without a
meaning, and many flags are of no country. Animals and dishes are the weakest: right in colour and outline, seldom a particular
thing. Guidance of about 2 helps.

With so few training pictures some results are near a known one. Of {facts["pictures"]} pictures drawn, \
{facts["near_copies"]:.0%} are within a mean squared error of 0.01 (pixels in [-1, 1]) of a training picture of their class; \
of the held-out emoji it is {facts["held_out_near_copies"]:.0%}. The median distance is {facts["nearest_training_picture"]:.3f}, \
for held-out emoji {facts["nearest_of_held_out"]:.3f}.

The emoji are Noto Color Emoji, under the SIL Open Font License 1.1 (`LICENSES/OFL-1.1.txt`).
"""


if __name__ == "__main__":
    sys.exit(main())
