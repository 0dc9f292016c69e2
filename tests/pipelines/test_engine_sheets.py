"""The engine on tiny models: sheets of several settings, in batches."""

import dataclasses

import numpy as np
import pytest

import attngen
from pipelines.cli import UserError
from pipelines.engine.settings import Settings
from tests.pipelines.engines import drawn, pixels

pytestmark = pytest.mark.usefixtures("unmeasured")


def apart(one, other):
    """The largest difference of two pictures, in levels."""
    return np.abs(one.astype(int) - other.astype(int)).max()


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_sheet_is_drawn_in_batches(engine, mediator, batch):
    sheet = [
        Settings(prompt="face", model=mediator, steps=3, seed=3, images=2),
        Settings(prompt="heart", model=mediator, steps=3, seed=7, images=3),
    ]
    told = []
    found = engine.draw(sheet, told.append, batch=batch)
    wanted = [(name, seed) for name, seeds in (("face", (3, 4)), ("heart", (7, 8, 9))) for seed in seeds]
    assert [(one["prompt"], one["seed"]) for one in found.file_settings] == wanted and found.steps == 15
    for k, (prompt, seed) in enumerate(wanted):
        alone = pixels(drawn(engine, mediator, prompt=prompt, seed=seed))
        assert apart(pixels(found, k), alone) <= (batch > 1), (prompt, seed)
    shares = [progress.share for progress in told]
    assert shares == sorted(shares) and shares[-1] == 1
    assert batch == 1 or f"images 1 to {min(batch, 5)} of 5" in str(told[1])


def test_texts_in_a_batch(engine, texts):
    given = {"negative_prompt": "a cat", "model": texts, "steps": 2, "guidance_scale": 3.0}
    sheet = [Settings(prompt="a fox", seed=1, **given), Settings(prompt="a longer text", seed=2, images=2, **given)]
    found = engine.draw(sheet, batch=3)
    for k, one in enumerate(found.file_settings):
        settings = Settings(prompt=one["prompt"], seed=one["seed"], **given)
        assert apart(pixels(found, k), pixels(engine.draw([settings]))) <= 1


def test_a_schedule_by_change_sees_one_picture_at_a_time(engine, mediator):
    use = {"method": "mediators", "options": {"mediators": "1:1,0.5:2", "follow": "change"}}
    found = engine.draw([Settings(prompt="face", model=mediator, steps=6, images=3, **use)], batch=3)
    assert np.array_equal(pixels(found, 2), pixels(drawn(engine, mediator, seed=2, steps=6, **use)))


def test_a_patch_instead_of_a_method(engine, softmax, tmp_path):
    attngen.Plan.of(attngen.AgentAttention(num_agents=4)).save(tmp_path / "plan.json")
    settings = Settings(prompt="face", model=softmax, steps=3)
    found = engine.draw([settings], patch=str(tmp_path / "plan.json"))
    agents = drawn(engine, softmax, method="agent", options={"num_agents": 4, "min_tokens": 0})
    assert found.report is not None and np.array_equal(pixels(found), pixels(agents))
    with pytest.raises(UserError, match="unknown method 'nope'; known"):
        engine.draw([settings], patch="nope")
    with pytest.raises(ValueError, match="either"):
        engine.draw([dataclasses.replace(settings, method="agent")], patch="softmax")
    with pytest.raises(ValueError, match="differ"):
        engine.draw([settings, dataclasses.replace(settings, steps=4)])
