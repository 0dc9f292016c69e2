"""Measure where which path of agent and linear attention is fastest on this machine: what `kernel="auto"` looks up.

    python -m benchmarks.crossovers                  # writes this device's part of attngen/kernels/crossovers.json
    python -m benchmarks.crossovers --device cuda --out mine.json

For each dtype, pass (forward, or forward and backward) and size: the fastest path of the attention itself, pooling of
the agents and shortcut included, and how many times faster it is than the fastest softmax attention of torch. For whole
layers: the weights of a cost model that says when absorbing the projections pays, fitted to the measured times. On a
CPU one thread is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attngen.kernels.dispatch import Kernel

TABLE = Path(__file__).parents[1] / "attngen" / "kernels" / "crossovers.json"


class Sizes(NamedTuple):
    """What is measured on a kind of device.

    Attributes:
        batches: pictures, with `heads` heads each.
        heads: of the attention calls.
        head_dims: sizes of a head.
        sides: of the token grid.
        agents: numbers of agents.
        layers: (channels, heads) of whole layers.
        layer_sides: side of their token grid.
        layer_agents: their numbers of agents.
        layer_batch: pictures.
    """

    batches: tuple[int, ...]
    heads: int
    head_dims: tuple[int, ...]
    sides: tuple[int, ...]
    agents: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    layer_sides: tuple[int, ...]
    layer_agents: tuple[int, ...]
    layer_batch: int


_LAYERS = ((320, 8), (384, 6), (1152, 16))
_LAYER_AGENTS = (4, 16, 32, 48, 64)
CPU = Sizes((1,), 8, (40, 64, 128), (8, 16, 32, 64), (4, 16, 64, 256), _LAYERS, (16, 32), _LAYER_AGENTS, 1)
CUDA = Sizes((2, 64), 8, (40, 64, 128), (16, 32, 64, 128), (4, 16, 64, 256), _LAYERS, (16, 32, 64), _LAYER_AGENTS, 8)
TINY = Sizes((1,), 2, (8,), (4, 8), (2, 8), ((16, 2),), (4, 8), (2, 4), 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crossovers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=TABLE, help="file to write; other devices in it stay")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min-seconds", type=float, default=0.01, help="shortest measurement")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--passes", nargs="+", default=["forward", "training"], choices=["forward", "training"])
    parser.add_argument("--minutes", type=float, default=math.inf, help="measure no further size after so many")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that the program works, and nothing else")
    options = parser.parse_args(argv)
    import torch

    from attngen.kernels.crossovers import device_key, read_crossovers

    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"there is no device {options.device!r} here")
    if options.device == "cpu":
        torch.set_num_threads(1)
    file = _read(options.out)
    key = device_key(torch.device(options.device))
    file["devices"][key] = measure(options)
    text = as_text(file)
    read_crossovers(text)  # what is written can be read
    options.out.write_text(text)
    print(f"{summary(file['devices'][key])}\nwritten to {options.out}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The part of one device."""
    import torch
    from tqdm import tqdm

    from attngen.kernels.crossovers import call_kind, layer_kind
    from pipelines.cli.provenance import machine

    sizes = TINY if options.tiny else CPU if options.device == "cpu" else CUDA
    calls: dict[str, list[list[Any]]] = {}
    absorbed: dict[str, dict[str, float]] = {}
    losses: dict[str, float] = {}
    end = time.monotonic() + 60 * options.minutes
    cases = list(itertools.product(options.dtypes, options.passes))
    bar = tqdm(total=len(cases) * (3 * _num_calls(sizes) + _num_layers(sizes)), disable=not sys.stderr.isatty())
    for name, kind in cases:
        dtype, training = getattr(torch, name), kind == "training"
        for bias in (False, True):
            rows = calls.setdefault(call_kind("agent", name, training, bias), [])
            for shape in _until(end, _calls(sizes)):
                rows += _agent_rows(shape, sizes, dtype, training, bias, options)
                bar.update()
        rows = calls.setdefault(call_kind("linear", name, training), [])
        for shape in _until(end, _calls(sizes)):
            rows.append(_linear_row(shape, sizes, dtype, training, options))
            bar.update()
        layers = []
        for shape in _until(end, _layers(sizes)):
            layers += _layer_times(shape, sizes, dtype, training, options)
            bar.update()
        if layers:
            absorbed[layer_kind(name, training)] = cost = fit(layers)
            losses[layer_kind(name, training)] = round(worst_loss(layers, cost), 3)
    bar.close()
    return {"machine": machine(options.device), "calls": calls, "absorbed": absorbed, "absorbed_worst_loss": losses}


