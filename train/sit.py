"""Train a SiT or DiT, with softmax, mediator or linear attention.

    python -m train.sit --preset emoji --out runs/emoji                            # about two hours on one core
    python -m train.sit --preset sit-s2-256-mediators --data latents/ --out runs/s2 --mixed-precision bf16 --compile
    accelerate launch --num_processes 8 -m train.sit --preset dit-xl2-256 --data latents/ --out runs/xl2

Every random draw is a function of the seed and the step, so a run that was stopped and resumed equals one that was not,
on any number of processes. SIGTERM, Ctrl+C and --max-minutes save and end it with exit status 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.presets import PRESETS, TrainingConfig

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from attngen.models import SiTTransformer2DModel
    from train.data import Data
    from train.objectives import Objective
    from train.run import Run
    from train.unet import ClassUNet

# What may change when a run goes on: nothing that decides what its weights are made of.
FREE = (
    *("data", "steps", "sample_every", "save_every", "log_every", "keep", "sample_steps", "guidance_scale", "cooldown"),
    *("balance", "augment", "flip", "max_broken", "workers", "accumulate", "mixed_precision", "compile"),
    *("gradient_checkpointing", "fd_every", "fd_pictures", "init_from", "interpolation"),
)
_FLOATS = ("mediator_starts", "ema_stds")


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, TrainingConfig]:
    """Command line -> options of the program, and the configuration of the run."""
    parser = argparse.ArgumentParser(
        prog="python -m train.sit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="emoji", metavar="NAME", help="recipe to start from; see --list-presets")
    parser.add_argument("--list-presets", action="store_true", help="name all recipes, and stop")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained and what it costs, and stop")
    parser.add_argument("--max-minutes", type=float, help="save and stop after this time; --resume goes on")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--allow-pickle", action="store_true", help="--init-from may be a pickled .pt file")
    parser.add_argument(
        "--trackers", nargs="*", metavar="NAME", help="of accelerate: wandb, … ; default tensorboard where installed"
    )
    recipe = parser.add_argument_group("the recipe", "every field of the preset can be overridden")
    for field in dataclasses.fields(TrainingConfig):
        _add_field(recipe, field)
    options = parser.parse_args(argv)
    if options.list_presets:
        print("\n".join(PRESETS))
        parser.exit()
    if options.preset not in PRESETS:
        near = difflib.get_close_matches(options.preset, PRESETS, n=3)
        parser.error(
            f"unknown preset {options.preset!r}; {'near it: ' + ', '.join(near) if near else '--list-presets'}"
        )
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(TrainingConfig)}
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    try:
        config = dataclasses.replace(PRESETS[options.preset], **overrides)
    except ValueError as error:
        parser.error(str(error))
    if not config.data:
        parser.error(f"the preset {options.preset!r} needs --data: pictures, or latents made by train.encode")
    return options, config


def _add_field(group: Any, field: dataclasses.Field[Any]) -> None:
    flag, help_text = "--" + field.name.replace("_", "-"), f"default {field.default!r}, or the preset's"
    if isinstance(field.default, tuple):
        kind = str if field.name == "classes" else float if field.name in _FLOATS else int
        group.add_argument(flag, nargs="*", type=kind, default=None, help=help_text)
    elif isinstance(field.default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
    else:
        group.add_argument(flag, type=type(field.default), default=None, help=help_text)


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
    """Run the training; returns the exit status."""
    import torch

    from train.checkpoint import list_checkpoints
    from train.data import open_data
    from train.objectives import make_objective

    if options.threads:
        torch.set_num_threads(options.threads)
    found = list_checkpoints(options.out / "checkpoints")
    if found and not (options.resume or options.dry_run):
        raise ValueError(f"{options.out} holds a run already; pass --resume to go on, or another --out")
    data = open_data(
        config.data,
        image_size=config.image_size,
        classes=config.classes,
        augment=config.augment,
        flip=config.flip,
        max_broken=config.max_broken,
    )
    config.check_tokens(data.sample_size)
    objective = make_objective(
        config.objective,
        path=config.path,
        weighting=config.weighting or None,
        time_sampling=config.time_sampling,
    )
    if options.dry_run:
        return dry_run(config, data, objective)
    run, step = start(options, config, data, objective, found)
    return loop(options, run, step)


def start(
    options: argparse.Namespace, config: TrainingConfig, data: Data, objective: Objective, found: Sequence[Path]
) -> tuple[Run, int]:
    """Everything a run needs, from its newest checkpoint if it has one, and the steps done."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    from train.checkpoint import write_json
    from train.ema import PowerAverage
    from train.run import Run

    trackers = _trackers(options.trackers)
    accelerator = Accelerator(
        cpu=options.cpu, mixed_precision=config.mixed_precision, log_with=trackers or None, project_dir=options.out
    )
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"a batch of {config.batch_size} cannot be shared by {accelerator.num_processes} processes in "
            f"{config.accumulate} parts each; batch_size must be a multiple of {parts}"
        )
    model = build_model(config, data, objective)
    checkpoint = _read(found[-1], config, data) if found else None
    if checkpoint is not None:
        model.load_state_dict(checkpoint[0]["model"])
    elif config.init_from:
        _warm_start(model, config, data, options.allow_pickle, accelerator.is_main_process)
    optimizers = build_optimizers(model, config, fused=accelerator.device.type == "cuda")
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    meter = _meter(model, config, data, objective, accelerator)
    if config.compile:
        # One graph a number of mediators: pooling to a size that is kept symbolic does not compile.
        model.compile(dynamic=False)
    prepared: Any = accelerator.prepare(model, *optimizers)
    wrapped, *optimizers = prepared
    ema = EMAModel(wrapped.parameters(), decay=config.ema_decay)
    ema.to(accelerator.device)
    averages = [PowerAverage(wrapped.parameters(), std) for std in config.ema_stds]
    run = Run(config, data, accelerator, wrapped, optimizers, ema, averages, objective, options.out, meter)
    step = 0 if checkpoint is None else _restore(run, *checkpoint)
    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "config.json", {**config.to_dict(), "id2label": data.id2label})
    if trackers:
        accelerator.init_trackers("attngen", config={k: str(v) for k, v in config.to_dict().items()})
    return run, step


