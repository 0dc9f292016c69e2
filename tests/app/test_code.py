"""The lines of Python that the page shows draw what it drew, to the pixel."""

import numpy as np
import pytest

from pipelines.engine.models import ModelStore
from pipelines.engine.session import Engine
from pipelines.engine.settings import Settings
from pipelines.methods.uses import parse_use
from pipelines.ui_code import code_of
from tests.builders.programs import save_sit

pytestmark = [pytest.mark.usefixtures("unmeasured"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def engine():
    return Engine(ModelStore())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_sit(folder / kind, kind) for kind in ("mediator", "softmax")}


@pytest.mark.parametrize(
    ("kind", "method", "more"),
    [
        ("mediator", "none", {"sampler": "ode euler"}),
        ("mediator", "mediators 2", {"height": 24, "width": 32}),
        ("mediator", "mediators 1:1,0.5:4", {}),
        ("mediator", "mediators 1:1,0.5:4 follow=change", {"steps": 6}),
        ("softmax", "agent 4 min_tokens=0", {}),
        ("softmax", "agent 1:4,0.5:0 min_tokens=0", {}),
        ("softmax", "none", {"guidance_scale": 1.0}),
    ],
)
def test_the_lines_draw_the_same_sample(engine, folders, kind, method, more):
    use = parse_use(method)
    given = Settings("heart", model=folders[kind], **{"seed": 7, "steps": 3, **more}).with_use(use)
    result = engine.draw([given])
    code = code_of(engine.models.get(folders[kind]), result.settings)
    found = {}
    exec(code, found)
    assert np.array_equal(np.asarray(found["image"]), np.asarray(result.pictures[0])), code


def test_models_that_ship_are_named_from_the_folder_of_the_repository(engine):
    model = engine.models.get("emoji-128")
    code = code_of(model, Settings("clock", model="emoji-128", seed=1, steps=2))
    assert "from_pretrained('attngen/assets/emoji_128')" in code and "pipe('clock'" in code
