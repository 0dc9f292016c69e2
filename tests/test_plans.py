"""The plans in the repository fit the models that ship, and are faster by their own measurements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attngen
from attngen import Plan, UNetClassPipeline

ROOT = Path(__file__).parents[1]
PLANS = sorted((ROOT / "plans").glob("*.json"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_is_faster_and_applies_to_its_model_alone(path):
    plan = Plan.load(path)
    found = plan.measurements
    assert found.cost == "time" and found.speedup >= 1.02 and found.error <= found.bound["max_error"]
    assert found.seconds < found.seconds_exact and found.settings["runs"] <= 30
    pipe = UNetClassPipeline.from_pretrained(ROOT / "attngen" / "assets" / "emoji_unet", dtype=torch.float32)
    with attngen.apply(pipe, path) as handle:
        assert any(layer.is_active for layer in handle.report((64, 64)).patched)
    emoji = attngen.SiTPipeline.from_pretrained(ROOT / "attngen" / "assets" / "emoji", dtype=torch.float32)
    with pytest.raises(ValueError, match="found for a UNet2DConditionModel, and this is a SiTTransformer2DModel"):
        attngen.apply(emoji, path)
    assert f"`{path.name}`" in (ROOT / "plans" / "README.md").read_text()
