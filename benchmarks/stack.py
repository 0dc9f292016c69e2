"""Agents stacked with what saves work elsewhere: step caches and token merging, each alone and each with agents.

    python -m benchmarks.stack --model sit-s --size 512 --steps 20 --threads 1
    python -m benchmarks.stack --model sd15 --size 512 --steps 12 --caches deepcache tomesd --dtype bfloat16
    python -m benchmarks.stack --size small --model dit-xl

One measurement is a whole denoising loop, scheduler and guidance included, with random weights. The share kept is the
combined speed-up over the product of the two single ones, round by round: 1 where the savings are independent. Both of
a pair that save attention cannot reach it.

deepcache, pab, fastercache, taylorseer and cache-dit reuse features of earlier steps; agents save in the steps that are
computed. cache-dit decides by thresholds on the features, which mean nothing with random weights: here it computes and
reuses by a fixed pattern. tomesd merges tokens around the attention of the top level; what is left is no grid, so in
those layers attention stays exact over the merged tokens and agents work in the layers below.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from benchmarks import options as cli
from benchmarks.model import MethodError, plan_of, split_kernel
from benchmarks.models import MODELS, build_random, random_inputs, structural_copy
from pipelines.cli.provenance import machine

INTERVAL = 3
"""Steps from one computed step to the next, where a cache has such a number."""


class Refused(Exception):
    """Why a peer cannot be measured here."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("stack", __doc__)
    parser.add_argument("--model", default="sit-s", choices=list(MODELS))
    parser.add_argument("--size", default=None, help="side of the picture in pixels, or small: a reduced model")
    parser.add_argument("--method", default="agent:64", help="a preset, a plan file, agent:NUMBER, @KERNEL behind it")
    parser.add_argument("--caches", nargs="+", default=list(CACHES), choices=list(CACHES))
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
        scheduler: gives the time steps; DDIM, and a plain Euler step for SiT.
        time: of the step that runs, from 1000 (noise) to 0.
        device_time: the same as a tensor on the model's device.
        gives_device_time: whether a UNet is called with that; otherwise with a tensor on the CPU.
    """

    def __init__(self, options: argparse.Namespace, model: Any) -> None:
        import torch
        from diffusers import DDIMScheduler

        self.model, self.kind = model, MODELS[options.model].kind
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

    def __call__(self) -> Any:
        from diffusers.models.cache_utils import CacheMixin

        for reset in self.resets:
            reset()
        latents = self._start
        # Some caches want a context, as pipelines give them. A UNet has no method for it.
        with CacheMixin.cache_context(self.model, "loop"):
            for time, device_time in zip(self.scheduler.timesteps, self.device_times, strict=True):
                self.time, self.device_time = float(time), device_time
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


def _tomesd(loop: Loop) -> None:
    if loop.kind != "unet":
        raise Refused("tomesd merges tokens of UNets only")
    try:
        import tomesd
    except ImportError:
        raise Refused("tomesd is not installed (the peers extra)") from None
    tomesd.apply_patch(loop.model, ratio=0.5, use_rand=False)


def _deepcache(loop: Loop) -> None:
    if loop.kind != "unet":
        raise Refused("DeepCache skips the inner levels of UNets only")
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError:
        raise Refused("DeepCache is not installed (the peers extra)") from None
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=loop.model, scheduler=loop.scheduler))
    helper.set_params(cache_interval=INTERVAL, cache_branch_id=0)
    helper.enable()
    # DeepCache reads the number of the time step, which waits for a GPU; it gets it on the CPU, the UNet on the device.
    inner = helper.function_dict["unet_forward"]
    helper.function_dict["unet_forward"] = lambda sample, time, **given: inner(sample, loop.device_time, **given)
    loop.gives_device_time = False


def _pab(loop: Loop) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=INTERVAL,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: int(loop.time),
    )
    apply_pyramid_attention_broadcast(loop.model, config)
    _reset_hooks(loop)


def _fastercache(loop: Loop) -> None:
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    if loop.kind == "unet":
        raise Refused("diffusers' FasterCache looks for attention where transformers have it, not UNets")
    if not loop.guided:
        raise Refused("FasterCache saves the pass without condition, and --no-guidance leaves that out")
    split = ["hidden_states", "encoder_hidden_states", "timestep", "class_labels"]
    logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        unconditional_batch_timestep_skip_range=(-1, 641),
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
        current_timestep_callback=lambda: int(loop.time),
        _unconditional_conditional_input_kwargs_identifiers=split,
    )
    apply_faster_cache(loop.model, config)
    _reset_hooks(loop)


def _taylorseer(loop: Loop) -> None:
    import torch
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(
        cache_interval=INTERVAL,
        disable_cache_before_step=3,
        max_order=1,
        taylor_factors_dtype=torch.float32 if loop.model.dtype == torch.float32 else torch.bfloat16,
        cache_identifiers=[r".*transformer_blocks\.\d+\.(attn|attn1|attn2|ff)"],
    )
    apply_taylorseer_cache(loop.model, config)
    _reset_hooks(loop)


def _cache_dit(loop: Loop) -> None:
    if loop.kind == "unet":
        raise Refused("cache-dit caches rows of transformer blocks, which a UNet is not")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # before the import, which reads it
    try:
        import cache_dit
    except ImportError:
        raise Refused("cache-dit is not installed (the peers extra)") from None
    functor = None
    if loop.kind == "dit":
        from cache_dit.caching.patch_functors import DiTPatchFunctor

        functor = DiTPatchFunctor()
    adapter = cache_dit.BlockAdapter(
        transformer=loop.model,
        blocks=loop.model.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        patch_functor=functor,
        check_forward_pattern=False,
    )
    warm = min(3, loop.steps - 1)
    mask = [1 if step < warm or (step - warm) % INTERVAL == INTERVAL - 1 else 0 for step in range(loop.steps)]
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=warm,
        residual_diff_threshold=1e9,
        num_inference_steps=loop.steps,
        steps_computation_mask=mask,
        steps_computation_policy="static",
    )
    cache_dit.enable_cache(adapter, cache_config=config)
    loop.resets.append(lambda: cache_dit.refresh_context(loop.model, cache_config=config))


def _reset_hooks(loop: Loop) -> None:
    """Start every loop with empty caches."""
    from diffusers.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(loop.model)
    registry.invalidate_child_registries_cache()
    loop.resets.append(registry.reset_stateful_hooks)


CACHES: dict[str, Callable[[Loop], None]] = {
    "tomesd": _tomesd,
    "deepcache": _deepcache,
    "pab": _pab,
    "fastercache": _fastercache,
    "taylorseer": _taylorseer,
    "cache-dit": _cache_dit,
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison; returns what `--out` writes."""
    import torch

    from benchmarks.timing import compare, spread

    dtype = getattr(torch, options.dtype)
    model: Any = build_random(options.model, dtype, options.device, options.size, options.small)
    loops: dict[str, Loop] = {}
    skipped: list[dict[str, str]] = []
    loops["exact"] = Loop(options, structural_copy(model))
    loops[options.method] = _loop(options, model, options.method, None)
    for cache in options.caches:
        try:
            pair = {
                cache: _loop(options, model, None, cache),
                f"{options.method} + {cache}": _loop(options, model, options.method, cache),
            }
            with torch.no_grad():
                for loop in pair.values():
                    loop()
        except Refused as refusal:
            skipped.append({"cache": cache, "reason": str(refusal)})
        except Exception as error:  # a peer fails in its own way; the others are measured
            text = str(error).strip().splitlines()
            skipped.append({"cache": cache, "reason": f"{type(error).__name__}: {text[0][:200] if text else ''}"})
        else:
            loops |= pair
    timed = compare(
        loops,
        [()],
        baseline="exact",
        device=options.device,
        rounds=options.rounds,
        min_seconds=0.0,
        uniform=True,
    )
    stacks = []
    for cache in options.caches:
        if cache not in loops:
            continue
        both = f"{options.method} + {cache}"
        singles = zip(timed.ratios(options.method), timed.ratios(cache), timed.ratios(both), strict=True)
        share = spread([combined / (agents * cached) for agents, cached, combined in singles])
        names = {"agents": options.method, "cache": cache, "both": both}
        medians = {key: spread(timed.ratios(name))["median"] for key, name in names.items()}
        stacks.append({"cache": cache, "method": options.method, "speedups": medians, "share": share})
    return {
        "program": "stack",
        "command": options.command,
        "settings": {**cli.settings(options), "clock": timed.clock},
        "machine": machine(options.device),
        "rows": [timed.row(name) for name in loops],
        "stacks": stacks,
        "skipped": skipped,
    }


