"""Agents stacked with what saves work elsewhere: step caches and token merging, each alone and each with agents.

    python -m benchmarks.stack --model sit-s --size 512 --steps 20 --threads 1
    python -m benchmarks.stack --model sd15 --size 512 --steps 12 --caches deepcache tomesd --dtype bfloat16
    python -m benchmarks.stack --size small --model dit-xl

    python -m benchmarks.stack --pipeline attngen/assets/emoji_unet --labels face clock --size 64 --steps 4 \\
        --method plans/emoji_unet-64px-4steps.json todo --caches deepcache pab taylorseer int8 --threads 1

One measurement is a whole denoising loop, scheduler and guidance included, with random weights, or with --pipeline a
trained pipeline's; then the relative errors of the latents are in the table too. The share kept is the combined
speed-up over the product of the two single ones, round by round: 1 where the savings are independent. Both of a pair
that save attention cannot reach it.

deepcache, pab, fastercache, taylorseer, cache-dit, first-block and seacache reuse features of earlier steps; methods
save in the steps that are computed. cache-dit, first-block and seacache decide by thresholds on the features, which
mean nothing with random weights: here they compute every third step. int8 is torch's dynamic quantisation of linear
layers. tomesd merges tokens around the attention of the top level; what is left is no grid, so in
those layers attention stays exact over the merged tokens and agents work in the layers below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import options as cli
from benchmarks.caches import CACHES, Refused
from benchmarks.model import MethodError, plan_of, split_kernel
from benchmarks.models import MODELS, build_random, random_inputs, structural_copy
from pipelines.cli.provenance import machine


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("stack", __doc__)
    parser.add_argument("--model", default="sit-s", choices=list(MODELS))
    parser.add_argument("--size", default=None, help="side of the picture in pixels, or small: a reduced model")
    parser.add_argument("--pipeline", type=Path, metavar="FOLDER", help="a trained pipeline of classes, not --model")
    parser.add_argument("--labels", nargs="+", default=["0"], help="classes that the pipeline draws")
    parser.add_argument(
        "--method", nargs="+", default=["agent:64"], help="presets, plan files, agent:NUMBER, @KERNEL behind them"
    )
    parser.add_argument("--caches", nargs="*", default=list(CACHES), choices=list(CACHES))
    parser.add_argument("--steps", type=cli.at_least(2), default=20)
    parser.add_argument("--batch", type=cli.at_least(1), default=1, help="pictures; guidance doubles it")
    parser.add_argument("--guidance", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", default="float32", choices=cli.DTYPES)
    parser.add_argument("--rounds", type=cli.at_least(1), default=3)
    options = cli.parse(parser, argv)
    if options.show:
        print(table(cli.read(parser, options.show)))
        return 0
    _check(parser, options)
    cli.prepare(parser, options)
    try:
        result = measure(options)
    except MethodError as error:
        parser.error(str(error))
    print(table(result))
    cli.write(options.out, result)
    return 0


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.pipeline:
        options.small = False
        if options.size is None or not options.size.isdigit():
            parser.error(f"--pipeline needs --size in pixels, got {options.size!r}")
        options.size, options.batch = int(options.size), len(options.labels)
        return
    described = MODELS[options.model]
    options.small = options.size == "small"
    if options.size is None or options.small:
        options.size = 256 if options.small else described.size
    try:
        options.size = int(options.size)
    except ValueError:
        parser.error(f"--size is a number of pixels or small, got {options.size!r}")
    if options.size < 1 or options.size % described.unit:
        parser.error(f"--size must be a multiple of {described.unit} for {options.model}, got {options.size}")


class Loop:
    """A denoising loop over one model.

    Attributes:
        model: the denoiser.
        target: what a method is applied to: the denoiser.
        scheduler: gives the time steps; DDIM, and a plain Euler step for SiT.
        time: of the step that runs, from 1000 (noise) to 0.
        device_time: the same as a tensor on the model's device.
        gives_device_time: whether a UNet is called with that; otherwise with a tensor on the CPU.
    """

    def __init__(self, options: argparse.Namespace, model: Any) -> None:
        import torch
        from diffusers import DDIMScheduler

        self.target = self.model = model
        self.kind = MODELS[options.model].kind
        self.guided, self.steps, self.time = options.guidance, options.steps, 1000.0
        copies = options.batch * (2 if options.guidance else 1)
        dtype = getattr(torch, options.dtype)
        self._inputs = random_inputs(options.model, model, options.size, copies, dtype, options.device)
        self._name = "sample" if self.kind == "unet" else "hidden_states"
        self._start = self._inputs[self._name][: options.batch].clone()
        self.scheduler: Any = DDIMScheduler()
        self.scheduler.set_timesteps(options.steps)
        # Copied once, since no CUDA graph can hold a copy from the CPU.
        self.device_times = self.scheduler.timesteps.to(options.device)
        self.device_time = self.device_times[0]
        self.gives_device_time = True
        self.resets: list[Callable[[], Any]] = []
        self.each_step: list[Callable[[int], Any]] = []

    def __call__(self) -> Any:
        from diffusers.models.cache_utils import CacheMixin

        for reset in self.resets:
            reset()
        latents = self._start
        for step, (time, device_time) in enumerate(zip(self.scheduler.timesteps, self.device_times, strict=True)):
            for act in self.each_step:
                act(step)
            self.time, self.device_time = float(time), device_time
            # Some caches need a context, as pipelines give them. A UNet has no method for it.
            now = {"step_index": step, "sigma": self.time / 1000, "num_inference_steps": self.steps}
            with CacheMixin.cache_context(self.model, "loop", **now):
                prediction = self._predict(latents, time)
            if self.kind == "sit":  # the velocity, from noise at 0 to data at 1
                latents = latents + prediction / self.steps
            else:
                latents = self.scheduler.step(prediction, time, latents).prev_sample
        return latents

    def _predict(self, latents: Any, time: Any) -> Any:
        import torch

        doubled = torch.cat([latents, latents]) if self.guided else latents
        given = {**self._inputs, self._name: doubled}
        if self.kind == "unet":  # tomesd and DeepCache read positional arguments
            del given["sample"], given["timestep"]
            time = self.device_time if self.gives_device_time else time
            output = self.model(doubled, time, **given, return_dict=False)[0]
        else:
            clock = 1 - self.time / 1000 if self.kind == "sit" else self.time
            given["timestep"] = torch.full((len(doubled),), clock, device=doubled.device)
            output = self.model(**given, return_dict=False)[0]
        output = output[:, : latents.shape[1]]
        if not self.guided:
            return output
        without, with_condition = output.chunk(2)
        return without + 2.0 * (with_condition - without)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison; returns what `--out` writes."""
    import torch

    from benchmarks.timing import compare

    make = _maker(options)
    loops: dict[str, Any] = {"exact": make(None, None)}
    loops |= {method: make(method, None) for method in options.method}
    skipped: list[dict[str, str]] = []
    for cache in options.caches:
        try:
            found = {cache: make(None, cache)}
            found |= {_both(method, cache): make(method, cache) for method in options.method}
            with torch.no_grad():
                for loop in found.values():
                    loop()
        except Refused as refusal:
            skipped.append({"cache": cache, "reason": str(refusal)})
        except Exception as error:  # a peer fails in its own way; the others are measured
            text = str(error).strip().splitlines()
            skipped.append({"cache": cache, "reason": f"{type(error).__name__}: {text[0][:200] if text else ''}"})
        else:
            loops |= found
    timed = compare(
        loops,
        [()],
        baseline="exact",
        device=options.device,
        rounds=options.rounds,
        min_seconds=0.0,
        uniform=True,
    )
    pairs = [(method, cache) for cache in options.caches if cache in loops for method in options.method]
    return {
        "program": "stack",
        "command": options.command,
        "settings": {**cli.settings(options), "clock": timed.clock},
        "machine": machine(options.device),
        "rows": [timed.row(name) for name in loops],
        "stacks": [_stack(timed, *pair) for pair in pairs],
        "errors": _errors(loops) if options.pipeline else {},
        "skipped": skipped,
    }


