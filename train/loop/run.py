"""A training run in progress: one optimiser step, its checkpoints, samples and report.

Every random draw is a function of the seed and the step, so nothing of it has to be saved, and a resumed run equals one
that was never stopped.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.cli.seeds import generator_for
from train.data.base import Data
from train.data.prefetch import Batch
from train.loop.averages import PowerAverage, snapshot_path
from train.loop.checkpoint import (
    checkpoint_tensors,
    clean_name,
    list_checkpoints,
    save_checkpoint,
    whole,
    write_json,
    write_tensors,
)
from train.loop.meter import Meter, append_line, bucket_sums, flat
from train.loop.preview import describe_pipeline, export_pipeline, sample_grid
from train.recipe.config import TrainingConfig
from train.recipe.objectives import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

    from attngen.sit.model import SiTTransformer2DModel
    from train.loop.distance import InceptionDistance


MOST_SKIPPED = 30
"""Steps in a row that float16's gradient scaler may skip: it starts at 65,536 and halves at each."""

CHECKPOINT, PIPELINE = "checkpoint", "pipeline"


class Draws(NamedTuple):
    """What a step draws beside its pictures, for this process's part of the batch.

    Attributes:
        noise: (b, C, H, W).
        times: (b,), the network's own.
        drop: (b,) bool, labels to replace by the null class.
        num_mediators: of this step, the same on every process, or None for the configured number.
    """

    noise: Tensor
    times: Tensor
    drop: Tensor
    num_mediators: int | None


class StepResult(NamedTuple):
    """What came of a step, over all processes.

    Attributes:
        loss: mean.
        stop: whether any process was asked to stop.
    """

    loss: float
    stop: bool


