"""What the top of the page shows without drawing: python -m pipelines.hero

The program draws each class with each number of mediators into one file, and measures a call of the network at several
sizes, with softmax attention too. The page shows these files; see `pipelines.ui_hero`.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli

if TYPE_CHECKING:
    from PIL import Image

PROGRAM = "pipelines.hero"
HERE = Path(__file__).parent / "ui_files"
SPRITE, NUMBERS, CARD, ICON = "samples.webp", "numbers.json", "card.png", "icon.png"
MODEL, COUNTS, SEEDS = "emoji-128", (1, 2, 4, 9, 16, 25, 64), (3, 5)
SIDES = (128, 256, 512, 1024)  # pixels; the model was trained on the first
ROUNDS = 5
EXAMPLES = """
examples:
  python -m pipelines.hero
  python -m pipelines.hero --out /tmp/hero --seeds 0 1
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(PROGRAM, "Draw and measure what the top of the page shows.", EXAMPLES)
    parser.add_argument("--out", type=Path, default=HERE, help=f"folder to write to (default {HERE.name} here)")
    parser.add_argument("--seeds", type=cli.whole_number(0), nargs="+", default=list(SEEDS), help="of the samples")
    parser.add_argument("--rounds", type=cli.whole_number(1), default=ROUNDS, help=f"of timing (default {ROUNDS})")
    options = parser.parse_args(argv)
    return cli.run(PROGRAM, lambda: make(options))


def make(options: argparse.Namespace) -> None:
    """Draw, measure, and write the files."""
    from pipelines.engine.session import Engine
    from pipelines.images import write_file

    engine = Engine()
    model = engine.models.get(MODEL)
    samples = draw_samples(engine, list(model.labels.values()), options.seeds)
    sprite, errors = sheet_of(samples)
    content = io.BytesIO()
    sprite.save(content, "WEBP", quality=80, method=6)
    write_file(options.out / SPRITE, content.getvalue())
    numbers = {
        "model": MODEL,
        "machine": f"one core of {processor()}",
        "side": model.size[0] if model.size else 0,
        "classes": list(model.labels.values()),
        "counts": COUNTS,
        "seeds": options.seeds,
        "steps": model.steps,
        "errors": errors,
        "sizes": [measure(model.pipe.transformer, side, options.rounds) for side in SIDES],
    }
    write_file(options.out / NUMBERS, json.dumps(numbers).encode())
    for name, picture in ((CARD, card(samples)), (ICON, samples[-1][0][COUNTS.index(16)].resize((64, 64)))):
        content = io.BytesIO()
        picture.quantize(128).save(content, "PNG", optimize=True)
        write_file(options.out / name, content.getvalue())
    print(options.out)


Samples = Sequence[Sequence[Sequence["Image.Image"]]]
"""By class, seed and number of mediators."""


def draw_samples(engine: Any, classes: Sequence[str], seeds: Sequence[int]) -> Samples:
    """One sample of each."""
    from pipelines.engine.settings import Settings

    def draw(name: str, seed: int, count: int) -> Image.Image:
        settings = Settings(name, model=MODEL, seed=seed, method="mediators", options={"mediators": str(count)})
        return engine.draw([settings]).pictures[0]

    return [[[draw(name, seed, count) for count in COUNTS] for seed in seeds] for name in classes]


def sheet_of(samples: Samples) -> tuple[Image.Image, list[list[list[float]]]]:
    """One picture of all, a row a class and seed, a column a count; and each one's difference from the last count's."""
    from PIL import Image

    from pipelines.engine.comparison import rms_difference

    rows = [row for seeds in samples for row in seeds]
    side = rows[0][0].width
    sheet = Image.new("RGB", (side * len(COUNTS), side * len(rows)))
    for y, row in enumerate(rows):
        for x, sample in enumerate(row):
            sheet.paste(sample, (x * side, y * side))
    errors = [[[round(rms_difference([one], [row[-1]]), 4) for one in row] for row in seeds] for seeds in samples]
    return sheet, errors


def measure(network: Any, side: int, rounds: int) -> dict[str, Any]:
    """Operations and milliseconds of a call at a size: a number for each count, and the last for softmax attention.

    The time is that of the processor, so that other programs on the machine do not count.

    Args:
        network: the transformer with mediators.
        side: of the image in pixels.
        rounds: of timing, each of all in turn.
    """
    import torch

    from pipelines.engine.calls import count_operations

    torch.set_num_threads(1)
    latent = side // SIDES[0] * network.config.sample_size
    config = {**network.config, "attention": "softmax", "sample_size": latent}
    softmax = type(network).from_config(config).eval()
    sample, t, label = torch.randn(1, network.config.in_channels, latent, latent), torch.ones(1), torch.zeros(1).long()
    calls: list[Callable[[], Any]] = [
        lambda count=count: network(sample, t, label, num_mediators=count) for count in COUNTS
    ]
    calls.append(lambda: softmax(sample, t, label))
    operations = [round(count_operations(call) / 1e9, 4) for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for _ in range(rounds):
            for call, times in zip(calls, seconds, strict=True):
                start = time.thread_time()
                call()
                times.append(time.thread_time() - start)
    tokens = (latent // network.config.patch_size) ** 2
    medians = [round(statistics.median(times) * 1e3, 2) for times in seconds]
    return {"side": side, "tokens": tokens, "gflop": operations, "milliseconds": medians}


def card(samples: Samples) -> Image.Image:
    """What other sites show beside a link to the page: 1200 x 630 pixels."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (1200, 630), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=64)
    draw.text((60, 50), "attngen", "#312e81", font)
    draw.text((60, 140), "Image generation with attention at linear cost", "#374151", ImageFont.load_default(size=36))
    for k, count in enumerate((1, 4, 16, 64)):
        sample = samples[k % len(samples)][0][COUNTS.index(count)].resize((250, 250))
        picture.paste(sample, (60 + 275 * k, 250))
        plural = "s" if count > 1 else ""
        draw.text(
            (185 + 275 * k, 535), f"{count} mediator{plural}", "#374151", ImageFont.load_default(size=30), anchor="mm"
        )
    return picture


def processor() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
