"""Train a small SiT on the emoji data set: python -m train.sit --preset emoji --out runs/emoji

Every random draw is a function of the seed and the step, so a run that was stopped and resumed equals one that was not.
Works on a CPU, a GPU, or several processes under `accelerate launch`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.presets import PRESETS, TrainingConfig

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from attngen.models import SiTTransformer2DModel
    from train.emoji import EmojiDataset


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, TrainingConfig]:
    """Command line -> options of the program, and the configuration of the run."""
    parser = argparse.ArgumentParser(
        prog="python -m train.sit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="emoji", choices=list(PRESETS), help="recipe to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--max-minutes", type=float, help="save and stop after this time; --resume goes on")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    for field in dataclasses.fields(TrainingConfig):
        _add_field(parser, field)
    options = parser.parse_args(argv)
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(TrainingConfig)}
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    try:
        return options, dataclasses.replace(PRESETS[options.preset], **overrides)
    except ValueError as error:
        parser.error(str(error))


def _add_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    flag, help_text = "--" + field.name.replace("_", "-"), f"default {field.default!r}, or the preset's"
    if isinstance(field.default, tuple):
        kind = str if field.name == "classes" else int
        parser.add_argument(flag, nargs="*", type=kind, default=None, help=help_text)
    else:
        parser.add_argument(flag, type=type(field.default), default=None, help=help_text)


def main(argv: Sequence[str] | None = None) -> int:
    options, config = parse_arguments(argv)
    if importlib.util.find_spec("accelerate") is None:
        print("train.sit: accelerate is not installed; pip install 'attngen[train]' brings it", file=sys.stderr)
        return 2
    try:
        return train(options, config)
    except ValueError as error:
        print(f"train.sit: {error}", file=sys.stderr)
        return 2


def train(options: argparse.Namespace, config: TrainingConfig) -> int:
    """Run the training; returns the exit code."""
    import torch
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from tqdm import tqdm

    from attngen.schedulers import InterpolantScheduler
    from train.checkpoint import list_checkpoints, write_json
    from train.emoji import EmojiDataset

    if options.threads:
        torch.set_num_threads(options.threads)
    checkpoints = options.out / "checkpoints"
    found = list_checkpoints(checkpoints)
    if found and not options.resume:
        raise ValueError(f"{options.out} holds a run already; pass --resume to go on, or another --out")

    data = EmojiDataset("train", image_size=config.image_size, classes=config.classes or None)
    accelerator = Accelerator(cpu=options.cpu, mixed_precision=options.mixed_precision)
    model = build_model(config, data)
    optimizers = build_optimizers(model, config)
    ema = EMAModel(model.parameters(), decay=config.ema_decay)
    scheduler = InterpolantScheduler(path=config.path, prediction_type=config.prediction_type)
    step = load(found[-1], model, optimizers, ema, config) if found else 0
    model, *optimizers = accelerator.prepare(model, *optimizers)
    ema.to(accelerator.device)
    run = Run(config, data, accelerator, model, optimizers, ema, scheduler, options.out)

    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "config.json", {**config.to_dict(), "id2label": data.id2label})
    stop = _StopOnSignal()
    started, first_step = time.monotonic(), step
    bar = tqdm(
        total=config.steps,
        initial=step,
        unit="step",
        disable=not (accelerator.is_main_process and sys.stderr.isatty()),
    )
    while step < config.steps:
        loss = run.step(step)
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}")
        elapsed = time.monotonic() - started
        run.log(step, loss, elapsed, images_per_second=(step - first_step) * config.batch_size / elapsed)
        out_of_time = options.max_minutes is not None and elapsed > options.max_minutes * 60
        if stop.requested or out_of_time:
            break
        if config.save_every and step % config.save_every == 0:
            run.save(step)
        if config.sample_every and step % config.sample_every == 0:
            run.sample(step)
    bar.close()
    run.save(step)
    if step >= config.steps:
        run.sample(step)
        run.export()
    elif accelerator.is_main_process:
        print(f"stopped after step {step} of {config.steps}; --resume goes on", file=sys.stderr)
    return 0


class _StopOnSignal:
    """SIGTERM and SIGINT finish the step, save and end the run instead of losing it."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                signal.signal(number, self._request)
            except ValueError:  # not in the main thread, where a caller handles signals
                return

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True


def build_model(config: TrainingConfig, data: EmojiDataset) -> SiTTransformer2DModel:
    """The network of a configuration, with weights drawn from its seed and the global RNG left alone."""
    import torch

    from attngen.models import SiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SiTTransformer2DModel(
            sample_size=config.image_size,
            patch_size=config.patch_size,
            in_channels=3,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            num_classes=data.num_classes,
            class_dropout_prob=config.class_dropout_prob,
            learn_sigma=False,
            attention=config.attention,
            num_mediators=config.num_mediators,
        )


