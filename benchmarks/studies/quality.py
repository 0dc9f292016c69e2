"""What each attention method costs in quality: the same pictures by each, their distance to the data, time and FLOPs.

    python -m benchmarks.studies.quality --model attngen/assets/emoji --pictures 1024 --name sit
    python -m benchmarks.studies.quality --model runs/mine/pipeline --plan calibrated=plan.json --name mine
    python -m benchmarks.studies.quality --table

The first row is what the others are compared with. Every row draws the same pictures, each from a seed of its own, with
`train.sample`; a set that is there is not drawn again, so a run that was stopped goes on. Models of the emoji are
measured by FD-emoji, any other against --reference by FID (see `train.fid`). The results are JSON, with the first
pictures of each row beside it, and --table makes a page and plots of them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measured_rows import measured_rows
from pipelines import cli, samplers

if TYPE_CHECKING:
    from benchmarks.studies.quality_rows import Row

PROGRAM = "benchmarks.studies.quality"
SHOWN, SHOWN_SIZE = 12, 64
"""Pictures of a row that are shown, and their least side in pixels."""
EXAMPLES = """
examples:
  python -m benchmarks.studies.quality --model attngen/assets/emoji --name sit --pictures 10000
  python -m benchmarks.studies.quality --model stable-diffusion-v1-5/stable-diffusion-v1-5 --name sd15 \\
      --pictures 2000 --seeds 1 --steps 50 --height 512 --width 512 --class-names imagenet.txt \\
      --reference imagenet-512/ --scheduler PNDMScheduler
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Measure what each attention method costs in quality.", EXAMPLES)
    add = parser.add_argument
    add("--table", action="store_true", help="write a page and plots of the results, and stop")
    add("--results", type=Path, help="folder of the results (default: OUT/results)")
    add("--page", type=Path, help="what --table writes (default: OUT/quality.md)")
    add("--model", help="pipeline folder, training run or hub id")
    add("--name", help="name of the results, NAME.json (default: the model's)")
    add("--out", type=Path, default=Path("runs/quality"), help="folder of all that is written (default runs/quality)")
    add("--rows", nargs="+", metavar="ROW", help="only these rows; the first is the baseline")
    add("--plan", action="append", default=[], type=_named_plan, metavar="NAME=FILE", help="a further row: a plan file")
    add("--pictures", type=cli.whole_number(2), default=1024, help="images per set (default 1024)")
    add("--seeds", type=cli.whole_number(1), default=3, help="sets per row, of different noise (default 3)")
    add("--steps", type=cli.whole_number(1), default=25, help="sampling steps (default 25)")
    add("--guidance-scale", type=cli.scale_number, help="(default: none for classes, else the model's own)")
    samplers.add_arguments(parser)
    add("--height", type=cli.whole_number(1), help="in pixels (default: as the model was trained)")
    add("--width", type=cli.whole_number(1), help="in pixels (default: as the model was trained)")
    add("--class-names", type=Path, metavar="FILE", help="for a model of texts: one class name per line")
    add("--reference", type=Path, help="reference images or statistics, for models of other data than the emoji")
    add(
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help="Inception weights for --reference, for use without a network",
    )
    add("--rounds", type=cli.whole_number(1), default=5, help="timing rounds (default 5)")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    options = parser.parse_args(argv)
    options.results = options.results or options.out / "results"
    options.page = options.page or options.out / "quality.md"
    if not options.table and not options.model:
        parser.error("give --model, or --table")
    return options


