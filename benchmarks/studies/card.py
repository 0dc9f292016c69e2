"""Model card of a training run: python -m benchmarks.studies.card --run runs/emoji

Every line comes from the run's own files: configuration, starts and log, the weights, and for the emoji the images drawn
beside the nearest training image. What the images look like is for a person to write.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import cli
from train.loop.record import STARTS


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = cli.Parser("benchmarks.studies.card", (__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that train.sit wrote")
    parser.add_argument("--pipeline", type=Path, help="folder of the pipeline, for the card (default: RUN/pipeline)")
    parser.add_argument("--pictures", type=int, default=130, help="emoji drawn to search for copies of training images")
    options = parser.parse_args(argv)
    options.pipeline = options.pipeline or options.run / "pipeline"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse_arguments(argv)
    return cli.run("benchmarks.studies.card", lambda: write_card(options.run, options.pipeline, options.pictures))


def write_card(run: Path, pipeline: Path, pictures: int) -> None:
    """Write README.md and training.json into the folder of a pipeline.

    Raises:
        UserError: if the run or the pipeline cannot be read.
    """
    from attngen.files import write_file
    from train.loop.checkpoint import write_json

    try:
        facts = {**training_facts(run), **pipeline_facts(pipeline)}
        if facts["config"]["data"] == "emoji":
            facts |= copying_facts(pipeline, run, pictures)
    except (OSError, ValueError, KeyError) as error:
        raise cli.UserError(f"no card can be made of {run} and {pipeline}: {error}") from error
    write_json(pipeline / "training.json", facts)
    write_file(pipeline / "README.md", card(facts).encode())


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
        **_starts(run),
    }


def _starts(run: Path) -> dict[str, Any]:
    """The commands of a run, in order, and the machine, as far as it noted them."""
    file = run / STARTS
    starts = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    machines = dict.fromkeys(f"{start['processes']} x {start['device']}" for start in starts)
    return {
        "commands": [f"{start['command']}    # from step {start['step']}" for start in starts],
        "machine": f" on {', then '.join(machines)}" if machines else "",
    }


def pipeline_facts(pipeline: Path) -> dict[str, Any]:
    """Number of weights of the network, and the class of the autoencoder if there is one: from the pipeline's files."""
    from safetensors import safe_open

    index = json.loads((pipeline / "model_index.json").read_text())
    part = "unet" if "unet" in index else "transformer"
    weights = 0
    for file in sorted((pipeline / part).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            weights += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())
    return {"parameters": weights, "vae": (index.get("vae") or [None, None])[1]}


def copying_facts(pipeline: Path, run: Path, pictures: int) -> dict[str, Any]:
    """How near the model's pictures are to training pictures, against how near held-out ones are.

    Distances are mean squared errors over pixels in [-1, 1] to the nearest training picture of the same class.
    """
    import torch

    from attngen import SiTPipeline, UNetClassPipeline
    from train.emoji.dataset import EmojiDataset, to_float

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
        "pictures": pictures,
        "nearest_training_picture": round(nearest.median().item(), 4),
        "nearest_of_held_out": round(held_out.median().item(), 4),
        "near_copies": round((nearest < 0.01).float().mean().item(), 3),
        "held_out_near_copies": round((held_out < 0.01).float().mean().item(), 3),
    }


def _nearest(images: Any, labels: Any, train: Any) -> Any:
    import torch

    from train.emoji.dataset import to_float

    known = to_float(train.pixel_values).flatten(1)
    distances = []
    for image, label in zip(images.float().flatten(1), labels, strict=True):
        same_class = known[train.labels == label]
        distances.append((same_class - image).square().mean(dim=1).min())
    return torch.stack(distances)


def card(facts: dict[str, Any]) -> str:
    """The card as Markdown: facts of the run, and no judgement of its pictures."""
    config = facts["config"]
    side, network = config["image_size"], "UNet" if config.get("architecture") == "unet" else "SiT"
    rows = {
        "network": f"{_network(facts)}, {facts['parameters'] / 1e6:.1f} million weights",
        "attention": _attention(config),
        "classes": ", ".join(config["id2label"].values()),
        "data": _data(config),
        "objective": f"{config['objective']} on the {config['path']} path, {config['time_sampling']} times, labels dropped with "
        f"probability {config['class_dropout_prob']:g}",
        "optimiser": f"{_optimizer(config)}, batches of {config['batch_size']}, moving average {config['ema_decay']:g}",
        "length": f"{facts['steps']:,} steps, {facts['images']:,} images, {facts['hours']:.2f} hours{facts['machine']}",
        "loss": f"{facts['loss_first']:.3f} over the first {facts['loss_window']} lines of the log, "
        f"{facts['loss_last']:.3f} over the last",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    commands = "\n".join(facts["commands"])
    parts = [
        f"---\nlicense: apache-2.0\nlibrary_name: attngen\ntags: [diffusers, {network.lower()}]\n---",
        f"# {network} for {side} x {side} pixels, {len(config['id2label'])} classes",
        f"| | |\n|---|---|\n{table}",
        f"```bash\n{commands}\n```",
    ]
    if "pictures" in facts:
        parts.append(_copying(facts))
    if config["data"] == "emoji":
        parts.append("The emoji are Noto Color Emoji, under the SIL Open Font License 1.1.")
    return "\n\n".join(parts) + "\n"


def _network(facts: dict[str, Any]) -> str:
    config, space = facts["config"], f"in the latents of {facts['vae']}" if facts.get("vae") else "in pixel space"
    if config.get("architecture") == "unet":
        channels = ", ".join(map(str, config["block_channels"]))
        return f"UNet {space}, {channels} channels, heads of {config['attention_head_dim']}"
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return (
        f"SiT {space}, {config['num_layers']} blocks of width {width}, {config['num_attention_heads']} heads, patches of "
        f"{config['patch_size']}"
    )


def _attention(config: dict[str, Any]) -> str:
    if config["attention"] != "mediator":
        return config["attention"]
    if not config["mediator_counts"]:
        return f"{config['num_mediators']} mediators"
    counts = ", ".join(map(str, config["mediator_counts"]))
    return f"mediators; their number was {'set by time to' if config['mediator_starts'] else 'drawn from'} {counts}"


def _data(config: dict[str, Any]) -> str:
    if config["data"] == "emoji":
        return "the training part of attngen's emoji (train/data/README.md): Noto Color Emoji on white"
    return Path(config["data"]).name or config["data"]


def _optimizer(config: dict[str, Any]) -> str:
    if config["optimizer"] != "muon":
        return f"AdamW at {config['learning_rate']:g}"
    return f"Muon at {config['muon_learning_rate']:g} for the blocks' matrices, AdamW at {config['learning_rate']:g} for the rest"


def _copying(facts: dict[str, Any]) -> str:
    return (
        f"Of {facts['pictures']} images drawn, {facts['near_copies']:.0%} are within a mean squared error of 0.01 (pixels in "
        f"[-1, 1]) of a training image of their class; of the held-out emoji {facts['held_out_near_copies']:.0%} are. The "
        f"median distance to the nearest is {facts['nearest_training_picture']:.3f}, for held-out emoji "
        f"{facts['nearest_of_held_out']:.3f}."
    )


if __name__ == "__main__":
    sys.exit(main())
