"""FID, sFID, IS, KID, precision, recall, MMD and MIND of images: python -m train.fid GENERATED REFERENCE

With the extractor that ships the numbers are FD-emoji and its kin, which compare models of emoji and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli

if TYPE_CHECKING:
    from train.metrics.sets import Given

PROGRAM = "train.fid"
METRICS = ("fid", "sfid", "is", "kid", "pr", "mmd", "mind")
ALIASES = {"fd": "fid", "kd": "kid", "cmmd": "mmd", "precision": "pr", "recall": "pr"}
EXAMPLES = """
examples:
  python -m train.fid samples/emoji emoji --extractor emoji
  python -m train.fid runs/emoji@2000 emoji --extractor emoji --num-pictures 1000
  python -m train.fid samples/imagenet/samples.npz VIRTUAL_imagenet256_labeled.npz --json
  python -m train.fid samples/agentsd ILSVRC2012/val --image-size 512 --metrics fid --inception-weights weights.pth

GENERATED and REFERENCE are folders (searched to any depth), tar shards, .npz with arr_0 or with mu and sigma, or
.safetensors written by --save-statistics; REFERENCE may be the emoji themselves: emoji, emoji:test or emoji:all.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Measure images against a reference.", EXAMPLES)
    add = parser.add_argument
    add(
        "generated",
        metavar="GENERATED",
        help="generated images, or a model to draw them with: RUN, RUN@STEP, a pipeline",
    )
    add("reference", metavar="REFERENCE", help="reference images")
    add(
        "--extractor",
        default="inception",
        metavar="NAME[=WEIGHTS]",
        help="inception, dinov2, clip or emoji; =WEIGHTS is a file for inception and emoji, a folder or hub id for "
        "dinov2 and clip (default inception)",
    )
    add(
        "--inception-weights", metavar="FILE", help="Inception weights in torch-fidelity's layout (default: downloaded)"
    )
    add(
        "--metrics",
        type=metric_names,
        nargs="+",
        default=[METRICS],
        metavar="NAME",
        help=f"of {', '.join(METRICS)}; fd is fid, kd is kid, cmmd is mmd (default: all)",
    )
    add("--intervals", type=cli.whole_number(2), default=0, metavar="N", help="spread of distances over N resamples")
    add("--extrapolate", action="store_true", help="also the Fréchet distance at infinitely many images")
    add(
        "--num-pictures",
        type=cli.whole_number(2),
        default=2048,
        metavar="N",
        help="images drawn of a model (default 2048)",
    )
    add("--samples", type=Path, metavar="DIR", help="folder of the images drawn of a model (default: samples/MODEL)")
    add("--image-size", type=cli.whole_number(1), metavar="S", help="crop all images to squares of S, as ADM does")
    add("--classes", help="classes of the emoji, separated by commas (default: those of GENERATED's manifest, or all)")
    add("--cache", type=Path, help="folder of statistics (default: attngen/statistics in the user's cache)")
    add("--no-cache", action="store_true", help="neither read nor write cached statistics")
    add("--save-statistics", type=Path, metavar="FILE", help="write REFERENCE's statistics, .safetensors")
    add(
        "--json",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="write a JSON file (default: beside GENERATED)",
    )
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    add("--threads", type=cli.whole_number(1), help="CPU threads (default: torch's)")
    add("--workers", type=cli.whole_number(1), default=4, metavar="N", help="threads that decode (default 4)")
    options = parser.parse_args(argv)
    options.metrics = tuple(dict.fromkeys(name for names in options.metrics for name in names))
    if options.inception_weights and options.extractor != "inception":
        parser.error("--inception-weights is for --extractor inception")
    if options.save_statistics and options.save_statistics.suffix != ".safetensors":
        parser.error(f"--save-statistics must end in .safetensors, got {options.save_statistics}")
    return options


