"""Plans as data: what they choose, how they are written and read, and what is refused."""

import dataclasses
import json
import os
import pickle

import pytest
import torch
from diffusers import UNet2DConditionModel

import attngen
from attngen import (
    PRESETS,
    AgentAttention,
    DownsampledKV,
    FocalAttention,
    LinearAttention,
    Plan,
    SoftmaxAttention,
    Stage,
    TileAttention,
    TokenMerging,
)
from attngen.learned.file import config_hash
from attngen.methods import METHOD_CLASSES, method_from_dict
from attngen.plan import PlanModel
from attngen.presets import resolve_preset

ALL = [
    SoftmaxAttention(),
    AgentAttention(),
    AgentAttention(num_agents=7, broadcast_exponent=1.0, shortcut=0.0),
    AgentAttention(num_agents=9, gain=0.9, agents="merged", correction="nystrom"),
    AgentAttention(agents="merged"),
    TokenMerging(),
    TokenMerging(0.25, 4, 0.9, True, 0.5, 0.0),
    DownsampledKV(3),
    FocalAttention(),
    TileAttention(4, 2, 0.3, 0.5, 2, (0.5, 0.25)),
    FocalAttention(4, 0, 9),
    *(LinearAttention(name) for name in ("elu", "relu", "focused", "identity")),
]
WRITTEN = Plan(
    stages=(
        Stage(start=1.0, layers={"up_blocks.3.*": AgentAttention(num_agents=64), "*": AgentAttention(num_agents=256)}),
        Stage(start=0.6, layers={"*": SoftmaxAttention()}),
    ),
    min_tokens=1024,
)


def as_dict(**changes):
    return {**WRITTEN.to_dict(), **changes}


def stages(*layers):
    return as_dict(stages=[{"start": 1.0, "layers": entry} for entry in layers])


def test_every_option_is_written_and_a_missing_one_has_its_default():
    written = AgentAttention(num_agents=64).to_dict()
    assert written == {
        "method": "agent",
        "num_agents": 64,
        "broadcast_exponent": 0.3,
        "shortcut": 0.075,
        "gain": 1.0,
        "agents": "pooled",
        "correction": None,
        "frames": None,
    }
    assert method_from_dict({"method": "agent", "num_agents": 64}) == AgentAttention(num_agents=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": float("nan")}, "gain"),
        ({"agents": "random"}, "'random'.*pooled, merged"),
        ({"correction": "inverse"}, "'inverse'.*None, nystrom"),
    ],
)
def test_unknown_options_of_agents_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AgentAttention(**options)


@pytest.mark.parametrize("plan", [*PRESETS.values(), *map(Plan.of, ALL), WRITTEN, Plan.of(ALL[1], max_levels=2)])
def test_json_round_trip(plan, tmp_path):
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()
    assert json.loads(plan.to_json()) == plan.to_dict()
    assert Plan.from_dict(plan.to_dict()) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan == Plan.load(str(tmp_path / "plan.json"))


def test_every_method_is_in_the_round_trip():
    assert {type(method) for method in ALL} == set(METHOD_CLASSES.values())


def test_the_file_format():
    assert json.loads(WRITTEN.to_json()) == {
        "format": "attngen-plan",
        "version": 1,
        "stages": [
            {
                "start": 1.0,
                "layers": {
                    "up_blocks.3.*": AgentAttention(num_agents=64).to_dict(),
                    "*": AgentAttention(num_agents=256).to_dict(),
                },
            },
            {"start": 0.6, "layers": {"*": {"method": "softmax"}}},
        ],
        "min_tokens": 1024,
        "max_levels": None,
    }


def test_a_file_may_leave_out_what_has_a_default():
    short = {"format": "attngen-plan", "version": 1, "stages": [{"start": 1, "layers": {"*": {"method": "agent"}}}]}
    assert Plan.from_dict(short) == Plan.of(AgentAttention())


def test_equality_and_hash():
    same = Plan((Stage(1, dict(WRITTEN.stages[0].layers)), WRITTEN.stages[1]), min_tokens=1024)
    assert same == WRITTEN and len({same, WRITTEN}) == 1
    swapped = Plan((Stage(1.0, dict(reversed(WRITTEN.stages[0].layers.items()))), WRITTEN.stages[1]), min_tokens=1024)
    assert swapped != WRITTEN  # the order decides
    assert dataclasses.replace(WRITTEN, min_tokens=1) != WRITTEN
    assert dataclasses.replace(WRITTEN, max_levels=1) != WRITTEN
    assert Stage(1.0, {"*": ALL[1]}) != Stage(0.5, {"*": ALL[1]})
    assert Stage() != "stage" and WRITTEN != WRITTEN.to_dict()


