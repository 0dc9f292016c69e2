"""A distillation in progress: its steps, checkpoints and log, and the file that comes out."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attngen.learned.modules import hidden_core
from pipelines.cli.signals import StopOnSignal
from train.distillation.pair import PREDICTION, TINY, Pair, measure, table
from train.loop.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
    write_json,
)
from train.loop.meter import append_line, trim_log
from train.loop.record import record_start, tell_changes

if TYPE_CHECKING:
    from attngen.learned.file import LearnedLayers
    from attngen.patch import AttentionPatch
    from train.distillation.inputs import Inputs

RUN_SUFFIX = ".run"
"""Of the folder with checkpoints and the log, beside the file that comes out."""

FREE = ("out", "threads", "cpu", "save_every")
"""Options that may change on resume: they decide nothing of the result."""

FULL_RATE = 16
"""Channels that a learned matrix may read before its learning rate is lowered in proportion."""


@dataclass
class Run:
    """A distillation in progress."""

    options: argparse.Namespace
    model: nn.Module
    patch: AttentionPatch
    layers: LearnedLayers
    inputs: Inputs

    def __post_init__(self) -> None:
        self.cores = self.patch.learned
        device = next(self.model.parameters()).device
        for core in self.cores.values():
            core.to(device, torch.float32).requires_grad_(True)
        mixed = self.options.mixed_precision == "bf16"
        context = (lambda: torch.autocast(device.type, torch.bfloat16)) if mixed else contextlib.nullcontext
        self.pair = Pair(self.model, self.patch, context)
        self.unsaved = self.unlogged = False
        self.optimizer = torch.optim.AdamW(self._groups(), weight_decay=0.0)
        self.folder = self.options.out.with_suffix(RUN_SUFFIX)
        self.before: dict[str, float] = {}
        self.before_options: dict[str, Any] = {}

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate."""
        groups: dict[float, list[Tensor]] = {}
        for core in self.cores.values():
            for name, parameter in core.named_parameters():
                groups.setdefault(self._rate(name, parameter), []).append(parameter)
        return [{"params": parameters, "lr": rate, "rate": rate} for rate, parameters in groups.items()]

    def _rate(self, name: str, parameter: Tensor) -> float:
        """AdamW moves every entry alike, so a matrix moves its output more the more channels it reads."""
        if name.startswith("projections."):
            return self.options.projection_rate
        is_matrix = name.startswith(("query_map.", "key_map.")) and name.endswith("weight") and parameter.ndim > 1
        return self.options.learning_rate * (min(1.0, FULL_RATE / parameter.shape[-1]) if is_matrix else 1.0)

    def run(self, checkpoint: Path | None) -> int:
        """Train from a checkpoint, or from nothing; measures before and after; returns the exit code."""
        with StopOnSignal() as stop:
            return self._run(checkpoint, stop)

    def _run(self, checkpoint: Path | None, stop: StopOnSignal) -> int:
        from tqdm import tqdm

        step = self.load(checkpoint) if checkpoint else 0
        held_out = self.inputs.held_out(self.options.measure)
        if not self.before:
            self.before = measure(self.pair, held_out)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", {**self.settings(), "arguments": self.arguments()})
        self._record(step)
        started, total = time.monotonic(), self.options.steps
        bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty())
        while step < total:
            losses = self.step(step)
            step += 1
            bar.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
            bar.update()
            self.log(step, losses, time.monotonic() - started)
            minutes = (time.monotonic() - started) / 60
            if stop.requested or (self.options.max_minutes is not None and minutes > self.options.max_minutes):
                break
            if step % self.options.save_every == 0 and step < total:
                self.save(step)
        bar.close()
        self.save(step)
        if step < total:
            print(f"stopped after step {step} of {total}; --resume {self.folder} continues", file=sys.stderr)
            return 1 if self.unsaved else 0
        after = measure(self.pair, held_out)
        print(table(self.before, after))
        write_json(self.options.out.with_suffix(".json"), {**self.settings(), "before": self.before, "after": after})
        self.layers.with_cores(self._hidden()).save(self.options.out, {**self.settings(), "errors": after})
        print(f"{self.options.out}: {self.layers.num_weights:,} weights of {len(self.cores)} layers")
        return 0

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns the loss and its parts.

        Raises:
            ValueError: if the loss or its gradient is not finite; the weights before it are saved.
        """
        calls, weight = self.options.accumulate, self.options.prediction_weight
        layers = prediction = 0.0
        for i in range(calls):
            for name, error, size in self.pair.squared_errors(self.inputs.call(step * calls + i)):
                relative = error / (size + TINY)
                share = weight if name == PREDICTION else 1 / len(self.cores)
                if not torch.isfinite(relative):
                    self._stop(step, f"the error of {name} is {relative.item()}")
                if share:
                    (relative * (share / calls)).backward()
                if name == PREDICTION:
                    prediction += relative.item() / calls
                else:
                    layers += relative.item() * share / calls
        norm = torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        if not torch.isfinite(norm):
            self._stop(step, f"the gradient is {norm.item()}")
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate_factor(step, self.options.steps, self.options.warmup_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": layers + weight * prediction, "layers": layers, PREDICTION: prediction}

    def _stop(self, step: int, reason: str) -> None:
        self.save(step)
        first, calls = step * self.options.accumulate, self.options.accumulate
        raise ValueError(
            f"{reason} in step {step + 1}, of the calls {first} to {first + calls - 1} of seed {self.options.seed}; "
            f"the weights before it are in {self.folder / 'checkpoints'}; try a lower --learning-rate and another --out"
        )

    def _hidden(self) -> dict[str, Any]:
        return {name: hidden_core(self.model.get_submodule(name)) for name in self.cores}

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        plain = {k: v for k, v in self.arguments().items() if k not in FREE}
        return {**plain, "method": self.layers.method.to_dict()}

    def arguments(self) -> dict[str, Any]:
        """The options of the command line, as JSON values."""
        given = {k: v for k, v in vars(self.options).items() if k not in ("resume", "max_minutes", "command")}
        return {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}

    def _record(self, step: int) -> None:
        """Note this start of the run, with the options that changed since its checkpoint."""
        now = json.loads(json.dumps(self.arguments()))
        changed = {k: [v, now[k]] for k, v in self.before_options.items() if k in now and now[k] != v}
        tell_changes("train.distill", changed)
        device = str(next(self.model.parameters()).device)
        record_start(
            self.folder, step, self.options.command, device=device, data=str(self.options.data), changes=changed
        )

    def log(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """Append a line to the run's log. A full disk is told once."""
        record = {"step": step, **{k: round(v, 8) for k, v in losses.items()}, "seconds": round(seconds, 2)}
        try:
            append_line(self.folder / "log.jsonl", record)
            self.unlogged = False
        except OSError as error:
            if not self.unlogged:
                print(f"train.distill: the log could not be written ({error})", file=sys.stderr)
            self.unlogged = True

    def save(self, step: int) -> None:
        """Write a checkpoint. A full disk keeps the old one and is told, not raised."""
        tensors = {
            "layers": {f"{name}/{n}": t for name, core in self.cores.items() for n, t in core.state_dict().items()},
            "optimizer": optimizer_tensors(self.optimizer),
        }
        state = {"settings": self.settings(), "arguments": self.arguments(), "before": self.before}
        folder = self.folder / "checkpoints"
        try:
            save_checkpoint(folder, step, tensors, state, keep=2)
            self.unsaved = False
        except OSError as error:
            found = list_checkpoints(folder)
            kept = f"the checkpoint {found[-1].name} is kept" if found else "there is no other checkpoint"
            print(
                f"train.distill: the checkpoint of step {step} could not be written ({error}); {kept}", file=sys.stderr
            )
            self.unsaved = True

    def load(self, path: Path) -> int:
        """Fill everything from a checkpoint; returns the steps done.

        Raises:
            ValueError: if it was made with other settings.
        """
        tensors, state = load_checkpoint(path)
        for name, value in json.loads(json.dumps(self.settings())).items():
            before = state["settings"].get(name)
            if before != value and name != "measure":
                raise ValueError(f"{path} was made with {name} = {before!r}, not {value!r}")
        for name, core in self.cores.items():
            prefix = f"{name}/"
            core.load_state_dict({k[len(prefix) :]: t for k, t in tensors["layers"].items() if k.startswith(prefix)})
        load_optimizer(self.optimizer, tensors["optimizer"])
        self.before, self.before_options = state["before"], state.get("arguments", {})
        trim_log(self.folder / "log.jsonl", state["step"])
        return state["step"]


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear rise, then half a cosine down to a twentieth."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