def _both(method: str, cache: str) -> str:
    return f"{method} + {cache}"


def _stack(timed: Any, method: str, cache: str) -> dict[str, Any]:
    """Speed-ups of a method, a cache and both, and the share of the product that both keep."""
    from benchmarks.timing import spread

    names = {"agents": method, "cache": cache, "both": _both(method, cache)}
    ratios = {key: timed.ratios(name) for key, name in names.items()}
    singles = zip(ratios["agents"], ratios["cache"], ratios["both"], strict=True)
    share = spread([combined / (agents * cached) for agents, cached, combined in singles])
    medians = {key: spread(values)["median"] for key, values in ratios.items()}
    return {"cache": cache, "method": method, "speedups": medians, "share": share}


def _errors(loops: dict[str, Any]) -> dict[str, float]:
    """Relative errors of the latents of the last round against exact attention without a cache."""
    outputs = {name: loop.last.double() for name, loop in loops.items()}
    exact = outputs.pop("exact")
    return {name: float((output - exact).norm() / exact.norm()) for name, output in outputs.items()}


def _maker(options: argparse.Namespace) -> Callable[[str | None, str | None], Any]:
    """What makes a loop with a method and a cache, both or neither."""
    import torch

    if options.pipeline:
        from benchmarks.trained import Drawing, load

        pipe = load(options)
        return lambda method, cache: _changed(Drawing(options, pipe), method, cache)
    dtype = getattr(torch, options.dtype)
    model: Any = build_random(options.model, dtype, options.device, options.size, options.small)
    return lambda method, cache: _loop(options, model, method, cache)


