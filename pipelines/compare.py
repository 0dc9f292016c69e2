"""A grid of methods and seeds with what each costs: python -m pipelines.compare face --mediators 4 16 25"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli
from pipelines.methods.options import MEDIATORS, PLAN, UNCHANGED, method_help

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.engine.comparison import Comparison, Row
    from pipelines.engine.models import Model
    from pipelines.methods.uses import Use

PROGRAM = "pipelines.compare"
# Methods with a flag of their own for their counts, and the option that it sets.
COUNTS = {"agent": "num_agents", MEDIATORS: MEDIATORS}
SHOWN_SIZE = 128  # pixels: small pictures are shown at least this large
EXAMPLES = """
examples:
  python -m pipelines.compare face --mediators 1 4 16 25 --images 6
  python -m pipelines.compare heart --methods none mediators:1:4,0.5:16 mediators:16 --difference
  python -m pipelines.compare "a lighthouse" --model models/sd15 --methods none agent:64 tome:ratio=0.5 plan.json
  python -m pipelines.compare "a fox" --model models/sdxl --agents 64 256 --height 2048 --width 2048
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Draw the same images by several attention methods, and measure each.", EXAMPLES)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="a text; for a model of classes the name or number of one")
    add("--model", default="emoji", help="one that ships, hub id, folder or .safetensors file (default: emoji)")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"the first is the baseline; NAME or NAME:option=value,…: none, mediators, {method_help()}",
    )
    add("--agents", nargs="+", metavar="COUNT", help="one row of agent per COUNT: a count, or time:count pairs")
    add("--mediators", nargs="+", metavar="COUNT", help="one row of mediators per COUNT: a count, or time:count pairs")
    add("--difference", action="store_true", help="add rows with the difference from the first method's images")
    add(
        "--lpips",
        action="store_true",
        help="add LPIPS and a verdict; its weights are downloaded where they are not here",
    )
    add("--negative-prompt", default="", metavar="TEXT", help="what not to draw")
    add("--steps", type=cli.whole_number(1), help="sampling steps (default: the model's usual number)")
    add(
        "--guidance-scale",
        type=cli.scale_number,
        metavar="S",
        help="guidance scale, 1 is off (default: the model's usual one)",
    )
    add("--scale", type=cli.whole_number(1), help="integer upscaling factor (default: until at least 128 px)")
    add("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    add("--offload", choices=cli.OFFLOADS, default="none", help="keep idle parts in main memory")
    cli.add_common_arguments(parser, images=3)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return cli.run(PROGRAM, lambda: compare(options))


def compare(options: argparse.Namespace) -> None:
    """Draw, write and report what the command line asks for."""
    from pipelines.engine.session import make_engine
    from pipelines.engine.settings import Settings

    uses = None if options.methods is None else [use for text in options.methods for use in expand(text, options)]
    settings = Settings(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        model=options.model,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        height=options.height,
        width=options.width,
        seed=options.seed,
        images=options.images,
    )
    engine = make_engine(options)
    engine.check(settings)
    uses = uses or default_uses(engine.models.get(options.model), options)
    check_uses(uses, options)
    path = cli.output_path(options, f"{options.prompt}-methods-{options.seed}")
    comparison: Comparison = watch(engine.compare(settings, uses, previews=False, lpips=options.lpips))
    write(comparison, path, options)
    report(comparison, path, options)


# What to compare


def read_use(text: str) -> Use:
    """A method as it is typed, see `pipelines.methods.uses.split_use`, or that of a plan file; only the options given.

    Raises:
        UserError: for an unknown method, or a file that cannot be read.
    """
    from pipelines.methods.uses import Use, split_use

    if not text.endswith(".json"):
        return split_use(text)
    try:
        return Use(PLAN, {PLAN: Path(text).read_text(encoding="utf-8")})
    except (OSError, UnicodeDecodeError) as error:
        raise cli.UserError(f"cannot read the plan file {text}: {error}") from error


def expand(text: str, options: argparse.Namespace) -> list[Use]:
    """A checked method, or one for each of `--agents` or `--mediators` where it is the method they are for."""
    use = read_use(text)
    option, counts = COUNTS.get(use.method, ""), _counts(options).get(use.method)
    if not counts or option in use.options:
        return [use.checked()]
    return [use._replace(options={**use.options, option: count}).checked() for count in counts]


def _counts(options: argparse.Namespace) -> dict[str, list[str]]:
    """The counts that the command line gives, by method."""
    return {"agent": options.agents or [], MEDIATORS: options.mediators or []}


def default_uses(model: Model, options: argparse.Namespace) -> list[Use]:
    """Every usual method that the model can be drawn with, each as it is by default."""
    from pipelines.methods.catalogue import METHODS

    names = [name for name in model.methods if name in (UNCHANGED, MEDIATORS) or METHODS[name].is_usual]
    if options.agents or options.mediators:
        names = [name for name in names if name == UNCHANGED or _counts(options).get(name)]
    return [use for name in names for use in expand(name, options)]


def check_uses(uses: Sequence[Use], options: argparse.Namespace) -> None:
    """Raise UserError for counts that no method takes, a method named twice, or too few of them."""
    for name, counts in _counts(options).items():
        if counts and all(use.method != name for use in uses):
            flag = "mediators" if name == MEDIATORS else "agents"
            raise cli.UserError(
                f"--{flag} is for the method {name!r}, which is not among the methods or not for the model"
            )
    labels = [use.label for use in uses if use.method != PLAN]
    for label in labels:
        if labels.count(label) > 1:
            raise cli.UserError(f"the method {label!r} is given twice")
    if len(uses) < 2:
        raise cli.UserError("a comparison needs at least two methods; name them with --methods")


def watch(events: Iterable[Any]) -> Any:
    """The last of the engine's events; the others move a bar, where someone is watching."""
    from pipelines.engine.results import Progress
    from pipelines.engine.session import progress_bar

    event: Any = None
    with progress_bar() as tell:
        for event in events:
            if isinstance(event, Progress):
                tell(event)
    return event


# What came of it


def write(comparison: Comparison, path: Path, options: argparse.Namespace) -> None:
    """The grid as a PNG with its settings, and the numbers as JSON beside it."""
    from pipelines.images import save_png, write_file

    text = json.dumps(details(comparison, path), ensure_ascii=False, indent=2)
    save_png(picture(comparison, options.scale, options.difference), path, describe(comparison))
    write_file(path.with_suffix(".json"), (text + "\n").encode())


def picture(comparison: Comparison, scale: int | None = None, difference: bool = False) -> Image.Image:
    """A row a method, a column a seed; with `difference` under each row but the first where it differs from that."""
    from pipelines.engine.comparison import DIFFERENCE_GAIN
    from pipelines.images import grid

    first = comparison.rows[0].result
    rows, labels = [], []
    for i, row in enumerate(comparison.rows):
        rows.append(row.result.pictures)
        labels.append(row_label(row, is_first=i == 0))
        if difference and i:
            rows.append([comparison.difference(i, k) for k in range(len(first.pictures))])
            labels.append(["difference,", f"{DIFFERENCE_GAIN} times as bright"])
    columns = [(f"seed {(first.settings.seed or 0) + k}", 1) for k in range(len(first.pictures))]
    return grid(rows, labels, columns, scale or -(-SHOWN_SIZE // min(first.pictures[0].size)))


def row_label(row: Row, is_first: bool) -> list[str]:
    """Lines left of a row: the method, its time and operations, its error."""
    result = row.result
    cost = [f"{result.seconds:.2f} s"]
    if result.flops is not None:
        cost.append(f"{result.flops / 1e9:.3g} GFLOP")
    lines = [row.label, ", ".join(cost)]
    if not is_first:
        lines.append(f"{row.speedup:.2f} times as fast, error {row.error:.3f}")
    return lines


def describe(comparison: Comparison) -> dict[str, Any]:
    """What is written into the file."""
    first = comparison.rows[0].result
    settings = {name: value for name, value in first.file_settings[0].items() if name not in ("options", "mediators")}
    return {
        **settings,
        "program": PROGRAM,
        "images": len(first.pictures),
        "method": ", ".join(row.label for row in comparison.rows),
    }


def details(comparison: Comparison, path: Path) -> dict[str, Any]:
    """Everything, as JSON values."""
    return {"file": str(path), "settings": describe(comparison), **comparison.to_dict()}


def report(comparison: Comparison, path: Path, options: argparse.Namespace) -> None:
    """Print the table and where the files are; with `--json` everything."""
    from pipelines.engine.comparison import COLUMNS, HEADS, WARM_UP_STEPS
    from pipelines.engine.paired import LPIPS

    if options.json:
        print(json.dumps(details(comparison, path), ensure_ascii=False))
        return
    for line in table([list(COLUMNS), *comparison.table()]):
        print(line)
    print(f"{WARM_UP_STEPS} warm-up steps per method, not timed")
    first = comparison.rows[0]
    print(f"pairs with {first.label} on the same noise, {len(first.result.pictures)} images; mean (interval of 95%):")
    for line in (*table(comparison.paired_table()), *comparison.paired_tests()):
        print(line)
    for name, reason in comparison.rows[1].paired.skipped.items():
        if options.lpips or name != LPIPS:
            print(f"{HEADS[name]} not computed: {reason}")
    count = sum(len(row.result.pictures) for row in comparison.rows)
    cli.report_done(options, path, count, sum(row.result.seconds for row in comparison.rows))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the columns under each other: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
