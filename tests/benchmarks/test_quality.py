"""The quality table: rows, resumed measurements, what is refused, and the page made of the results."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from attngen import (
    AgentAttention,
    InterpolantScheduler,
    Plan,
    SiTPipeline,
    SiTTransformer2DModel,
    SoftmaxAttention,
    Stage,
)
from benchmarks.studies import quality, quality_cost, quality_rows, quality_table
from tests.builders.programs import build_sd

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning", "ignore::UserWarning")


def save_model(folder, attention):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiTTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=3,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_classes=2,
            learn_sigma=False,
            attention=attention,
            num_mediators=4,
        )
        for weights in model.parameters():  # adaLN-zero's own weights would hide what attention does
            torch.nn.init.normal_(weights, std=0.2)
    scheduler = InterpolantScheduler(sampler="ode", solver="euler")
    SiTPipeline(model, scheduler, id2label={0: "face", 1: "heart"}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / name, name) for name in ("softmax", "mediator")}


def run(model, tmp_path, *more):
    argv = ["--model", str(model), "--name", "tiny", "--pictures", "6", "--seeds", "2", "--steps", "2", "--rounds", "1"]
    return quality.main([*argv, "--out", str(tmp_path / "sets"), "--results", str(tmp_path / "results"), *more])


def results(tmp_path):
    return json.loads((tmp_path / "results" / "tiny.json").read_text())


def test_rows_are_measured_once_and_make_a_page(models, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    Plan.of(AgentAttention(num_agents=4)).save(plan)
    assert run(models["softmax"], tmp_path, "--rows", "softmax", "agent-16") == 0
    first = results(tmp_path)
    exact, agents = first["rows"]
    assert exact["values"][0] != exact["values"][1] and exact["values"] != agents["values"]
    assert exact["attention_gflop"] == exact["attention_exact"] == agents["attention_exact"]
    assert agents["attention_gflop"] < exact["attention_gflop"] and agents["gflop"] < exact["gflop"]
    difference = exact["gflop"] - agents["gflop"]
    assert difference == pytest.approx(
        exact["attention_gflop"] - agents["attention_gflop"], rel=0.05
    )  # pooling is in one alone

    rows = ["--plan", f"mine={plan}", "--rows", "softmax", "mine"]
    assert run(models["softmax"], tmp_path, *rows) == 0
    again = results(tmp_path)
    assert [row["row"] for row in again["rows"]] == ["softmax", "mine", "agent-16"]
    assert again["rows"][0] == exact and again["rows"][2] == agents

    repeated = quality.parse_arguments(shlex.split(again["command"])[3:])
    assert repeated.rows == ["softmax", "mine", "agent-16"] and repeated.rounds == 1 and repeated.pictures == 6
    assert repeated.plan == [("mine", Path("plan.json"))]  # of an absolute path the last part

    with Image.open(tmp_path / "results" / "tiny.png") as sheet:
        assert sheet.width > 6 * 64 and sheet.height > 3 * 64

    page = tmp_path / "docs" / "quality.md"
    assert quality.main(["--table", "--results", str(tmp_path / "results"), "--page", str(page)]) == 0
    text = page.read_text()
    assert f"| `agent-16` | {agents['mean']:.3f} ± {agents['spread']:.3f} |" in text
    assert "![Quality against operations](images/quality-tiny.png)" in text
    assert "![Pictures](../results/tiny.png)" in text
    assert (page.parent / "images" / "quality-tiny.png").stat().st_size > 5000


def test_one_set_has_no_spread_and_results_are_written_beside_the_sets(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--model", str(models["softmax"]), "--name", "tiny", "--pictures", "6", "--seeds", "1", "--steps", "1"]
    assert quality.main([*given, "--rounds", "1", "--rows", "softmax"]) == 0
    assert capsys.readouterr().out.startswith("softmax: FD-emoji") and not (tmp_path / "docs").exists()
    (row,) = json.loads((tmp_path / "runs/quality/results/tiny.json").read_text())["rows"]
    assert row["spread"] is None and quality_rows.shown(row) == f"{row['mean']:.3f}"
    assert quality.main(["--table"]) == 0
    page = (tmp_path / "runs/quality/quality.md").read_text()
    assert f"| `softmax` | {row['mean']:.3f} |" in page and "±" not in page


@pytest.mark.parametrize("scale", [None, "1", "7.5"])
def test_operations_of_attention_count_the_guided_samples(tmp_path, scale):
    """What the pipeline guides by itself is counted as what is asked for: Stable Diffusion's own scale is 7.5."""
    build_sd().save_pretrained(tmp_path / "sd")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    given = ["--model", str(tmp_path / "sd"), "--class-names", str(tmp_path / "names.txt"), "--steps", "2"]
    given += [
        "--reference",
        str(tmp_path),
        "--out",
        str(tmp_path),
        *([] if scale is None else ["--guidance-scale", scale]),
    ]
    options = quality.parse_arguments(given)
    sampler = quality.load_sampler(options)
    softmax = quality_rows.Row("softmax", Plan.of(SoftmaxAttention()))
    found = quality_cost.operations(sampler, softmax, options)
    seen = []
    with quality_cost.drawn_with(sampler, softmax) as report:
        hook = sampler.pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        quality_cost.draw(sampler, softmax, options)
        hook.remove()
        each = report().flops_exact
    assert set(seen) == {1 if scale == "1" else 2} and len(seen) >= 2
    assert found["attention_exact"] == pytest.approx(sum(seen) * each / 1e9)


