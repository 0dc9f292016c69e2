"""Pictures as files of the engine, and settings that come back from files, of strangers too."""

import numpy as np
import pytest

from pipelines.cli import UserError
from pipelines.engine.models import ModelStore
from pipelines.engine.recall import parse_parameters, recall
from pipelines.engine.results import save
from pipelines.images import read_settings, save_png
from tests.pipelines.engines import drawn, last, pixels

pytestmark = pytest.mark.usefixtures("unmeasured")


def test_recall_draws_the_identical_picture(engine, mediator, tmp_path):
    settings = {"method": "mediators", "options": {"mediators": "1:1,0.5:4"}, "seed": 11, "images": 2, "steps": 4}
    made = save(drawn(engine, mediator, prompt="heart", **settings), tmp_path)
    for k, file in enumerate(made.files):
        found = recall(file, engine.models, engine.limits)
        assert found.notes == []
        assert found.settings.seed == 11 + k and found.settings.images == 1
        again = last(engine.generate(found.settings))
        assert np.array_equal(pixels(again), pixels(made, k))


def test_files_hold_settings_or_do_not(engine, mediator, tmp_path):
    result = drawn(engine, mediator)
    (with_settings,) = save(result, tmp_path).files
    (without,) = save(result, tmp_path, with_settings=False).files
    assert read_settings(with_settings)["model_hash"] == engine.models.get(mediator).hash
    assert b"Steps: 3" in with_settings.read_bytes() and b"face" not in without.read_bytes()
    with pytest.raises(UserError, match="cannot be recalled"):
        recall(without, engine.models)
    assert oct(without.stat().st_mode)[-3:] == "644"


def test_no_file_is_left_when_one_cannot_be_written(engine, mediator, tmp_path, monkeypatch):
    result = drawn(engine, mediator, images=2)
    from pipelines import images

    whole, count = images.write_file, []

    def full(path, content):
        count.append(path)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        whole(path, content)

    monkeypatch.setattr(images, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        save(result, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_recall_of_other_programs_files(engine, tmp_path):
    from PIL import Image

    path = tmp_path / "x.png"
    common = {"prompt": "face", "labels": [0], "seed": 7, "steps": 5, "guidance_scale": 1.5, "images": 1}
    save_png(
        Image.new("RGB", (8, 8)), path, {**common, "sampler": "ode heun", "mediators": "1:4,0.5:16", "model": "emoji"}
    )
    found = recall(path, ModelStore())
    assert found.settings.method == "mediators" and found.settings.options["mediators"] == "1:4,0.5:16"
    assert (found.settings.seed, found.settings.steps, found.settings.sampler) == (7, 5, "ode heun")
    save_png(Image.new("RGB", (8, 8)), path, {**common, "model": "other", "method": "secret/plan.json"})
    found = recall(path, ModelStore())
    assert len(found.notes) == 2 and found.settings.method == "none"


def test_recall_of_a_foreign_parameters_text():
    pairs = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x768, Model: x"
    text = f"a fox, in snow\nNegative prompt: cat\n{pairs}"
    found = parse_parameters(text)
    assert found == {
        "prompt": "a fox, in snow", "negative_prompt": "cat", "model": "x", "steps": 20, "seed": 42,
        "guidance_scale": 7.0, "size": "512x768",
    }  # fmt: skip
    assert parse_parameters("hello") is None


HOSTILE = [
    {"prompt": "face", "seed": -5},
    {"prompt": "face", "steps": 10**9},
    {"prompt": ["face"], "seed": 1},
    {"prompt": "face", "size": "99999x99999"},
    {"prompt": "face", "method": "agent", "options": {"agents": "__import__('os').system('touch /tmp/x')"}},
    {"prompt": "face", "method": "plan", "options": {"plan": {"format": "attngen-plan", "stages": 1}}},
    {"prompt": "x" * 5000},
]


@pytest.mark.parametrize("data", HOSTILE, ids=lambda value: str(value)[:50])
def test_hostile_settings_are_refused(engine, tmp_path, data):
    from PIL import Image

    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (8, 8)), path, {"model": "emoji", **data})
    with pytest.raises(UserError):
        recall(path, ModelStore(), engine.limits)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"\x89PNG\r\n\x1a\n" + b"\0" * 100])
def test_broken_files_are_refused(engine, tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be recalled"):
        recall(path, engine.models)


def test_other_weights_under_the_same_name_are_told_of(tmp_path):
    from PIL import Image

    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (8, 8)), path, {"prompt": "face", "model": "emoji", "model_hash": "0123456789"})
    (note,) = recall(path, ModelStore()).notes
    assert "other weights" in note
