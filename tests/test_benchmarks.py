"""The benchmark programs, on a model small enough to be measured in a second."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import model as program
from benchmarks.models import MODELS, BenchmarkModel, _unet_inputs

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def test_a_comparison_and_its_table(tmp_path, monkeypatch, capsys, global_rng_untouched):
    monkeypatch.setitem(MODELS, "sd15", BenchmarkModel(small_unet, _unet_inputs))
    out = tmp_path / "results" / "small.json"
    options = ["--size", "256", "--rounds", "2", "--methods", "softmax", "todo", "linear", "--out", str(out)]
    assert program.main(options) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["softmax"]["speedup"] == 1 and rows["softmax"]["error"] == 0
    assert rows["todo"]["flops_ratio"] > 1.05 and rows["todo"]["error"] > 0
    # The counter sees attention on the CPU: halving keys and values twice saves what the report says it saves.
    assert rows["linear"]["flops"] < rows["todo"]["flops"] < rows["softmax"]["flops"]
    assert result["machine"]["torch"] == torch.__version__ and result["settings"]["size"] == 256
    assert program.main(["--show", str(out)]) == 0
    assert capsys.readouterr().out == printed and "| `todo` |" in printed
