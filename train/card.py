"""Model card of a training run: python -m train.card --run runs/emoji --pipeline attngen/assets/emoji

Every number comes from the run's own files: its configuration, its log and the pictures beside the nearest training picture.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import cli


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("train.card", (__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that train.sit wrote")
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the pipeline; the card goes into it")
    parser.add_argument("--commands", nargs="+", required=True, help="the commands of the run, in order")
    parser.add_argument(
        "--pictures", type=int, default=130, help="images drawn to search for copies of training images"
    )
    options = parser.parse_args(argv)

    from attngen.files import write_file  # after --help has been answered
    from train.checkpoint import write_json

    facts = {**training_facts(options.run), **copying_facts(options.pipeline, options.run, options.pictures)}
    facts["commands"] = options.commands
    write_json(options.pipeline / "training.json", facts)
    write_file(options.pipeline / "README.md", card(facts).encode())
    return 0


def training_facts(run: Path) -> dict[str, Any]:
    """How long, on what, with what loss: from the run's configuration and log."""
    config = json.loads((run / "config.json").read_text())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [record for record in lines if "loss" in record]
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
        "images": max(steps) * config["batch_size"],
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

    from attngen import SiTPipeline, UNetClassPipeline
    from train.emoji import EmojiDataset, to_float

    config = json.loads((run / "config.json").read_text())
    is_unet = config.get("architecture") == "unet"
    pipe: Any = (UNetClassPipeline if is_unet else SiTPipeline).from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    weights: torch.nn.Module = pipe.unet if is_unet else pipe.transformer
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
        "parameters": sum(parameter.numel() for parameter in weights.parameters()),
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
    described = _unet(facts) if config.get("architecture") == "unet" else _sit(facts)
    commands = "\n".join(facts["commands"])
    side = config["image_size"]
    return f"""---
license: apache-2.0
library_name: attngen
tags: {described["tags"]}
---

# {described["title"]}, {side} x {side} pixels{described["subtitle"]}

A small {described["kind"]} that draws emoji by class. It ships with attngen so that {described["purpose"]} can be tried without a
download. It is a demonstration, not a product: the pictures are tiny, and it knows {len(config["id2label"])} classes.

![{described["sheet"]}](samples.png)

| | |
|---|---|
| network | {described["network"]}, {facts["parameters"] / 1e6:.1f} million weights, half precision |
| attention | {described["attention"]} |
| classes | {", ".join(config["id2label"].values())} |
| data | the training part of attngen's [emoji](../../../train/data/README.md): Noto Color Emoji on white, without skin tones |
| objective | {config["objective"]} on the {config["path"]} path, {config["time_sampling"]} times, labels dropped with \
probability {config["class_dropout_prob"]:g} |
| optimiser | {config["optimizer"]} ({config["muon_learning_rate"]:g} for the {described["matrices"]}, {config["learning_rate"]:g} for the rest), \
batches of {config["batch_size"]}, moving average {config["ema_decay"]:g} |
| length | {facts["steps"]:,} steps, {facts["images"]:,} pictures, {facts["hours"]:.1f} hours on one busy CPU core, no GPU |
| loss | {facts["loss_first"]:.3f} over the first {described["logged"]}, {facts["loss_last"]:.3f} over the last |

```bash
{commands}
```

## What it can and cannot do

{described["can"]}

With so few training pictures some results are near a known one. Of {facts["pictures"]} pictures drawn, \
{facts["near_copies"]:.0%} are within a mean squared error of 0.01 (pixels in [-1, 1]) of a training picture of their class; \
of the held-out emoji it is {facts["held_out_near_copies"]:.0%}. The median distance is {facts["nearest_training_picture"]:.3f}, \
for held-out emoji {facts["nearest_of_held_out"]:.3f}.

The emoji are Noto Color Emoji, under the SIL Open Font License 1.1 (`LICENSES/OFL-1.1.txt`).
"""


def _sit(facts: dict[str, Any]) -> dict[str, str]:
    """What the card says of a SiT alone."""
    config = facts["config"]
    counts = ", ".join(map(str, config["mediator_counts"]))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = (config["image_size"] // config["patch_size"]) ** 2
    return {
        "tags": "[diffusers, sit, attention-mediators, emoji]",
        "title": "SiT for emoji",
        "subtitle": ", elastic mediators",
        "kind": "diffusion transformer",
        "purpose": "everything",
        "sheet": "Samples: a row a class, groups of columns with different numbers of mediators",
        "network": f"SiT in pixel space, {config['num_layers']} blocks of width {width}, {config['num_attention_heads']} "
        f"heads, patches of {config['patch_size']} ({tokens} tokens)",
        "attention": f"mediators; their number was drawn from {counts} in every step, and any number works at sampling",
        "matrices": "blocks' matrices",
        "logged": f"{facts['loss_window']} steps",
        "can": """\
Faces, hearts, clocks, flags, people, fruit, plants, buildings and vehicles are recognised at a glance. Signs are signs without a
meaning, and many flags are of no country. Animals and dishes are the weakest: right in colour and outline, seldom a particular
thing. Guidance of about 2 helps.""",
    }


def _unet(facts: dict[str, Any]) -> dict[str, str]:
    """What the card says of a UNet alone."""
    config = facts["config"]
    channels, side = config["block_channels"], config["image_size"]
    levels = " and ".join(f"{side >> i} x {side >> i}" for i in range(len(channels) - 1))
    return {
        "tags": "[diffusers, unet, emoji]",
        "title": "UNet for emoji",
        "subtitle": "",
        "kind": "UNet, diffusers' `UNet2DConditionModel`,",
        "purpose": "changes of attention without training",
        "sheet": "Samples: a row a class",
        "network": f"UNet in pixel space, {', '.join(map(str, channels))} channels, heads of {config['attention_head_dim']}",
        "attention": f"softmax, to itself and to the class, at {levels} pixels and in the middle",
        "matrices": "attention blocks' matrices",
        "logged": f"{facts['loss_window']} lines of the log",
        "can": """\
It was trained for about an hour on a shared core, so that attention can be swapped in a network that draws: faces are round and
yellow with marks for eyes and mouth, hearts are hearts, clocks are discs, flags are waving and of no country. Fine detail is
missing. Guidance of about 2 helps.

```python
pipe = attngen.UNetClassPipeline.from_pretrained("attngen/assets/emoji_unet", dtype=torch.float32)
with attngen.apply(pipe, attngen.AgentAttention(num_agents=64)) as handle:
    pipe(["heart", "clock"], guidance_scale=2.0).images
```""",
    }


if __name__ == "__main__":
    sys.exit(main())
