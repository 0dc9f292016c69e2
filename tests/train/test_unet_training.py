"""train.sit with a UNet: the network behind a SiT's interface, resumed runs, the pipeline that comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import attngen
from tests.train.test_sit_training import assert_same, weights
from train import export, sit
from train.data.open import open_data
from train.recipe.config import TrainingConfig
from train.recipe.presets import PRESETS
from train.recipe.unet import build_unet

SMALL = (
    *("--preset", "emoji-unet", "--image-size", "16", "--classes", "face", "heart", "--block-channels", "16", "16"),
    *(
        "--attention-head-dim",
        "8",
        "--batch-size",
        "4",
        "--sample-steps",
        "2",
        "--sample-every",
        "0",
        "--log-every",
        "1",
    ),
    *("--cpu", "--trackers", "none"),
)


def run(out: Path, *options: str) -> int:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return sit.main([*SMALL, "--out", str(out), *options])


def small_config(**changes) -> TrainingConfig:
    settings = {"architecture": "unet", "block_channels": (16, 16), "attention": "softmax", "patch_size": 1}
    return TrainingConfig(**{**settings, "attention_head_dim": 8, "num_layers": 1, "image_size": 16, **changes})


def test_it_is_called_as_a_sit_and_predicts_data_less_noise(global_rng_untouched):
    data = open_data("emoji", image_size=16, classes=("face", "heart"))
    model = build_unet(small_config(), data).eval()
    again = build_unet(small_config(), data)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    generator = torch.Generator().manual_seed(0)
    sample, times = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0.0, 0.25, 1.0])
    labels, drop = torch.tensor([0, 1, 1]), torch.tensor([False, False, True])
    tokens = torch.eye(3)[[0, 1, 2]].unsqueeze(1)
    with torch.no_grad():
        got = model(sample, times, labels, drop_labels=drop).sample
        steps = torch.tensor([1000.0, 750.0, 0.0])
        want = model.unet(sample, steps, tokens, class_labels=torch.tensor([0, 1, 2])).sample
    assert torch.equal(got, -want)


def test_attention_is_at_all_resolutions_but_the_last():
    preset = PRESETS["emoji-unet"]
    data = open_data("emoji", image_size=preset.image_size, classes=preset.classes)
    with torch.device("meta"):
        unet = build_unet(preset, data).unet
    seen = {}
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            seen.setdefault(name.split(".attentions")[0], []).append(module.inner_dim // module.heads)
    assert sorted(seen) == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1", "up_blocks.2"]
    assert {size for sizes in seen.values() for size in sizes} == {32}
    assert unet.config["cross_attention_dim"] == unet.config["num_class_embeds"] == len(preset.classes) + 1


def test_a_resumed_run_equals_a_whole_one_and_ends_with_a_pipeline(tmp_path):
    assert run(tmp_path / "whole", "--steps", "3") == 0
    assert run(tmp_path / "parts", "--steps", "3", "--max-minutes", "0") == 0
    assert run(tmp_path / "parts", "--steps", "3", "--resume") == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3] and all(0 < line["mfu"] for line in log)
    assert (tmp_path / "whole" / "samples" / "step-00000003.png").stat().st_size > 0
    pipe = attngen.UNetClassPipeline.from_pretrained(tmp_path / "whole" / "pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    averaged = weights(tmp_path / "whole")["ema"]
    for name, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(value, averaged[f"unet.{name}"], atol=1e-3, rtol=1e-3)
    with attngen.apply(pipe, attngen.AgentAttention(num_agents=4)):
        assert pipe("heart", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


def test_averages_of_a_unet_are_exported(tmp_path):
    assert run(tmp_path / "run", "--steps", "2", "--ema-stds", "0.1", "--save-every", "1") == 0
    assert export.main([str(tmp_path / "run"), "--weights", "std:0.1", "--out", str(tmp_path / "made")]) == 0
    pipe = attngen.UNetClassPipeline.from_pretrained(tmp_path / "made", dtype=torch.float32)
    kept = weights(tmp_path / "run")["average_0"]
    for name, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(value, kept[f"unet.{name}"], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "linear"}, "attention='linear' is not for a UNet"),
        ({"objective": "epsilon"}, "objective='epsilon' is not for a UNet"),
        ({"block_channels": (16,)}, "two resolutions"),
        ({"block_channels": (16, 12)}, "got 12"),
        ({"architecture": "sit"}, "are for the architecture 'unet'"),
        ({"architecture": "vnet"}, "known: sit, unet"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
    with pytest.raises(ValueError, match="18 is not a multiple of 4"):
        small_config(block_channels=(16, 16, 16)).check_tokens(18)
