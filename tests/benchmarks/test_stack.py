"""Methods together with other accelerators: caches and token merging of other packages."""

from __future__ import annotations

import json

import pytest
import torch

import attngen
from attngen import DownsampledKV, Plan, SiTPipeline
from benchmarks import models, stack
from benchmarks import options as cli
from tests.builders.programs import save_sit

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")
WHOLE = ("tomesd", "fastercache", "int8")
"""What computes all attention layers in every step."""


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
            assert calls <= exact_calls and (calls < exact_calls or cache in WHOLE), cache
            both = stack._loop(options, built, "agent:4" if name == "sd15" else "agent:16", cache)
            assert not torch.equal(both(), output), f"agents change nothing with {cache}"
    expected = {"sd15": ["tomesd", "deepcache", "pab", "taylorseer"]}.get(
        name, ["pab", "fastercache", "taylorseer", "cache-dit"]
    )
    assert accepted == [*expected, *(["first-block", "seacache"] if name == "sit-s" else []), "int8"]


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


def test_a_trained_pipeline_has_errors_too(tmp_path, capsys, one_thread):
    folder, out = save_sit(tmp_path / "sit", attention="softmax"), tmp_path / "stack.json"
    plan = tmp_path / "keys.json"
    Plan.of(DownsampledKV(2)).save(plan)
    base = ["--pipeline", folder, "--labels", "face", "1", "--size", "16", "--steps", "6", "--rounds", "1"]
    assert stack.main([*base, "--method", str(plan), "agent:4", "--caches", "seacache", "int8", "--out", str(out)]) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    names = [str(plan), "agent:4", "seacache", "int8"]
    assert [row["name"] for row in result["rows"]][:3] == ["exact", *names[:2]] and not result["skipped"]
    assert all(0 < result["errors"][name] < 2 for name in names)
    pipe = SiTPipeline.from_pretrained(folder, dtype=torch.float32)
    call = {"class_labels": ["face", 1], "num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "latent"}
    exact = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    with attngen.apply(pipe, Plan.of(DownsampledKV(2))):
        got = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert result["errors"][str(plan)] == pytest.approx(float((got - exact).norm() / exact.norm()), rel=1e-4)
    assert "| `keys.json` | seacache |" in printed and "`sit`, 16 px" in printed
    with pytest.raises(SystemExit):
        stack.main(["--pipeline", folder])
    assert "--pipeline needs --size in pixels" in capsys.readouterr().err


def test_a_peer_that_fails_is_listed(monkeypatch, capsys, one_thread):
    def broken(loop):
        raise RuntimeError("it broke\nsecond line")

    monkeypatch.setitem(stack.CACHES, "pab", broken)
    base = ["--model", "sit-s", "--size", "small", "--steps", "2", "--rounds", "1", "--method", "agent:16"]
    assert stack.main([*base, "--caches", "pab"]) == 0
    assert "- pab left out: RuntimeError: it broke\n" in capsys.readouterr().out
