"""One pass of a full-size denoiser, softmax attention against each method, in turn in one process.

    python -m benchmarks.model --model sd15 --size 512 --out benchmarks/results/sd15-512-cpu.json
    python -m benchmarks.model --model sd15 --size 1024 --dtype bfloat16 --methods softmax agent:64 tomesd
    python -m benchmarks.model --model sit-xl --methods softmax values:4 input:4 --pass training --block --batch 8
    python -m benchmarks.model --show benchmarks/results/sd15-512-cpu.json

A method is a preset's name, the path of a plan file, `agent:64` (64 agents in the layers of at least 16 times as many
tokens), `plain:64` (the same without Stable Diffusion's scale and share of the values), `tomesd` (the package, merging
half of the tokens; UNets only), or for SiT `values:4` or `input:4`: the model of the same size with 4 mediators and
their convolution on the values or on the layer's input. That is another model, so its output is not compared. A kernel
may stand behind it: `agent:64@triton`; --kernel is for all methods without one. `softmax@cudnn` is softmax attention by
one of torch's backends (flash, cudnn, efficient, math); the fastest of several is what the others are compared with.

Time is the median over rounds of the ratio to the first method in the same round, so that a machine that gets slower or
faster meanwhile matters little. Operations are counted by torch, those of fused attention included and those of Triton
kernels not. The error is that of the output against the first method, ‖out - exact‖ / ‖exact‖; with random weights it
says that a method changes the result, not how a picture looks. A training pass is forward and backward, without the
optimiser.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import options as cli
from benchmarks.models import MODELS, build_random, random_inputs, structural_copy
from pipelines.cli.provenance import machine
from pipelines.methods.options import preset_names

if TYPE_CHECKING:
    from torch import nn

DEFAULT_METHODS_OF_SIT = ("softmax", "values:4", "input:4")
CONVOLUTIONS = ("values", "input")
SOFTMAX = "softmax"
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("model", __doc__)
    parser.add_argument("--model", default="sd15", choices=list(MODELS))
    parser.add_argument("--size", type=cli.at_least(1), help="side of the picture in pixels; that of publication")
    parser.add_argument("--batch", type=cli.at_least(1), default=1)
    parser.add_argument("--methods", nargs="+", help="see above; the first is what the others are compared with")
    parser.add_argument("--dtype", default="float32", choices=cli.DTYPES)
    parser.add_argument("--rounds", type=cli.at_least(1), default=5)
    parser.add_argument("--pass", dest="passes", default="forward", choices=["forward", "training"])
    parser.add_argument("--block", action="store_true", help="the first block of SiT alone")
    parser.add_argument("--kernel", help="of attngen.apply: auto, sdpa, triton, absorbed, ...")
    parser.add_argument("--compile", action="store_true", help="torch.compile each model")
    parser.add_argument("--small", action="store_true", help="a reduced model, to try the program")
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


class MethodError(ValueError):
    """A method that the model or this installation does not have."""


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in defaults; ends in argparse's error for what cannot be measured."""
    described = MODELS[options.model]
    options.size = options.size or described.size
    if options.size % described.unit:
        parser.error(f"--size must be a multiple of {described.unit} for {options.model}, got {options.size}")
    if options.block and described.kind != "sit":
        parser.error(f"--block measures a block of SiT; {options.model} is none, take sit-s, sit-b or sit-xl")
    defaults = DEFAULT_METHODS_OF_SIT if described.kind == "sit" else ["softmax", *preset_names()]
    options.methods = list(dict.fromkeys(options.methods or defaults))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison; returns what `--out` writes."""
    import torch

    from benchmarks.timing import compare

    dtype = getattr(torch, options.dtype)
    exact: Any = build_random(options.model, dtype, options.device, options.size, options.small, **_depth(options))
    inputs = random_inputs(options.model, exact, options.size, options.batch, dtype, options.device)
    rows: dict[str, dict[str, Any]] = {}
    functions: dict[str, Callable[[], Any]] = {}
    leaves: dict[str, list[Any]] = {}
    skipped: dict[str, str] = {}
    reference = None
    for name in options.methods:
        model, patch, extra = _with_method(options, name, exact, dtype)
        given_inputs, training = {**inputs, **extra}, options.passes == "training"
        run, given = _block(model, given_inputs, training) if options.block else (_whole(model, given_inputs), [])
        run = _by_backend(name, run)
        try:
            with torch.no_grad():
                run()  # kernels are measured outside of the count
                output, flops = _count(run)
        except RuntimeError as error:
            if not _backend_of(name):
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        reference = output if reference is None else reference
        # Other weights give another output, which says nothing.
        error = None if extra else ((output - reference).norm() / reference.norm()).item()
        rows[name] = {"method": name, "flops": flops, "error": error, **_layers(patch, model)}
        if options.compile:
            (model.transformer_blocks[0] if options.block else model).compile()
        functions[name] = run
        leaves[name] = [*(model.transformer_blocks[0] if options.block else model).parameters(), *given]
    base = next(iter(rows))
    timed = compare(
        functions,
        [()],
        baseline=base,
        device=options.device,
        rounds=options.rounds,
        training=options.passes == "training",
        leaves=leaves,
        min_seconds=None if options.block else 0.0,
        uniform=True,
        memory=True,
    )
    base = timed.fastest([name for name in rows if split_kernel(name)[0] == SOFTMAX] or [base])
    for name, row in rows.items():
        measured = timed.row(name, base)
        speedup = measured["speedup"]
        row["seconds"] = statistics.median(timed.seconds[name])
        row["speedup"] = speedup["median"]
        row["speedup_range"] = [speedup["min"], speedup["max"]]
        row["speedup_quartiles"] = [speedup["q1"], speedup["q3"]]
        row["all_seconds"] = timed.seconds[name]
        row["flops_ratio"] = rows[base]["flops"] / row["flops"]
        row["peak_bytes"] = measured["peak_bytes"]
        if "launches" in measured:
            row["launches"] = measured["launches"]
    settings = {**cli.settings(options), "clock": timed.clock}
    return {
        "program": "model",
        "command": options.command,
        "settings": settings,
        "machine": machine(options.device),
        "baseline": base,
        "rows": list(rows.values()),
        "skipped": [{"method": name, "reason": reason} for name, reason in skipped.items()],
    }


def _backend_of(name: str) -> str | None:
    """Torch's name of the backend of a method such as `softmax@cudnn`, or None."""
    method, backend = split_kernel(name)
    return BACKENDS.get(backend) if method == SOFTMAX else None


