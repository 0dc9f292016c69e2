"""A training run of an autoencoder in progress: its step, checkpoints, measurements and export."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.cli.seeds import generator_for
from train.autoencoder.config import VaeConfig
from train.autoencoder.images import Images, make_batch
from train.autoencoder.model import build_optimizers, build_vae, latent_loss, latent_statistics, reconstruction_loss
from train.autoencoder.quality import measure, reconstruct, write_sheet
from train.loop.checkpoint import (
    checkpoint_tensors,
    list_checkpoints,
    load_checkpoint,
    load_optimizer,
    save_checkpoint,
    write_json,
)
from train.loop.meter import append_line, trim_log
from train.loop.preview import write_pipeline
from train.loop.record import record_start, tell_changes
from train.recipe.files import changes

# Options that may change on resume.
FREE = ("data", "steps", "minutes", "log_every", "eval_every", "eval_images", "save_every", "keep")


@dataclass
class VaeRun:
    """A training run of an autoencoder in progress.

    Attributes:
        config: of the run.
        images: it trains on and is measured on.
        vae: the network.
        optimizers: AdamW and Muon.
        ema: diffusers' average of the weights.
        out: folder of the run.
        step: optimiser steps done.
        seconds: of training done, over all its parts.
        lost: whether the newest weights could not be written.
    """

    config: VaeConfig
    images: Images
    vae: Any
    optimizers: Sequence[torch.optim.Optimizer]
    ema: Any
    out: Path
    step: int = 0
    seconds: float = 0.0
    lost: bool = False
    _losses: list[float] = field(default_factory=list, init=False)
    _logged: tuple[int, float] = field(default=(0, 0.0), init=False)

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self.config.progress(self.step, self.seconds)

    @property
    def is_done(self) -> bool:
        """Whether the run is at its end."""
        return self.progress >= 1

    def train_step(self) -> float:
        """One optimiser step; returns the loss.

        Raises:
            ValueError: if the loss or a gradient is not finite; the weights are those before the step.
        """
        started, config = time.monotonic(), self.config
        whole = self.progress >= config.crop_share
        size = None if whole else config.crop_size
        batch = make_batch(self.images.train, config.seed, self.step, config.batch_size, size)
        noise = generator_for(config.seed, "latent noise", self.step)
        with _autocast(config):
            latents = self.vae.encode(batch, return_dict=False)[0]
            draws = torch.randn(latents.shape, generator=noise) * config.latent_noise
            decoded = self.vae.decode(latents + draws.to(latents.dtype), return_dict=False)[0]
        loss = reconstruction_loss(decoded, batch) + latent_loss(latents)
        loss.backward()
        self._check_finite(loss)
        self._update()
        self.step += 1
        self.seconds += time.monotonic() - started
        self._losses.append(float(loss.detach()))
        return self._losses[-1]

    def _check_finite(self, loss: Tensor) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.vae.parameters() if p.grad is not None])
        if torch.isfinite(loss) and torch.isfinite(norm):
            return
        found = list_checkpoints(self.out / "checkpoints")
        kept = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        what = f"the loss is {float(loss.detach())} and the norm of the gradient {float(norm)}"
        raise ValueError(f"{what} in step {self.step + 1}; {kept}; lower learning_rate and muon_learning_rate")

    def _update(self) -> None:
        factor = self.config.rate_factor(self.progress)
        rates = (self.config.learning_rate, self.config.muon_learning_rate)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.ema.step(self.vae.parameters())

    @contextlib.contextmanager
    def averaged(self) -> Any:
        """The network with the averaged weights, inside a `with` block."""
        self.ema.store(self.vae.parameters())
        self.ema.copy_to(self.vae.parameters())
        try:
            yield self.vae
        finally:
            self.ema.restore(self.vae.parameters())

    def evaluate(self, count: int | None = None) -> dict[str, Any]:
        """Measure the averaged weights on held-out images, evenly chosen: into the log and onto a sheet.

        Args:
            count: images, or None for all.
        """
        held, total = self.images.held_out, len(self.images.held_out)
        chosen = torch.linspace(0, total - 1, min(count or total, total)).long()
        with self.averaged() as vae:
            decoded = reconstruct(vae, held[chosen])
        found = measure(decoded, held[chosen], [self.images.names[i] for i in chosen.tolist()])
        self._record({"held_out": found})
        sheet = self.out / "samples" / f"step-{self.step:08d}.png"
        self._try(f"{sheet}", lambda: write_sheet(decoded, held[chosen], sheet, {"step": self.step, **found}))
        return found

    def log(self) -> None:
        """A line of the log on the steps since the last."""
        steps, seconds = self.step - self._logged[0], self.seconds - self._logged[1]
        line = {
            "loss": round(sum(self._losses) / max(1, len(self._losses)), 6),
            "seconds": round(self.seconds, 2),
            "images_per_second": round(steps * self.config.batch_size / max(seconds, 1e-9), 2),
            "learning_rate": self.config.learning_rate * self.config.rate_factor(self.progress),
        }
        self._logged, self._losses = (self.step, self.seconds), []
        self._record(line)

    def _record(self, record: dict[str, Any]) -> None:
        self._try("the log", lambda: append_line(self.out / "log.jsonl", {"step": self.step, **record}))

    def save(self) -> None:
        """Write a checkpoint; one that cannot be written is reported, and the run continues."""
        tensors, _ = checkpoint_tensors(self.vae, self.optimizers, self.ema, ())
        state = {
            "config": self.config.to_dict(),
            "ema_step": self.ema.optimization_step,
            "seconds": self.seconds,
            "fingerprint": self.images.fingerprint,
        }
        folder = self.out / "checkpoints"
        self.lost = not self._try(
            "the checkpoint", lambda: save_checkpoint(folder, self.step, tensors, state, self.config.keep)
        )

    def _try(self, what: str, write: Any) -> bool:
        """Write; returns whether it could be written."""
        try:
            write()
        except OSError as error:
            print(f"train.vae: {what} of step {self.step} could not be written ({error})", file=sys.stderr)
            return False
        return True

    def export(self) -> None:
        """Measure the averaged weights on all held-out images and write them as a diffusers folder in half precision.

        The mean and standard deviation of the latents' channels, over the training images, go into its configuration,
        `metrics.json` beside it has the numbers of the weights in full precision and as exported.
        """
        held = self.images.held_out
        found = self.evaluate()
        with self.averaged() as vae:
            weights = {name: tensor.half() for name, tensor in vae.state_dict().items()}
            mean, std = latent_statistics(vae, self.images.train)
        exported = build_vae(self.config)
        exported.load_state_dict(weights)  # half precision's values, in float32 to measure
        exported.register_to_config(latents_mean=mean, latents_std=std)
        in_half = measure(reconstruct(exported, held), held, self.images.names)
        metrics = {"step": self.step, "seconds": round(self.seconds, 1), "held_out": found, "held_out_fp16": in_half}

        def write() -> None:
            write_pipeline(exported.half(), self.out / "vae")
            write_json(self.out / "metrics.json", metrics)

        self.lost = not self._try("the exported autoencoder", write) or self.lost


def start(config: VaeConfig, images: Images, out: Path, command: str = "") -> VaeRun:
    """A run from its newest checkpoint, or from the beginning where there is none.

    Args:
        config: of the run.
        images: it trains on.
        out: its folder.
        command: that starts it, for its record.

    Raises:
        ValueError: if the checkpoint is damaged, or of another configuration or other images.
    """
    from diffusers.training_utils import EMAModel

    vae = build_vae(config)
    found = list_checkpoints(out / "checkpoints")
    checkpoint = _read(found[-1], config, images) if found else None
    if checkpoint is not None:
        vae.load_state_dict(checkpoint[0]["model"])
    optimizers = build_optimizers(vae, config)
    ema = EMAModel(vae.parameters(), decay=config.ema_decay, foreach=True)
    run = VaeRun(config, images, vae, optimizers, ema, out)
    if checkpoint is not None:
        tensors, state = checkpoint
        for i, optimizer in enumerate(optimizers):
            load_optimizer(optimizer, tensors[f"optimizer_{i}"])
        ema.shadow_params = [tensors["ema"][name].clone() for name, _ in vae.named_parameters()]
        ema.optimization_step = state["ema_step"]
        run.step, run.seconds = state["step"], state["seconds"]
        run._logged = run.step, run.seconds
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config.to_dict())
    trim_log(out / "log.jsonl", run.step)
    changed = {} if checkpoint is None else changes(checkpoint[1]["config"], config)
    tell_changes("train.vae", changed)
    record_start(out, run.step, command, device="cpu", data=images.fingerprint, changes=changed)
    return run


def _read(path: Path, config: VaeConfig, images: Images) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """A checkpoint's tensors and state; ValueError if it is of another run."""
    tensors, state = load_checkpoint(path)
    for name, (was, value) in changes(state["config"], config).items():
        if name not in FREE:
            raise ValueError(
                f"{path} was trained with {name} = {was!r}, not {value!r}; resume with what it had, or pass another"
                " --out"
            )
    if state["fingerprint"] != images.fingerprint:
        raise ValueError(f"{path} was trained on other images than {config.data!r}; pass another --out")
    return tensors, state


def _autocast(config: VaeConfig) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16")
