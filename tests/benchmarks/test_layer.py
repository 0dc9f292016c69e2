"""One layer: what is measured, and that all candidates compute the same."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as tf

from benchmarks import layer, shapes
from tests.benchmarks.programs import error_of, spin

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def test_names_of_shapes():
    assert shapes.SHAPES["sd15-512-l0"].tokens == 4096 and shapes.SHAPES["sd15-512-l0"].head_dim == 40
    assert shapes.SHAPES["sdxl-2048-l0"].grid == (128, 128) and shapes.SHAPES["sit-xl-256"].channels == 1152
    assert [shape.name for shape in shapes.select(["sit-*-256"])] == ["sit-s-256", "sit-b-256", "sit-xl-256"]
    with pytest.raises(ValueError, match="no shape is called 'sd3-512'"):
        shapes.select(["sd3-512"])


def small_layer(**options):
    """Measurements of one tiny layer."""
    wanted = {"--agents": "4", "--what": "core block", "--pass": "forward training", "--rounds": "2", **options}
    arguments = ["--quick", *(word for name, value in wanted.items() for word in (name, *value.split()))]
    _, parsed = layer._parse(arguments)
    return layer.measure(parsed, [shapes.Shape("tiny", 2, 8, 8, True)])


def test_a_layer_is_measured_against_the_fastest_softmax(one_thread, global_rng_untouched, monkeypatch):
    from benchmarks import attention

    # The slower one first, so that the first is not the fastest by chance.
    backends = {name: attention.SOFTMAX_BACKENDS[name] for name in ("math", "flash")}
    monkeypatch.setattr(attention, "SOFTMAX_BACKENDS", backends)
    result = small_layer()
    rows = result["rows"]
    for case in {(row["what"], row["pass"]) for row in rows}:
        group = {row["candidate"]: row for row in rows if (row["what"], row["pass"]) == case}
        exact = {name: row["median_seconds"] for name, row in group.items() if row["kind"] == "softmax"}
        assert {row["baseline"] for row in group.values()} == {min(exact, key=exact.__getitem__)}
        assert ("agents plain 4 absorbed" in group) == ("agents input 4 sdpa" in group) == (case[0] == "block")
        assert {"agents shortcut 4 einsum", "agents values 4 matmul", "linear reference"} <= group.keys()
    by_name = {row["candidate"]: row for row in rows if row["what"] == "core" and row["pass"] == "forward"}
    plain, shortcut, values = (by_name[f"agents {name} 4 sdpa"] for name in ("plain", "shortcut", "values"))
    tensor, biases = 4 * 2 * 64 * 16, 2 * 4 * 2 * 4 * 64
    assert values["least_bytes"] == 6 * tensor + biases  # biases once, not for each of both pictures
    assert plain["least_bytes"] == 5 * tensor and shortcut["least_bytes"] == 6 * tensor
    share = plain["least_bytes"] / plain["median_seconds"] / result["copy_bandwidth"]
    assert plain["bandwidth_share"] == pytest.approx(share)
    assert result["settings"]["agents"] == [4] and result["machine"]["torch"] == torch.__version__


def test_every_candidate_agrees_with_its_formula_in_float64(one_thread):
    result = small_layer(**{"--pass": "forward"})
    errors = {(row["what"], row["candidate"]): row["error"] for row in result["errors"]}
    measured = {(row["what"], row["candidate"]) for row in result["rows"]}
    assert measured == errors.keys() and len(errors) > 20
    assert max(errors.values()) < 2e-6


def test_the_oracle_is_the_formula():
    """Against torch in float64, so that an error shared by candidates and oracle shows."""
    from attngen.functional import agent_attention, pool_tokens
    from benchmarks import attention

    shape = shapes.Shape("tiny", 2, 8, 8, True)
    weights = attention.Layer.random(shape, [4], torch.float64, "cpu").to(torch.float64)
    found, _ = attention.candidates(weights, True, [4], ["shortcut"], "cpu", False)
    by_path = {candidate.path: candidate for candidate in found if candidate.kind != "linear"}
    x = torch.randn(2, 64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query, key, value, out = weights.projections
    q, k, v = (tf.linear(x, *projection) for projection in (query, key, value))
    heads = [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v, pool_tokens(q, (8, 8), (2, 2)))]
    exact = tf.scaled_dot_product_attention(*heads[:3])
    agents = agent_attention(*heads, broadcast_scale=8**-0.15, shortcut=0.075, kernel="reference")
    for name, mixed in (("math", exact), ("absorbed", agents)):
        expected = tf.linear(mixed.transpose(1, 2).flatten(2), *out)
        torch.testing.assert_close(attention.oracle(by_path[name], weights, True)(x), expected)


def test_what_does_not_fit_or_takes_too_long_is_listed():
    result = small_layer(**{"--limit": "1e-9", "--pass": "forward", "--what": "core"})
    assert result["rows"] == []
    reasons = {item["candidate"]: item["reason"] for item in result["skipped"]}
    assert "over the limit" in reasons["softmax flash"] and "no softmax attention fits" in reasons["all"]
    assert reasons["agents plain 4 triton"] == "Triton kernels need a GPU"
    assert "over the limit" in layer.table(result)
    result = small_layer(**{"--agents": "4 64", "--pass": "forward", "--what": "core"})
    reasons = {item["candidate"]: item["reason"] for item in result["skipped"]}
    assert reasons["agents plain 64 sdpa"] == "64 agents are too many for 64 tokens"
    huge = shapes.Shape("huge", 64, 256, 4096, True)
    _, parsed = layer._parse(["--agents", "4", "--pass", "forward", "--batch", "1024"])
    parsed.what = ["core"]
    monster = layer._measure_case(
        parsed,
        huge,
        {"shape": "huge", "dtype": "float32", "batch": 1024, "what": "core", "pass": "forward"},
        1.0,
        layer._Pace(parsed),
    )
    assert monster[0] == [] and "do not fit" in monster[1][0]["reason"]


def test_what_is_clearly_too_slow_is_not_tried():
    from benchmarks import attention

    def run(*_):
        raise AssertionError("it was tried")

    _, parsed = layer._parse(["--limit", "1"])
    endless = attention.Candidate("endless", "softmax", None, None, "flash", run, flops=10**18)
    tiny = attention.Layer.random(shapes.Shape("tiny", 2, 8, 8, True), [], torch.float32, "cpu")
    reason = layer._Pace(parsed).why_not(endless, tiny, {"dtype": "float32", "batch": 1, "pass": "forward"}, (), ())
    assert reason is not None and reason.startswith("about ") and reason.endswith("over the limit of 1 s")
    _, parsed = layer._parse(["--limit", "0.01"])
    slow = attention.Candidate("slow", "softmax", None, None, "flash", lambda x: spin(0.05), flops=1)
    x = (torch.zeros(1),)
    reason = layer._Pace(parsed).why_not(slow, tiny, {"dtype": "float32", "batch": 1, "pass": "forward"}, x, ())
    assert reason == "0 s a call, over the limit of 0.01 s"
    large = attention.Candidate("large", "softmax", None, None, "math", run, flops=1, matrix_bytes=2**50)
    reason = layer._Pace(parsed).why_not(large, tiny, {"dtype": "float32", "batch": 1, "pass": "forward"}, (), ())
    assert reason == "it writes 1048576.0 GiB beside its output, which does not fit"


def test_the_layer_program(tmp_path, capsys, monkeypatch, one_thread):
    monkeypatch.setattr(shapes, "SHAPES", {"tiny": shapes.Shape("tiny", 2, 8, 8, False)})
    out = tmp_path / "layer.json"
    arguments = ["--shapes", "tiny", "--quick", "--agents", "4", "--what", "core", "--out", str(out)]
    assert layer.main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["command"] == "python -m benchmarks.layer --shapes tiny --quick --agents 4 --what core"
    assert "baseline softmax" in printed and "| agents plain 4 sdpa |" in printed
    assert layer.main(["--show", str(out)]) == 0 and capsys.readouterr().out == printed
    assert "no shape is called 'nothing'" in error_of(capsys, layer, "--shapes", "nothing")
