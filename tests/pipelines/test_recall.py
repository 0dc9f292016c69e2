"""Pictures as files of the engine, and settings that come back from files, of strangers too."""

import numpy as np
import pytest

from pipelines.cli import UserError
from pipelines.engine.models import ModelStore
from pipelines.engine.parameters import parse_parameters
from pipelines.engine.recall import recall
from pipelines.engine.results import save
from pipelines.images import parameters_text, read_settings, save_png
from pipelines.png_text import read_texts
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


COMMON = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x768, Model: x"
FOUND = {"model": "x", "steps": 20, "seed": 42, "guidance_scale": 7.0, "size": "512x768"}
HIRES = 'Hires prompt: "a fox, Steps: 3, Seed: 9", ControlNet 0: "Module: canny, Weight: 1", Lora hashes: "a: 1, b: 2"'
TEXTS = {
    "whole": (f"a fox, in snow\nNegative prompt: cat\n{COMMON}", "a fox, in snow", "cat"),
    "no prompt": (f"Negative prompt: cat\n{COMMON}", "", "cat"),
    "nothing but settings": (COMMON, "", ""),
    "several lines": (f"a fox,\nin snow\nNegative prompt: cat,\ndog\n{COMMON}", "a fox,\nin snow", "cat,\ndog"),
    "CRLF": (f"a fox\r\nNegative prompt: cat\r\n{COMMON}\r\n", "a fox", "cat"),
    "lines after the settings": (f"a fox\n{COMMON}\nTemplate: a {{x}}, Seed: 1\nNegative Template: b", "a fox", ""),
    "settings over two lines": ("a fox\n" + COMMON.replace(", Seed", ",\nSeed"), "a fox", ""),
    "quoted values with commas": (f"a fox\n{COMMON.replace(', Size', f', {HIRES}, Size')}", "a fox", ""),
    "a prompt about steps": (f"Steps: 3 of them, in stone\n{COMMON}", "Steps: 3 of them, in stone", ""),
    "size with blanks": (f"a fox\n{COMMON.replace('512x768', '512 x 768')}", "a fox", ""),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_parameters_texts_as_people_have_them(kind):
    text, prompt, negative = TEXTS[kind]
    assert parse_parameters(text) == {**FOUND, "prompt": prompt, "negative_prompt": negative}


@pytest.mark.parametrize(
    "text", ["", "hello", "Steps: 20", "Steps: x, Seed: 1", "a\nSteps: 1, Seed: y", "Steps: 1, Seed: 2" + "x" * 70_000]
)
def test_texts_that_hold_no_settings(text):
    assert parse_parameters(text) is None


def test_our_own_text_alone_restores_the_method():
    text = parameters_text({
        "prompt": "face", "steps": 4, "seed": 1, "model": 'my, "own" model', "method": "mediators",
        "mediators": "1:1,0.5:4",
    })  # fmt: skip
    found = parse_parameters(text)
    assert (found["model"], found["method"], found["mediators"]) == ('my, "own" model', "mediators", "1:1,0.5:4")


def written(path, texts, behind=()):
    """A PNG with these texts, those of `behind` after the pixels."""
    import io
    import struct
    import zlib

    from PIL import Image, PngImagePlugin

    chunks, content = PngImagePlugin.PngInfo(), io.BytesIO()
    for keyword, text in texts.items():
        chunks.add_text(keyword, text)
    Image.new("RGB", (4, 4)).save(content, "PNG", pnginfo=chunks)
    data = content.getvalue()
    end = data.rindex(b"IEND") - 4
    more = b""
    for keyword, text in behind:
        body = b"iTXt" + keyword.encode() + b"\0\1\0\0\0" + zlib.compress(text.encode())
        more += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:end] + more + data[end:])
    return path


def test_text_behind_the_pixels_is_read(tmp_path):
    path = written(tmp_path / "x.png", {}, [("parameters", f"flag\n{COMMON.replace('Model: x', 'Model: emoji')}")])
    found = recall(path, ModelStore())
    assert found.settings.seed == 42 and found.missing is None


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ({"prompt": "{}", "workflow": "{}"}, "ComfyUI"),
        ({"parameters": '{"prompt": "a fox"}', "fooocus_scheme": "fooocus"}, "Fooocus"),
        ({"invokeai_metadata": "{}"}, "InvokeAI"),
        ({"comment": "hello"}, "holds no settings"),
        ({"parameters": "hello"}, "holds no settings"),
    ],
)
def test_other_programs_are_named(tmp_path, texts, named):
    with pytest.raises(UserError, match=named):
        recall(written(tmp_path / "x.png", texts), ModelStore())


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff\xe0JFIF"])
def test_no_png_and_no_path_in_the_message(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no PNG picture") as refused:
        recall(path, ModelStore())
    assert str(tmp_path) not in str(refused.value)


def test_the_name_of_a_model_that_is_not_here(tmp_path):
    found = recall(written(tmp_path / "x.png", {"parameters": f"a fox\n{COMMON}"}), ModelStore())
    assert found.missing == "x"


def test_a_text_that_inflates_without_end_is_left_out(tmp_path):
    path = written(tmp_path / "x.png", {}, [("parameters", "x" * (1 << 22))])
    assert read_texts(path) == {}


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