def loop(options: argparse.Namespace, run: Run, step: int) -> int:
    """Step until the end, or until asked to stop; returns the exit status."""
    from tqdm import tqdm

    from train.data_prefetch import Prefetcher
    from train.seeds import generator_for, sample_order

    config, accelerator = run.config, run.accelerator
    weights = class_weights(run.data, config.balance)

    def schedule(step: int) -> tuple[torch.Tensor, torch.Generator]:
        indices = sample_order(config.seed, weights, step * config.batch_size, config.batch_size)
        return indices, generator_for(config.seed, "batch", step)

    part = slice(accelerator.process_index, None, accelerator.num_processes)
    stop, started, last_saved = _StopOnSignal(), time.monotonic(), step
    shown = accelerator.is_main_process and sys.stderr.isatty()
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=not shown)
    with Prefetcher(run.data, schedule, config.workers, part=part, start=step, stop=config.steps) as batches:
        while step < config.steps:
            out_of_time = options.max_minutes is not None and time.monotonic() - started > options.max_minutes * 60
            result = run.step(next(batches), batches.waited, stop.requested or out_of_time)
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{result.loss:.3f}")
            if step % config.log_every == 0 or step == config.steps or result.stop:
                run.log(step)
            if result.stop:
                break
            if config.save_every and step % config.save_every == 0 and run.save(step):
                last_saved = step
            if config.sample_every and step % config.sample_every == 0:
                run.sample(step)
            if config.fd_every > 0 and step % config.fd_every == 0 and step < config.steps:
                run.evaluate(step)
    bar.close()
    if last_saved != step:
        run.save(step)
    if step >= config.steps:
        run.sample(step)
        if config.fd_every >= 0:
            run.evaluate(step)
        run.export()
    elif accelerator.is_main_process:
        print(f"stopped after step {step} of {config.steps}; --resume goes on", file=sys.stderr)
    accelerator.end_training()
    return 0 if run.unsaved is None else 1


