"""One call of a denoiser: models, comparisons, tables."""

from __future__ import annotations

import json

import pytest
import torch

import attngen
from benchmarks import model, models
from tests.benchmarks.programs import RESULTS

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


@pytest.mark.parametrize("name", list(models.MODELS))
def test_every_model_runs_small_and_copies_share_weights(name, global_rng_untouched):
    size, core = max(models.MODELS[name].unit, 64), models.MODELS[name].kind == "core"
    built = models.build_random(name, torch.float32, "cpu", size, small=True)
    inputs = models.random_inputs(name, built, size, 2, torch.float32, "cpu")
    with torch.no_grad():
        output = built(**inputs, return_dict=False)[0]
        copied = models.structural_copy(built)
        again = copied(**inputs, return_dict=False)[0]
    assert output.shape[0] == 2 and (core or output.shape[2:] == (size // 8, size // 8))
    assert output.std() > 0.01 and torch.equal(output, again)
    assert next(copied.parameters()) is next(built.parameters())
    attngen.apply(copied, "agent" if core else "linear", min_tokens=0, **({"num_agents": 4} if core else {}))
    with torch.no_grad():
        assert torch.equal(built(**inputs, return_dict=False)[0], output)
        assert not torch.equal(copied(**inputs, return_dict=False)[0], output)


FULL_SIZE = {  # parameters in millions; diffusers' DiT has an embedding of time and class in every block
    "sd15": 860,
    "sd21": 866,
    "sdxl": 2567,
    "sit-s": 33,
    "sit-b": 131,
    "sit-xl": 675,
    "dit-xl": 750,
    "pixart": 611,
}


@pytest.mark.parametrize("name", list(FULL_SIZE))
def test_full_models_have_the_published_size(name):
    with torch.device("meta"):
        built = models.MODELS[name].build(models.MODELS[name].size)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert count / 1e6 == pytest.approx(FULL_SIZE[name], rel=0.01)


def test_a_comparison_and_its_table(tmp_path, capsys, global_rng_untouched):
    out = tmp_path / "results" / "small.json"
    methods = ["softmax", "todo", "linear", "agent:16"]
    options = ["--small", "--size", "256", "--rounds", "2", "--methods", *methods, "--out", str(out)]
    assert model.main(options) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["softmax"]["speedup"] == 1 and rows["softmax"]["error"] == 0
    assert rows["todo"]["flops_ratio"] > 1.05 and rows["todo"]["error"] > 0
    # The counter sees attention on the CPU: halving keys and values twice saves what the report says it saves.
    assert rows["linear"]["flops"] < rows["todo"]["flops"] < rows["softmax"]["flops"]
    assert rows["agent:16"]["active_layers"] == 4 == sum(rows["agent:16"]["kernels"].values())
    assert rows["agent:16"]["error"] > 0
    assert all(row["peak_bytes"] > 2**16 and len(row["all_seconds"]) == 2 for row in rows.values())
    assert result["machine"]["torch"] == torch.__version__ and result["settings"]["size"] == 256
    assert model.main(["--show", str(out)]) == 0
    assert capsys.readouterr().out == printed and "| `todo` |" in printed


def test_mediators_and_a_single_block(capsys, tmp_path, one_thread):
    out = tmp_path / "block.json"
    base = ["--model", "sit-s", "--small", "--rounds", "1", "--pass", "training", "--out", str(out)]
    assert model.main([*base, "--block", "--methods", "softmax", "plain:4", "values:4", "input:4"]) == 0
    assert "other model" in capsys.readouterr().out
    block = json.loads(out.read_text())
    rows = {row["method"]: row for row in block["rows"]}
    assert rows["values:4"]["error"] is None and rows["plain:4"]["error"] > 0 and rows["plain:4"]["active_layers"] == 1
    assert model.main([*base, "--methods", "softmax"]) == 0
    whole = json.loads(out.read_text())
    # Two layers, and the embeddings and output around them.
    assert 2 < whole["rows"][0]["flops"] / rows["softmax"]["flops"] < 3
    assert whole["settings"]["passes"] == "training"


def test_a_block_gets_gradients(one_thread):
    built = models.build_random("sit-s", torch.float32, "cpu", 64, small=True)
    inputs = models.random_inputs("sit-s", built, 64, 1, torch.float32, "cpu")
    run, given = model._block(built, inputs, training=True)
    assert [tuple(x.shape) for x in given] == [(1, 16, 64), (1, 64)]  # tokens and condition
    wanted = [*built.transformer_blocks[0].parameters(), *given]
    assert all(grad is not None for grad in torch.autograd.grad(run().sum(), wanted, allow_unused=True))
    run, given = model._block(built, inputs, training=False)
    assert given == []


def test_the_kernel_asked_for_is_passed_on(monkeypatch, capsys):
    seen = []
    apply = attngen.apply

    def spied(*arguments, **options):
        seen.append(options["kernel"])
        return apply(*arguments, **options)

    monkeypatch.setattr(attngen, "apply", spied)
    base = ["--small", "--size", "64", "--rounds", "1", "--methods", "agent:4"]
    assert model.main([*base, "--kernel", "matmul"]) == 0 and model.main(base) == 0
    assert model.main([*base, "agent:4@reference", "--kernel", "matmul"]) == 0
    assert seen == ["matmul", "auto", "matmul", "reference"]


def test_the_committed_measurements_of_older_versions_are_shown(capsys):
    assert model.main(["--show", str(RESULTS / "sd15-512-cpu.json")]) == 0
    assert "| `agent` | 1." in capsys.readouterr().out