def _by_backend(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, in which torch's attention takes the backend of the method; as it is for any other method."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = _backend_of(name)
    if backend is None:
        return run

    def through() -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return run()

    return through


def _with_method(options: argparse.Namespace, name: str, exact: Any, dtype: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The model with a method, its patch or None, and further inputs, which a model with weights of its own has."""
    import attngen
    from attngen.kernels.dispatch import AUTO, check_kernel

    method, kernel = split_kernel(name)
    kernel = kernel or options.kernel or AUTO
    kind, _, count = method.partition(":")
    if _backend_of(name):
        return structural_copy(exact), None, {}
    try:
        check_kernel(kernel)
        if kind in CONVOLUTIONS:
            return _mediators(options, kind, count, dtype), None, {"attention_kwargs": {"kernel": kernel}}
        if kind == "tomesd":
            return _tomesd(options, exact), None, {}
        model: Any = structural_copy(exact)
        return model, attngen.apply(model, plan_of(method), kernel=kernel), {}
    except ValueError as error:
        raise MethodError(f"{name}: {error}") from None


def split_kernel(name: str) -> tuple[str, Any]:
    """The method and the kernel of `agent:64@triton`; None where there is no kernel."""
    method, at, kernel = name.rpartition("@")
    return (method, kernel) if at else (name, None)


def _layers(patch: Any, model: Any) -> dict[str, Any]:
    """How many layers a method changes, and how many take which kernel; None where that is not known."""
    if patch is None:
        mediators = [m for m in model.modules() if type(m).__name__ == "MediatorMixer"]
        return {"active_layers": len(mediators) or None, "kernels": None}
    active = [layer for layer in patch.report().patched if layer.is_active]
    stages = [next(stage for stage in layer.stages if stage.why_exact is None) for layer in active]
    return {"active_layers": len(active), "kernels": dict(Counter(str(stage.kernel) for stage in stages))}


def plan_of(name: str) -> Any:
    """What `attngen.apply` takes for a method's name: `agent:64` is 64 agents in layers of at least 16 · 64 tokens.

    `plain:64` leaves out the scale and the share of the values that are for Stable Diffusion.

    Raises:
        MethodError: for a count that is no whole number above 0, or of a method that takes none.
    """
    from attngen import AgentAttention, Plan

    kind, colon, count = name.partition(":")
    if not colon or name.endswith(".json"):
        return name
    if kind not in ("agent", "plain") or not count.isdigit() or int(count) < 1:
        raise MethodError(f"a number goes with agent, plain, values and input, as in agent:64, got {name!r}")
    options: dict[str, Any] = {"broadcast_exponent": 1.0, "shortcut": 0.0} if kind == "plain" else {}
    return Plan.of(AgentAttention(num_agents=int(count), **options), min_tokens=16 * int(count))


def _mediators(options: argparse.Namespace, convolution: str, count: str, dtype: Any) -> nn.Module:
    if MODELS[options.model].kind != "sit":
        raise MethodError(f"learned mediators are a method of SiT, and {options.model} is none")
    if not count.isdigit() or int(count) < 1:
        raise MethodError(f"a number of mediators goes with {convolution}, as in {convolution}:4, got {count!r}")
    config = {"attention": "mediator", "num_mediators": int(count), "convolution": convolution, **_depth(options)}
    return build_random(options.model, dtype, options.device, options.size, options.small, **config)


def _depth(options: argparse.Namespace) -> dict[str, Any]:
    """For one block there is no need to build the others."""
    return {"num_layers": 1} if options.block else {}


def _tomesd(options: argparse.Namespace, exact: Any) -> Any:
    if MODELS[options.model].kind != "unet":
        raise MethodError(f"tomesd merges tokens of a UNet, and {options.model} is none")
    try:
        import tomesd
    except ImportError:
        raise MethodError("tomesd is not installed; pip install tomesd==0.1.3 or leave it out") from None
    return tomesd.apply_patch(structural_copy(exact), ratio=0.5, use_rand=False)


def _whole(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    # tomesd reads the size of the first positional argument.
    sample = inputs[next(iter(inputs))]
    rest = dict(list(inputs.items())[1:])
    return lambda: model(sample, **rest, return_dict=False)[0]


def _block(model: Any, inputs: dict[str, Any], training: bool) -> tuple[Callable[[], Any], list[Any]]:
    """The first block of a SiT on the arguments that the whole model gives it, and those of them with a gradient."""
    import torch

    block, given = model.transformer_blocks[0], {}

    def keep(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.update(arguments=arguments, named=named)

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()

    def fresh(value: Any) -> Any:
        # In a model the gradient goes on to what made tokens and condition.
        is_activation = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_(training) if is_activation else value

    arguments = [fresh(value) for value in given["arguments"]]
    named = {name: fresh(value) for name, value in given["named"].items()}
    with_gradient = [x for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    return lambda: block(*arguments, **named), with_gradient


def _count(run: Callable[[], Any]) -> tuple[Any, int]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # torch counts attention on GPUs only.
    extra = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_on_cpu}
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        output = run()
    return output.float(), counter.get_total_flops()


def table(result: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    settings, machine_ = result["settings"], result["machine"]
    lines = [
        "| method | times faster | times fewer FLOPs | output error | layers changed |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["speedup_range"]
        error = "other model" if row["error"] is None else f"{row['error']:.3f}"
        lines.append(
            f"| `{row['method']}` | {row['speedup']:.2f} ({low:.2f} to {high:.2f}) | {row['flops_ratio']:.2f} "
            f"| {error} | {'' if row['active_layers'] is None else row['active_layers']} |"
        )
    first = next((row for row in result["rows"] if row["method"] == result.get("baseline")), result["rows"][0])
    seconds = f"{first['seconds']:.1f} s" if first["seconds"] >= 0.5 else f"{first['seconds'] * 1e3:.2f} ms"
    what = "one block" if settings.get("block") else "one pass"
    what += ", forward and backward" if settings.get("passes") == "training" else ""
    what += ", compiled" if settings.get("compile") else ""
    small = "reduced " if settings.get("small") else ""
    lines += [f"- {one['method']} left out: {one['reason']}" for one in result.get("skipped", [])]
    lines.append("")
    lines.append(
        f"{small}`{settings['model']}`, {settings['size']} px, batch {settings['batch']}, {settings['dtype']}, "
        f"random weights, {what}, median of {settings['rounds']} rounds; {first['method']} {seconds}; "
        f"{machine_['device']}, {machine_['threads']} threads, torch {machine_['torch']}, {machine_['date']}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
