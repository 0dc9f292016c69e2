"""The protocols of the papers as commands: the same images by each method, their distance, beside the paper's table.

    python -m benchmarks.protocols agentsd --reference ILSVRC2012/val --class-names imagenet.txt --device cuda
    python -m benchmarks.protocols mediators --model runs/sit-s2 --reference VIRTUAL_imagenet256_labeled.npz
    python -m benchmarks.protocols linfusion --layers linfusion.safetensors --class-names imagenet.txt --reference val
    python -m benchmarks.protocols agentsd --tiny        # the whole way with tiny models, in a minute

Drawing goes on where it was stopped, and a row that is measured is not measured again. The papers' numbers are of their
own weights, reference images and machine: compare rows of one column with each other, not the two columns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measured_rows import measured_rows
from pipelines import cli

PROGRAM = "benchmarks.protocols"
RESULTS = "results.json"


@dataclass(frozen=True)
class Row:
    """One line of a paper's table.

    Attributes:
        name: as the paper calls it.
        arguments: of `train.sample`, beside those of all rows; "{layers}" is the file of --layers.
        preset: of attngen, with its ratio, or None.
        published: the paper's numbers by column; empty where they are not known to us.
    """

    name: str
    arguments: tuple[str, ...] = ()
    preset: tuple[str, float] | None = None
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """One paper's evaluation.

    Attributes:
        source: the paper.
        model: that it was made with.
        pictures: how many images.
        arguments: of `train.sample`, for all rows.
        measured: of `train.fid`.
        rows: of the table; the first is the baseline.
        caution: what differs from the paper, or is not known of it.
        classes: whether prompts are made of names of classes.
    """

    source: str
    model: str
    pictures: int
    arguments: tuple[str, ...]
    measured: tuple[str, ...]
    rows: tuple[Row, ...]
    caution: str
    classes: bool = False


_SD = (
    "--prompt-template",
    "a photo of a {}",
    "--steps",
    "50",
    "--guidance-scale",
    "7.5",
    "--height",
    "512",
    "--width",
    "512",
)
_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
_TOME = ((28.64, 2.40), (28.68, 2.15), (28.82, 1.90), (28.74, 1.71), (29.01, 1.53))
_AGENT = ((27.79, 1.97), (27.77, 1.80), (28.03, 1.65), (28.15, 1.54), (28.42, 1.42))


def _ratios(name: str, preset: str, published: Sequence[tuple[float, float]]) -> tuple[Row, ...]:
    return tuple(
        Row(f"{name} {ratio:.0%}", preset=(preset, ratio), published={"FID": fid, "s/image": seconds})
        for ratio, (fid, seconds) in zip(_RATIOS, published, strict=True)
    )


PROTOCOLS = {
    "agentsd": Protocol(
        source="Agent Attention, arXiv 2312.08874, and its repository",
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pictures=2000,
        arguments=(*_SD, "--scheduler", "PNDMScheduler"),
        measured=("--metrics", "fid", "kid", "--image-size", "512"),
        rows=(
            Row("Stable Diffusion", published={"FID": 28.84, "s/image": 2.62}),
            *_ratios("ToMeSD", "tome", _TOME),
            *_ratios("AgentSD", "agentsd", _AGENT),
        ),
        caution="Which validation images and which crop the paper took is not known to us; its seconds are of an RTX "
        "4090, presumably with unfused attention. ToMe's own table has 33.12 for the same baseline.",
        classes=True,
    ),
    "mediators": Protocol(
        source="Attention Mediators, arXiv 2408.05710, SiT-S/2 at 256 px, 400,000 steps, no guidance",
        model="runs/sit-s2",
        pictures=50000,
        arguments=("--labels", "random", "--sampler", "sde", "--steps", "250"),
        measured=("--metrics", "fid", "sfid", "is", "pr"),
        rows=(
            Row("4 mediators", ("--mediators", "4"), published={"FID": 57.67, "sFID": 10.01, "IS": 26.66}),
            Row("16 mediators", ("--mediators", "16"), published={"FID": 54.55, "sFID": 9.28, "IS": 26.55}),
            Row("64 mediators", ("--mediators", "64"), published={"FID": 53.57, "sFID": 9.01, "IS": 27.26}),
            Row("by change", ("--mediators", "change:4,16,64:0.8,0.5")),
        ),
        caution="The paper trains a model for each number of mediators; one elastic model draws all rows here. It "
        "publishes no numbers of mediators and ratios for its headline models: the last row has none to compare with.",
    ),
    "linfusion": Protocol(
        source="LinFusion, arXiv 2409.02097",
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pictures=2000,
        arguments=_SD,
        measured=("--metrics", "fid", "kid", "--image-size", "512"),
        rows=(Row("Stable Diffusion"), Row("LinFusion", ("--method", "{layers}"))),
        caution="The paper's FID was not obtainable by us; the images are those of the AgentSD protocol.",
        classes=True,
    ),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Draw and measure as a paper did.", (__doc__ or "").split("\n\n", 1)[1])
    add = parser.add_argument
    add("protocol", choices=list(PROTOCOLS), help="which paper's")
    add("--model", help="hub id, folder or training run (default: the paper's model)")
    add("--reference", help="images or statistics that `train.fid` reads")
    add("--class-names", type=Path, metavar="FILE", help="names of the classes, one a line, for models of texts")
    add("--layers", type=Path, metavar="FILE", help="learned layers of the row LinFusion")
    add("--rows", nargs="+", metavar="ROW", help="only these rows")
    add("--pictures", type=cli.whole_number(2), help="images a row (default: the paper's)")
    add("--steps", type=cli.whole_number(1), help="denoising steps (default: the paper's)")
    add("--seed", type=cli.whole_number(0), default=0, help="(default 0)")
    add("--inception-weights", metavar="FILE", help="for use without a network")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    add(
        "--out", type=Path, default=Path("runs/protocols"), help="folder of images and results (default runs/protocols)"
    )
    add("--tiny", action="store_true", help="tiny models and few images, to see that all of it works")
    options = parser.parse_args(argv)
    if not options.tiny and not options.reference:
        parser.error("give --reference, or --tiny")
    if PROTOCOLS[options.protocol].classes and not options.class_names and not options.tiny:
        parser.error(f"the protocol {options.protocol} makes prompts of names of classes; give --class-names")
    if options.protocol == "linfusion" and not options.layers and not options.tiny:
        parser.error("the protocol linfusion needs learned layers; give --layers")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return cli.run(PROGRAM, lambda: measure(options))


def measure(options: argparse.Namespace) -> None:
    """Draw and measure each row, and print the table.

    Raises:
        UserError: for a row that the paper has not, or what `train.sample` and `train.fid` refuse.
    """
    from pipelines.images import write_file

    protocol = PROTOCOLS[options.protocol]
    rows = choose(protocol, options.rows)
    folder = options.out / options.protocol
    if options.tiny:
        from benchmarks.protocols_tiny import make_tiny

        folder = folder / "tiny"
        make_tiny(options, folder)
    path = folder / RESULTS
    facts = describe(options, protocol)
    done = measured_rows(path, facts, ("versions",), "give another --out")
    for row in rows:
        if row.name not in done:
            done[row.name] = measure_row(options, protocol, row, folder / row.name.replace(" ", "-").replace("%", ""))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps({**facts, "rows": list(done.values())}, indent=1).encode())
    print("\n".join(table(protocol, [(row, done[row.name]) for row in rows])))
    print(path)


def choose(protocol: Protocol, wanted: Sequence[str] | None) -> list[Row]:
    """The rows of these names, in the paper's order; all of them for None.

    Raises:
        UserError: for a name that is none.
    """
    names = [row.name for row in protocol.rows]
    for name in wanted or ():
        if name not in names:
            raise cli.UserError(f"the table has no row {name!r}; expected some of {', '.join(names)}")
    return [row for row in protocol.rows if wanted is None or row.name in wanted]


def describe(options: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    """What decides the numbers: JSON values."""
    from pipelines.cli.provenance import versions

    return {
        "program": PROGRAM,
        "protocol": options.protocol,
        "source": protocol.source,
        "model": cli.public_name(options.model or protocol.model),
        "reference": Path(options.reference).name,
        "pictures": options.pictures or protocol.pictures,
        "steps": options.steps,
        "seed": options.seed,
        "versions": versions(),
    }


def measure_row(options: argparse.Namespace, protocol: Protocol, row: Row, folder: Path) -> dict[str, Any]:
    """Draw a row's images where they are not there yet, and measure them.

    Raises:
        UserError: if drawing was stopped or failed.
    """
    from train import fid, sample

    print(f"{row.name}: drawing")
    drawn = sample.sample(sample.parse_arguments(sample_arguments(options, protocol, row, folder)))
    if drawn["missing"]:
        raise cli.UserError(f"{folder} lacks {drawn['missing']} images; run the same command again to continue")
    argv = [str(folder), options.reference, *protocol.measured, *getattr(options, "measured", ())]
    for flag, value in (("--inception-weights", options.inception_weights), ("--device", options.device)):
        argv += [flag, value] if value else []
    try:
        found = fid.fid(fid.parse_arguments(argv))
    except (ValueError, ImportError) as error:
        raise cli.UserError(str(error)) from error
    seconds = drawn["seconds"] / drawn["drawn"] if drawn.get("drawn") else None
    return {
        "row": row.name,
        "values": found["values"],
        "skipped": found["skipped"],
        "seconds_per_image": seconds,
        "extractor": found["extractor"],
    }


def sample_arguments(options: argparse.Namespace, protocol: Protocol, row: Row, folder: Path) -> list[str]:
    """A row's images, as arguments of `train.sample`; the last of a flag counts."""
    given = {
        "--model": options.model or protocol.model,
        "--num-pictures": options.pictures or protocol.pictures,
        "--seed": options.seed,
        "--class-names": options.class_names if protocol.classes else None,
        "--device": options.device,
        "--out": folder,
    }
    arguments = [*protocol.arguments, *(part.format(layers=options.layers) for part in row.arguments)]
    arguments += [str(part) for flag, value in given.items() if value is not None for part in (flag, value)]
    if row.preset is not None:
        arguments += ["--method", str(_plan_file(row, folder))]
    return [*arguments, *(["--steps", str(options.steps)] if options.steps else []), *getattr(options, "drawn", ())]


def _plan_file(row: Row, folder: Path) -> Path:
    """The row's preset as a plan file beside its images."""
    from attngen.presets import resolve_preset

    assert row.preset is not None
    name, ratio = row.preset
    path = folder.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    resolve_preset(name, {"ratio": ratio}).save(path)
    return path


def table(protocol: Protocol, rows: Sequence[tuple[Row, dict[str, Any]]]) -> list[str]:
    """Lines: what was measured here, and in brackets what the paper has."""
    metrics = list(dict.fromkeys(name for _, found in rows for name in found["values"]))
    lines = [["row", *metrics, "s/image"]]
    for row, found in rows:
        cells = [_cell(found["values"].get(name), row.published.get(name.partition("-")[0])) for name in metrics]
        lines.append([row.name, *cells, _cell(found["seconds_per_image"], row.published.get("s/image"))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [f"{protocol.source}; in brackets the paper's numbers", *text, protocol.caution]


def _cell(measured: Any, published: float | None) -> str:
    value = measured["mean"] if isinstance(measured, dict) else measured
    ours = "-" if value is None else f"{value:.4g}"
    return ours if published is None else f"{ours} ({published:g})"


if __name__ == "__main__":
    sys.exit(main())
