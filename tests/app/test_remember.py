"""What comes back from a browser is checked field by field: good ones fill the form, the others do nothing."""

import json

import pytest

from pipelines.engine.models import ModelStore
from pipelines.engine.session import Engine
from pipelines.engine.settings import Limits
from tests.builders.programs import save_sit

gr = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    from pipelines.ui_form import Form
    from pipelines.ui_remember import Memory

    folder = tmp_path_factory.mktemp("models")
    first, second = save_sit(folder / "mediator"), save_sit(folder / "softmax", "softmax")
    engine = Engine(ModelStore(allowed=[first, second]), Limits(pixels=256 * 256, steps=100, images=8, characters=200))
    form = Form(engine)
    with gr.Blocks() as page:
        form.make_choice()
        form.make_presets()
        form.make_method()
        form.make_details()
        memory = Memory(page, form, {}, gr.Textbox(elem_id="status"))
    memory.names = {part.elem_id: part for part in [form.remember, form.model, *memory.checks, memory.status]}
    memory.second = second
    return memory


def filled(memory, **kept):
    """Values by name that the form gets for what was kept."""
    updates = memory.fill(json.dumps({"remember": True, "model": memory.form.first.name, **kept}))
    found = {name: updates[part] for name, part in memory.names.items() if part in updates}
    return {name: value.get("value") if isinstance(value, dict) else value for name, value in found.items()}


def test_what_was_typed_comes_back(memory):
    kept = {
        "label": "heart",
        "steps": 7,
        "guidance": 1.5,
        "width": 32,
        "seed": 4,
        "new-seed": False,
        "keep-settings": False,
        "sampler": "ode heun",
        "method": "mediators",
        "mediators-mediators": "1:2,0.5:4",
        "agent-num-agents": "64",
    }
    found = filled(memory, **kept)
    assert {name: found[name] for name in kept} == kept
    assert found["status"].endswith("as you left it.")


@pytest.mark.parametrize(
    "forged",
    [
        {"label": "<img src=x onerror=alert(1)>"},
        {"label": ["heart"]},
        {"prompt": "x" * 300},
        {"steps": 10**9},
        {"steps": True},
        {"guidance": "2"},
        {"guidance": float("nan")},
        {"width": -1},
        {"seed": 1.5},
        {"new-seed": "yes"},
        {"sampler": "magic"},
        {"sampler": {}},
        {"agent-num-agents": "__import__('os')"},
        {"tome-ratio": 5},
        {"plan-plan": 3.5},
    ],
)
def test_what_cannot_be_used_is_left_out(memory, forged):
    (name,) = forged
    assert filled(memory, **forged).get(name) == filled(memory).get(name)
    assert filled(memory, **forged, images=3)["images"] == 3


@pytest.mark.parametrize("method", ["agent", "magic", "plan", 7])
def test_a_method_that_the_model_does_not_have(memory, method):
    assert filled(memory, method=method)["method"] == "none"


def test_half_typed_options_have_their_default(memory):
    found = filled(memory, **{"method": "mediators", "mediators-mediators": "1:"})
    assert found["method"] == "mediators" and found["mediators-mediators"] == "1:4,0.5:16,0.2:25"


def test_another_model_comes_back_where_it_is_at_hand(memory):
    found = filled(memory, model=memory.second, method="agent", **{"agent-num-agents": "16"})
    assert (found["model"], found["method"], found["agent-num-agents"]) == (memory.second, "agent", "16")
    found = filled(memory, model="owner/large", label="heart")
    assert found["model"] == memory.form.first.name and found["label"] == "heart"
    assert "'owner/large' is not loaded" in found["status"]


def test_nothing_kept_fills_nothing(memory):
    for raw in ("", "{", "[1]", "7", None, "x" * 10**6, '{"remember": 1, "label": "heart"}', "[" * 10**5):
        assert all(isinstance(value, dict) or value is False for value in memory.fill(raw).values()), raw
    assert memory.fill('{"remember": false}') == {memory.form.remember: False}


def test_methods_to_compare_are_those_of_the_model(memory):
    from pipelines.ui_compare import usable_methods

    typed = ["none", "mediators 4", "agent 16 min_tokens=0", "agent x", "magic", 7, None]
    models = memory.models
    assert usable_methods(typed, models.get(memory.form.first.name)) == ["none", "mediators 4"]
    assert usable_methods(typed, models.get(memory.second)) == ["none", "agent 16 min_tokens=0"]
    assert usable_methods("none", models.get(memory.second)) == []
