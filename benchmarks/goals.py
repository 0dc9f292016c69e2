"""What this library aims for in speed, and how to find each number among the measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, dict[str, Any]]
Found = list[tuple[str, float]]


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        text: what is measured, against what.
        least: the number to reach.
        unit: "times", or "share" for a percentage.
        find: results by file name -> labels and values; all of them have to reach it.
        why_not: what keeps it out of reach, told where it is missed.
    """

    text: str
    least: float
    unit: str
    find: Callable[[Results], Found]
    why_not: str = ""

    def number(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "share" else f"{value:.2f}×"


def _is_on(result: dict[str, Any], device: str) -> bool:
    on_cpu = str(result["settings"].get("device", "cpu")) == "cpu"
    return on_cpu if device == "cpu" else not on_cpu and "H200" in str(result["machine"].get("device"))


def _rows(results: Results, program: str, device: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(result, row) of every row that a program measured on a kind of device, at full size."""
    return [
        (result, row)
        for result in results.values()
        if result.get("program", "model") == program and _is_on(result, device) and not result["settings"].get("small")
        for row in result["rows"]
    ]


def _matches(row: dict[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())


def _layer(device: str, shapes: Sequence[str], **wanted: Any) -> Callable[[Results], Found]:
    """Against the fastest softmax: for each shape and dtype the fastest candidate that is as wanted."""

    def find(results: Results) -> Found:
        best: dict[str, float] = {}
        for _, row in _rows(results, "layer", device):
            if row["shape"] in shapes and row["kind"] == "agents" and _matches(row, wanted):
                label = f"{row['shape']} {row['dtype']}"
                best[label] = max(best.get(label, 0.0), row["speedup"]["median"])
        return sorted(best.items())

    return find


def _over(device: str, shapes: Sequence[str], path: str, **wanted: Any) -> Callable[[Results], Found]:
    """The fastest path of the library over the candidate of another `path`, at the same shape, agents and variant."""

    def find(results: Results) -> Found:
        times: dict[str, dict[str, float]] = {}
        for result, row in _rows(results, "layer", device):
            if row["shape"] in shapes and row["kind"] == "agents" and _matches(row, wanted):
                # Only what was measured together is compared.
                label = f"{row['shape']} {row['dtype']}"
                key = f"{label}|{result['command']}|{row['batch']}|{row['variant']}|{row['agents']}|{row['pass']}"
                times.setdefault(key, {})[row["path"]] = row["median_seconds"]
        found: dict[str, float] = {}
        for key, by_path in times.items():
            others = [seconds for name, seconds in by_path.items() if name not in (path, "einsum", "absorbed")]
            if path in by_path and others:
                label = key.split("|")[0]
                found[label] = min(found.get(label, float("inf")), by_path[path] / min(others))
        return sorted(found.items())

    return find


def _bandwidth(device: str, **wanted: Any) -> Callable[[Results], Found]:
    """The best share of the copy bandwidth at each shape of 4,096 tokens or more."""

    def find(results: Results) -> Found:
        best: dict[str, float] = {}
        for _, row in _rows(results, "layer", device):
            if row["tokens"] >= 4096 and "bandwidth_share" in row and _matches(row, wanted):
                best[row["shape"]] = max(best.get(row["shape"], 0.0), row["bandwidth_share"])
        return sorted(best.items())

    return find


def _model(
    device: str, model: str, size: int, methods: Sequence[str], passes: str = "forward", **wanted: Any
) -> Callable[[Results], Found]:
    """The best of some methods for a whole model, or one block of it."""

    def find(results: Results) -> Found:
        best: dict[str, float] = {}
        for result, row in _rows(results, "model", device):
            settings = {"passes": "forward", "block": False, "compile": False, **result["settings"]}
            here = {"model": model, "size": size, "passes": passes, "block": False, **wanted}
            if row["method"].partition("@")[0] in methods and _matches(settings, here):
                label = f"{row['method']} {settings['dtype']}"
                best[label] = max(best.get(label, 0.0), row["speedup"])
        return sorted([max(best.items(), key=lambda item: item[1])]) if best else []

    return find


def _stack(device: str) -> Callable[[Results], Found]:
    def find(results: Results) -> Found:
        found: Found = []
        for result in results.values():
            if result.get("program") != "stack" or not _is_on(result, device) or result["settings"]["small"]:
                continue
            model = result["settings"]["model"]
            found += [(f"{model} with {s['cache']}", s["share"]["median"]) for s in result["stacks"]]
        return sorted(found)

    return find


_BLOCK_4 = {"what": "block", "variant": "plain", "agents": 4, "path": "absorbed"}
_BLOCK = {"block": True, "passes": "training"}

CPU: tuple[Goal, ...] = (
    Goal(
        "Attention sub-block, 4 agents absorbed, N = 256, forward",
        4.0,
        "times",
        _layer("cpu", ("sit-s-256", "sit-xl-256"), **_BLOCK_4, **{"pass": "forward"}),
    ),
    Goal(
        "The same, N = 1024",
        12.0,
        "times",
        _layer("cpu", ("sit-s-512", "sit-xl-512"), **_BLOCK_4, **{"pass": "forward"}),
    ),
    Goal(
        "The same, N = 256, forward and backward",
        3.0,
        "times",
        _layer("cpu", ("sit-s-256", "sit-xl-256"), **_BLOCK_4, **{"pass": "training"}),
    ),
    Goal(
        "SiT-S/2 block, forward and backward, N = 256, 4 agents",
        1.4,
        "times",
        _model("cpu", "sit-s", 256, ("plain:4", "input:4"), **_BLOCK),
    ),
    Goal(
        "SiT-XL/2 block, the same",
        1.3,
        "times",
        _model("cpu", "sit-xl", 256, ("plain:4", "input:4"), **_BLOCK),
    ),
    Goal(
        "SiT-S/2 block, 4 mediators with the convolution on the values",
        1.15,
        "times",
        _model("cpu", "sit-s", 256, ("values:4",), **_BLOCK),
    ),
    Goal("SiT-XL/2 block, the same", 1.15, "times", _model("cpu", "sit-xl", 256, ("values:4",), **_BLOCK)),
    Goal(
        "Stable Diffusion 1.5 UNet, 512 px, bfloat16, 64 agents",
        1.5,
        "times",
        _model("cpu", "sd15", 512, ("agent:64",), dtype="bfloat16"),
        "the goal is the best of two runs on another processor (1.47 and 1.51). Agents save a sixth of the operations; "
        "the rest of the gain is how slow softmax attention is in bfloat16, and that differs between processors.",
    ),
    Goal(
        "The same, 1024 px",
        3.0,
        "times",
        _model("cpu", "sd15", 1024, ("agent:64",), dtype="bfloat16"),
        "the same reason; the spread of the rounds reaches it.",
    ),
    Goal(
        "64 agents over the einsums of the published code, N = 1024, float32",
        1.4,
        "times",
        _over("cpu", ("sit-s-512", "sit-xl-512", "sd15-512-l1"), "einsum", what="core", agents=64, dtype="float32"),
        "einsum writes the scores to memory and reads them again; what that costs depends on the processor's caches. "
        "The goal was measured on another one, where the same two calls were 1.4 to 3.4 times faster than einsum.",
    ),
    Goal(
        "The same, N = 4096",
        2.8,
        "times",
        _over("cpu", ("sd15-512-l0", "sdxl-1024-l0"), "einsum", what="core", agents=64, dtype="float32"),
        "the same reason. With 256 agents, whose scores fit into no cache, the two calls are 2.4 times faster here.",
    ),
    Goal(
        "Stacked with a step cache or tomesd, share of the product of both kept",
        0.9,
        "share",
        _stack("cpu"),
        "pyramid attention broadcast leaves out attention itself in the steps it reuses, so agents save nothing in "
        "these; the caches that leave out whole blocks keep 94% and more.",
    ),
)

_CORE_64 = {"what": "core", "agents": 64, "batch": 2, "pass": "forward"}


def _h200_layer(shape: str, least: float) -> Goal:
    text = f"Attention layer {shape}, 64 agents, batch 2"
    return Goal(text, least, "times", _layer("gpu", (shape,), **_CORE_64))


def _h200_model(model: str, size: int, methods: Sequence[str], least: float) -> Goal:
    text = f"Whole denoiser {model}, {size} px, {' or '.join(methods)}, compiled"
    return Goal(text, least, "times", _model("gpu", model, size, methods, compile=True))


_LARGE = ("sd15-512-l0", "sd15-1024-l0", "sdxl-2048-l0", "sdxl-1024-l0")

H200: tuple[Goal, ...] = (
    _h200_layer("sd15-512-l0", 10),
    _h200_layer("sd15-1024-l0", 50),
    _h200_layer("sdxl-2048-l0", 30),
    Goal(
        "Share of the copy bandwidth, N ≥ 4096, 64 agents",
        0.8,
        "share",
        _bandwidth("gpu", **_CORE_64, variant="shortcut", path="triton"),
    ),
    Goal(
        "The same with position biases and the convolution",
        0.7,
        "share",
        _bandwidth("gpu", **_CORE_64, variant="values", path="triton"),
    ),
    Goal("Over two exact calls, 64 agents", 1.5, "times", _over("gpu", _LARGE, "sdpa", **_CORE_64, variant="plain")),
    Goal("The same with position biases", 3.0, "times", _over("gpu", _LARGE, "sdpa", **_CORE_64, variant="values")),
    _h200_model("sd15", 512, ("agent:64",), 1.18),
    _h200_model("sd15", 1024, ("agent:64",), 1.75),
    _h200_model("sd15", 2048, ("agent:64",), 4.2),
    _h200_model("sdxl", 1024, ("agent:64",), 1.07),
    _h200_model("sdxl", 2048, ("agent:64",), 1.33),
    _h200_model("sdxl", 4096, ("agent:64",), 2.4),
    _h200_model("sit-xl", 256, ("plain:4", "input:4"), 1.4),
    Goal("Stacked with a step cache or tomesd, share of the product of both kept", 0.9, "share", _stack("gpu")),
)
