"""How a training run begins: from nothing, from the weights of another model, or from its own newest checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.data.base import Data
from train.loop.averages import PowerAverage
from train.loop.build import build_model, build_optimizers, compile_model, make_meter
from train.loop.checkpoint import clean_name, load_checkpoint, load_optimizer, place_like, step_of, write_json
from train.loop.distance import open_distance
from train.loop.meter import trim_log
from train.loop.record import record_start, tell_changes
from train.loop.run import Run
from train.recipe.config import TrainingConfig
from train.recipe.files import changes
from train.recipe.objectives import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

# Options that may change on resume: those that do not change the architecture or the objective.
FREE = frozenset(
    (
        "data steps sample_every save_every log_every keep keep_every sample_steps guidance_scale cooldown balance "
        "augment flip max_broken workers accumulate mixed_precision tf32 compile gradient_checkpointing fd_every "
        "fd_pictures fd_reference fd_weights init_from interpolation"
    ).split()
)

# The other processes wait while the first one draws samples and measures distances.
PATIENCE = timedelta(hours=12)


def start(
    options: argparse.Namespace, config: TrainingConfig, data: Data, objective: Objective, found: Sequence[Path]
) -> tuple[Run, int]:
    """Everything a run needs, and the steps that are done.

    Args:
        options: of the program.
        config: of the run.
        data: of the run.
        objective: of the run.
        found: its checkpoints, oldest first; it goes on from the last.

    Raises:
        ValueError: if the batch cannot be shared by the processes, a tracker is missing, the precision is none of the
            device's, or the checkpoint is damaged or of another run.
    """
    from diffusers.training_utils import EMAModel

    accelerator = _accelerator(options, config)
    check_same_checkpoint(accelerator, options.out, found)
    distance = open_distance(config, data, accelerator.device) if accelerator.is_main_process else None
    model = build_model(config, data, objective)
    checkpoint = _read(found[-1], config, data) if found else None
    if checkpoint is not None:
        model.load_state_dict(checkpoint[0]["model"])
    elif config.init_from:
        _warm_start(model, config, data, options.allow_pickle, accelerator.is_main_process)
    optimizers = build_optimizers(model, config, fused=accelerator.device.type == "cuda")
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    meter = make_meter(model, config, data, accelerator)
    if config.compile:
        compile_model(model, config)
    prepared: Any = accelerator.prepare(model, *optimizers)
    wrapped, *optimizers = prepared
    # On a GPU a few kernels for all tensors, rather than a few for each, which a small network would wait for.
    ema = EMAModel(wrapped.parameters(), decay=config.ema_decay, foreach=accelerator.device.type == "cuda")
    ema.to(accelerator.device)
    averages = [PowerAverage(wrapped.parameters(), std) for std in config.ema_stds]
    run = Run(config, data, accelerator, wrapped, optimizers, ema, averages, objective, options.out, meter, distance)
    step = 0 if checkpoint is None else _restore(run, *checkpoint)
    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "config.json", {**config.to_dict(), "id2label": data.id2label})
        trim_log(options.out / "log.jsonl", step)
        _record(options, run, step, {} if checkpoint is None else changes(checkpoint[1]["config"], config))
        if options.resume:
            where = f"resuming from {found[-1]}" if found else f"no checkpoint in {options.out}, starting from scratch"
            print(f"train.sit: {where}", file=sys.stderr)
    if accelerator.log_with:
        accelerator.init_trackers("attngen", config={k: str(v) for k, v in config.to_dict().items()})
    return run, step


def _record(options: argparse.Namespace, run: Run, step: int, changed: dict[str, list[Any]]) -> None:
    tell_changes("train.sit", changed)
    record_start(
        options.out,
        step,
        options.command,
        device=str(run.accelerator.device),
        data=run.data.fingerprint,
        changes=changed,
        processes=run.accelerator.num_processes,
    )


def _accelerator(options: argparse.Namespace, config: TrainingConfig) -> Accelerator:
    """accelerate's device, processes and precision; ValueError for what they cannot do."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=options.cpu,
        mixed_precision=config.mixed_precision,
        log_with=tracker_names(options.trackers) or None,
        project_dir=options.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"a batch of {config.batch_size} cannot be shared by {accelerator.num_processes} processes in "
            f"{config.accumulate} parts each; batch_size must be a multiple of {parts}"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") and accelerator.device.type == "cpu":
        raise ValueError(
            "ACCELERATE_USE_FSDP is set, and accelerate shards on GPUs only, but this run is on CPUs; unset it"
        )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', which needs a GPU, but this run is on the CPU; use 'bf16' or 'no'")
    set_matmul_precision(accelerator.device, config)
    return accelerator