@dataclass
class Run:
    """A training run in progress.

    Attributes:
        config: of the run.
        data: what it trains on.
        accelerator: of accelerate.
        model: as accelerate prepared it.
        optimizers: AdamW, and Muon if asked for.
        ema: diffusers' average of the weights.
        averages: power-function averages.
        objective: forward process and loss.
        out: folder of the run.
        meter: of the log.
        distance: what FID needs, or None.
        failed: what could not be written the last time it was tried.
    """

    config: TrainingConfig
    data: Data
    accelerator: Accelerator
    model: Any
    optimizers: Sequence[torch.optim.Optimizer]
    ema: Any
    averages: Sequence[PowerAverage]
    objective: Objective
    out: Path
    meter: Meter
    distance: InceptionDistance | None = None
    failed: set[str] = field(default_factory=set, init=False)
    _skipped: int = field(default=0, init=False)

    @property
    def lost(self) -> bool:
        """Whether the newest weights are not on disk."""
        return bool(self.failed & {CHECKPOINT, PIPELINE})

    def step(self, batch: Batch, waited: float, stop: bool) -> StepResult:
        """One optimiser step.

        Args:
            batch: of this step and process.
            waited: seconds spent waiting for data so far.
            stop: whether this process was asked to stop.

        Raises:
            ValueError: if the loss or the gradient is not finite, naming the pictures of the batch and the last good
                checkpoint; the weights are those before the step.
        """
        draws: Draws = self.draw(batch) if batch.draws is None else batch.draws
        self.model.train()
        losses = self._backward(batch, draws)
        grad_norm = self._limit_gradients()
        levels = self.objective.noise_level(draws.times)
        told: Any = torch.cat(
            [
                losses.mean().reshape(1),
                torch.as_tensor([float(stop)], device=losses.device),
                bucket_sums(losses, levels),
            ]
        )
        reduced: Any = self.accelerator.reduce(told, "sum")
        told = reduced.cpu()
        loss = float(told[0]) / self.accelerator.num_processes
        self._check_finite(batch, loss, grad_norm)
        self._update(batch.step)
        self.meter.add(loss, grad_norm, told[2:], waited)
        return StepResult(loss, bool(told[1] > 0))

    def _backward(self, batch: Batch, draws: Draws) -> Tensor:
        """Gradients of the mean loss, part by part; returns the loss of each picture."""
        device, parts = self.accelerator.device, self.config.accumulate
        tensors = (batch.clean, draws.noise, draws.times, batch.labels, draws.drop)
        chunks = list(zip(*(tensor.to(device).chunk(parts) for tensor in tensors), strict=True))
        losses = []
        for i, (clean, noise, times, labels, drop) in enumerate(chunks):
            last = i == len(chunks) - 1
            with _synced(self.accelerator, self.model, last), self.accelerator.autocast():
                noisy = self.objective.add_noise(clean, noise, times)
                output = self.model(noisy, times, labels, num_mediators=draws.num_mediators, drop_labels=drop).sample
                loss = self.objective.loss(output.float(), clean, noise, times)
                self.accelerator.backward(loss.sum() / len(batch.clean))
            losses.append(loss.detach())
        return torch.cat(losses)

    def _limit_gradients(self) -> float:
        limit = self.config.max_grad_norm or float("inf")
        norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        return float("nan") if norm is None else float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _check_finite(self, batch: Batch, loss: float, grad_norm: float) -> None:
        if _finite(loss) and _finite(grad_norm):
            self._skipped = 0
            return
        # float16's gradient scaler skips a step whose gradient overflows, and that is no fault.
        self._skipped += 1
        if _finite(loss) and self.accelerator.scaler is not None and self._skipped < MOST_SKIPPED:
            return
        what = f"the loss is {loss}" if not _finite(loss) else f"the norm of the gradient is {grad_norm}"
        found = list_checkpoints(self.out / "checkpoints")
        kept = (
            f"the last good checkpoint is {found[-1]}, from which --init-from starts a run with other settings"
            if found
            else "there is no checkpoint yet"
        )
        raise ValueError(f"{what} in step {batch.step + 1}; {kept}; {self._note_batch(batch, what)}")

    def _note_batch(self, batch: Batch, what: str) -> str:
        """Write all pictures of a batch to a file; returns a few words on them."""
        names = self.data.names(batch.indices)
        first = ", ".join(names[:8])
        path = self.out / "bad-batch.json"
        if self.accelerator.is_main_process:
            note = {"step": batch.step + 1, "reason": what, "indices": batch.indices.tolist(), "pictures": names}
            try:
                write_json(path, note)
            except OSError:
                return f"the batch of {len(names)} began with: {first}"
        return f"its {len(names)} images are in {path} and begin with: {first}"

    def _update(self, step: int) -> None:
        factor = learning_rate_factor(step, self.config)
        rates = (self.config.learning_rate, self.config.muon_learning_rate)
        for optimizer, rate in zip(self.optimizers, rates, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        if self.accelerator.scaler is None:
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            self._scaled_update(self.accelerator.scaler)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        for average in self.averages:
            average.update(self.model.parameters(), step + 1)

    def _scaled_update(self, scaler: Any) -> None:
        """All optimisers step or none does, and the scale is updated once.

        accelerate's optimisers would each update it, after which the gradients of the next one count as scaled still.
        """
        if not self._skipped:
            for optimizer in self.optimizers:
                scaler.step(getattr(optimizer, "optimizer", optimizer))
        scaler.update()

    def draw(self, batch: Batch) -> Draws:
        """Noise, times, dropped labels and mediators of a step: drawn for the whole batch, of which a part is kept."""
        config, generator, count = self.config, batch.generator, len(batch.indices)
        part = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        noise = torch.randn((count, *batch.clean.shape[1:]), generator=generator)
        times = self.objective.draw_times(count, generator)
        num_mediators, times = self._mediators(batch.step, times, generator)
        drop = torch.rand(count, generator=generator) < config.class_dropout_prob
        return Draws(noise[part], times[part], drop[part], num_mediators)

    def _mediators(self, step: int, times: Tensor, generator: torch.Generator) -> tuple[int | None, Tensor]:
        counts, starts = self.config.mediator_counts, self.config.mediator_starts
        if self.config.attention != "mediator" or not counts:
            return None, times
        if starts:
            stage, times = self._one_stage(times, generator)
            return counts[stage], times
        own = generator_for(self.config.seed, "mediators", step)
        return counts[int(torch.randint(len(counts), (), generator=own))], times

    def _one_stage(self, times: Tensor, generator: torch.Generator) -> tuple[int, Tensor]:
        """Times of one stage: that of the first, and the others drawn again until they are in it.

        Over many steps a picture's times are distributed as without stages.
        """
        starts = torch.tensor(self.config.mediator_starts)

        def stages(times: Tensor) -> Tensor:
            return (self.objective.noise_level(times)[:, None] <= starts).sum(dim=1).clamp(min=1) - 1

        wanted, times = stages(times[:1]), times.clone()
        while (outside := stages(times) != wanted).any():
            times[outside] = self.objective.draw_times(int(outside.sum()), generator)
        return int(wanted), times

    # Outside of the step

    def averaged_model(self) -> SiTTransformer2DModel:
        """A new network with the averaged weights, in evaluation mode. Every process has to ask for it."""
        plain = plain_model(self.accelerator, self.model)
        names = [clean_name(name) for name, _ in self.model.named_parameters()]
        weights = {name: whole(tensor) for name, tensor in zip(names, self.ema.shadow_params, strict=True)}
        with torch.random.fork_rng(devices=[]):
            model = type(plain).from_config(plain.config)
        model.load_state_dict(weights)
        return model.to(self.accelerator.device).eval()

    def save(self, step: int) -> bool:
        """Write a checkpoint. A full disk keeps the old one and is told, not raised; returns whether it was written."""
        tensors, averages = checkpoint_tensors(self.model, self.optimizers, self.ema, self.averages)
        scaler = self.accelerator.scaler
        state = {
            "config": self.config.to_dict(),
            "ema_step": self.ema.optimization_step,
            "fingerprint": self.data.fingerprint,
            "id2label": self.data.id2label,
            "pipeline": describe_pipeline(plain_model(self.accelerator, self.model), self.objective, self.data),
            **({} if scaler is None else {"scaler": scaler.state_dict()}),
        }

        def write() -> None:
            save_checkpoint(self.out / "checkpoints", step, tensors, state, self.config.keep, self.config.keep_every)
            for std, named in averages.items():
                path = snapshot_path(self.out, step, std)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(path, named)

        return self._try_to_write(CHECKPOINT, f"the checkpoint of step {step}", write)

    def _try_to_write(self, kind: str, what: str, write: Callable[[], Any]) -> bool:
        """Write on the main process. A full disk is told, once until it is over, and returns False."""
        if not self.accelerator.is_main_process:
            return True
        try:
            write()
        except OSError as error:
            if kind == CHECKPOINT or kind not in self.failed:
                found = list_checkpoints(self.out / "checkpoints")
                kept = f"the checkpoint {found[-1].name} is kept" if found else "there is no checkpoint yet"
                print(f"train.sit: {what} could not be written ({error}); {kept}", file=sys.stderr)
            self.failed.add(kind)
            return False
        self.failed.discard(kind)
        return True

    def sample(self, step: int) -> None:
        """A grid of pictures at fixed seeds: a row a class, a group of columns for each number of mediators."""
        model = self.averaged_model()
        self._try_to_write(
            "samples",
            f"the images of step {step}",
            lambda: sample_grid(model, self.objective, self.config, self.data, self.out, step),
        )

    def evaluate(self, step: int, stopped: Callable[[], bool]) -> None:
        """The Fréchet distance, for each number of mediators that is trained; given up, and said so, once `stopped`."""
        from train.loop.distance import Stopped, frechet_distances

        model = self.averaged_model()
        if not self.accelerator.is_main_process:
            return
        try:
            found = frechet_distances(model, self.objective, self.config, self.data, self.distance, stopped)
        except Stopped:
            print(
                f"train.sit: the distance of step {step} was not measured because the run is stopping", file=sys.stderr
            )
            return
        self._tell(step, found)

    def export(self) -> None:
        """The averaged weights as a pipeline folder, in half precision."""
        model, folder = self.averaged_model(), self.out / "pipeline"
        self._try_to_write(PIPELINE, f"{folder}", lambda: export_pipeline(model, self.objective, self.data, folder))

    def log(self, step: int) -> None:
        """A line of the log, and the same to the trackers."""
        line = self.meter.line(step)
        line["learning_rate"] = self.config.learning_rate * learning_rate_factor(step - 1, self.config)
        broken = getattr(self.data, "broken", None)
        if broken is not None:
            line["unreadable"] = len(broken.reasons)
        self._tell(step, {k: v for k, v in line.items() if k != "step"})

    def _tell(self, step: int, record: dict[str, Any]) -> None:
        """Add a line to the log, and the same to the trackers."""
        path = self.out / "log.jsonl"
        self._try_to_write("log", f"{path}", lambda: append_line(path, {"step": step, **record}))
        self._try_to_write("tracker", "the tracker's log", lambda: self.accelerator.log(flat(record), step=step))

    def end_trackers(self) -> None:
        """Close the trackers. Every process has to call it."""
        try:
            self.accelerator.end_training()
        except OSError as error:  # of what a full disk left unwritten
            if "tracker" not in self.failed:
                print(f"train.sit: the tracker's log could not be written ({error})", file=sys.stderr)


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, constant, linear cool-down over the last share of the steps."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cooldown_steps = max(1.0, config.cooldown * config.steps)
    return min(warmup, (config.steps - step) / cooldown_steps, 1.0)


def plain_model(accelerator: Accelerator, model: nn.Module) -> Any:
    """The network without what accelerate and torch.compile put around it."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def _finite(number: float) -> bool:
    return number - number == 0


def _synced(accelerator: Accelerator, model: nn.Module, last: bool) -> Any:
    """Gradients are exchanged between processes with the last part of the batch only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(model)
