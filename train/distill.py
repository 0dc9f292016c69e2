"""Learn cheap attention for a model that has softmax: python -m train.distill --model FOLDER --out layers.safetensors

The model is its own teacher and stays as it is. Each layer learns to give the exact layer's output for the exact
layer's input, and all together to give the exact model's prediction. The file that comes out is loaded onto the model
by attngen.apply(pipe, "layers.safetensors").
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attngen.learned import LearnedLayers
    from attngen.methods.learned import LearnedMethod
    from attngen.patch import AttentionPatch
    from train.distill_inputs import Call, Inputs

PREDICTION = "prediction"
FULL_RATE = 16
"""Channels that a learned matrix may read before its learning rate is lowered in proportion."""
_TINY = 1e-12

EXAMPLES = """
examples:
  python -m train.distill --model runs/mine/pipeline --method mediator:16 --data emoji --steps 500 --out m16.safetensors
  python -m train.distill --model stable-diffusion-v1-5/stable-diffusion-v1-5 --method linear --data self \\
      --prompts prompts.txt --steps 5000 --mixed-precision bf16 --out linear.safetensors
methods:
  mediator[:COUNT][,convolution=values|input]   agents with learned biases, scales and convolution (16)
  linear[,feature_map=...][,maps=...][,...]     linear attention with maps of each head; options of LearnedLinear
  linfusion[,reduction=...]                     LinFusion's generalised linear attention
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.distill",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id of a pipeline, or folder of a SiTTransformer2DModel")
    add("--method", default="mediator:16", help="what to learn, see below (default %(default)s)")
    add(
        "--train",
        choices=["mixer", "qkvo"],
        default="mixer",
        help="qkvo: also projections for each layer, a large file",
    )
    add("--start", choices=["plain", "agent"], default="agent", help="of mediators: agent is AgentAttention's scales")
    add("--data", default="self", help="self: the model's own sampling; or emoji, pictures or latents as for train.sit")
    add("--prompts", type=Path, help="file with a prompt a line; a class, by name or number, for class models")
    add("--out", type=Path, required=True, help="file to write, .safetensors; the run's folder is beside it, .run")
    add("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    add("--max-minutes", type=float, help="save and stop after this time; --resume goes on")
    add("--threads", type=int, help="CPU threads")
    add("--cpu", action="store_true", help="do not use a GPU")
    number = parser.add_argument_group("numbers")
    add = number.add_argument
    add("--steps", type=int, default=1000, help="optimiser steps (default %(default)s)")
    add("--batch-size", type=int, default=4, help="pictures in a call (default %(default)s)")
    add("--accumulate", type=int, default=1, help="calls in a step (default %(default)s)")
    add("--learning-rate", type=float, default=3e-2, help="of AdamW (default %(default)s)")
    add("--projection-rate", type=float, default=1e-4, help="of --train qkvo's projections (default %(default)s)")
    add("--warmup-steps", type=int, default=20, help="steps in which it rises (default %(default)s)")
    add("--prediction-weight", type=float, default=1.0, help="of the final prediction's error (default %(default)s)")
    add("--sample-steps", type=int, default=20, help="of the model's own sampling (default %(default)s)")
    add("--guidance-scale", type=float, help="of the model's own sampling (default: the pipeline's)")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels (default: the pipeline's)")
    add("--mixed-precision", choices=["no", "bf16"], default="no")
    add("--gradient-checkpointing", action="store_true", help="less memory for the final prediction's gradient")
    add("--save-every", type=int, default=200, help="steps between checkpoints (default %(default)s)")
    add("--measure", type=int, default=8, help="calls to measure errors on (default %(default)s)")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for name in ("steps", "batch_size", "accumulate", "sample_steps", "save_every", "measure"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    for name in ("learning_rate", "projection_rate", "prediction_weight", "warmup_steps", "seed"):
        if not (math.isfinite(getattr(options, name)) and getattr(options, name) >= 0):
            parser.error(f"--{name.replace('_', '-')} must be a finite number >= 0, got {getattr(options, name)}")
    if options.out.suffix != ".safetensors":
        parser.error(f"--out must end in .safetensors, got {options.out}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        return distill(options)
    except (ValueError, OSError) as error:
        print(f"train.distill: {error}", file=sys.stderr)
        return 2


def distill(options: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    import torch

    import attngen
    from attngen.hosts.families import denoisers_of
    from attngen.learned import LearnedLayers
    from train.checkpoint import list_checkpoints
    from train.distill_inputs import Drawing, open_inputs

    if options.threads:
        torch.set_num_threads(options.threads)
    method = parse_method(options.method, options.train == "qkvo")
    found = list_checkpoints(run_folder(options) / "checkpoints")
    if (found or options.out.exists()) and not options.resume:
        raise ValueError(f"{options.out} or its run is there already; pass --resume to go on, or another --out")
    lines = None if options.prompts is None else read_lines(options.prompts)
    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cpu" if options.cpu or not torch.cuda.is_available() else "cuda")
    name, model = next(iter(denoisers_of(pipe).items()))
    model.requires_grad_(False).eval()
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    size = None if options.size is None else (options.size[0], options.size[1])
    drawing = Drawing(
        pipe,
        model,
        choices(pipe, lines),
        batch_size=options.batch_size,
        seed=options.seed,
        steps=options.sample_steps,
        guidance_scale=options.guidance_scale,
        size=size,
    )
    layers = LearnedLayers.create(model, method, start=options.start, seed=options.seed)
    with attngen.apply(model, layers) as patch:
        inputs = open_inputs(options.data, drawing, patch.paused)
        run = Run(options, model, patch, layers, inputs)
        return run.run(found[-1] if found else None)


def run_folder(options: argparse.Namespace) -> Path:
    """Where checkpoints and the log are."""
    return options.out.with_suffix(".run")


def parse_method(text: str, own_projections: bool) -> LearnedMethod:
    """The method that a text names, see EXAMPLES.

    Raises:
        ValueError: for an unknown name or option, or a value that it cannot have.
    """
    import dataclasses

    from attngen.methods.learned import LearnedLinear, LearnedMediators

    head, *given = text.split(",")
    name, _, count = head.partition(":")
    options: dict[str, Any] = {"own_projections": own_projections}
    bases: dict[str, LearnedMethod] = {
        "mediator": LearnedMediators(),
        "linear": LearnedLinear(),
        "linfusion": LearnedLinear("elu", "input", 1, convolution=False),
    }
    if name not in bases or (count and name != "mediator"):
        raise ValueError(f"unknown method {head!r}; known: mediator:COUNT, linear, linfusion")
    types = {f.name: type(getattr(bases[name], f.name)) for f in dataclasses.fields(bases[name])}
    for part in [*([f"num_mediators={count}"] if count else []), *given]:
        key, _, value = part.partition("=")
        if key not in types:
            raise ValueError(f"{name} has no option {key!r}; it has {', '.join(types)}")
        options[key] = _parsed(key, value, types[key])
    return dataclasses.replace(bases[name], **options)


def _parsed(key: str, value: str, kind: type) -> Any:
    try:
        return {"true": True, "false": False}[value] if kind is bool else kind(value)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{key} cannot be {value!r}; it is a {kind.__name__}") from error


def choices(pipe: Any, lines: Sequence[str] | None) -> Sequence[Any] | None:
    """What pictures are asked for: prompts, or class numbers, or None for all classes.

    Args:
        pipe: the pipeline.
        lines: of the user's file, or None for a few general prompts or all classes.

    Raises:
        ValueError: for a class that the pipeline does not have.
    """
    from train.distill_inputs import PROMPTS

    if "prompt" in inspect.signature(pipe.__call__).parameters:
        return lines or PROMPTS
    return None if lines is None else [int(line) if line.isdigit() else pipe.get_label_ids([line])[0] for line in lines]


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty.

    Raises:
        ValueError: if the file cannot be read or has none.
    """
    try:
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts in {path}: {error}") from error
    if not lines:
        raise ValueError(f"{path} has no prompts")
    return lines


def load_pipeline(name: str) -> Any:
    """A pipeline by folder or Hub id; a bare SiT gets one around it.

    Raises:
        ValueError: if there is none, or it is a bare model of another kind.
    """
    from diffusers import DiffusionPipeline

    import attngen

    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        config = _json(folder / "config.json")
        if config.get("_class_name") != "SiTTransformer2DModel":
            kind = config.get("_class_name", "no model")
            raise ValueError(f"{name} holds {kind}, not a pipeline; sampling and conditions need the whole pipeline")
        model = attngen.SiTTransformer2DModel.from_pretrained(folder)
        return attngen.SiTPipeline(model, attngen.InterpolantScheduler(sampler="ode"))
    try:
        index: Any = DiffusionPipeline.load_config(name)
        cls = attngen.SiTPipeline if index.get("_class_name") == "SiTPipeline" else DiffusionPipeline
        return cls.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"cannot load the pipeline {name}: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return content if isinstance(content, dict) else {}


# The teacher and the student are one model, patched and paused


@dataclass
class Exact:
    """One call of the exact model.

    Attributes:
        prediction: its output.
        layers: layer -> the arguments of the layer, and its output.
    """

    prediction: Tensor
    layers: dict[str, tuple[Call, Tensor]]


class Pair:
    """The exact model and the patched one, and how far they are apart on a call.

    Args:
        model: the denoiser, patched.
        patch: the patch, of learned layers.
        autocast: context that networks run in.
    """

    def __init__(self, model: nn.Module, patch: AttentionPatch, autocast: Any = contextlib.nullcontext) -> None:
        self.model, self.patch, self.autocast = model, patch, autocast
        self.names = list(patch.learned)
        self._payloads: dict[Any, dict[str, Any]] = {}

    def exact(self, call: Call) -> Exact:
        """Run the exact model and keep what its layers were given and gave."""
        import torch

        from train.distill_inputs import Call

        layers: dict[str, tuple[Call, Tensor]] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                layers[name] = Call(args, kwargs), output

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in self.names
        ]
        try:
            with self.patch.paused(), torch.no_grad(), self.autocast():
                return Exact(_prediction(self.model, call), layers)
        finally:
            for handle in handles:
                handle.remove()

    def student(self, call: Call) -> Tensor:
        """The patched model's prediction."""
        with self.autocast():
            return _prediction(self.model, call)

    def layer(self, name: str, exact: Exact, call: Call) -> Tensor:
        """The output of a learned layer for what the exact layer was given."""
        from attngen.step import CHANNEL_KEY

        given, _ = exact.layers[name]
        payload = self._payload(call)[name]
        with self.autocast():
            return self.model.get_submodule(name)(*given.args, **given.kwargs, **{CHANNEL_KEY: payload})

    def _payload(self, call: Call) -> dict[str, Any]:
        """What the patch tells each layer about a call of this size; found out by making one."""
        import torch

        from attngen.step import CHANNEL_KEY
        from train.distill_inputs import latents_of

        size = latents_of(self.model, call).shape
        if size in self._payloads:
            return self._payloads[size]
        found: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found[name] = kwargs[CHANNEL_KEY]

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
            for name in self.names
        ]
        try:
            with torch.no_grad():
                self.student(call)
        finally:
            for handle in handles:
                handle.remove()
        return self._payloads.setdefault(size, found)

    def squared_errors(self, call: Call) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For each layer and for the prediction: its name, its squared error and its squared size.

        One after the other, so that the graph of one is gone before the next one is made.
        """
        exact = self.exact(call)
        for name in self.names:
            wanted = exact.layers[name][1].float()
            yield name, (self.layer(name, exact, call).float() - wanted).square().sum(), wanted.square().sum()
        wanted = exact.prediction.float()
        yield PREDICTION, (self.student(call).float() - wanted).square().sum(), wanted.square().sum()


def _prediction(model: nn.Module, call: Call) -> Tensor:
    output = model(*call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output.sample


def measure(pair: Pair, calls: Sequence[Call]) -> dict[str, float]:
    """Relative errors (root of squared error over squared size) of each layer and of the prediction, over all calls."""
    import torch

    errors: dict[str, float] = {}
    sizes: dict[str, float] = {}
    with torch.no_grad():
        for call in calls:
            for name, error, size in pair.squared_errors(call):
                errors[name] = errors.get(name, 0.0) + float(error)
                sizes[name] = sizes.get(name, 0.0) + float(size)
    return {name: math.sqrt(errors[name] / (sizes[name] + _TINY)) for name in errors}


def table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Errors side by side."""
    width = max(map(len, before))
    lines = [f"{'relative error':{width}}  before   after   times lower"]
    for name, error in before.items():
        lines.append(f"{name:{width}}  {error:.4f}  {after[name]:.4f}  {error / max(after[name], _TINY):.2f}")
    return "\n".join(lines)


# The loop


@dataclass
class Run:
    """A distillation in progress."""

    options: argparse.Namespace
    model: nn.Module
    patch: AttentionPatch
    layers: LearnedLayers
    inputs: Inputs

    def __post_init__(self) -> None:
        import torch

        self.cores = self.patch.learned
        device = next(self.model.parameters()).device
        for core in self.cores.values():
            core.to(device, torch.float32).requires_grad_(True)
        mixed = self.options.mixed_precision == "bf16"
        context = (lambda: torch.autocast(device.type, torch.bfloat16)) if mixed else contextlib.nullcontext
        self.pair = Pair(self.model, self.patch, context)
        self.optimizer = torch.optim.AdamW(self._groups(), weight_decay=0.0)
        self.folder = run_folder(self.options)
        self.before: dict[str, float] = {}

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
        from tqdm import tqdm

        from train.checkpoint import write_json

        step = self.load(checkpoint) if checkpoint else 0
        held_out = self.inputs.held_out(self.options.measure)
        if not self.before:
            self.before = measure(self.pair, held_out)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", self.settings())
        stop, started = StopOnSignal(), time.monotonic()
        total = self.options.steps
        bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty())
        while step < total:
            losses = self.step(step)
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{losses['loss']:.4f}")
            self.log(step, losses, time.monotonic() - started)
            minutes = (time.monotonic() - started) / 60
            if stop.requested or (self.options.max_minutes is not None and minutes > self.options.max_minutes):
                break
            if step % self.options.save_every == 0:
                self.save(step)
        bar.close()
        self.save(step)
        if step < total:
            print(f"stopped after step {step} of {total}; --resume goes on", file=sys.stderr)
            return 0
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
        import torch

        calls, weight = self.options.accumulate, self.options.prediction_weight
        layers = prediction = 0.0
        for i in range(calls):
            for name, error, size in self.pair.squared_errors(self.inputs.call(step * calls + i)):
                relative = error / (size + _TINY)
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
        raise ValueError(f"{reason} in step {step + 1}; the weights before it are in {self.folder / 'checkpoints'}")

    def _hidden(self) -> dict[str, Any]:
        from attngen.hosts.learned import hidden_core

        return {name: hidden_core(self.model.get_submodule(name)) for name in self.cores}

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        free = {"out", "resume", "max_minutes", "threads", "cpu", "save_every"}
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.options).items() if k not in free}
        return {**plain, "method": self.layers.method.to_dict()}

    def log(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """Append a line to the run's log."""
        record = {"step": step, **{k: round(v, 8) for k, v in losses.items()}, "seconds": round(seconds, 2)}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, step: int) -> None:
        from train.checkpoint import optimizer_tensors, save_checkpoint

        tensors = {
            "layers": {f"{name}/{n}": t for name, core in self.cores.items() for n, t in core.state_dict().items()},
            "optimizer": optimizer_tensors(self.optimizer),
        }
        state = {"settings": self.settings(), "before": self.before}
        save_checkpoint(self.folder / "checkpoints", step, tensors, state, keep=2)

    def load(self, path: Path) -> int:
        """Fill everything from a checkpoint; returns the steps done.

        Raises:
            ValueError: if it was made with other settings.
        """
        from train.checkpoint import load_checkpoint, load_optimizer
        from train.meter import trim_log

        tensors, state = load_checkpoint(path)
        for name, value in json.loads(json.dumps(self.settings())).items():
            before = state["settings"].get(name)
            if before != value and name != "measure":
                raise ValueError(f"{path} was made with {name} = {before!r}, not {value!r}")
        for name, core in self.cores.items():
            prefix = f"{name}/"
            core.load_state_dict({k[len(prefix) :]: t for k, t in tensors["layers"].items() if k.startswith(prefix)})
        load_optimizer(self.optimizer, tensors["optimizer"])
        self.before = state["before"]
        trim_log(self.folder / "log.jsonl", state["step"])
        return state["step"]


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear rise, then half a cosine down to a twentieth."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class StopOnSignal:
    """SIGTERM and SIGINT finish the step, save and end the run instead of losing it.

    Attributes:
        requested: whether one came.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread, where a caller handles signals
                signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True


if __name__ == "__main__":
    sys.exit(main())
