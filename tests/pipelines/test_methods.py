"""The methods of the programs: derived from attngen's presets, so that a new one is offered without an edit."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

import attngen
from attngen import AgentAttention, DownsampledKV, Plan, SoftmaxAttention
from attngen.methods.base import AttentionMethod, option
from pipelines.cli import UserError
from pipelines.methods import __main__ as program
from pipelines.methods.catalogue import METHODS, Offer
from pipelines.methods.options import method_help, preset_names
from pipelines.methods.uses import Use, parse_use, timeline

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Made(AttentionMethod):
    """Something new. With a second sentence."""

    width: int = option(8, "how wide", low=1, high=64)
    mode: Literal["soft", "hard"] | None = option(None, "how hard")
    share: float | None = option(None, "how much", below=1, high=0.9)
    sharp: bool = option(True, "whether")
    kind: ClassVar[str] = "made"
    title: ClassVar[str] = "Made up"
    source: ClassVar[str] = "arXiv 1234.56789"
    presets: ClassVar[dict] = {"made": None}

    def route(self, layer, call, like):
        raise NotImplementedError

    def flops(self, shape, kernel=""):
        raise NotImplementedError


@pytest.fixture
def made(monkeypatch):
    plan = Plan.of(Made(width=16), min_tokens=64)
    monkeypatch.setattr("attngen.presets.PRESETS", {**attngen.PRESETS, "made": plan})
    monkeypatch.setattr(attngen, "PRESETS", {**attngen.PRESETS, "made": plan})
    return Offer("made")


def test_a_new_method_is_offered_with_all_that_it_says_of_itself(made):
    info = made.info()
    assert (info.name, info.title, info.about) == ("made", "Made up", "Something new.")
    width, mode, share, sharp, smallest = info.options
    assert (width.kind, width.default, width.low, width.high, width.about) == ("count", 16, 1, 64, "how wide")
    assert (mode.kind, mode.default, mode.choices, mode.label) == ("choice", None, (None, "soft", "hard"), "Mode")
    assert (share.kind, share.optional, share.high, sharp.kind, sharp.default) == ("number", True, 0.9, "flag", True)
    assert (smallest.name, smallest.default) == ("min_tokens", 64)
    typed = {"width": "4", "mode": "hard", "share": "0.5", "sharp": "false", "min_tokens": 0}
    checked = info.checked(typed)
    assert checked == {"width": 4, "mode": "hard", "share": 0.5, "sharp": False, "min_tokens": 0}
    assert made.plan(checked) == Plan.of(Made(width=4, mode="hard", share=0.5, sharp=False))
    assert info.checked({**typed, "mode": "none", "share": "none"})["share"] is None
    for bad in ({"width": 65}, {"width": 1.5}, {"mode": "x"}, {"share": 0.95}, {"sharp": "maybe"}, {"other": 1}):
        with pytest.raises(UserError, match=next(iter(bad))):
            info.checked(bad)


def test_a_new_method_is_in_the_readme_table(made):
    (row,) = [line for line in program.presets_table().splitlines() if "`made`" in line]
    assert row == (
        "| `made` | Something new. In layers of 64 tokens or more. | `width=16`, `mode=None`, `share=None`, "
        "`sharp=True` | [1234.56789](https://arxiv.org/abs/1234.56789) |"
    )


def test_the_readme_has_the_present_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert program.presets_table() in readme, "run python -m pipelines.methods --readme README.md"
    assert program.with_table(readme) == readme


def test_the_table_is_rewritten_between_its_marks(tmp_path, capsys):
    file = tmp_path / "x.md"
    file.write_text(f"before\n{program.BEGIN}\nold\n{program.END}\nafter\n")
    assert program.main(["--readme", str(file)]) == 0
    assert file.read_text() == f"before\n{program.BEGIN}\n{program.presets_table()}{program.END}\nafter\n"
    file.write_text("none")
    assert program.main(["--readme", str(file)]) == 2 and "does not have the lines" in capsys.readouterr().err


def test_every_preset_is_offered_and_its_defaults_are_the_preset():
    assert set(attngen.PRESETS) <= set(METHODS)
    for name, plan in attngen.PRESETS.items():
        info = METHODS[name]
        assert info.plan is not None and info.title and info.about.endswith(".")
        assert info.plan(info.checked({})) == plan
        fields = {o.name for stage in plan.stages for method in stage.layers.values() for o in method.options()}
        assert {option.name for option in info.options} - {"switch", "min_tokens"} == fields
    assert len({info.title for info in METHODS.values()}) == len(METHODS)


def test_help_has_every_preset_without_importing_the_library():
    assert sorted(preset_names()) == sorted(attngen.PRESETS)
    assert "agentsd" in method_help() and method_help("none").endswith(", none, or a plan file (.json)")


@pytest.mark.parametrize(
    ("typed", "plan"),
    [
        ("agent 64", Plan.of(AgentAttention(num_agents=64), min_tokens=1024)),
        ("agent num_agents=64 min_tokens=0", Plan.of(AgentAttention(num_agents=64))),
        ("agent:correction=nystrom,agents=merged", None),
        ("todo 4", Plan.of(DownsampledKV(factor=4), max_levels=1)),
    ],
)
def test_options_reach_the_method(typed, plan):
    use = parse_use(typed)
    build = METHODS[use.method].plan
    assert build is not None
    if plan is None:
        plan = Plan.of(AgentAttention(correction="nystrom", agents="merged"), min_tokens=1024)
    assert build(use.options) == plan
    assert parse_use(use.text) == use


def test_counts_over_time():
    use = parse_use("agent 1:64,0.4:0 min_tokens=0")
    build = METHODS["agent"].plan
    assert build is not None
    plan = build(use.options)
    assert [(s.start, s.layers["*"]) for s in plan.stages] == [
        (1.0, AgentAttention(num_agents=64)),
        (0.4, SoftmaxAttention()),
    ]
    first, second = timeline(use)
    assert (first.label, first.exact, second.label, second.exact) == ("agent 64", False, "exact", True)
    few, many = timeline(parse_use("agent 1:4,0.5:64"))
    assert 0 < few.level < many.level == 1
    with pytest.raises(UserError, match="not between 0 and 4096"):
        parse_use("agent 5000")


def test_the_second_stage_of_a_recipe_moves():
    build = METHODS["agentsd"].plan
    assert build is not None
    first, second = attngen.PRESETS["agentsd"].stages
    moved = build(parse_use("agentsd switch=0.3 ratio=0.5").options)
    assert [stage.start for stage in moved.stages] == [1.0, 0.3]
    assert all(stage.layers["*"].to_dict()["ratio"] == 0.5 for stage in moved.stages)
    assert build(parse_use("agentsd switch=0").options).stages == (first,)
    assert build(parse_use("agentsd switch=1").options).stages == (dataclasses.replace(second, start=1.0),)
    assert [part.start for part in timeline(Use("agentsd").checked())] == [1.0, 0.6]


def test_the_program_lists_them(capsys):
    assert program.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in METHODS)
    assert "  num_agents=256  0 to 4,096: most agents a layer uses" in out
    assert program.main(["tome"]) == 0
    assert capsys.readouterr().out.startswith("tome: Token merging. Similar tokens")
    assert program.main(["magic"]) == 2 and "unknown method 'magic'; known: none, " in capsys.readouterr().err


def test_its_help_imports_nothing_heavy():
    code = (
        "import sys; from pipelines.methods.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and "python -m pipelines.methods" in ran.stdout, ran.stderr