def _calls(sizes: Sizes) -> Iterator[tuple[int, int, int]]:
    """(batch, head size, side)."""
    return itertools.product(sizes.batches, sizes.head_dims, sizes.sides)


def _layers(sizes: Sizes) -> Iterator[tuple[tuple[int, int], int]]:
    return itertools.product(sizes.layers, sizes.layer_sides)


def _until(end: float, sizes: Iterable[Any]) -> Iterator[Any]:
    """The sizes that begin before the end: a kind that is left without some is measured where it runs."""
    return itertools.takewhile(lambda _: time.monotonic() < end, sizes)


def _num_calls(sizes: Sizes) -> int:
    return len(list(_calls(sizes)))


def _num_layers(sizes: Sizes) -> int:
    return len(list(_layers(sizes)))


def _agent_rows(
    shape: tuple[int, int, int],
    sizes: Sizes,
    dtype: torch.dtype,
    training: bool,
    bias: bool,
    options: argparse.Namespace,
) -> list[list[Any]]:
    """For each number of agents: batch times heads, head size, tokens, agents, the fastest path, its speed-up."""
    from attngen.functional import agent_attention, agent_grid, pool_tokens

    batch, head_dim, side = shape
    tokens, heads, grid = side * side, sizes.heads, (side, side)
    counts = [count for count in sizes.agents if 2 * count < tokens]
    draw = _Draw(dtype, options.device, training)
    inputs = tuple(draw(batch, tokens, heads * head_dim) for _ in range(3))
    tables = {count: [draw(1, heads, count, tokens) for _ in range(2 if bias else 0)] for count in counts}

    def through_agents(count: int, kernel: Kernel) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            pooled = pool_tokens(query, grid, agent_grid(count, grid))
            biases = {}
            if bias:
                first, second = tables[count]
                biases = {"aggregation_bias": first, "broadcast_bias": second.transpose(-1, -2)}
            mixed = agent_attention(
                *(_heads(x, heads) for x in (query, key, value, pooled)),  # type: ignore[misc]
                shortcut=0.0 if bias else 0.075,
                kernel=kernel,
                **biases,
            )
            return mixed.transpose(1, 2).flatten(2)

        return run

    kernels = _kernels(("sdpa", "matmul", "triton"), options.device)
    candidates = {(m, kernel): through_agents(m, kernel) for m in counts for kernel in kernels}
    leaves = {key: tables[key[0]] for key in candidates}
    best, timing = _against_softmax(candidates, leaves, inputs, heads, training, options)
    rows = []
    for count in counts:
        fastest = timing.fastest([(count, kernel) for kernel in kernels])
        speedup = timing.row(fastest, best)["speedup"]["median"]
        rows.append([batch * heads, head_dim, tokens, count, fastest[1], round(speedup, 3)])
    return rows


def _linear_row(
    shape: tuple[int, int, int], sizes: Sizes, dtype: torch.dtype, training: bool, options: argparse.Namespace
) -> list[Any]:
    """Batch times heads, head size, tokens, the fastest path, its speed-up."""
    from attngen.functional import linear_attention

    batch, head_dim, side = shape
    draw = _Draw(dtype, options.device, training)
    inputs = tuple(draw(batch, side * side, sizes.heads * head_dim) for _ in range(3))

    def linear(kernel: Kernel) -> Callable[..., Tensor]:
        def run(*tokens: Tensor) -> Tensor:
            query, key, value = (_heads(x, sizes.heads) for x in tokens)
            return linear_attention(query, key, value, kernel=kernel).transpose(1, 2).flatten(2)

        return run

    kernels = _kernels(("reference", "triton"), options.device)
    best, timing = _against_softmax({k: linear(k) for k in kernels}, {}, inputs, sizes.heads, training, options)
    fastest = timing.fastest(kernels)
    speedup = timing.row(fastest, best)["speedup"]["median"]
    return [batch * sizes.heads, head_dim, side * side, fastest, round(speedup, 3)]


