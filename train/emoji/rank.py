"""Does FD-emoji rank? Damage and lack of training against the distance: python -m train.emoji.rank

Every kind of damage is done to the emoji themselves, at rising strength; the distance to the whole emoji must rise with
it. With --run, distances that a training run has logged (`--fd-every`) must fall with its steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli

if TYPE_CHECKING:
    from torch import Tensor

    from train.emoji.dataset import EmojiDataset

PROGRAM = "train.emoji.rank"
EXAMPLES = """
examples:
  python -m train.emoji.rank
  python -m train.emoji.rank --run runs/emoji --json rank.json
"""
STRENGTHS = {
    "noise": (8, 16, 32, 64),
    "blur": (1, 2, 4, 8),
    "wrong classes": (0.1, 0.25, 0.5, 1.0),
    "one class": (0.2, 0.4, 0.7, 1.0),
}


def with_noise(data: EmojiDataset, strength: float) -> Tensor:
    """Normal noise of `strength` levels of 255."""
    import torch

    from pipelines.cli.seeds import generator_for

    noise = torch.randn(data.pixel_values.shape, generator=generator_for("noise"))
    return (data.pixel_values + strength * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(data: EmojiDataset, strength: float) -> Tensor:
    """The mean of 3 x 3 pixels, `strength` times."""
    import torch
    from torch.nn import functional as F

    pictures = data.pixel_values.float()
    for _ in range(int(strength)):
        pictures = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), value=255.0), 3, stride=1)
    return pictures.round().to(torch.uint8)


def of_wrong_classes(data: EmojiDataset, strength: float) -> Tensor:
    """A share of the pictures is of classes that the reference has not, as if a model drew what nobody asked for."""
    from train.emoji.dataset import CLASSES, EmojiDataset

    others = [name for name in CLASSES if name not in data.classes]
    strangers = EmojiDataset(data.split, data.image_size, others).pixel_values
    return _replaced(data, strangers, strength)


def of_one_class(data: EmojiDataset, strength: float) -> Tensor:
    """A share of the pictures is of the first class, as of a model that draws little else."""
    return _replaced(data, data.pixel_values[data.labels == 0], strength)


def _replaced(data: EmojiDataset, others: Tensor, share: float) -> Tensor:
    import torch

    from pipelines.cli.seeds import generator_for

    chosen = torch.randperm(len(data), generator=generator_for("replaced"))[: round(share * len(data))]
    pictures = data.pixel_values.clone()
    order = torch.randperm(len(others), generator=generator_for("others"))
    pictures[chosen] = others[order[torch.arange(len(chosen)) % len(others)]]
    return pictures


DAMAGES: dict[str, Callable[[Any, float], Any]] = {
    "noise": with_noise,
    "blur": blurred,
    "wrong classes": of_wrong_classes,
    "one class": of_one_class,
}
# Half of the classes, so that the other half is wrong.
REFERENCE_CLASSES = ("face", "animal", "fruit", "vehicle", "building", "clock", "sign", "flag")


def rank_damage(image_size: int = 32, classes: Sequence[str] = REFERENCE_CLASSES) -> dict[str, dict[str, float]]:
    """FD-emoji by kind and strength of damage; each kind begins with none.

    Args:
        image_size: side of the pictures.
        classes: of the reference.
    """
    from train.emoji.dataset import EmojiDataset
    from train.metrics.frechet import frechet_distance, reference_statistics, statistics_of

    data, reference = EmojiDataset("train", image_size, classes), reference_statistics(image_size, classes)
    found: dict[str, dict[str, float]] = {}
    for kind, damage in DAMAGES.items():
        found[kind] = {
            f"{strength:g}": frechet_distance(statistics_of(damage(data, strength)), reference, warn=False)
            for strength in (0, *STRENGTHS[kind])
        }
    return found


def rank_steps(run: Path) -> dict[str, dict[str, float]]:
    """FD-emoji by step of a training run, by kind of evaluation.

    Raises:
        ValueError: if the run has logged none, or only one.
    """
    found: dict[str, dict[str, float]] = {}
    try:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{run} holds no log of a training run: {error}") from error
    for line in lines:
        for name, value in _distances(line):
            found.setdefault(name, {})[str(line["step"])] = value
    if not found or min(map(len, found.values())) < 2:
        raise ValueError(f"{run} has logged fewer than two distances; train it with --fd-every")
    return found


def _distances(record: Any, prefix: str = "") -> list[tuple[str, float]]:
    """Names and values of all distances in a line of a log, at any depth."""
    found: list[tuple[str, float]] = []
    for name, value in record.items() if isinstance(record, dict) else ():
        if isinstance(value, dict):
            found += _distances(value, f"{name} ")
        elif "FD-emoji" in name and isinstance(value, (int, float)):
            found.append((prefix + name, float(value)))
    return found


def is_monotone(values: Sequence[float], rising: bool) -> bool:
    """Whether values only rise, or only fall."""
    pairs = list(zip(values, values[1:], strict=False))
    return all(b > a if rising else b < a for a, b in pairs)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Check that FD-emoji ranks damage and training.", EXAMPLES)
    parser.add_argument("--run", type=Path, help="folder of a training run with --fd-every")
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write the distances to")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    failed: list[str] = []
    code = cli.run(PROGRAM, lambda: failed.extend(rank(options)))
    return code or (cli.EXIT_FAILURE if failed else 0)


def rank(options: argparse.Namespace) -> list[str]:
    """Print a line a series; returns the names of those that do not rank."""
    from train.loop.checkpoint import write_json

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        series = {kind: (values, True) for kind, values in rank_damage().items()}
    if options.run is not None:
        try:
            series |= {name: (values, False) for name, values in rank_steps(options.run).items()}
        except ValueError as error:
            raise cli.UserError(str(error)) from error
    failed = [name for name, (values, rising) in series.items() if not is_monotone(list(values.values()), rising)]
    for name, (values, rising) in series.items():
        shown = "  ".join(f"{strength}: {value:.3f}" for strength, value in values.items())
        verdict = f"does not {'rise' if rising else 'fall'} throughout" if name in failed else "ranks"
        print(f"{name}: {shown}  {verdict}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, {name: values for name, (values, _) in series.items()})
    return failed


if __name__ == "__main__":
    sys.exit(main())