def check_same_checkpoint(accelerator: Any, out: Path, found: Sequence[Path]) -> None:
    """Raise ValueError unless all processes see the same newest checkpoint; nodes with disks of their own do not."""
    mine = step_of(found[-1]) if found else 0
    steps = accelerator.gather(torch.tensor([mine], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        seen = ", ".join(map(str, steps))
        raise ValueError(
            f"the processes see different checkpoints in {out} (steps {seen}); put it on a disk they share"
        )


def set_matmul_precision(device: torch.device, config: TrainingConfig) -> None:
    """Of products of float32 matrices on a GPU, for this program."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")


def tracker_names(names: Sequence[str] | None) -> list[Any]:
    """The trackers asked for: by default tensorboard, where it is installed.

    Raises:
        ValueError: for one that accelerate does not know, or that is not installed.
    """
    if names is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(name) for name in get_available_trackers()]
    wanted = [name for name in names if name != "none"]
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS and name != "all":
            raise ValueError(f"unknown tracker {name!r}; known: none, all, {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in installed and name != "all":
            raise ValueError(
                f"the tracker {name!r} is not installed; install it, or choose from: {', '.join(['none', *installed])}"
            )
    return wanted


def _warm_start(model: Any, config: TrainingConfig, data: Data, allow_pickle: bool, told: bool) -> None:
    from train.warm.start import format_changes, warm_start

    try:
        changes = warm_start(
            model,
            config.init_from,
            interpolation=config.interpolation,
            id2label=data.id2label,
            allow_pickle=allow_pickle,
        )
    except ValueError as error:
        raise ValueError(str(error).replace("allow_pickle=True", "--allow-pickle")) from error
    if told:
        print(format_changes(changes), file=sys.stderr)


def _read(path: Path, config: TrainingConfig, data: Data) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """A checkpoint's tensors and state.

    Raises:
        ValueError: if it is damaged, or was made with another model or data.
    """
    tensors, state = load_checkpoint(path)
    for name, (was, value) in changes(state["config"], config).items():
        if name not in FREE:
            raise ValueError(
                f"{path} was trained with {name} = {was!r}, not {value!r}; resume with what it had, or start a new run "
                f"from it with --init-from {path} and another --out"
            )
    if state.get("fingerprint", data.fingerprint) != data.fingerprint:
        raise ValueError(
            f"{path} was trained on other data than {config.data!r}; to train on this data, start a new run from it "
            f"with --init-from {path} and another --out"
        )
    return tensors, state


def _restore(run: Run, tensors: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]) -> int:
    """Fill optimisers and averages from a checkpoint; returns the steps done."""
    names = [clean_name(name) for name, _ in run.model.named_parameters()]
    parameters = list(run.model.parameters())
    for i, optimizer in enumerate(run.optimizers):
        load_optimizer(optimizer, tensors[f"optimizer_{i}"])
    pairs = list(zip(names, parameters, strict=True))
    run.ema.shadow_params = [place_like(tensors["ema"][name], like) for name, like in pairs]
    run.ema.optimization_step = state["ema_step"]
    for i, average in enumerate(run.averages):
        average.shadow = [place_like(tensors[f"average_{i}"][name], like) for name, like in pairs]
    scaler = run.accelerator.scaler
    if scaler is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    return state["step"]