def _named_plan(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, Path(file)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.table:
        from benchmarks.studies.quality_table import write_page

        return cli.run(PROGRAM, lambda: write_page(options.results, options.page))
    return cli.run(PROGRAM, lambda: measure(options))


def measure(options: argparse.Namespace) -> None:
    """Draw and measure every row that is not in the results yet.

    Raises:
        UserError: for options that cannot be used.
    """
    from tqdm import tqdm

    from benchmarks.studies.quality_cost import costs
    from benchmarks.studies.quality_rows import rows_of, shown
    from pipelines.images import write_file

    sampler = load_sampler(options)
    try:
        rows = choose_rows(rows_of(sampler.pipe, options.plan), options.rows)
    except (ValueError, OSError) as error:
        raise cli.UserError(str(error)) from error
    name = options.name or Path(options.model).name.lower()
    path = options.results / f"{name}.json"
    settings = describe(options, sampler)
    done = measured_rows(path, settings, ("versions", "device"), "choose another --name")
    missing = [row for row in rows if row.name not in done]
    cost = costs(sampler, missing, options, baseline=rows[0]) if missing else {}
    for row in tqdm(missing, desc="rows", disable=None):
        if row.name not in cost:
            continue  # the method changes nothing here, as was said
        sets = [measure_set(options, sampler, row, name, seed) for seed in range(options.seeds)]
        done[row.name] = {"row": row.name, "kind": row.kind, **_means(sets), **cost[row.name]}
        path.parent.mkdir(parents=True, exist_ok=True)
        done = in_order(done, rows)
        told = {**settings, "command": command(options, list(done))}
        write_file(path, json.dumps({**told, "rows": list(done.values())}, indent=1).encode())
    if done:
        write_sheet(options.out / name, list(in_order(done, rows)), path.with_suffix(".png"))
    for record in done.values():
        print(f"{record['row']}: {record['metric']} {shown(record)}")


def in_order(done: dict[str, dict[str, Any]], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Records in the order of the rows, then those of rows that were not asked for now."""
    return {row.name: done[row.name] for row in rows if row.name in done} | done


def choose_rows(rows: Sequence[Row], wanted: Sequence[str] | None) -> list[Row]:
    """The rows of these names, in the order given.

    Raises:
        ValueError: for a name that is none.
    """
    by_name = {row.name: row for row in rows}
    for name in wanted or ():
        if name not in by_name:
            raise ValueError(f"there is no row {name!r} for this model; known: {', '.join(by_name)}")
    return [by_name[name] for name in wanted] if wanted else list(rows)


def sample_arguments(options: argparse.Namespace) -> list[str]:
    """What all sets have in common, as arguments of `train.sample`."""
    given: dict[str, Any] = {
        "--model": options.model,
        "--num-pictures": options.pictures,
        "--steps": options.steps,
        "--guidance-scale": options.guidance_scale,
        "--sampler": options.sampler,
        "--solver": options.solver,
        "--scheduler": options.scheduler,
        "--height": options.height,
        "--width": options.width,
        "--class-names": options.class_names,
        "--device": options.device,
        "--labels": None if options.class_names else "data" if options.reference is None else "balanced",
    }
    return [str(part) for flag, value in given.items() if value is not None for part in (flag, value)]


def load_sampler(options: argparse.Namespace) -> Any:
    """The model as `train.sample` draws with it, its attention unchanged."""
    from train.sample import parse_arguments as parse_sampling
    from train.sampling.model import Sampler

    parsed = parse_sampling([*sample_arguments(options), "--out", str(options.out)])
    sampler = Sampler(parsed, cli.prepare_device(argparse.Namespace(device=options.device, threads=1)))
    if options.reference is None and not sampler.draws_classes:
        raise cli.UserError(f"{sampler.name} draws texts, which FD-emoji cannot measure; give --reference")
    return sampler


def describe(options: argparse.Namespace, sampler: Any) -> dict[str, Any]:
    """What decides the numbers: JSON values."""
    import torch

    from pipelines.cli.provenance import versions

    scheduler = sampler.pipe.scheduler
    return {
        "program": PROGRAM,
        "model": sampler.name,
        "model_hash": sampler.hash,
        "pipeline": type(sampler.pipe).__name__,
        "classes": list(sampler.id2label.values()),
        "pictures": options.pictures,
        "seeds": options.seeds,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "scheduler": type(scheduler).__name__,
        "sampler": scheduler.config.get("sampler"),
        "solver": scheduler.config.get("solver"),
        "reference": None if options.reference is None else options.reference.name,
        "device": torch.cuda.get_device_name() if sampler.pipe.device.type == "cuda" else "cpu",
        "versions": versions(),
    }


def command(options: argparse.Namespace, rows: Sequence[str]) -> str:
    """The command that gives these rows. Paths are as they were given; of absolute ones the last part is left."""
    given = {
        "--model": cli.public_name(options.model),
        "--name": options.name,
        "--pictures": options.pictures,
        "--seeds": options.seeds,
        "--steps": options.steps,
        "--guidance-scale": options.guidance_scale,
        "--sampler": options.sampler,
        "--solver": options.solver,
        "--scheduler": options.scheduler,
        "--height": options.height,
        "--width": options.width,
        "--class-names": options.class_names,
        "--reference": options.reference,
        "--inception-weights": options.inception_weights,
        "--rounds": options.rounds,
    }
    words = [word for flag, value in given.items() if value is not None for word in (flag, _public(value))]
    for name, path in options.plan:
        words += ["--plan", f"{name}={_public(path)}"]
    return shlex.join(["python", "-m", PROGRAM, *words, "--rows", *rows])


def _public(value: Any) -> str:
    """A value of an option, without folders of this machine."""
    return cli.public_name(str(value)) if isinstance(value, Path) else str(value)


def measure_set(options: argparse.Namespace, sampler: Any, row: Row, name: str, seed: int) -> dict[str, Any]:
    """Draw one set where it is not there yet, and its distance.

    Raises:
        UserError: if drawing was stopped or failed.
    """
    from train import sample

    folder = options.out / name / row.name / f"seed-{seed}"
    argv = [*sample_arguments(options), "--seed", str(seed), "--out", str(folder)]
    if row.plan is not None:
        plan_file = folder.parent / "plan.json"
        plan_file.parent.mkdir(parents=True, exist_ok=True)
        row.plan.save(plan_file)
        argv += ["--method", str(plan_file)]
    if row.mediators is not None:
        argv += ["--mediators", row.mediators]
    done = sample.sample(sample.parse_arguments(argv))
    if done["missing"]:
        raise cli.UserError(f"{folder} lacks {done['missing']} images; run the same command again to continue")
    if options.reference is not None:
        return fid_of(folder, options)
    return fd_of(folder, list(sampler.id2label.values()))


def pictures_of(folder: Path) -> list[Path]:
    """Files of a set, in the order of their numbers."""
    return sorted(folder.glob("pictures/**/*.png"))


def write_sheet(sets: Path, rows: Sequence[str], path: Path) -> None:
    """The first pictures of every row, the same noise below each other, or nothing where a row's are not here."""
    from PIL import Image

    from pipelines.images import grid, save_png

    files = {row: pictures_of(sets / row / "seed-0")[:SHOWN] for row in rows}
    if not all(files.values()):
        return
    pictures = [[Image.open(file).convert("RGB") for file in files[row]] for row in rows]
    scale = -(-SHOWN_SIZE // max(pictures[0][0].size))
    save_png(grid(pictures, row_labels=list(rows), scale=scale), path, {"program": PROGRAM, "rows": list(rows)})


def fd_of(folder: Path, classes: Sequence[str]) -> dict[str, Any]:
    """FD-emoji of a set in the data's frequencies."""
    import warnings

    import numpy as np
    import torch
    from PIL import Image

    from train.metrics.frechet import fd_emoji

    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in pictures_of(folder)]
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*images are fewer than")  # the table names the number and floor
        found = fd_emoji(stacked, classes)
    return {"metric": found["name"], "value": found["value"], "floor": found["floor"]}


def fid_of(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """FID of a set against the reference, whose pictures are cropped to the same size."""
    from train import fid

    argv = [str(folder), str(options.reference), "--metrics", "fid"]
    if options.height is not None and options.height == options.width:
        argv += ["--image-size", str(options.height)]
    if options.inception_weights is not None:
        argv += ["--inception-weights", str(options.inception_weights)]
    if options.device is not None:
        argv += ["--device", options.device]
    try:
        found = fid.fid(fid.parse_arguments(argv))
    except (ValueError, ImportError) as error:
        raise cli.UserError(str(error)) from error
    ((metric, value),) = found["values"].items()
    return {"metric": metric, "value": value, "floor": None}


def _means(sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = [found["value"] for found in sets]
    return {
        "metric": sets[0]["metric"],
        "values": [round(value, 5) for value in values],
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,  # one set has none
        "floor": sets[0]["floor"],
    }


if __name__ == "__main__":
    sys.exit(main())