def test_a_plan_does_not_follow_the_dict_it_was_made_of():
    layers = {"*": AgentAttention()}
    plan = Plan((Stage(1.0, layers),))
    layers["*"] = SoftmaxAttention()
    assert plan.methods_for("x") == (AgentAttention(),)


@pytest.mark.parametrize(
    ("pattern", "layer", "matches"),
    [
        ("*", "up_blocks.1.attentions.0.transformer_blocks.0.attn1", True),
        ("up_blocks.*", "up_blocks.1.attn1", True),
        ("up_blocks.*", "down_blocks.1.attn1", False),
        ("up_blocks", "up_blocks.1.attn1", False),
        ("*.attn1", "up_blocks.1.attn1", True),
        ("*.attn1", "up_blocks.1.attn12", False),
        ("up_blocks.[12].*", "up_blocks.2.attn1", True),
        ("up_blocks.[!12].*", "up_blocks.2.attn1", False),
        ("up_blocks.?.attn1", "up_blocks.12.attn1", False),
        ("UP_blocks.*", "up_blocks.1.attn1", False),
        ("up_blocks.1.attn1", "up_blocks.1.attn1", True),
    ],
)
def test_patterns(pattern, layer, matches):
    stage = Stage(1.0, {pattern: DownsampledKV(5)})
    assert stage.method_for(layer) == (DownsampledKV(5) if matches else SoftmaxAttention())


def test_the_first_pattern_that_matches_decides_in_each_stage():
    wide, narrow = AgentAttention(num_agents=64), AgentAttention(num_agents=16)
    plan = Plan(
        (Stage(1.0, {"a.*": wide, "*": narrow}), Stage(0.5, {"*": narrow, "a.*": wide}), Stage(0.2, {"b.*": wide}))
    )
    assert plan.methods_for("a.x") == (wide, narrow, SoftmaxAttention())
    assert plan.methods_for("b.x") == (narrow, narrow, wide)
    assert plan.starts == (1.0, 0.5, 0.2)


BAD = {
    "not an object": (["a"], "attngen-plan"),
    "another format": ({"format": "lora"}, "attngen-plan"),
    "no format": ({"version": 1, "stages": []}, "attngen-plan"),
    "newer version": (as_dict(version=2), "version 2"),
    "no version": ({k: v for k, v in WRITTEN.to_dict().items() if k != "version"}, "version None"),
    "unknown entry": (as_dict(max_level=1), "max_level"),
    "no stages": (as_dict(stages=[]), "start at 1"),
    "stages not a list": (as_dict(stages={"start": 1.0}), "stages"),
    "a stage without layers": (as_dict(stages=[{"start": 1.0}]), "layers"),
    "a stage with more": (as_dict(stages=[{"start": 1.0, "layers": {}, "end": 0.0}]), "end"),
    "layers a list": (as_dict(stages=[{"start": 1.0, "layers": []}]), "layers"),
    "unknown method": (stages({"*": {"method": "agnet"}}), "agnet.*known: softmax, agent"),
    "unknown option": (stages({"*": {"method": "agent", "count": 4}}), "count.*num_agents"),
    "a method's name alone": (stages({"*": "agent"}), "agent"),
    "a method without a name": (stages({"*": {"num_agents": 4}}), "num_agents"),
    "bad count": (stages({"*": {"method": "agent", "num_agents": -1}}), "num_agents.*-1"),
    "bad ratio": (stages({"*": {"method": "token-merging", "ratio": 1.5}}), "ratio.*1.5"),
    "bad map": (stages({"*": {"method": "linear", "feature_map": "tanh"}}), "tanh.*elu"),
    "NaN option": (stages({"*": {"method": "agent", "shortcut": float("nan")}}), "shortcut.*nan"),
    "NaN start": (as_dict(stages=[{"start": float("nan"), "layers": {}}]), "nan"),
    "start as text": (as_dict(stages=[{"start": "1", "layers": {}}]), "'1'"),
    "start above 1": (as_dict(stages=[{"start": 999, "layers": {}}]), "999"),
    "first start below 1": (as_dict(stages=[{"start": 0.9, "layers": {}}]), "0.9"),
    "starts rise": (as_dict(stages=[{"start": s, "layers": {}} for s in (1.0, 0.2, 0.5)]), "0.5"),
    "starts repeat": (as_dict(stages=[{"start": s, "layers": {}} for s in (1.0, 0.5, 0.5)]), "0.5"),
    "bad min_tokens": (as_dict(min_tokens=-1), "min_tokens.*-1"),
    "min_tokens true": (as_dict(min_tokens=True), "min_tokens.*True"),
    "bad max_levels": (as_dict(max_levels=0), "max_levels.*0"),
    "a model as text": (as_dict(model="UNet"), '"model" of a plan has a "class" and a "config_hash", got .UNet'),
    "a model without hash": (as_dict(model={"class": "UNet"}), '"config_hash", got'),
    "a model of numbers": (as_dict(model={"class": "UNet", "config_hash": 1}), "config_hash of a plan's model.*1"),
    "bad measurements": (as_dict(measurements={"error": 0.1}), "measurements are damaged: KeyError"),
    "measurements a list": (as_dict(measurements=[1]), "measurements are damaged"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_bad_files_name_themselves_and_the_value(data, message, tmp_path):
    path = tmp_path / "my plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"my plan.json.*{message}"):
        Plan.load(path)
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"plan", b"\xff\xfe\x00", b"[" * 100_000, b'{"format": "attngen-plan", "version": 1'],
    ids=repr,
)
def test_files_that_are_not_json_name_themselves(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="plan.json"):
        Plan.load(path)


