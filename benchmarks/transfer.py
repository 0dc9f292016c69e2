"""What becomes of a plan where it is not used as it was found: other steps, sizes, guidance, a LoRA, another scheduler.

    python -m benchmarks.transfer --pipeline attngen/assets/emoji_unet --labels face clock --size 64 --steps 10 \\
        --plan plans/emoji_unet-64px.json --threads 1 --out plans/measured/transfer-emoji-unet-cpu.json

One row a change, the others as in the first row. Each row compares exact attention and the plan under the same change,
in turn: seconds of whole drawings, the median over rounds of their ratio, and the relative error of the latents. The
LoRA is random, of rank 4 in all attention layers; --lora is its scale, and its row has how much it changes the exact
result. The aspect ratios have the area of the first row, as near as the model's sizes allow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import options as cli
from pipelines.cli.provenance import machine

STEPS = (4, 25, 50)
GUIDANCE = (1.0, 4.0)
SCHEDULERS = {"FlowMatchEulerDiscreteScheduler": "FlowMatchHeunDiscreteScheduler"}
"""Another scheduler for one."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("transfer", __doc__)
    parser.add_argument("--pipeline", type=Path, metavar="FOLDER", help="a trained pipeline of classes")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="the plan of the first row")
    parser.add_argument("--labels", nargs="+", default=["0"], help="classes that the pipeline draws")
    parser.add_argument("--size", type=cli.at_least(8), default=64, help="side in pixels of the first row")
    parser.add_argument("--steps", type=cli.at_least(2), default=10, help="of the first row")
    parser.add_argument("--lora", type=float, default=1.0, help="scale of the random LoRA")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose name has one of these in it")
    parser.add_argument("--rounds", type=cli.at_least(1), default=3)
    parser.add_argument("--dtype", default="float32", choices=cli.DTYPES)
    options = cli.parse(parser, argv)
    if options.show:
        print(table(cli.read(parser, options.show)))
        return 0
    if options.pipeline is None or options.plan is None:
        parser.error("--pipeline and --plan must be given")
    options.guidance = True
    cli.prepare(parser, options)
    result = measure(options)
    print(table(result))
    cli.write(options.out, result)
    return 0


Change = Callable[[Any], Any]
"""Changes a `Drawing`."""


def changes(options: argparse.Namespace, pipe: Any) -> dict[str, Change]:
    """What is tried, by name; the first changes nothing."""
    size, unit = options.size, pipe._size_unit
    found: dict[str, Change] = {"as it was found": lambda drawing: None}
    found |= {f"{steps} steps": _call(num_inference_steps=steps) for steps in STEPS if steps != options.steps}
    shares = ((0.5, 0.5), (1.25, 1.25), (0.5, 2.0), (1.5, 0.75))
    for height, width in ((int(size * share) // unit * unit for share in pair) for pair in shares):
        found[f"{height} × {width} pixels"] = _call(height=height, width=width)
    found |= {f"guidance {scale:g}": _call(guidance_scale=scale) for scale in GUIDANCE}
    other = SCHEDULERS.get(type(pipe.scheduler).__name__)
    found |= {} if other is None else {other: _scheduler(other)}
    found[f"a LoRA of scale {options.lora:g}"] = lambda drawing: _lora(drawing, options.lora)
    return {name: change for name, change in found.items() if not options.rows or any(t in name for t in options.rows)}


def _call(**arguments: Any) -> Change:
    return lambda drawing: drawing.call.update(arguments)


def _scheduler(name: str) -> Change:
    def change(drawing: Any) -> None:
        import diffusers

        drawing.pipe.register_modules(scheduler=getattr(diffusers, name).from_config(drawing.pipe.scheduler.config))

    return change


def _lora(drawing: Any, scale: float) -> None:
    """A random LoRA of rank 4, the same every time."""
    import torch
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        alpha: Any = 4 * scale
        config = LoraConfig(
            r=4, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
        )
        drawing.model.add_adapter(config)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the rows; returns what `--out` writes."""
    import attngen
    from attngen import Plan
    from benchmarks.timing import compare
    from benchmarks.trained import Drawing, load

    pipe, plan = load(options), Plan.load(options.plan)
    rows, clock, plain = [], "", None
    for name, change in changes(options, pipe).items():
        drawings = {"exact": Drawing(options, pipe), "plan": Drawing(options, pipe)}
        for drawing in drawings.values():
            change(drawing)
        attngen.apply(drawings["plan"].pipe, plan)
        timed = compare(drawings, [()], baseline="exact", device=options.device, rounds=options.rounds, min_seconds=0.0)
        exact, got = (drawing.last.double() for drawing in drawings.values())
        clock, plain = timed.clock, exact if plain is None else plain
        changed = float((exact - plain).norm() / plain.norm()) if exact.shape == plain.shape else None
        error = float((got - exact).norm() / exact.norm())
        rows.append({**timed.row("plan"), "name": name, "exact_seconds": timed.median("exact"), "error": error})
        rows[-1]["changed"] = changed
    return {
        "program": "transfer",
        "command": options.command,
        "settings": {**cli.settings(options), "clock": clock},
        "machine": machine(options.device),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    settings, machine_ = result["settings"], result["machine"]
    lines = ["| | seconds exact | with the plan | times as fast (lowest to highest) | error |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        speedup = row["speedup"]
        lines.append(
            f"| {row['name']} | {row['exact_seconds']:.2f} | {row['median_seconds']:.2f} "
            f"| {speedup['median']:.2f} ({speedup['min']:.2f} to {speedup['max']:.2f}) | {row['error']:.3f} |"
        )
    lora = next((row for row in result["rows"] if "LoRA" in row["name"]), None)
    effect = "" if lora is None else f"; the LoRA changes the exact latents by {lora['changed']:.2f}"
    lines += [
        "",
        f"`{Path(settings['plan']).name}` on `{Path(settings['pipeline']).name}`, first row {settings['size']} px, "
        f"{settings['steps']} steps, guidance 2, {len(settings['labels'])} images, {settings['dtype']}, median of "
        f"{settings['rounds']} rounds in turn{effect}; {machine_['device']}, {machine_['threads']} threads, torch "
        f"{machine_['torch']}, {machine_['date']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
