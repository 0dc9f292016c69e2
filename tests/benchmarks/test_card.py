"""The model card has what the run's own files have, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from attngen import InterpolantScheduler, SiTPipeline, SiTTransformer2DModel
from benchmarks.studies.card import card, main, training_facts
from train.recipe.presets import PRESETS


def write_run(folder, **changes):
    config = {**PRESETS["emoji-tiny"].to_dict(), "id2label": {"0": "face", "1": "heart"}, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    # Two processes: 30 minutes, then 60; the clock starts anew in the second.
    seconds = [900.0, 1800.0, 1200.0, 3600.0]
    records = [{"step": i + 1, "loss": 4.0 - i, "seconds": s} for i, s in enumerate(seconds)]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    starts = [{"step": step, "command": f"train {step}", "processes": 2, "device": "a chip"} for step in (0, 2)]
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    return config


def test_facts_of_a_run_that_was_resumed(tmp_path):
    config = write_run(tmp_path)
    facts = training_facts(tmp_path)
    assert facts["hours"] == 1.5 and facts["steps"] == 4 and facts["images"] == 4 * config["batch_size"]
    assert (facts["loss_first"], facts["loss_last"]) == (4.0, 1.0)
    copies = {
        "nearest_training_picture": 0.1,
        "nearest_of_held_out": 0.2,
        "near_copies": 0.01,
        "held_out_near_copies": 0,
    }
    text = card({**facts, **copies, "parameters": 4e6, "vae": None, "pictures": 13})
    assert "4 steps, 32 images, 1.50 hours on 2 x a chip" in text and "face, heart" in text
    assert "train 0    # from step 0\ntrain 2    # from step 2" in text
    assert "SiT in pixel space" in text and "mediators; their number was drawn from 1, 4" in text
    for claim in ("glance", "ships with", "no GPU", "helps", "weakest", "demonstration"):
        assert claim not in text


def test_a_unet_is_described_as_one(tmp_path):
    config = {**PRESETS["emoji-unet"].to_dict(), "id2label": {"0": "face"}}
    facts = {"config": config, "steps": 9, "images": 144, "hours": 1.0, "loss_first": 1.0, "loss_last": 0.1}
    facts |= {"loss_window": 1, "parameters": 2e6, "vae": None, "commands": ["python -m train.sit"], "machine": ""}
    text = card(facts)
    assert "UNet in pixel space, 32, 64, 96 channels, heads of 32" in text and "mediator" not in text
    assert "hours |" in text and "nearest" not in text


def test_a_model_of_latents_is_described_as_one(tmp_path, capsys):
    from diffusers import AutoencoderKL

    write_run(tmp_path, data="runs/latents", attention="softmax", optimizer="adamw")
    with torch.random.fork_rng():
        network = SiTTransformer2DModel(
            sample_size=4, in_channels=4, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=2
        )
        decoder = AutoencoderKL(norm_num_groups=4, block_out_channels=(4,))
    SiTPipeline(network, InterpolantScheduler(), vae=decoder).save_pretrained(tmp_path / "pipeline")
    assert main(["--run", str(tmp_path)]) == 0
    text = (tmp_path / "pipeline" / "README.md").read_text()
    assert "SiT in the latents of AutoencoderKL" in text and "pixel space" not in text and "Noto" not in text
    assert "| data | latents |" in text and "AdamW at 0.001, batches" in text
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert f"{millions:.1f} million weights" in text
    assert main(["--run", str(tmp_path / "none")]) == 2
    assert "no card can be made of" in capsys.readouterr().err


@pytest.mark.parametrize("starts", [(), (1, 0.5)])
def test_mediators_by_time(starts):
    config = {**PRESETS["emoji-tiny"].to_dict(), "mediator_starts": starts, "id2label": {"0": "face"}}
    facts = {"config": config, "steps": 9, "images": 9, "hours": 1, "loss_first": 1, "loss_last": 1, "loss_window": 1}
    text = card({**facts, "parameters": 1, "commands": [], "machine": ""})
    assert ("set by time to 1, 4" in text) == bool(starts)
