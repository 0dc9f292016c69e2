"""benchmarks.studies.experiment: its commands, resuming, losses at fixed noise, and the page made of results."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest
import torch

from benchmarks.studies import experiment
from benchmarks.studies.experiment_table import text
from train.recipe.objectives import make_objective
from train.recipe.presets import PRESETS
from train.sit import parse_arguments


def result(name: str, words: tuple[str, ...]) -> dict:
    _, config = parse_arguments(["--preset", experiment.PRESET, *words])
    kinds = [f"{count} mediators" if count else "" for count in experiment.counts_of(config)]
    distance = {f"FD-emoji[x] {kind}".strip(): 10.0 + i for i, kind in enumerate(kinds)}
    return {
        "name": name,
        "command": f"python {name}",
        "config": json.loads(json.dumps(config.to_dict())),
        "weights": 1,
        "loss": {split: {kind: 0.25 + i for i, kind in enumerate(kinds)} for split in ("train", "test")},
        "distance": {**distance, "floor": 1.0, "pictures": 1024},
        "curve": [[5, 1.0], [10, 0.5]],
        "machine": {"device": "a CPU", "torch": "2", "commit": "abc", "date": "today"},
    }


def test_runs_differ_in_attention_alone():
    base = PRESETS[experiment.PRESET]
    assert (base.image_size // base.patch_size) ** 2 >= 256 and base.fd_pictures >= 1000
    for words in experiment.RUNS.values():
        _, config = parse_arguments(["--preset", experiment.PRESET, *words])
        kept = {f: getattr(base, f) for f in ("attention", "num_mediators", "mediator_counts", "convolution")}
        assert dataclasses.replace(config, **kept) == base


def test_a_done_run_is_not_run_again_and_a_failed_one_is_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "softmax.json").write_text("{}")
    ran = []
    monkeypatch.setattr(experiment, "_train", ran.append)
    monkeypatch.setattr(experiment, "measure", lambda run: {"measured": run.name})
    common = ["--results", str(tmp_path), "--out", str(tmp_path / "runs"), "--cpu", "--steps", "7"]
    assert experiment.main(["--run", "softmax", "linear", *common]) == 0
    assert len(ran) == 1 and ran[0][-5:] == ["--steps", "7", "--out", str(tmp_path / "runs" / "linear"), "--cpu"]
    assert json.loads((tmp_path / "linear.json").read_text())["measured"] == "linear"
    assert experiment.main(["--run", "elastc", *common]) == 2
    assert "near it: elastic" in capsys.readouterr().err
    assert experiment.main(["--table", "--results", str(tmp_path / "none")]) == 2


def test_results_are_written_beside_the_runs(tmp_path, monkeypatch):
    """The committed results of the repository are no results of the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "experiment").mkdir(parents=True)
    (tmp_path / "docs" / "experiment" / "softmax.json").write_text("{}")
    ran = []
    monkeypatch.setattr(experiment, "_train", ran.append)
    monkeypatch.setattr(experiment, "measure", lambda run: {"measured": run.name})
    assert experiment.main(["--run", "softmax"]) == 0
    assert len(ran) == 1 and (tmp_path / "runs/experiment/results/softmax.json").is_file()


def test_the_loss_is_at_fixed_noise_and_counts_every_picture():
    config = dataclasses.replace(PRESETS[experiment.PRESET], classes=("heart",), image_size=16)
    objective = make_objective("velocity")

    class Zero:
        def __call__(self, noisy, times, labels, num_mediators):
            return argparse.Namespace(sample=torch.zeros_like(noisy))

    losses = [experiment.losses(Zero(), config, objective, split) for split in ("train", "train", "test")]
    assert losses[0] == losses[1] != losses[2]
    squares, number = 0.0, 0
    for clean, _, noise, _ in experiment._draws(config, objective, "train"):
        squares, number = squares + (clean - noise).square().sum().item(), number + clean.numel()
    assert losses[0][""] == pytest.approx(squares / number, rel=1e-4)


def test_the_page_has_a_row_for_every_number_of_mediators():
    found = {name: result(name, words) for name, words in experiment.RUNS.items()}
    rates = {"training": 40.4, "forward": 100.0}
    speed = {"rounds": 7, "speed": {"softmax": rates, "elastic 16 mediators": rates}, **found["softmax"]}
    page = text(found, speed, "experiment")
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 11 and "| elastic | 16 | 1.2500 | 1.2500 | 11.00 | 40 | 100 |" in rows
    assert "| mediators-64 | 64 | 0.2500 | 0.2500 | 10.00 |  |  |" in rows
    assert "median of 6 rounds" in page and "python linear" in page and "1,024 pictures" in page