def build_optimizers(model: SiTTransformer2DModel, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices inside the blocks and AdamW for all else."""
    import torch

    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and name.startswith("transformer_blocks.") and config.optimizer == "muon"
        (matrices if is_matrix else rest).append(parameter)
    decay = config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=config.learning_rate, weight_decay=decay)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=decay))
    return optimizers


def load(
    path: Path,
    model: SiTTransformer2DModel,
    optimizers: Sequence[torch.optim.Optimizer],
    ema: Any,
    config: TrainingConfig,
) -> int:
    """Fill everything from a checkpoint; returns the steps done.

    Raises:
        ValueError: if the checkpoint was made with another model or data.
    """
    from train.checkpoint import load_checkpoint, load_optimizer

    tensors, state = load_checkpoint(path)
    free = {
        "steps",
        "sample_every",
        "save_every",
        "keep",
        "sample_steps",
        "guidance_scale",
        "cooldown",
        "balance",
        "augment",
    }
    for name, value in config.to_dict().items():
        before = state["config"].get(name)
        before = tuple(before) if isinstance(before, list) else before
        if name not in free and before != value:
            raise ValueError(f"{path} was trained with {name} = {before!r}, not {value!r}")
    model.load_state_dict(tensors["model"])
    for i, optimizer in enumerate(optimizers):
        load_optimizer(optimizer, tensors[f"optimizer_{i}"])
    names = [name for name, _ in model.named_parameters()]
    ema.shadow_params = [tensors["ema"][name] for name in names]
    ema.optimization_step = state["ema_step"]
    return state["step"]


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, constant, linear cool-down over the last share of the steps."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cooldown_steps = max(1.0, config.cooldown * config.steps)
    return min(warmup, (config.steps - step) / cooldown_steps, 1.0)


@dataclasses.dataclass
class Run:
    """A training run in progress."""

    config: TrainingConfig
    data: EmojiDataset
    accelerator: Accelerator
    model: Any
    optimizers: Sequence[torch.optim.Optimizer]
    ema: Any
    scheduler: Any
    out: Path

    def step(self, step: int) -> float:
        """One optimiser step; returns the loss over all processes.

        Raises:
            ValueError: if the loss is not finite, naming the pictures of the batch.
        """
        import torch

        clean, noise, times, labels, drop, indices = self.batch(step)
        noisy = self.scheduler.add_noise(clean, noise, times)
        self.model.train()
        with self.accelerator.autocast():
            output = self.model(noisy, times, labels, num_mediators=self.num_mediators(step), drop_labels=drop).sample
        loss = self.scheduler.loss(output.float(), clean, noise, times).mean()
        if not torch.isfinite(loss):
            names = ", ".join(self.data.names[i] for i in indices[:8].tolist())
            raise ValueError(f"the loss is {loss.item()} in step {step}; the batch began with: {names}")
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        factor = learning_rate_factor(step, self.config)
        rates = (self.config.learning_rate, self.config.muon_learning_rate)
        for optimizer, rate in zip(self.optimizers, rates, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        reduced: Any = self.accelerator.reduce(loss.detach(), "mean")
        return reduced.item()

    @cached_property
    def weights(self) -> Tensor:
        """(N,) how often each picture is drawn, by the size of its class."""
        import torch

        sizes = torch.bincount(self.data.labels, minlength=self.data.num_classes).double()
        return sizes[self.data.labels] ** -self.config.balance

    def num_mediators(self, step: int) -> int | None:
        """The count of this step, the same on every process."""
        import torch

        from train.seeds import generator_for

        counts = self.config.mediator_counts
        if self.config.attention != "mediator" or not counts:
            return None
        return counts[int(torch.randint(len(counts), (), generator=generator_for(self.config.seed, "mediators", step)))]

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Pictures, noise, times, labels, dropped labels and indices of this process's part of step `step`."""
        import torch

        from train.emoji import augment
        from train.seeds import generator_for, sample_order

        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        indices = sample_order(config.seed, self.weights, step * config.batch_size, config.batch_size)
        generator = generator_for(config.seed, "batch", step)
        labels = self.data.labels[indices]
        clean = augment(self.data.pixel_values[indices], labels, generator, self.data.classes, config.augment)
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.rand(len(clean), generator=generator)
        if config.time_sampling == "logit-normal":
            times = torch.randn(len(clean), generator=generator).sigmoid()
        low, high = self.scheduler.train_interval
        times = low + (high - low) * times
        drop = torch.rand(len(clean), generator=generator) < config.class_dropout_prob
        everything = (clean, noise, times, labels, drop, indices)
        part = [x[rank::world].to(self.accelerator.device) for x in everything]
        return part[0], part[1], part[2], part[3], part[4], part[5]

    def averaged_model(self) -> SiTTransformer2DModel:
        """A copy of the network with the averaged weights, in evaluation mode."""
        import copy

        model = copy.deepcopy(self.accelerator.unwrap_model(self.model)).eval()
        self.ema.copy_to(model.parameters())
        return model

    def save(self, step: int) -> None:
        from train.checkpoint import optimizer_tensors, save_checkpoint

        if not self.accelerator.is_main_process:
            return
        model = self.accelerator.unwrap_model(self.model)
        names = [name for name, _ in model.named_parameters()]
        tensors = {
            "model": model.state_dict(),
            "ema": dict(zip(names, self.ema.shadow_params, strict=True)),
            **{f"optimizer_{i}": optimizer_tensors(o) for i, o in enumerate(self.optimizers)},
        }
        state = {"config": self.config.to_dict(), "ema_step": self.ema.optimization_step}
        save_checkpoint(self.out / "checkpoints", step, tensors, state, self.config.keep)

    def sample(self, step: int) -> None:
        """A grid of pictures at fixed seeds: a row a class, a group of columns for each number of mediators."""
        from train.samples import sample_grid

        if self.accelerator.is_main_process:
            sample_grid(self.averaged_model(), self.scheduler, self.config, self.data.id2label, self.out, step)

    def export(self) -> None:
        """The averaged weights as a pipeline folder, in half precision."""
        from train.samples import export_pipeline

        if self.accelerator.is_main_process:
            export_pipeline(self.averaged_model(), self.config, self.data.id2label, self.out / "pipeline")

    def log(self, step: int, loss: float, seconds: float, images_per_second: float) -> None:
        """Append a line to the run's log; `seconds` count from the start of this process."""
        if self.accelerator.is_main_process:
            record = {
                "step": step,
                "loss": round(loss, 6),
                "seconds": round(seconds, 2),
                "images_per_second": round(images_per_second, 2),
            }
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(main())