def _against_softmax(
    candidates: dict[Any, Callable[..., Tensor]],
    leaves: dict[Any, Any],
    inputs: tuple[Tensor, ...],
    heads: int,
    training: bool,
    options: argparse.Namespace,
) -> tuple[str, Any]:
    """The name of the fastest softmax attention here, and the times of all."""
    from benchmarks.timing import compare, input_sets

    softmax = _softmax(heads, options.device, inputs, training)
    size = 4 * inputs[0].numel() * inputs[0].element_size()
    sets = [inputs]
    for _ in range(1, input_sets(size, options.device)):
        sets.append(tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs))
    timing = compare(
        {**softmax, **candidates},
        sets,
        baseline=next(iter(softmax)),
        device=options.device,
        rounds=options.rounds,
        training=training,
        leaves=leaves,
        min_seconds=options.min_seconds,
        progress=False,
    )
    return timing.fastest(list(softmax)), timing


def _softmax(heads: int, device: str, inputs: tuple[Tensor, ...], training: bool) -> dict[str, Callable[..., Tensor]]:
    """Torch's softmax attention, by each backend that takes these tensors."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend: SDPBackend | None) -> Callable[..., Tensor]:
        def run(*tokens: Tensor) -> Tensor:
            query, key, value = (_heads(x, heads) for x in tokens)
            if backend is None:
                mixed = F.scaled_dot_product_attention(query, key, value)
            else:
                with sdpa_kernel(backend):
                    mixed = F.scaled_dot_product_attention(query, key, value)
            return mixed.transpose(1, 2).flatten(2)

        return run

    if device == "cpu":
        return {"softmax": through(None)}
    from benchmarks.timing import as_call

    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            as_call(through(backend), training, ())(*inputs)
            torch.cuda.synchronize()
        except RuntimeError:  # it does not take this dtype or head size
            continue
        found[f"softmax {backend.name}"] = through(backend)
    return found


class LayerTime(NamedTuple):
    """A layer's seconds both ways."""

    size: Any
    direct: float
    absorbed: float


def _layer_times(
    shape: tuple[tuple[int, int], int], sizes: Sizes, dtype: torch.dtype, training: bool, options: argparse.Namespace
) -> list[LayerTime]:
    import torch
    import torch.nn.functional as F

    from attngen.functional import agent_attention, agent_grid, pool_tokens
    from attngen.kernels.absorbed import Projection, absorbed_agent_attention
    from attngen.kernels.reference import Convolution
    from attngen.layers.route import AbsorbedSize
    from benchmarks.timing import compare

    (channels, heads), side = shape
    tokens, grid = side * side, (side, side)
    draw = _Draw(dtype, options.device, training)
    x = draw(sizes.layer_batch, tokens, channels)
    projections = [Projection(draw(channels, channels, std=channels**-0.5), draw(channels)) for _ in range(4)]
    convolution = Convolution(draw(channels, 1, 3, 3), draw(channels), grid)
    weights = [tensor for projection in projections for tensor in projection if tensor is not None]
    query, key, value, out = projections

    def direct(count: int, kept: int) -> Callable[..., Tensor]:
        def run(x: Tensor) -> Tensor:
            projected = [F.linear(x, weight, bias) for weight, bias in (query, key, value)]
            pooled = pool_tokens(projected[0], grid, agent_grid(count, grid))
            mixed = agent_attention(
                *(_heads(part, heads) for part in (*projected, pooled)),  # type: ignore[misc]
                shortcut=0.075 if kept == 1 else 0.0,
            )
            mixed = mixed.transpose(1, 2).flatten(2)
            mixed = mixed + convolution.on_tokens(projected[2]) if kept == 2 else mixed
            return F.linear(mixed, *out)

        return run

    def absorbed(count: int, kept: int) -> Callable[..., Tensor]:
        def run(x: Tensor) -> Tensor:
            return absorbed_agent_attention(
                x,
                pool_tokens(x, grid, agent_grid(count, grid)),
                query=query,
                key=key,
                value=value,
                out=out,
                num_heads=heads,
                shortcut=0.075 if kept == 1 else 0.0,
                value_branch=convolution.on_tokens if kept == 2 else None,
            )

        return run

    found = []
    for count in (count for count in sizes.layer_agents if 2 * count < tokens):
        for kept in (0, 1, 2):
            candidates = {"direct": direct(count, kept), "absorbed": absorbed(count, kept)}
            convolved = [t for t in convolution[:2] if isinstance(t, torch.Tensor)] if kept == 2 else []
            timing = compare(
                candidates,
                [(x,)],
                baseline="direct",
                device=options.device,
                rounds=options.rounds,
                training=training,
                leaves={name: [*weights, *convolved] for name in candidates},
                min_seconds=options.min_seconds,
                progress=False,
            )
            size = AbsorbedSize(count, channels // heads, heads, channels, tokens, kept)
            found.append(LayerTime(size, timing.median("direct"), timing.median("absorbed")))
    return found


def fit(layers: Sequence[LayerTime]) -> dict[str, float]:
    """Weights of the cost model whose choices lose least time against the better of both ways, by trying a grid.

    Among equals those whose predicted ratios are nearest to the measured ones.
    """
    from attngen.kernels.crossovers import AbsorbedCost

    best, best_rank = None, (math.inf, math.inf)
    steps = [round(0.5 * 1.15**i, 3) for i in range(16)]
    for narrow, own, kept in itertools.product(steps, steps, (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)):
        cost = AbsorbedCost(narrow, own, kept)
        lost = distance = 0.0
        for size, direct, absorbed in layers:
            gain = size.gain(cost)
            lost += math.log((absorbed if gain > 1 else direct) / min(direct, absorbed))
            distance += math.log(gain * absorbed / direct) ** 2
        if (lost, distance) < best_rank:
            best, best_rank = cost, (lost, distance)
    assert best is not None
    return best._asdict()


def worst_loss(layers: Sequence[LayerTime], cost: dict[str, float]) -> float:
    """How many times longer than the better way the model's choice takes at worst."""
    from attngen.kernels.crossovers import AbsorbedCost

    weights = AbsorbedCost(**cost)
    return max(
        (layer.absorbed if layer.size.gain(weights) > 1 else layer.direct) / min(layer.direct, layer.absorbed)
        for layer in layers
    )


class _Draw:
    """Normal tensors from one seed."""

    def __init__(self, dtype: torch.dtype, device: str, training: bool) -> None:
        import torch

        self.dtype, self.device, self.training = dtype, device, training
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *size: int, std: float = 1.0) -> Tensor:
        import torch

        drawn = (torch.randn(*size, generator=self.generator) * std).to(device=self.device, dtype=self.dtype)
        return drawn.requires_grad_(self.training)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _kernels(names: Sequence[Kernel], device: str) -> list[Kernel]:
    return [name for name in names if name != "triton" or device != "cpu"]


