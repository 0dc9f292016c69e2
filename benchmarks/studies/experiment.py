"""The same small SiT with each kind of attention: loss, Fréchet distance, speed; same size, data, steps and seed.

    python -m benchmarks.studies.experiment --list                 # the runs and their commands
    python -m benchmarks.studies.experiment --run                  # train and measure those that are not done
    python -m benchmarks.studies.experiment --run elastic --steps 5000 --out runs/long
    python -m benchmarks.studies.experiment --table                # a page and a plot of the results

A run that was stopped goes on, and one that was measured is not run again. The results are JSON, one file a run.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli
from train.recipe.config import TrainingConfig
from train.recipe.presets import PRESETS

if TYPE_CHECKING:
    import torch

    from train.data.base import Data

PRESET = "emoji-experiment"
ELASTIC = ("--attention", "mediator", "--num-mediators", "64", "--mediator-counts", "4", "16", "64")
RUNS: Mapping[str, tuple[str, ...]] = {
    "softmax": ("--attention", "softmax"),
    "mediators-4": ("--attention", "mediator", "--num-mediators", "4"),
    "mediators-16": ("--attention", "mediator", "--num-mediators", "16"),
    "mediators-64": ("--attention", "mediator", "--num-mediators", "64"),
    "elastic": ELASTIC,
    "elastic-input": (*ELASTIC, "--convolution", "input"),
    "linear": ("--attention", "linear"),
}
SPEED = "speed"
# Noises and times that the loss of every picture is measured at.
LOSS_DRAWS = 16
SPEED_ROUNDS = 7


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = cli.Parser("benchmarks.studies.experiment", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print the runs and their commands")
    what.add_argument("--run", nargs="*", metavar="NAME", help="train and measure these runs, or all")
    what.add_argument("--table", action="store_true", help="write the table and the plot from the results")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, help="folder of the results, one JSON file per run (default: OUT/results)"
    )
    parser.add_argument("--page", type=Path, help="what --table writes (default: OUT/experiment.md)")
    parser.add_argument("--steps", type=int, default=PRESETS[PRESET].steps, help="optimiser steps per run")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    options = parser.parse_args(argv)
    options.results = options.results or options.out / "results"
    options.page = options.page or options.out / "experiment.md"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse_arguments(argv)
    try:
        return _act(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"benchmarks.studies.experiment: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _act(options: argparse.Namespace) -> int:
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    if options.list:
        print("\n".join(f"{name}: {shlex.join(command(name, options))}" for name in RUNS))
        return 0
    if options.table:
        from benchmarks.studies.experiment_table import write_page

        print(write_page(options.results, options.page, list(RUNS)))
        return 0
    for name in _chosen(options.run):
        _run(name, options)
    return 0


def _chosen(names: Sequence[str]) -> list[str]:
    known = [*RUNS, SPEED]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            others = f"near it: {near[0]}" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown run {name!r}; {others}")
    return list(names) or known


def command(name: str, options: argparse.Namespace) -> list[str]:
    """The command of a run."""
    words = ["python", "-m", "train.sit", "--preset", PRESET, *RUNS[name]]
    if options.steps != PRESETS[PRESET].steps:
        words += ["--steps", str(options.steps)]
    return [*words, "--out", str(options.out / name), *(["--cpu"] if options.cpu else [])]


def _run(name: str, options: argparse.Namespace) -> None:
    """Train and measure a run, as far as that is not done."""
    from train.loop.checkpoint import write_json

    path = options.results / f"{name}.json"
    if path.is_file():
        print(f"{name}: done, in {path}", file=sys.stderr)
        return
    if name == SPEED:
        found = measure_speed()
    else:
        print(f"{name}: {shlex.join(command(name, options))}", file=sys.stderr)
        _train(command(name, options))
        found = {"name": name, "command": shlex.join(command(name, options)), **measure(options.out / name)}
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(path, {**found, **_machine()})


def _train(words: Sequence[str]) -> None:
    """Run the training program to its end; it goes on from its newest checkpoint.

    Raises:
        ValueError: if it fails.
    """
    done = subprocess.run([sys.executable, *words[1:], "--resume", "--trackers", "none"], check=False)
    if done.returncode:
        raise ValueError(f"the run failed with exit status {done.returncode}: {shlex.join(words)}")


def _machine() -> dict[str, Any]:
    import torch

    from pipelines.cli.provenance import machine

    return {"machine": machine("cuda" if torch.cuda.is_available() else "cpu")}


# Measuring


def measure(run: Path) -> dict[str, Any]:
    """Loss and Fréchet distance of a finished run's averaged weights, by number of mediators where several are trained.

    Raises:
        ValueError: if the run has no checkpoint or is not at its end.
    """
    from benchmarks.studies.plot import read_log
    from train.data.open import open_data
    from train.loop.build import build_model
    from train.loop.checkpoint import list_checkpoints, load_checkpoint
    from train.loop.distance import frechet_distances
    from train.recipe.objectives import make_objective

    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise ValueError(f"{run} has no complete checkpoint to measure")
    tensors, state = load_checkpoint(found[-1])
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state["config"].items()}
    config = TrainingConfig(**fields)
    if state["step"] < config.steps:
        raise ValueError(f"{run} is at step {state['step']} of {config.steps}; --run continues it")
    data = open_data(config.data, image_size=config.image_size, classes=config.classes)
    objective = make_objective(config.objective, path=config.path, time_sampling=config.time_sampling)
    model: Any = build_model(config, data, objective)
    model.load_state_dict(tensors["ema"])
    model.eval()
    log = [record for record in read_log(run) if "loss" in record]
    return {
        "config": config.to_dict(),
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "loss": {split: losses(model, config, objective, split) for split in ("train", "test")},
        "distance": frechet_distances(model, objective, config, data),
        "curve": [(record["step"], record["loss"]) for record in log],
    }


def losses(model: Any, config: TrainingConfig, objective: Any, split: str) -> dict[str, float]:
    """Mean loss over the emoji of a part at fixed noise and times, the same for every model, by number of mediators.

    Args:
        model: in evaluation mode.
        config: of its training.
        objective: likewise.
        split: "train" or "test".
    """
    return {_count_name(count): _loss(model, config, objective, split, count) for count in counts_of(config)}


def counts_of(config: TrainingConfig) -> tuple[int | None, ...]:
    """Numbers of mediators that a model was trained with; None for the one it is made for."""
    return (config.mediator_counts if config.attention == "mediator" else ()) or (None,)


def _count_name(count: int | None) -> str:
    return "" if count is None else f"{count} mediators"


def _loss(model: Any, config: TrainingConfig, objective: Any, split: str, count: int | None) -> float:
    import torch

    total, pictures = 0.0, 0
    with torch.no_grad():
        for clean, labels, noise, times in _draws(config, objective, split):
            noisy = objective.add_noise(clean, noise, times)
            output = model(noisy, times, labels, num_mediators=count).sample
            total += objective.loss(output, clean, noise, times).double().sum().item()
            pictures += len(clean)
    return round(total / pictures, 6)


def _draws(config: TrainingConfig, objective: Any, split: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches of pictures, labels, noise and times; one picture at several times, spread evenly by their own law."""
    import torch

    from pipelines.cli.seeds import generator_for
    from train.emoji.dataset import EmojiDataset, to_float

    emoji = EmojiDataset(split, image_size=config.image_size, classes=config.classes or None)
    for draw in range(LOSS_DRAWS if split == "test" else 1):
        for start in range(0, len(emoji), config.batch_size):
            part = slice(start, start + config.batch_size)
            clean, labels = to_float(emoji.pixel_values[part]), emoji.labels[part]
            generator = generator_for("experiment", split, draw, start)
            noise = torch.randn(clean.shape, generator=generator)
            yield clean, labels, noise, objective.draw_times(len(clean), generator)