def dry_run(config: TrainingConfig, data: Data, objective: Objective) -> int:
    """Print what would be trained and what it costs."""
    from train.meter import training_flops

    model = build_model(config, data, objective)
    flops = training_flops(model, _example(model, data))
    weights = sum(parameter.numel() for parameter in model.parameters())
    size, kind = data.sample_size, "latents" if data.is_latent else "pictures"
    tokens, passes = (size // config.patch_size) ** 2, config.steps * config.batch_size / len(data)
    held = f"{len(data):,} {kind} of {data.channels} x {size} x {size} in {data.num_classes} classes"
    cost = "not countable" if flops is None else f"{flops / 1e9:.2f} GFLOP"
    lines = {
        "data": f"{held}, {config.data}",
        "network": f"{weights / 1e6:.2f} million weights, {tokens} tokens, {config.attention}",
        "training step": f"{cost} a picture, {config.batch_size} pictures",
        "whole run": f"{config.steps:,} steps, {passes:.1f} times the data",
    }
    print("\n".join(f"{name}: {value}" for name, value in lines.items()))
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


def build_model(config: TrainingConfig, data: Data, objective: Objective) -> SiTTransformer2DModel | ClassUNet:
    """The network of a configuration, with weights drawn from its seed and the global RNG left alone."""
    import torch

    from attngen.models import SiTTransformer2DModel

    if config.architecture == "unet":
        from train.unet import build_unet

        return build_unet(config, data)
    needed = objective.model_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SiTTransformer2DModel(
            sample_size=data.sample_size,
            patch_size=config.patch_size,
            in_channels=data.channels,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            num_classes=data.num_classes,
            class_dropout_prob=config.class_dropout_prob,
            attention=config.attention,
            num_mediators=config.num_mediators,
            feature_map=config.feature_map,
            convolution=config.convolution,
            **{**needed, "learn_sigma": needed["learn_sigma"] or config.learn_sigma},
        )


def build_optimizers(
    model: SiTTransformer2DModel | ClassUNet, config: TrainingConfig, fused: bool = False
) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices inside the blocks and AdamW for all else."""
    import torch

    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and ".transformer_blocks." in f".{name}" and config.optimizer == "muon"
        (matrices if is_matrix else rest).append(parameter)
    decay = config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.learning_rate, weight_decay=decay, fused=fused)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=decay))
    return optimizers


def class_weights(data: Data, balance: float) -> torch.Tensor:
    """(N,) how often each picture is drawn, by the size of its class."""
    import torch

    sizes = torch.bincount(data.labels, minlength=data.num_classes).double()
    return sizes[data.labels] ** -balance


def _trackers(names: Sequence[str] | None) -> list[Any]:
    if names is not None:
        return [name for name in names if name != "none"]
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


def _example(model: SiTTransformer2DModel | ClassUNet, data: Data) -> dict[str, Any]:
    import torch

    shape = (1, data.channels, data.sample_size, data.sample_size)
    return {"hidden_states": torch.empty(shape), "timestep": torch.zeros(1), "class_labels": torch.zeros(1).long()}


def _meter(
    model: SiTTransformer2DModel | ClassUNet,
    config: TrainingConfig,
    data: Data,
    objective: Objective,
    accelerator: Accelerator,
) -> Any:
    import torch

    from train.meter import Meter, matmul_flops, training_flops

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision, torch.float32)
    peak = matmul_flops(accelerator.device, dtype) * accelerator.num_processes
    return Meter(config.batch_size, training_flops(model, _example(model, data)), peak)


def _warm_start(model: Any, config: TrainingConfig, data: Data, allow_pickle: bool, told: bool) -> None:
    from train.warm_start import format_changes, warm_start

    changes = warm_start(
        model,
        config.init_from,
        interpolation=config.interpolation,
        id2label=data.id2label,
        allow_pickle=allow_pickle,
    )
    if told:
        print(format_changes(changes), file=sys.stderr)


def _read(path: Path, config: TrainingConfig, data: Data) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """A checkpoint's tensors and state.

    Raises:
        ValueError: if it is damaged, or was made with another model or data.
    """
    from train.checkpoint import load_checkpoint

    tensors, state = load_checkpoint(path)
    before = {**TrainingConfig().to_dict(), **state["config"]}
    for name, value in json.loads(json.dumps(config.to_dict())).items():
        was = json.loads(json.dumps(before[name]))
        if name not in FREE and was != value:
            raise ValueError(f"{path} was trained with {name} = {was!r}, not {value!r}")
    if state.get("fingerprint", data.fingerprint) != data.fingerprint:
        raise ValueError(f"{path} was trained on other data than {config.data!r} is now")
    return tensors, state


def _restore(run: Run, tensors: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]) -> int:
    """Fill optimisers and averages from a checkpoint; returns the steps done."""
    from train.checkpoint import clean_name, load_optimizer, place_like

    names = [clean_name(name) for name, _ in run.model.named_parameters()]
    parameters = list(run.model.parameters())
    for i, optimizer in enumerate(run.optimizers):
        load_optimizer(optimizer, tensors[f"optimizer_{i}"])
    pairs = list(zip(names, parameters, strict=True))
    run.ema.shadow_params = [place_like(tensors["ema"][name], like) for name, like in pairs]
    run.ema.optimization_step = state["ema_step"]
    for i, average in enumerate(run.averages):
        average.shadow = [place_like(tensors[f"average_{i}"][name], like) for name, like in pairs]
    return state["step"]


if __name__ == "__main__":
    sys.exit(main())
