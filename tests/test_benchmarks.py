"""The benchmark programs, on models and shapes small enough to be measured in a second."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as tf

import attngen
from benchmarks import gpu, layer, model, models, report, shapes, stack, timing
from benchmarks import options as cli
from pipelines.cli import provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")

PROGRAMS = {"layer": layer, "model": model, "stack": stack, "gpu": gpu, "report": report}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def error_of(capsys, program, *arguments):
    with pytest.raises(SystemExit) as ended:
        program.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# The clock


def spin(seconds):
    """Use that much CPU time, and hand back a tensor."""
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass
    return torch.zeros(1)


def test_times_and_ratios_are_of_the_work_done(one_thread):
    timed = timing.compare(
        {"slow": lambda: spin(0.02), "fast": lambda: spin(0.005)},
        [()],
        baseline="slow",
        rounds=3,
        min_seconds=0.0,
    )
    assert timed.clock == "thread CPU time"
    assert all(0.02 <= seconds < 0.03 for seconds in timed.seconds["slow"])
    row = timed.row("fast")
    assert row["baseline"] == "slow" and len(row["seconds"]) == 3
    assert 2.5 < row["speedup"]["median"] <= 4.01
    assert timed.ratios("slow") == [1.0] * 3 and timed.row("slow", "fast")["speedup"]["median"] < 0.4
    assert timed.fastest(["slow", "fast"]) == "fast"


def test_sleeping_is_no_cpu_time(one_thread):
    def sleep():
        time.sleep(0.03)
        return torch.zeros(1)

    timed = timing.compare({"sleep": sleep}, [()], baseline="sleep", rounds=1, min_seconds=0.0)
    assert timed.median("sleep") < 0.01


def test_rounds_are_interleaved_and_input_sets_take_turns(one_thread):
    calls = []

    def candidate(name):
        def run(x):
            calls.append((name, x))
            return torch.zeros(1)

        return run

    names = ("a", "b", "c")
    sets = [(1,), (2,)]
    timing.compare({n: candidate(n) for n in names}, sets, baseline="a", rounds=4, min_seconds=0.0, progress=False)
    # Each candidate: one call to warm up, then every round a, b, c.
    measured = calls[len(names) :]
    assert [name for name, _ in measured] == list("abc") * 4
    assert [x for name, x in measured if name == "b"] == [1, 2, 1, 2]


def test_short_calls_are_repeated(one_thread):
    count = 0

    def run():
        nonlocal count
        count += 1
        return spin(0.001)

    timed = timing.compare({"a": run}, [()], baseline="a", rounds=2, min_seconds=0.02)
    assert all(0.001 <= seconds < 0.002 for seconds in timed.seconds["a"]) and count > 2 * 18


def test_spread():
    assert timing.spread([3.0, 1.0, 2.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 5.0}
    assert timing.spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "max": 2.0}


def test_a_training_call_differentiates_by_inputs_parameters_and_leaves():
    x, weight = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    linear = torch.nn.Linear(3, 1)
    grads = timing.as_call(lambda x: x * weight, True, [weight])(x)
    assert len(grads) == 2 and torch.allclose(grads[0] / 2, grads[1])
    assert [tuple(grad.shape) for grad in timing.as_call(linear, True, ())(x)] == [(3,), (1, 3), (1,)]
    assert x.grad is None and linear.weight.grad is None
    assert not timing.as_call(lambda x: x * weight, False, [weight])(x).requires_grad


def test_peak_memory_is_that_of_live_tensors():
    megabyte = 2**18  # floats

    def two_at_a_time():
        total = torch.zeros(megabyte)
        for _ in range(4):
            total += torch.ones(megabyte)
        return total

    assert timing.peak_memory(two_at_a_time) == pytest.approx(2 * 2**20, rel=0.01)
    kept = torch.zeros(megabyte)
    assert timing.peak_memory(lambda: kept.add_(1)) < 2**16


def test_the_profiler_says_nothing(capfd):
    timing.peak_memory(lambda: torch.zeros(1))
    assert capfd.readouterr().err == ""
    print("still here", file=sys.stderr)
    assert capfd.readouterr().err == "still here\n"


def test_a_bad_comparison():
    with pytest.raises(ValueError, match="baseline 'b' is not among a"):
        timing.compare({"a": spin}, [(0.0,)], baseline="b")
    with pytest.raises(ValueError, match="got 0 and 3"):
        timing.compare({"a": spin}, [], baseline="a", rounds=3)


def test_copy_bandwidth_counts_both_ways(one_thread, monkeypatch):
    seen = {}

    def compare(candidates, inputs, **_):
        ((name, copy),) = candidates.items()
        seen["bytes"] = inputs[0][0].nbytes
        copy(*inputs[0])
        return timing.Timing({name: [0.5, 0.5]}, name, "wall clock")

    monkeypatch.setattr(timing, "compare", compare)
    assert timing.copy_bandwidth(num_bytes=1000) == 4000 and seen["bytes"] == 1000


@pytest.mark.gpu
def test_cuda_graphs_and_peak_memory_on_a_gpu():
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    functions = {"one": lambda x: x @ x, "four": lambda x: x @ x @ x @ x @ x}
    for training in (False, True):
        timed = timing.compare(functions, [(x,)], baseline="four", device="cuda", training=training, memory=True)
        assert set(timed.launches.values()) == {"graph"}
        assert 2 < timed.row("one")["speedup"]["median"] < 6
        assert timed.peak_bytes["one"] >= 4 * 1024**2
    waits = {"waits": lambda x: x * x.sum().item(), "fine": lambda x: x * 2}
    timed = timing.compare(waits, [(x,)], baseline="fine", device="cuda", uniform=True)
    assert all(how.startswith("plain") for how in timed.launches.values())


# Layers


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


# Models


@pytest.mark.parametrize("name", list(models.MODELS))
def test_every_model_runs_small_and_copies_share_weights(name, global_rng_untouched):
    size = max(models.MODELS[name].unit, 64)
    built = models.build_random(name, torch.float32, "cpu", size, small=True)
    inputs = models.random_inputs(name, built, size, 2, torch.float32, "cpu")
    with torch.no_grad():
        output = built(**inputs, return_dict=False)[0]
        copied = models.structural_copy(built)
        again = copied(**inputs, return_dict=False)[0]
    assert output.shape[0] == 2 and output.shape[2:] == (size // 8, size // 8)
    assert output.std() > 0.01 and torch.equal(output, again)
    assert next(copied.parameters()) is next(built.parameters())
    attngen.apply(copied, "linear", min_tokens=0)
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


# Stacks


@pytest.mark.parametrize("name", ["sd15", "sit-s", "dit-xl", "pixart"])
def test_caches_save_steps_and_are_empty_in_every_loop(name, monkeypatch):
    pytest.importorskip("cache_dit", reason="the peers extra")
    pytest.importorskip("DeepCache", reason="the peers extra")
    pytest.importorskip("tomesd", reason="the peers extra")
    options = parsed_stack("--model", name)
    options.size = min(options.size, 128 if name == "sd15" else 256)
    built = models.build_random(name, torch.float32, "cpu", options.size, small=True)
    with torch.no_grad():
        exact, exact_calls = run_twice(stack.Loop(options, models.structural_copy(built)))
        accepted = []
        for cache in stack.CACHES:
            try:
                loop = stack._loop(options, built, None, cache)
            except stack.Refused:
                continue
            accepted.append(cache)
            output, calls = run_twice(loop)
            assert not torch.equal(output, exact) and torch.isfinite(output).all(), cache
            assert calls <= exact_calls and (calls < exact_calls or cache in ("tomesd", "fastercache")), cache
            both = stack._loop(options, built, "agent:4" if name == "sd15" else "agent:16", cache)
            assert not torch.equal(both(), output), f"agents change nothing with {cache}"
    expected = {"sd15": ["tomesd", "deepcache", "pab", "taylorseer"]}
    assert accepted == expected.get(name, ["pab", "fastercache", "taylorseer", "cache-dit"])


def parsed_stack(*arguments):
    parser = cli.parser("stack", None)
    given = ["--model", "sit-s", "--size", "small", "--steps", "10", *arguments]
    result = {}

    def keep(options):
        result["options"] = options
        raise KeyboardInterrupt

    before, stack.measure = stack.measure, keep
    try:
        stack.main(given)
    except KeyboardInterrupt:
        return result["options"]
    finally:
        stack.measure = before
    raise AssertionError(parser)


def run_twice(loop):
    """The output, and how often self-attention was computed; the second loop must not see what the first cached."""
    calls = []
    handles = [
        module.to_q.register_forward_hook(lambda *_: calls.append(1))
        for name, module in loop.model.named_modules()
        if hasattr(module, "to_q") and not getattr(module, "is_cross_attention", False)
    ]
    first = loop()
    count = len(calls)
    second = loop()
    for handle in handles:
        handle.remove()
    assert torch.equal(first, second) and len(calls) == 2 * count
    return first, count


def test_the_stack_program(tmp_path, capsys, one_thread):
    out = tmp_path / "stack.json"
    base = ["--model", "sit-s", "--size", "small", "--steps", "6", "--rounds", "2", "--method", "agent:16"]
    assert stack.main([*base, "--caches", "taylorseer", "deepcache", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    (row,) = result["stacks"]
    timed = {row["name"]: row["seconds"] for row in result["rows"]}
    assert list(timed) == ["exact", "agent:16", "taylorseer", "agent:16 + taylorseer"]
    agents, cache, both = ([e / s for e, s in zip(timed["exact"], timed[n], strict=True)] for n in list(timed)[1:])
    shares = [b / (a * c) for a, b, c in zip(agents, both, cache, strict=True)]
    assert row["share"]["min"] == pytest.approx(min(shares)) and row["share"]["max"] == pytest.approx(max(shares))
    assert result["skipped"][0]["cache"] == "deepcache" and "UNets only" in printed
    assert stack.main(["--show", str(out)]) == 0 and capsys.readouterr().out == printed


def test_a_peer_that_fails_is_listed(monkeypatch, capsys, one_thread):
    def broken(loop):
        raise RuntimeError("it broke\nsecond line")

    monkeypatch.setitem(stack.CACHES, "pab", broken)
    base = ["--model", "sit-s", "--size", "small", "--steps", "2", "--rounds", "1", "--method", "agent:16"]
    assert stack.main([*base, "--caches", "pab"]) == 0
    assert "- pab left out: RuntimeError: it broke\n" in capsys.readouterr().out


# Everything at once, and the report


def test_parts_run_and_a_failing_one_leaves_the_others(tmp_path, monkeypatch, capsys):
    fine = gpu.Part(
        "fine", "", 60, tiny="benchmarks.layer --shapes sit-s-256 --quick --rounds 1 --agents 4 --what core"
    )
    slow = gpu.Part("slow", "", 2, tiny="timeit -n 1 -r 1 -s pass __import__('time').sleep(60)")
    wrong = gpu.Part("wrong", "", 60, tiny="benchmarks.layer --shapes nothing")
    monkeypatch.setattr(gpu, "PARTS", (wrong, slow, fine))
    assert gpu.main(["--tiny", "--device", "cpu", "--commit", "abc", "--out", str(tmp_path)]) == 0
    monkeypatch.delenv("BENCHMARK_COMMIT")
    result = json.loads((tmp_path / "gpu.json").read_text())
    status = {row["name"]: row["status"] for row in result["rows"]}
    assert status == {"wrong": "failed with 2", "slow": "ended after its limit of 2 s", "fine": "done"}
    assert "no shape is called 'nothing'" in result["rows"][0]["log"]
    assert result["results"]["fine"]["machine"]["commit"] == result["machine"]["commit"] == "abc"
    assert "| slow | ended after its limit of 2 s |" in capsys.readouterr().out
    assert gpu.main(["--split", str(tmp_path / "gpu.json"), "--out", str(tmp_path / "split")]) == 0
    assert [path.name for path in (tmp_path / "split").iterdir()] == ["gpu-fine.json"]


def test_no_part_starts_after_the_minutes(tmp_path, capsys):
    arguments = ["--tiny", "--device", "cpu", "--minutes", "0.1", "--out", str(tmp_path), "--parts", "layer"]
    assert gpu.main(arguments) == 0
    assert "| layer | not started: the minutes were over | 0 |" in capsys.readouterr().out


def test_the_command_lines_of_the_parts_are_understood(monkeypatch):
    """Every part parses and passes the checks before it would need a GPU."""
    programs = {"benchmarks.layer": layer, "benchmarks.model": model, "benchmarks.stack": stack}
    measured = []
    monkeypatch.setattr(cli, "prepare", lambda *_: None)
    for program in programs.values():
        monkeypatch.setattr(program, "measure", lambda *arguments: measured.append(arguments) or {})
        monkeypatch.setattr(program, "table", lambda result: "")
    names = [part.name for part in gpu.PARTS]
    assert len(set(names)) == len(names)
    for part in gpu.PARTS:
        for line in (part.arguments, part.tiny):
            name, *arguments = (line or "none").split()
            if name in programs:
                assert programs[name].main([*arguments, "--device", "cuda"]) == 0
    assert len(measured) > 15
    assert sum(part.limit for part in gpu.PARTS if part.default) <= 1200


def test_the_committed_report_is_what_the_program_writes():
    assert report.main(["--check"]) == 0, "run python -m benchmarks.report"


def test_the_report_states_goals_commands_and_machines(tmp_path):
    results = {path.name: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    text = report.document(results)
    for name in results:
        assert f"## {name.removesuffix('.json')}\n\n`python -m benchmarks." in text
    assert text.count("Measured on ") == len(results)


def layer_result(device, rows):
    complete = {"dtype": "bfloat16", "batch": 2, "what": "core", "pass": "forward", "kind": "agents", "tokens": 4096}
    complete |= {"shape": "sd15-512-l0", "agents": 64, "variant": "plain", "baseline": "softmax flash"}
    complete |= {"heads": 8, "head_dim": 40, "candidate": "x"}
    machine_ = {"device": device, "threads": 1, "torch": "2", "commit": "c", "date": "d"}
    return {
        "program": "layer",
        "command": "python -m benchmarks.layer",
        "settings": {"device": "cpu" if device == "CPU" else "cuda"},
        "machine": machine_,
        "rows": [{**complete, **row} for row in rows],
        "skipped": [],
    }


def times(seconds, speedup):
    return {"median_seconds": seconds, "speedup": {"median": speedup, "q1": speedup, "q3": speedup}}


def test_goals_are_found_among_the_measurements():
    rows = [
        {"path": "sdpa", **times(2.0, 6.0)},
        {"path": "triton", **times(1.0, 12.0)},
        {"path": "triton", "variant": "shortcut", "bandwidth_share": 0.7, **times(1.5, 8.0)},
        {"path": "triton", "shape": "sd15-1024-l0", "tokens": 16384, "batch": 64, **times(1.0, 99.0)},
    ]
    text = report.document({"a.json": layer_result("NVIDIA H200", rows)})
    assert (
        "| Attention layer sd15-512-l0, 64 agents, batch 2 | ≥ 10.00× | 12.00× (sd15-512-l0 bfloat16) | yes |" in text
    )
    assert "| Attention layer sd15-1024-l0, 64 agents, batch 2 | ≥ 50.00× | not measured (no GPU) |  |" in text
    assert "| Over two exact calls, 64 agents | ≥ 1.50× | 2.00× (sd15-512-l0 bfloat16) | yes |" in text
    assert "| Share of the copy bandwidth, N ≥ 4096, 64 agents | ≥ 80% | 70% (sd15-512-l0) | no |" in text
    # Numbers of another GPU or of the CPU are none of the H200.
    for device in ("NVIDIA A100", "CPU"):
        text = report.document({"a.json": layer_result(device, rows)})
        assert text.count("not measured (no GPU)") == len(report.H200)


def test_goals_of_the_cpu_and_partial_success():
    block = {"what": "block", "agents": 4, "path": "absorbed", "dtype": "float32"}
    rows = [
        {**block, "shape": "sit-s-256", **times(1.0, 4.5)},
        {**block, "shape": "sit-xl-256", **times(1.0, 3.9)},
        {**block, "shape": "sit-s-512", "variant": "values", **times(1.0, 50.0)},
    ]
    einsum = {"dtype": "float32", "shape": "sit-s-512"}
    rows += [{**einsum, "path": "einsum", **times(3.0, 1.0)}, {**einsum, "path": "matmul", **times(2.0, 1.0)}]
    rows += [{**einsum, "path": "sdpa", **times(2.5, 1.0)}, {**einsum, "path": "absorbed", **times(1.0, 1.0)}]
    text = report.document({"a.json": layer_result("CPU", rows)})
    assert "| ≥ 4.00× | 4.50× (sit-s-256 float32), 3.90× (sit-xl-256 float32) | 1 of 2 |" in text.replace(
        "3.90× (sit-xl-256 float32), 4.50× (sit-s-256 float32)", "4.50× (sit-s-256 float32), 3.90× (sit-xl-256 float32)"
    )
    assert "| The same, N = 1024 | ≥ 12.00× | not measured |" in text
    assert "N = 1024, float32 | ≥ 1.40× | 1.50× (sit-s-512 float32) | yes |" in text
    assert "Why not:" not in text
    rows[-2] |= times(2.9, 1.0)  # the two calls are slower now, so the goal over einsum is missed and has a reason
    rows[-3] |= times(2.9, 1.0)
    missed = report.document({"a.json": layer_result("CPU", rows)})
    assert "Why not:\n\n- 64 agents over the einsums" in missed and missed.count("\n- 64 agents over the einsums") == 1


def test_the_report_checks_what_is_there(tmp_path, capsys):
    out = tmp_path / "docs" / "benchmarks.md"
    arguments = ["--results", str(RESULTS), "--out", str(out)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0 and report.main([*arguments, "--check"]) == 0
    first = out.read_text()
    assert report.main(arguments) == 0 and out.read_text() == first
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("{}")
    assert "holds no measurements" in error_of(capsys, report, "--results", tmp_path / "results")
    assert "there is no folder" in error_of(capsys, report, "--results", tmp_path / "nothing")


# Command lines


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_help_comes_without_importing_torch(name):
    command = [sys.executable, "-X", "importtime", "-m", f"benchmarks.{name}", "--help"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and f"python -m benchmarks.{name}" in ran.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in ran.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "diffusers", "attngen"}


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (model, ["--model", "sd9"], "invalid choice: 'sd9'"),
        (model, ["--size", "100"], "--size must be a multiple of 64 for sd15, got 100"),
        (model, ["--size", "-1"], "a whole number of at least 1, got '-1'"),
        (model, ["--block"], "--block measures a block of SiT; sd15 is none"),
        (model, ["--small", "--size", "64", "--methods", "nothing"], "unknown method 'nothing'"),
        (model, ["--small", "--size", "64", "--methods", "agent:x"], "a number goes with agent"),
        (model, ["--small", "--size", "64", "--methods", "todo:4"], "a number goes with agent"),
        (model, ["--small", "--size", "64", "--methods", "values:4"], "learned mediators are a method of SiT"),
        (model, ["--small", "--size", "64", "--methods", "agent:4", "--kernel", "fast"], "unknown kernel 'fast'"),
        (model, ["--small", "--model", "sit-s", "--methods", "values:"], "a number of mediators goes with values"),
        (model, ["--small", "--model", "sit-s", "--methods", "tomesd"], "tomesd merges tokens of a UNet"),
        (model, ["--device", "gpu"], "a device is cpu, cuda or cuda:NUMBER, got 'gpu'"),
        (model, ["--show", "nothing.json"], "nothing.json cannot be read as JSON"),
        (stack, ["--size", "big"], "--size is a number of pixels or small, got 'big'"),
        (stack, ["--size", "100"], "--size must be a multiple of 16 for sit-s, got 100"),
        (stack, ["--caches", "mine"], "invalid choice: 'mine'"),
        (stack, ["--steps", "1"], "a whole number of at least 2, got '1'"),
        (layer, ["--agents", "0"], "a whole number of at least 1, got '0'"),
        (layer, ["--dtype", "int8"], "invalid choice: 'int8'"),
        (gpu, ["--parts", "mine"], "invalid choice: 'mine'"),
        (gpu, ["--split", str(RESULTS / "sd15-512-cpu.json")], "--split needs a folder"),
    ],
)
def test_what_cannot_be_measured_ends_in_a_sentence(program, arguments, message, capsys):
    assert message in error_of(capsys, program, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_a_sentence(capsys):
    assert "there is no cuda device here" in error_of(capsys, model, "--device", "cuda")


def test_the_machine_names_versions_and_commit(monkeypatch):
    found = provenance.machine("cpu")
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads() and found["device"]
    assert found["diffusers"] and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    assert provenance.machine("cpu")["commit"] == "abc1234"


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    cli.write(path, {"x": 1})
    with pytest.raises(TypeError):
        cli.write(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1} and math.isfinite(path.stat().st_size)