def _loop(options: argparse.Namespace, model: Any, method: str | None, cache: str | None) -> Loop:
    return _changed(Loop(options, structural_copy(model)), method, cache)


def _changed(loop: Any, method: str | None, cache: str | None) -> Any:
    import attngen

    # Before the patch: it replaces linear layers, which the patch reads.
    if cache == "int8":
        CACHES[cache](loop)
    if method is not None:
        try:
            name, kernel = split_kernel(method)
            attngen.apply(loop.target, plan_of(name), kernel=kernel or "auto")
        except ValueError as error:
            raise MethodError(f"{method}: {error}") from None
    if cache is not None and cache != "int8":
        CACHES[cache](loop)
    return loop


def table(result: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    settings, machine_ = result["settings"], result["machine"]
    errors = result.get("errors") or {}
    lines = [
        "| method | with | method alone | other alone | both | share of the product (lowest to highest) |",
        "|---|---|---|---|---|---|",
    ]

    def cell(speedup: float, name: str) -> str:
        return f"{speedup:.2f}" + (f" ({errors[name]:.3f})" if name in errors else "")

    for stack in result["stacks"]:
        speedups, share, method, cache = stack["speedups"], stack["share"], stack["method"], stack["cache"]
        lines.append(
            f"| `{_name(method)}` | {cache} | {cell(speedups['agents'], method)} | {cell(speedups['cache'], cache)} "
            f"| {cell(speedups['both'], _both(method, cache))} "
            f"| {share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f}) |"
        )
    alone = {row["name"]: row["speedup"]["median"] for row in result["rows"]}
    stacked = {stack["method"] for stack in result["stacks"]}
    methods = settings["method"] if isinstance(settings["method"], list) else [settings["method"]]
    lines += [f"| `{_name(m)}` | – | {cell(alone[m], m)} | – | – | – |" for m in methods if m not in stacked]
    lines.append("")
    lines += [f"- {item['cache']} left out: {item['reason']}" for item in result["skipped"]]
    lines += [""] if result["skipped"] else []
    lines.append(_about(settings, machine_, result))
    return "\n".join(lines)


def _name(method: str) -> str:
    return Path(method).name if method.endswith(".json") else method


def _about(settings: dict[str, Any], machine_: dict[str, Any], result: dict[str, Any]) -> str:
    small = "reduced " if settings["small"] else ""
    guidance = "with guidance" if settings["guidance"] else "without guidance"
    model, weights = settings["model"], "random weights"
    if settings.get("pipeline"):
        model, weights = Path(settings["pipeline"]).name, "in brackets the relative error of the latents"
    return (
        f"{small}`{model}`, {settings['size']} px, {settings['steps']} steps {guidance}, batch "
        f"{settings['batch']}, {settings['dtype']}, {weights}, median of {settings['rounds']} rounds; exact "
        f"{result['rows'][0]['median_seconds']:.2f} s; {machine_['device']}, {machine_['threads']} threads, torch "
        f"{machine_['torch']}, {machine_['date']}."
    )


if __name__ == "__main__":
    sys.exit(main())
