"""Train the feature extractor of FD-emoji on the emoji set: python -m train.emoji.train_features

Writes the weights in half precision and, beside them, a card with accuracy, sizes, versions and the hash. The same
seed gives the same weights on the same machine; about two minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines import cli

# As train.emoji.features has it, which takes seconds to import.
WEIGHTS_FILE = Path(__file__).parents[1] / "data" / "features.safetensors"
STEPS = 1300
BATCH_SIZE = 64


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = cli.Parser("train.emoji.train_features", __doc__)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=WEIGHTS_FILE,
        help="file of weights; the card is written next to it (default %(default)s)",
    )
    add("--steps", type=int, default=STEPS, help="optimiser steps (default %(default)s)")
    add("--batch-size", type=int, default=BATCH_SIZE, help="batch size (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation (default %(default)s)")
    add(
        "--threads", type=int, default=1, help="CPU threads; another number may round differently (default %(default)s)"
    )
    options = parser.parse_args(argv)
    for name, least in (("steps", 1), ("batch_size", 2), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    if options.out.suffix != ".safetensors":
        parser.error(f"--out must end in .safetensors, got {options.out}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    import torch

    from train.emoji.training import make_extractor

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        card = make_extractor(options)
    except (ValueError, OSError) as error:
        print(f"train.emoji.train_features: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    found = card["accuracy"]
    print(
        f"{options.out}: {card['weights']:,} weights, {card['bytes'] / 2**20:.2f} MiB, "
        f"class found for {found['train']:.1%} of training images, {found['held_out']:.1%} of held-out ones"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
