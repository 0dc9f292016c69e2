"""The model card's numbers come from the run's own files."""

from __future__ import annotations

import json

from train.card import card, training_facts
from train.presets import PRESETS


def test_facts_of_a_run_that_was_resumed(tmp_path):
    config = {**PRESETS["emoji-tiny"].to_dict(), "id2label": {"0": "face", "1": "heart"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # Two processes: 30 minutes, then 60; the clock starts anew in the second.
    seconds = [900.0, 1800.0, 1200.0, 3600.0]
    records = [{"step": i + 1, "loss": 4.0 - i, "seconds": s} for i, s in enumerate(seconds)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    facts = training_facts(tmp_path)
    assert facts["hours"] == 1.5 and facts["steps"] == 4 and facts["images"] == 4 * config["batch_size"]
    assert (facts["loss_first"], facts["loss_last"]) == (4.0, 1.0)
    copies = {
        "nearest_training_picture": 0.1,
        "nearest_of_held_out": 0.2,
        "near_copies": 0.01,
        "held_out_near_copies": 0,
    }
    text = card({**facts, **copies, "parameters": 4e6, "pictures": 13, "commands": ["python -m train.sit"]})
    assert "4 steps, 32 pictures, 1.5 hours" in text and "face, heart" in text
    assert "heads of" not in text and "mediators; their number" in text


def test_a_unet_is_described_as_one():
    config = {**PRESETS["emoji-unet"].to_dict(), "id2label": {"0": "face"}}
    facts = {"config": config, "steps": 9, "images": 144, "hours": 1.0, "loss_first": 1.0, "loss_last": 0.1}
    facts |= {"loss_window": 1, "parameters": 2e6, "pictures": 8, "commands": ["python -m train.sit"]}
    facts |= {"nearest_training_picture": 0.1, "nearest_of_held_out": 0.2, "near_copies": 0, "held_out_near_copies": 0}
    text = card(facts)
    assert "32 x 32 and 16 x 16" in text and "32, 64, 96 channels, heads of 32" in text and "mediator" not in text