def metric_names(text: str) -> tuple[str, ...]:
    """An argument type: names of metrics separated by commas."""
    names = [part.strip().lower() for part in text.split(",")]
    for name in names:
        if name not in METRICS and name not in ALIASES:
            known = ",".join((*METRICS, *ALIASES))
            raise argparse.ArgumentTypeError(f"{name!r} is not a metric; expected some of {known}")
    return tuple(ALIASES.get(name, name) for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return cli.run(PROGRAM, lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    draw_generated(options)
    try:
        result = fid(options)
    except ImportError as error:
        raise cli.UserError(f"train.fid needs torch-fidelity: pip install 'attngen[fid]' ({error})") from error
    except ValueError as error:
        raise cli.UserError(str(error)) from error
    print(table(result))
    if options.json is not None:
        from train.loop.checkpoint import write_json

        path = json_path(options)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        print(path)


def draw_generated(options: argparse.Namespace) -> None:
    """Where GENERATED is a model, draw its images as `train.sample` does by default, and measure these.

    Raises:
        UserError: if the model cannot be used, or the folder holds other images.
    """
    from pipelines.engine.runs import is_checkpoint, resolve

    model = Path(resolve(options.generated))
    if not is_checkpoint(model) and not (model / "model_index.json").is_file():
        return
    from train import sample

    out = options.samples or Path("samples") / Path(options.generated).name
    labels = "data" if options.reference.partition(":")[0] == "emoji" else "random"
    words = ["--model", options.generated, "--num-pictures", str(options.num_pictures), "--labels", labels]
    words += [] if options.device is None else ["--device", options.device]
    done = sample.sample(sample.parse_arguments([*words, "--out", str(out)]))
    if done.get("missing"):
        raise cli.UserError(f"{out} lacks {done['missing']} images; run the same command again to continue")
    options.generated = str(out)


def json_path(options: argparse.Namespace) -> Path:
    """The file of --json: as given, or beside what was measured."""
    if options.json != Path():
        return options.json
    generated = Path(options.generated)
    return generated / "fid.json" if generated.is_dir() else generated.with_name(f"{generated.stem}.fid.json")


def fid(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the options ask for.

    Args:
        options: of `parse_arguments`.

    Returns:
        The numbers by name, and what they are of: JSON values.

    Raises:
        ValueError: if an input cannot be measured; all inputs are checked before anything is downloaded or computed.
        ImportError: if torch-fidelity is not installed.
        OSError: if weights cannot be downloaded.
    """
    import torch_fidelity  # noqa: F401  # before hours of reading

    from train.metrics.extractors import make_extractor, split_extractor
    from train.metrics.measure import default_cache, measure_input, write_measured
    from train.metrics.numbers import compare, facts_of, library_versions
    from train.metrics.sets import open_input

    name, weights = split_extractor(options.extractor)
    device = cli.prepare_device(options)
    if device.type == "mps":  # no double precision there
        device = "cpu"
    generated = open_input(options.generated, options.image_size, options.workers)
    check_input(generated)
    reference = open_reference(options, generated)
    check_input(reference)
    check_pair(generated, reference)
    extractor = make_extractor(name, weights or options.inception_weights, device)
    for given in (generated, reference):
        if given.pictures is not None:
            extractor.check_size(given.pictures.size)

    cache = None if options.no_cache else options.cache or default_cache()
    sets = [measure_input(given, extractor, cache, bar("features", given)) for given in (reference, generated)]
    if options.save_statistics:
        write_measured(options.save_statistics, sets[0])
    result = compare(sets[1], sets[0], extractor, options.metrics, options.intervals, options.extrapolate)
    return {
        **result,
        "generated": facts_of(sets[1]),
        "reference": facts_of(sets[0]),
        "image_size": options.image_size,
        "preprocessing": extractor.preprocessing,
        "versions": library_versions(),
    }


def check_input(given: Given) -> None:
    """Read every picture of an input once.

    Raises:
        ValueError: if one is broken or of another size, there are fewer than 2, or a file holds no statistics.
    """
    from train.metrics.sets import is_statistics

    if given.statistics is not None and not is_statistics(given.statistics):
        raise ValueError(f"{given.name} holds no statistics; make them with --save-statistics")
    if given.pictures is not None:
        given.pictures.check(bar("checking", given))


def check_pair(generated: Given, reference: Given) -> None:
    """Raise ValueError for pictures of two sizes, which differ by that alone."""
    if generated.pictures is None or reference.pictures is None:
        return
    a, b = generated.pictures.size, reference.pictures.size
    if a != b:
        raise ValueError(
            f"{generated.name} has images of {a[1]} x {a[0]} pixels and {reference.name} of {b[1]} x {b[0]}; "
            "crop both to one size by --image-size"
        )


def bar(task: str, given: Given) -> Callable[[Any], Any]:
    """A progress bar over pictures, where someone is watching."""
    from tqdm import tqdm

    total = given.pictures.count if given.pictures is not None and given.pictures.count else None
    return lambda pictures: tqdm(pictures, desc=f"{task} {given.name}", total=total, disable=None, leave=False)


def open_reference(options: argparse.Namespace, generated: Given) -> Given:
    """The second argument: the emoji in the size and classes of the first, or an input.

    Raises:
        ValueError: if it cannot be.
    """
    from train.metrics.sets import EMOJI, EmojiSet, Given, open_input

    name, _, split = options.reference.partition(":")
    if name != EMOJI or Path(options.reference).exists():
        return open_input(options.reference, options.image_size, options.workers)
    if generated.pictures is None:
        raise ValueError("the emoji are compared with images, whose size they take; GENERATED has statistics only")
    classes, labels = manifest_facts(Path(options.generated))
    if options.classes:
        classes = [part.strip() for part in options.classes.split(",")]
    split = split or "train"
    if labels is not None and classes is not None:
        import torch

        from train.metrics.frechet import warn_of_mix

        warn_of_mix(torch.tensor(labels), generated.pictures.count, classes, split)
    side = min(generated.pictures.size[0], 64)
    if generated.pictures.size[0] > side:
        raise ValueError(
            f"the emoji have 64 pixels a side; give --image-size 64 for images of {generated.pictures.size[0]}"
        )
    return Given(options.reference, EmojiSet(split, side, classes))


def manifest_facts(folder: Path) -> tuple[list[str] | None, list[int] | None]:
    """Names of the classes, and the labels, of a set of train.sample; None where there are none."""
    try:
        names = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["settings"]["id2label"]
        lines = (folder / "pictures.jsonl").read_text(encoding="utf-8").splitlines()
        return [names[str(n)] for n in range(len(names))], [int(json.loads(line)["label"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def table(result: Mapping[str, Any]) -> str:
    """The numbers as text, a line each."""
    lines = []
    for name, value in result["values"].items():
        spread = result.get("spread", {}).get(name)
        lines.append((name, _shown(value) + (f" ± {spread:.4f} (resampled)" if spread is not None else "")))
    if "at_infinity" in result:
        lines.append(("at infinity", f"{result['at_infinity']:.4f} extrapolated to infinitely many generated images"))
    if "floor" in result:
        floor = result["floor"]
        lines.append(("its floor", f"{floor['value']:.4f} of {floor['pictures']:,} images as good as the reference"))
    lines += [(name, f"not computed: {reason}") for name, reason in result["skipped"].items()]
    for kind in ("generated", "reference"):
        facts = result[kind]
        count = "statistics" if facts["pictures"] is None else f"{facts['pictures']:,} pictures"
        lines.append((kind, ", ".join(part for part in (facts["name"], count, facts["size"]) if part)))
    lines.append(("extractor", result["extractor"]))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines)


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:.4f}"
    text = f"{value['mean']:.5f} ± {value['std']:.5f}"
    if "subset_size" in value:
        text += f" (subsets of {value['subset_size']:,})"
    return text + (f", {value['all_pairs']:.5f} over all pairs" if "all_pairs" in value else "")


if __name__ == "__main__":
    sys.exit(main())
