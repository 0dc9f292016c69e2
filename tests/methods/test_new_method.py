"""A new method is one file and one line: everything else follows from its own fields."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

TOY = '''
"""Every query gets the mean of all values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer, Selection
from attngen.layers.route import Route
from attngen.methods.base import AttentionMethod, LayerShape, Preset, option
from attngen.tokens import join_heads


@dataclass(frozen=True)
class MeanAttention(AttentionMethod):
    """Every query gets the mean of all values, weighted.

    Attributes:
        weight: of the mean.
        norm: what is averaged.
    """

    weight: float = option(1.0, "factor of the mean", high=2, step=0.1, shown=True)
    norm: Literal["mean", "median"] = option("mean", "what is averaged")

    kind: ClassVar[str] = "mean"
    title: ClassVar[str] = "Mean"
    presets: ClassVar[Mapping[str, Preset]] = {"mean": Preset(min_tokens=16)}
    candidates: ClassVar[tuple[Mapping[str, float], ...]] = ({"weight": 0.5},)

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        return Route(self._run, "mean")

    def _run(self, layer: Layer, hidden_states: Tensor, call: Call) -> Tensor:
        query, _, value = layer.project(Selection(hidden_states, hidden_states))
        return layer.output(join_heads(self.weight * value.mean(2, keepdim=True).expand_as(query)))

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        return shape.projection_flops(0, shape.tokens)
'''

USE = """
import torch, attngen
from attngen import Plan
from attngen.calibration import DEFAULT_CANDIDATES
from attngen.methods import METHOD_CLASSES, method_from_dict

cls = METHOD_CLASSES["mean"]
assert attngen.PRESETS["mean"] == Plan.of(cls(), min_tokens=16)
assert method_from_dict(cls(weight=0.5).to_dict()) == cls(weight=0.5)
assert Plan.from_json(Plan.of(cls(norm="median")).to_json()).stages[0].layers["*"].norm == "median"
assert cls(0.5) in DEFAULT_CANDIDATES and cls(0.5).label == "mean 0.5"
assert [o.name for o in cls.options()] == ["weight", "norm"] and cls.options()[1].choices == ("mean", "median")
for bad in ({"weight": -1}, {"norm": "mode"}):
    try:
        cls(**bad)
    except ValueError as error:
        assert next(iter(bad)) in str(error)
    else:
        raise AssertionError(bad)

model = attngen.SiTTransformer2DModel(sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)
with torch.no_grad():
    for weight in model.parameters():
        weight.normal_(0, 0.3)
x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
with torch.no_grad():
    exact = model(x, t).sample
    handle = attngen.apply(model, "mean", weight=0.7)
    trace = handle.trace()
    changed = model(x, t).sample
assert not torch.equal(changed, exact)
assert {row.kernel for row in trace.rows} == {"mean"} and "mean by mean" in str(handle.report())
handle.remove()

from pipelines.methods.uses import parse_use
use = parse_use("mean weight=0.5 norm=median")
assert use.options["weight"] == 0.5 and use.options["norm"] == "median"
print("all of it")
"""


def test_a_toy_method_needs_its_file_and_one_line(tmp_path):
    """In a copy of the library and its programs: presets, JSON, labels, calibration, report, trace, command lines."""
    for folder in ("attngen", "pipelines"):
        for source in (ROOT / folder).rglob("*"):
            if source.suffix in (".py", ".json") and "assets" not in source.parts:
                target = tmp_path / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
    (tmp_path / "attngen/methods/mean.py").write_text(TOY)
    table = tmp_path / "attngen/methods/__init__.py"
    text = table.read_text()
    assert text.count("        LinearAttention,\n") == 1
    text = text.replace("        LinearAttention,\n", "        LinearAttention,\n        MeanAttention,\n")
    table.write_text(
        text.replace(
            "import LinearAttention\n", "import LinearAttention\nfrom attngen.methods.mean import MeanAttention\n"
        )
    )
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(USE)], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0 and ran.stdout.strip() == "all of it", ran.stderr
