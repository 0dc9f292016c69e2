"""What becomes of a plan under other steps, sizes, guidance and a LoRA."""

from __future__ import annotations

import json

import pytest
import torch

import attngen
from attngen import DownsampledKV, Plan, SiTPipeline
from benchmarks import transfer
from tests.builders.programs import save_sit

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def test_each_row_compares_with_exact_attention_under_the_same_change(tmp_path, capsys, monkeypatch, one_thread):
    monkeypatch.setattr(transfer, "STEPS", (2,))
    folder, plan, out = save_sit(tmp_path / "sit", attention="softmax"), tmp_path / "plan.json", tmp_path / "out.json"
    Plan.of(DownsampledKV(2)).save(plan)
    base = ["--pipeline", folder, "--plan", str(plan), "--labels", "face", "--size", "16", "--steps", "3"]
    assert transfer.main([*base, "--rounds", "1", "--lora", "0.5", "--out", str(out)]) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    rows = {row["name"]: row for row in result["rows"]}
    sizes = ["8 × 8 pixels", "20 × 20 pixels", "8 × 32 pixels", "24 × 12 pixels"]
    assert list(rows) == ["as it was found", "2 steps", *sizes, "guidance 1", "guidance 4", "a LoRA of scale 0.5"]
    assert all(0 < row["error"] < 1 and row["exact_seconds"] > 0 for row in rows.values())
    assert rows["as it was found"]["changed"] == 0 < rows["a LoRA of scale 0.5"]["changed"]
    pipe = SiTPipeline.from_pretrained(folder, dtype=torch.float32)
    call = {"class_labels": ["face"], "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    exact = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    with attngen.apply(pipe, Plan.of(DownsampledKV(2))):
        got = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert rows["2 steps"]["error"] == pytest.approx(float((got - exact).norm() / exact.norm()), rel=1e-4)
    assert transfer.main(["--show", str(out)]) == 0 and capsys.readouterr().out == printed


def test_what_must_be_given(capsys):
    with pytest.raises(SystemExit):
        transfer.main(["--plan", "plan.json"])
    assert "--pipeline and --plan must be given" in capsys.readouterr().err
