"""Draw many pictures with a model, to measure it: python -m train.sample --num-pictures 10000 --out samples/emoji

Picture i is a function of the seed and i: it does not depend on the number of processes, the batch size, or on where a
run was stopped and resumed. Under torchrun or accelerate launch every process draws a part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli, samplers
from pipelines.cli.signals import StopOnSignal
from pipelines.methods.options import method_help

if TYPE_CHECKING:
    from train.sampling.files import SampleFolder
    from train.sampling.model import Sampler
    from train.sampling.subjects import Subject

PROGRAM = "train.sample"
EXAMPLES = """
examples:
  python -m train.sample --num-pictures 10000 --labels data --out samples/emoji
  torchrun --nproc_per_node 2 -m train.sample --num-pictures 10000 --model runs/mine --mediators 1:4,0.5:16 \\
      --out samples/mine
  python -m train.sample --num-pictures 50000 --model runs/imagenet --sampler sde --steps 250 --guidance-scale 1.5 \\
      --guidance-channels 3 --labels random --npz --out samples/imagenet
  python -m train.sample --num-pictures 2000 --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --class-names imagenet.txt --prompt-template "a photo of a {}" --steps 50 --height 512 --width 512 \\
      --method agentsd --out samples/agentsd
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Draw many images with a model, to measure it.", EXAMPLES)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the set; an unfinished set in it is continued")
    # Under torchrun the short form does not work: it takes it for the beginning of its own options.
    add("--num-pictures", "--num", dest="num", type=cli.whole_number(1), required=True, metavar="N", help="images")
    add("--seed", type=cli.whole_number(0), default=0, help="image i depends on the seed and i alone (default 0)")
    add("--format", choices=["png", "tar"], default="png", help="PNG files, or tar shards of 1,000 (default png)")
    add("--npz", action="store_true", help="write samples.npz too, as ADM's evaluation reads it")
    _add_model_arguments(parser)
    _add_subject_arguments(parser)
    add("--batch-size", type=cli.whole_number(1), metavar="N", help="images between two writes (default: one group)")
    add(
        "--group-size",
        type=cli.whole_number(1),
        metavar="N",
        help="images per call of the pipeline, always the same ones; rounding may depend on it "
        "(default: classes 16 on a CPU and 64 on a GPU, texts 1 and 4)",
    )
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU where there is one, one a process)")
    add("--threads", type=cli.whole_number(1), help="CPU threads per process (default: 1 for classes, else torch's)")
    add("--json", action="store_true", help="print what was done as JSON")
    options = parser.parse_args(argv)
    if (options.height is None) != (options.width is None):
        parser.error("--height and --width go together")
    if options.prompts and options.class_names:
        parser.error("--prompts and --class-names exclude each other")
    return options