@pytest.mark.parametrize("name", ["missing.json", ""])
def test_missing_files_and_folders_name_themselves(name, tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path / name)):
        Plan.load(tmp_path / name)


BAD_OPTIONS = {
    AgentAttention: {
        "num_agents": [0, -1, 2.5, True, float("nan"), "4", None],
        "broadcast_exponent": [-1, float("nan"), float("inf"), True, "1", None],
        "shortcut": [-0.1, float("nan"), float("inf"), "x", None],
    },
    TokenMerging: {
        "ratio": [-0.1, 1.0, 2, float("nan"), "x", None, True],
        "stride": [0, -1, 1.5, True, None, "2"],
        "agent_ratio": [-0.1, 1.0, float("nan"), "x", True],
        "random": ["no", 1],
        "broadcast_exponent": [float("nan")],
        "shortcut": [float("inf")],
    },
    DownsampledKV: {"factor": [0, -1, 2.0, True, None, float("nan")]},
    FocalAttention: {
        "window": [0, -1, 2.5, True, None, "8"],
        "margin": [-1, 0.5, True, None],
        "num_cells": [0, -4, 1.5, True, None, float("nan")],
    },
    LinearAttention: {"feature_map": ["tanh", "", None, 3]},
}


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [(cls, option, value) for cls, options in BAD_OPTIONS.items() for option in options for value in options[option]],
)
def test_bad_options_are_refused_by_name(cls, option, value):
    with pytest.raises(ValueError, match=option):
        cls(**{option: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plan(()),
        lambda: Plan((Stage(1.0), "stage")),
        lambda: Plan(Stage()),
        lambda: Plan(None),
        lambda: Stage(None),
        lambda: Stage(True),
        lambda: Stage(1.0, [("*", AgentAttention())]),
        lambda: Stage(1.0, {"*": "agent"}),
        lambda: Stage(1.0, {"*": AgentAttention}),
        lambda: Stage(1.0, {3: AgentAttention()}),
        lambda: Plan.of("agent"),
        lambda: Plan.of(AgentAttention(), min_tokens=1.5),
    ],
)
def test_bad_plans_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    WRITTEN.save(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("the disk is full")

    for name in ("replace", "fsync", "chmod"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="full"):
                Plan.of(AgentAttention()).save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["plan.json"]
    Plan.of(AgentAttention()).save(path)
    assert Plan.load(path) == Plan.of(AgentAttention()) and os.listdir(tmp_path) == ["plan.json"]


def test_presets():
    assert set(PRESETS) == {"softmax", "agent", "agentsd", "tome", "todo", "focal", "linear"}
    assert PRESETS["agentsd"].starts == (1.0, 0.6)
    assert PRESETS["agentsd"].methods_for("x") == (
        TokenMerging(ratio=0.4, stride=4, agent_ratio=0.95, broadcast_exponent=0.3, shortcut=0.075),
        TokenMerging(ratio=0.4, stride=2),
    )
    assert PRESETS["agent"].methods_for("x") == (AgentAttention(num_agents=256),)
    assert all(isinstance(plan, Plan) for plan in PRESETS.values())
    assert attngen.PRESETS is PRESETS


def methods_of(name, **options):
    plan = resolve_preset(name, options)
    assert (plan.starts, plan.min_tokens, plan.max_levels) == (
        PRESETS[name].starts,
        PRESETS[name].min_tokens,
        PRESETS[name].max_levels,
    )
    return plan.methods_for("x")


def test_an_override_replaces_one_option_of_a_preset():
    assert resolve_preset("agent") == PRESETS["agent"]
    assert methods_of("agent", num_agents=64, shortcut=0) == (AgentAttention(num_agents=64, shortcut=0),)
    assert methods_of("linear", feature_map="elu") == (LinearAttention("elu"),)


def test_an_override_of_a_recipe_replaces_values_that_are_no_defaults_and_else_all():
    first, second = PRESETS["agentsd"].methods_for("x")
    assert methods_of("agentsd", agent_ratio=0.9) == (dataclasses.replace(first, agent_ratio=0.9), second)
    both = (dataclasses.replace(first, random=True), dataclasses.replace(second, random=True))
    assert methods_of("agentsd", random=True) == both


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("agnet", {}, "unknown method 'agnet'; did you mean 'agent'.*known: .*agentsd.*plan file"),
        ("agent", {"num_agent": 4}, "'agent' has no option 'num_agent'; did you mean 'num_agents'.*broadcast_exponent"),
        ("agent", {"num_agents": 0}, "num_agents.*0"),
        ("softmax", {"num_agents": 4}, "'softmax' has no option 'num_agents'; it has: none"),
    ],
)
def test_an_unknown_preset_or_option_is_named_with_the_nearest(name, options, message):
    with pytest.raises(ValueError, match=message):
        resolve_preset(name, options)