def test_another_measurement_of_the_same_name_is_refused(models, tmp_path, capsys):
    assert run(models["softmax"], tmp_path, "--rows", "softmax") == 0
    assert run(models["softmax"], tmp_path, "--rows", "softmax", "--steps", "3") == 2
    assert "was measured with steps = 2, not 3" in capsys.readouterr().err


def test_the_solver_is_given_on_and_told(models, tmp_path, capsys):
    assert run(models["softmax"], tmp_path, "--rows", "softmax") == 0
    euler = results(tmp_path)
    again = [models["softmax"], tmp_path / "heun", "--rows", "softmax", "--solver", "heun"]
    assert run(*again) == 0
    heun = results(tmp_path / "heun")
    assert heun["rows"][0]["gflop"] == pytest.approx(2 * euler["rows"][0]["gflop"])
    assert "--solver heun" in heun["command"]
    assert run(models["softmax"], tmp_path, "--rows", "softmax", "--solver", "heun") == 2
    assert "was measured with solver = 'euler', not 'heun'" in capsys.readouterr().err
    assert quality.main(["--table", "--results", str(tmp_path / "heun/results"), "--page", str(tmp_path / "q.md")]) == 0
    assert "InterpolantScheduler (ode, heun), cpu" in (tmp_path / "q.md").read_text()


def test_a_difference_has_the_spread_over_sets_of_one_noise():
    first = {"values": [1.0, 2.0], "mean": 1.5}
    row = {"values": [1.2, 2.6], "mean": 1.9}
    assert quality_table._against(row, first) == "+26.7% ± 7.1%"
    assert quality_table._against(first, first) == "+0.0%"


def test_a_model_with_mediators_is_drawn_with_numbers_of_them(models, tmp_path, capsys):
    assert run(models["mediator"], tmp_path, "--rows", "mediators-4", "by-time-1-4-16", "by-change-4-9-16") == 0
    four, by_time, _ = results(tmp_path)["rows"]
    assert four["attention_gflop"] is None and four["gflop"] != by_time["gflop"]
    assert run(models["mediator"], tmp_path, "--plan", f"mine={tmp_path / 'plan.json'}") == 2
    assert "takes no plan" in capsys.readouterr().err


def test_a_method_that_changes_nothing_is_left_out_with_the_reason(models, tmp_path, capsys):
    sampler = quality.load_sampler(quality.parse_arguments(["--model", str(models["softmax"]), "--steps", "2"]))
    options = quality.parse_arguments(["--model", str(models["softmax"]), "--rounds", "1"])
    exact = quality_rows.Row("softmax")
    nothing = quality_rows.Row("nothing", Plan((Stage(1.0, {"no.such.layer": AgentAttention(num_agents=4)}),)))
    found = quality_cost.costs(sampler, [exact, nothing], options, exact)
    assert list(found) == ["softmax"] and "nothing is left out: no attention layer matches" in capsys.readouterr().err


def test_other_models_are_measured_by_fid_against_a_reference(models, tmp_path, monkeypatch):
    """The way to FID: what is measured against what; the numbers themselves are tested with train.fid."""
    from train import fid

    asked = []

    def measured(options):
        asked.append(options)
        return {"values": {"FID": 12.5}}

    monkeypatch.setattr(fid, "fid", measured)
    assert run(models["softmax"], tmp_path, "--rows", "softmax", "--reference", str(tmp_path / "photos")) == 0
    (row,) = results(tmp_path)["rows"]
    assert row["metric"] == "FID" and row["values"] == [12.5, 12.5] and row["floor"] is None
    assert [options.metrics for options in asked] == [("fid",)] * 2
    assert asked[0].reference == str(tmp_path / "photos") and asked[0].generated.endswith("tiny/softmax/seed-0")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --model, or --table"),
        (["--model", "m", "--plan", "plan.json"], "is not NAME=FILE"),
        (["--model", "m", "--pictures", "1"], "at least 2"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        quality.parse_arguments(argv)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_unknown_rows_and_damaged_results(models, tmp_path, capsys):
    assert run(models["softmax"], tmp_path, "--rows", "agents-99") == 2
    assert "there is no row 'agents-99'" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tiny.json").write_text("{")
    assert run(models["softmax"], tmp_path) == 2
    assert "cannot be read as results" in capsys.readouterr().err
    with pytest.raises(quality_table.UserError, match="cannot be read"):
        quality_table.read(tmp_path / "results" / "tiny.json")