def _add_model_arguments(parser: cli.Parser) -> None:
    add = parser.add_argument
    add("--model", help="pipeline folder, RUN or RUN@STEP of train.sit, hub id or file (default: the model that ships)")
    add("--config", help="for a single file: folder or hub id of a pipeline of its kind")
    add("--revision", help="branch, tag or commit on the hub")
    add("--variant", help="weights' variant, such as fp16")
    add("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    add("--dtype", choices=cli.DTYPES, default="auto", help="number format of the model (default: auto)")
    add("--method", metavar="NAME", help=f"attention: {method_help()}")
    add(
        "--mediators",
        metavar="COUNT",
        help="a count, time:count pairs (1:4,0.5:16), or counts by change of the sample (change:4,16,25)",
    )
    add("--steps", type=cli.whole_number(1), help="sampling steps (default: 25 for classes, else the pipeline's)")
    samplers.add_arguments(parser)
    add("--guidance-scale", type=cli.scale_number, metavar="S", help="(default: 1, off, for classes, else its own)")
    add("--guidance-channels", type=cli.whole_number(1), metavar="N", help="guide only the first N channels (SiT: 3)")
    add("--guidance-interval", type=interval, metavar="LOW:HIGH", help="guide only between these times, 1 is noise")
    add("--height", type=cli.whole_number(1), help="in pixels (default: as the model was trained)")
    add("--width", type=cli.whole_number(1), help="in pixels (default: as the model was trained)")


def _add_subject_arguments(parser: cli.Parser) -> None:
    add = parser.add_argument
    add(
        "--labels",
        default="balanced",
        metavar="HOW",
        help="balanced (default), data (the frequencies of the emoji), random (uniform), a class name, "
        "or a file with one label per line",
    )
    add("--prompts", type=Path, metavar="FILE", help="one per line, or .jsonl with prompt, negative_prompt, label")
    add("--class-names", type=Path, metavar="FILE", help="one class name per line, for prompts made of classes")
    add("--prompt-template", default="a photo of a {}", metavar="TEXT", help="for --class-names (default %(default)r)")
    add("--negative-prompt", metavar="TEXT", help="what not to draw")


def interval(text: str) -> tuple[float, float]:
    """An argument type: "0.1:0.9"."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval LOW:HIGH with 0 <= LOW <= HIGH <= 1")
    return low, high


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    stopped = StopOnSignal("this group")
    with stopped:
        code = cli.run(PROGRAM, lambda: _report(options, sample(options, stopped)))
    return cli.EXIT_INTERRUPTED if code == 0 and stopped.by == signal.SIGINT else code


def sample(options: argparse.Namespace, stopped: StopOnSignal | None = None) -> dict[str, Any]:
    """Draw what is missing of the set that the options describe.

    Args:
        options: of `parse_arguments`.
        stopped: tells when to stop.

    Returns:
        What was done, as it is printed; empty in processes other than the first.

    Raises:
        UserError: for options that cannot be, or a folder with other pictures.
        FloatingPointError: if a picture is not finite; those before it are kept.
    """
    from train.sampling.files import SampleFolder
    from train.sampling.model import Sampler, default_group

    stopped = stopped or StopOnSignal()
    processes = start_processes(options)
    sampler = Sampler(options, processes.device)
    if processes.device.type == "cpu" and sampler.draws_classes and options.threads is None:
        _one_thread()
    subjects = choose_subjects(sampler, options)
    group = options.group_size or default_group(sampler, options)
    settings = describe(sampler, options, subjects, group, processes.device)
    folder = SampleFolder(options.out, options.num)
    # The first process alone makes the folder; the others check what it wrote.
    if processes.is_main_process:
        folder.open(settings, write=True)
    processes.wait_for_everyone()
    folder.open(settings, write=False)
    from accelerate.utils import gather_object  # here, as start_processes has said it if there is no accelerate

    start = time.perf_counter()
    drawn = draw_share(sampler, folder, subjects, group, options, processes, stopped)
    seconds = time.perf_counter() - start
    drawn = sum(gather_object([drawn]))  # of all processes, which wait here for each other
    done: dict[str, Any] = {}
    if processes.is_main_process:
        done = finish(folder, sampler, subjects, settings, options) | {"drawn": drawn, "seconds": round(seconds, 2)}
    processes.wait_for_everyone()
    return done


def start_processes(options: argparse.Namespace) -> Any:
    """accelerate's state: which process this is, of how many, and on which device.

    Raises:
        UserError: if accelerate is not installed, or there is no such device.
    """
    from datetime import timedelta

    try:
        from accelerate import PartialState
    except ImportError as error:
        raise cli.UserError("train.sample needs accelerate: pip install 'attngen[train]'") from error
    chosen = cli.prepare_device(options)
    # Processes that finish early wait for the others, for days if they have to.
    state = PartialState(cpu=chosen.type == "cpu", timeout=timedelta(days=30))
    if options.device is not None and state.num_processes == 1:
        state.device = chosen
    return state


def _one_thread() -> None:
    """More processes are a better use of cores than threads in small matrices, and pictures must not depend on it."""
    import torch

    torch.set_num_threads(1)


def choose_subjects(sampler: Sampler, options: argparse.Namespace) -> list[Subject]:
    """What each picture shows.

    Raises:
        UserError: if the options do not fit the kind of model.
    """
    from train.sampling.subjects import Subject, choose_labels, class_prompts, read_lines, read_prompts, repeat

    if sampler.draws_classes:
        if options.prompts or options.class_names or options.negative_prompt:
            raise cli.UserError(f"{sampler.name} draws classes, not texts; choose them by --labels")
        labels = choose_labels(
            options.labels, options.num, options.seed, sampler.id2label, sampler.num_classes, sampler.find_label
        )
        return [Subject(label) for label in labels]
    if options.prompts:
        return repeat(read_prompts(options.prompts), options.num, options.negative_prompt)
    if not options.class_names:
        raise cli.UserError(f"{sampler.name} draws texts; give --prompts FILE, or --class-names FILE")
    names = read_lines(options.class_names)
    prompts = class_prompts(names, options.prompt_template)
    labels = choose_labels(
        options.labels, options.num, options.seed, dict(enumerate(names)), len(names), lambda text: _line(names, text)
    )
    return [replace(prompts[label], negative_prompt=options.negative_prompt) for label in labels]


def _line(names: Sequence[str], text: str) -> int:
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise cli.UserError(f"{text!r} is not a class; expected 0 to {len(names) - 1} or a line of --class-names")


def describe(
    sampler: Sampler, options: argparse.Namespace, subjects: Sequence[Subject], group: int, device: Any
) -> dict[str, Any]:
    """Everything that decides a picture, and the names of the classes: JSON values."""
    import torch

    from pipelines.cli.provenance import versions
    from train.sampling.subjects import subjects_hash

    scheduler = sampler.pipe.scheduler
    method = options.method
    if method and Path(method).is_file():
        method = f"{Path(method).name} {hashlib.sha256(Path(method).read_bytes()).hexdigest()[:10]}"
    settings = {
        "model": sampler.name,
        "model_hash": sampler.hash,
        "pipeline": type(sampler.pipe).__name__,
        "revision": options.revision,
        "num": options.num,
        "seed": options.seed,
        "labels": options.labels if options.prompts is None else None,
        "prompt_template": options.prompt_template if options.class_names else None,
        "subjects": subjects_hash(subjects),
        "method": method,
        "mediators": options.mediators,
        "scheduler": type(scheduler).__name__,
        "scheduler_config": hashlib.sha256(json.dumps(dict(scheduler.config), default=str).encode()).hexdigest()[:10],
        "sampler": scheduler.config.get("sampler"),
        "solver": scheduler.config.get("solver"),
        **{name: value for name, value in sampler.arguments.items() if name != "num_mediators"},
        "format": options.format,
        "group_size": group,
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": versions(),
        "id2label": {str(number): name for number, name in sampler.id2label.items()} or None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def draw_share(
    sampler: Sampler,
    folder: SampleFolder,
    subjects: Sequence[Subject],
    group: int,
    options: argparse.Namespace,
    processes: Any,
    stopped: StopOnSignal,
) -> int:
    """Draw the missing pictures of this process's groups; returns how many it drew."""
    from tqdm import tqdm

    rank, world = processes.process_index, processes.num_processes
    groups = [range(first, min(first + group, len(subjects))) for first in range(0, len(subjects), group)][rank::world]
    present = folder.present([index for part in groups for index in part])
    waiting = [part for part in groups if not present.issuperset(part)]
    every = max(1, (options.batch_size or group) // group)
    drawn, pictures = 0, {}
    total = sum(len(part) for part in groups)
    with tqdm(total=total, initial=len(present), desc="pictures", disable=None if rank == 0 else True) as bar:
        try:
            for number, part in enumerate(waiting, 1):
                if stopped.by is not None:
                    break
                made = draw_group(sampler, subjects, part, group, options.seed)
                _compare(folder, {i: made[i] for i in part if i in present})
                pictures |= {i: made[i] for i in part if i not in present}
                if number % every == 0:
                    drawn += _write(folder, f"{rank}-of-{world}", pictures, bar)
        finally:  # what was drawn before a failure is kept
            drawn += _write(folder, f"{rank}-of-{world}", pictures, bar)
    return drawn


def _write(folder: SampleFolder, process: str, pictures: dict[int, bytes], bar: Any) -> int:
    count = len(pictures)
    if pictures:
        folder.add(process, pictures)
        pictures.clear()
        bar.update(count)
    return count


def draw_group(
    sampler: Sampler, subjects: Sequence[Subject], part: Sequence[int], group: int, seed: int
) -> dict[int, bytes]:
    """PNG files by number of one group.

    The last group is filled up with pictures that are thrown away: matrix products of another size round differently.

    Raises:
        FloatingPointError: if a picture is not finite, naming it.
    """
    from train.sampling.files import png_bytes
    from train.sampling.subjects import picture_seed

    numbers = range(part[0], part[0] + group)
    shown = [subjects[min(index, len(subjects) - 1)] for index in numbers]
    try:
        images = sampler.draw(shown, [picture_seed(seed, index) for index in numbers])
    except FloatingPointError as error:
        index = part[0] + error.args[1]
        raise FloatingPointError(
            f"image {index} is not finite and was not written; try --dtype float32 or another --method"
        ) from error
    return {index: png_bytes(pixels) for index, pixels in zip(part, images, strict=False)}


def _compare(folder: SampleFolder, again: Mapping[int, bytes]) -> None:
    """Warn if pictures that are there come out otherwise now: then the set would be of two kinds."""
    import warnings

    from train.sampling.files import sha256

    different = [index for index, content in again.items() if sha256(content) != folder.hash_of(index)]
    if different:
        warnings.warn(
            f"image {different[0]} differs from its first drawing; was that on another machine?",
            stacklevel=2,
        )


def finish(
    folder: SampleFolder,
    sampler: Sampler,
    subjects: Sequence[Subject],
    settings: Mapping[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Pack and list a complete set; says what is missing of another."""
    from train.sampling.pack import NPZ, pack_shards, write_npz

    folder.reload()
    missing = len(folder.missing())
    done: dict[str, Any] = {"folder": str(folder.path), "pictures": folder.count - missing, "missing": missing}
    if missing:
        return done
    if options.format == "tar":
        pack_shards(folder, subjects)
    folder.write_list(subjects, options.seed, sampler.id2label, packed=options.format == "tar")
    if options.npz:
        done["npz"] = str(folder.path / NPZ)
        write_npz(folder, subjects)
    folder.write_manifest(settings, complete=True)
    folder.drop_journal()
    return done


def _report(options: argparse.Namespace, done: Mapping[str, Any]) -> None:
    if not done:
        return
    if options.json:
        print(json.dumps(done))
    elif done["missing"]:
        print(
            f"{done['folder']}: {done['pictures']} images, {done['missing']} missing; "
            "run the same command again to continue"
        )
    else:
        print(f"{done['folder']}: {done['pictures']} images, {done['drawn']} drawn now, {done['seconds']:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