# The model that a plan is for


def small_unet(width=32):
    with torch.random.fork_rng():
        return UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(width, width), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8, attention_head_dim=8,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8,
        )  # fmt: skip


def test_a_plan_for_a_model_is_refused_by_others():
    model = small_unet()
    plan = dataclasses.replace(Plan.of(AgentAttention(4)), model=PlanModel("UNet2DConditionModel", config_hash(model)))
    assert Plan.from_json(plan.to_json()) == plan != dataclasses.replace(plan, model=None)
    attngen.apply(model, plan).remove()
    attngen.apply(model, plan, min_tokens=16).remove()
    with pytest.raises(ValueError, match=r"the plan was found for a UNet2DConditionModel of another configuration \("):
        attngen.apply(small_unet(64), plan)
    other = dataclasses.replace(plan, model=PlanModel("FluxTransformer2DModel", "0" * 64))
    with pytest.raises(ValueError, match="was found for a FluxTransformer2DModel, and this is a UNet2DConditionModel"):
        attngen.apply(model, other)
    attngen.apply(model, dataclasses.replace(other, model=None)).remove()


# Plans on the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository with two plans. Records what was asked for."""
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        path = tmp_path / "hub" / repository / file
        if not path.exists():
            raise OSError(f"404: {repository} has no {file}\nand a second line")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    folder = tmp_path / "hub" / "someone" / "sdxl-plans"
    (folder / "fast").mkdir(parents=True)
    WRITTEN.save(folder / "plan.json")
    Plan.of(AgentAttention(9)).save(folder / "fast" / "4.json")
    return asked


def test_plans_are_loaded_by_their_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Plan.load("someone/sdxl-plans") == WRITTEN
    assert Plan.load("someone/sdxl-plans:fast/4.json") == Plan.of(AgentAttention(9))
    assert hub == [("someone/sdxl-plans", "plan.json"), ("someone/sdxl-plans", "fast/4.json")]
    model = small_unet()
    with attngen.apply(model, "someone/sdxl-plans:fast/4.json") as handle:
        assert handle.plan == Plan.of(AgentAttention(9))
    with pytest.raises(ValueError, match=r"^cannot fetch plan.json of someone/else from the Hub: 404: .* plan.json$"):
        attngen.apply(model, "someone/else")


@pytest.mark.parametrize("name", ["plans/missing.json", "a/b/c", "./a/b", "/a/b", "agent", "a\\b.json"])
def test_other_names_are_no_ids(hub, name):
    with pytest.raises(ValueError, match="cannot read the plan file"):
        Plan.load(name)
    assert not hub


def test_a_file_that_is_there_is_no_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    Plan.of(AgentAttention(5)).save(tmp_path / "someone" / "sdxl-plans")
    assert Plan.load("someone/sdxl-plans") == Plan.of(AgentAttention(5)) and not hub