def _read(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text())
    return {"format": "attngen-crossovers", "version": 1, "devices": {}}


def as_text(file: dict[str, Any]) -> str:
    """The file as JSON with one measurement a line."""
    devices = []
    for device, part in file["devices"].items():
        calls = [
            f"    {json.dumps(kind)}: [\n" + ",\n".join(f"     {json.dumps(row)}" for row in rows) + "\n    ]"
            for kind, rows in part["calls"].items()
        ]
        absorbed = [f"    {json.dumps(kind)}: {json.dumps(cost)}" for kind, cost in part["absorbed"].items()]
        devices.append(
            f'  {json.dumps(device)}: {{\n   "machine": {json.dumps(part["machine"])},\n'
            f'   "calls": {{\n{_lines(calls)}\n   }},\n   "absorbed": {{\n{_lines(absorbed)}\n   }},\n'
            f'   "absorbed_worst_loss": {json.dumps(part.get("absorbed_worst_loss", {}))}\n  }}'
        )
    head = f'{{\n "format": {json.dumps(file["format"])},\n "version": {file["version"]},\n'
    return head + f' "devices": {{\n{_lines(devices)}\n }}\n}}\n'


def _lines(parts: Sequence[str]) -> str:
    return ",\n".join(parts)


def summary(part: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    lines = []
    for kind, rows in part["calls"].items():
        paths = {path: sum(row[-2] == path for row in rows) for path in sorted({row[-2] for row in rows})}
        slow = [row for row in rows if row[-1] < 0.98]
        found = ", ".join(f"{path} {count}" for path, count in paths.items())
        lines.append(f"{kind}: {found}; slower than softmax at {len(slow)} of {len(rows)} sizes {slow or ''}".rstrip())
    lines += [
        f"absorbed, {kind}: {cost}; at worst {part['absorbed_worst_loss'][kind]:.2f} times the better way"
        for kind, cost in part["absorbed"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