def measure_speed(rounds: int = SPEED_ROUNDS) -> dict[str, Any]:
    """Pictures a second of every run's network, training (forward and backward) and forward, each in turn.

    On a CPU of one thread's own time, so that other programs on the machine count little.
    """
    import torch

    from train.sit import parse_arguments

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timed = {}
        for name, words in RUNS.items():
            _, config = parse_arguments(["--preset", PRESET, *words])
            for count in counts_of(config):
                timed[f"{name} {_count_name(count)}".strip()] = _Timed(config, count)
        for _ in range(rounds):
            for network in timed.values():
                network.run()
    finally:
        torch.set_num_threads(threads)
    return {"name": SPEED, "rounds": rounds, "threads": 1, "speed": {k: v.rates() for k, v in timed.items()}}


class _Timed:
    """A network whose steps are timed."""

    def __init__(self, config: TrainingConfig, count: int | None) -> None:
        import torch

        from train.data.open import open_data
        from train.loop.build import build_model
        from train.recipe.objectives import make_objective

        data: Data = open_data(config.data, image_size=config.image_size, classes=config.classes)
        model: Any = build_model(config, data, make_objective(config.objective))
        self.model, self.count, self.size = model, count, config.batch_size
        shape = (config.batch_size, data.channels, data.sample_size, data.sample_size)
        generator = torch.Generator().manual_seed(config.seed)
        self.inputs = torch.randn(shape, generator=generator), torch.rand(len(self), generator=generator)
        self.labels = torch.zeros(len(self), dtype=torch.long)
        self.drop = torch.zeros(len(self), dtype=torch.bool)
        self.seconds: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return self.size

    def run(self) -> None:
        """A training step without the optimiser, and a forward pass."""
        import time

        import torch

        options = {"num_mediators": self.count, "drop_labels": self.drop}
        start = time.process_time()
        self.model(*self.inputs, self.labels, **options).sample.square().mean().backward()
        middle = time.process_time()
        with torch.no_grad():
            self.model(*self.inputs, self.labels, **options)
        self.seconds.append((middle - start, time.process_time() - middle))
        self.model.zero_grad()

    def rates(self) -> dict[str, float]:
        """Median, and lowest and highest, pictures a second; the first round warms up and does not count."""
        import statistics

        rates = {}
        for name, column in zip(("training", "forward"), zip(*self.seconds[1:], strict=True), strict=True):
            found = [len(self) / seconds for seconds in column]
            rates |= {name: statistics.median(found), f"{name}_low": min(found), f"{name}_high": max(found)}
        return {name: round(value, 2) for name, value in rates.items()}


if __name__ == "__main__":
    sys.exit(main())