def _loop(options: argparse.Namespace, model: Any, method: str | None, cache: str | None) -> Loop:
    import attngen

    loop = Loop(options, structural_copy(model))
    if method is not None:
        try:
            name, kernel = split_kernel(method)
            attngen.apply(loop.model, plan_of(name), kernel=kernel or "auto")
        except ValueError as error:
            raise MethodError(f"{method}: {error}") from None
    if cache is not None:
        CACHES[cache](loop)
    return loop


def table(result: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    settings, machine_ = result["settings"], result["machine"]
    lines = [
        f"| with | alone | `{settings['method']}` alone | both | share of the product (lowest to highest) |",
        "|---|---|---|---|---|",
    ]
    for stack in result["stacks"]:
        speedups, share = stack["speedups"], stack["share"]
        lines.append(
            f"| {stack['cache']} | {speedups['cache']:.2f} | {speedups['agents']:.2f} | {speedups['both']:.2f} "
            f"| {share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f}) |"
        )
    lines.append("")
    lines += [f"- {item['cache']} left out: {item['reason']}" for item in result["skipped"]]
    lines += [""] if result["skipped"] else []
    small = "reduced " if settings["small"] else ""
    guidance = "with guidance" if settings["guidance"] else "without guidance"
    lines.append(
        f"{small}`{settings['model']}`, {settings['size']} px, {settings['steps']} steps {guidance}, batch "
        f"{settings['batch']}, {settings['dtype']}, random weights, median of {settings['rounds']} rounds; exact "
        f"{result['rows'][0]['median_seconds']:.2f} s; {machine_['device']}, {machine_['threads']} threads, torch "
        f"{machine_['torch']}, {machine_['date']}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
