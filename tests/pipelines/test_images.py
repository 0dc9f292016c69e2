"""Grids, and PNGs with settings."""

import json
import os
import stat

import pytest
from PIL import Image, PngImagePlugin

from pipelines.cli.provenance import model_hash
from pipelines.images import (
    MAX_SETTINGS_CHARACTERS,
    SETTINGS_CHUNK,
    enlarge,
    grid,
    parameters_text,
    read_settings,
    save_png,
    write_file,
)

RED, GREEN, BLUE = "#ff0000", "#00ff00", "#0000ff"
SETTINGS = {
    "prompt": "a fox, “quoted” — and\nlines",
    "negative_prompt": "blur",
    "steps": 50,
    "sampler": "ode heun",
    "guidance_scale": 2.0,
    "seed": 7,
    "size": "32x32",
    "model": "emoji",
    "mediators": "1:4,0.5:16",
    "labels": [0, 3],
}


def square(color, side=8):
    return Image.new("RGB", (side, side), color)


def colors(image):
    return {color for _, color in image.convert("RGB").getcolors(maxcolors=100000)}


def boxes(image, color):
    """Bounding box of a colour."""
    mask = Image.new("1", image.size)
    wanted = tuple(bytes.fromhex(color[1:]))
    mask.putdata([pixel == wanted for pixel in image.getdata()])
    return mask.getbbox()


def test_enlarged_pixels_are_squares():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), (0, 0, 255))
    large = enlarge(image, 3)
    assert large.size == (6, 3) and boxes(large, RED) == (0, 0, 3, 3) and boxes(large, BLUE) == (3, 0, 6, 3)
    assert enlarge(image, 1) is image


def test_a_grid_keeps_every_picture_whole():
    sheet = grid([[square(RED), square(GREEN)], [square(BLUE)]], scale=2)
    found = {color: boxes(sheet, color) for color in (RED, GREEN, BLUE)}
    sizes = {(right - left, lower - upper) for left, upper, right, lower in found.values()}
    assert sizes == {(16, 16)}
    assert found[RED][1] == found[GREEN][1] < found[BLUE][1]
    assert found[RED][0] == found[BLUE][0] < found[GREEN][0]
    assert sheet.size[0] < 2 * 16 + 10, "no room is left for labels that are not there"


def test_labels_stand_beside_and_above():
    plain = grid([[square(RED, 32), square(RED, 32)]])
    labelled = grid([[square(RED, 32), square(GREEN, 32)]], row_labels=["fox"], groups=[("4", 1), ("16", 1)])
    left, upper = boxes(labelled, RED)[:2]
    assert left > 20 and upper > 12 and labelled.width > plain.width
    for part in ((0, upper, left, labelled.height), (left, 0, labelled.width, upper)):
        assert len(colors(labelled.crop(part))) > 2, "there is a text"
    gap = boxes(labelled, GREEN)[0] - boxes(labelled, RED)[2]
    assert gap > 5, "groups stand apart"


def test_a_long_label_is_cut():
    sheet = grid(
        [[square(RED, 32)]], row_labels=["a very long prompt " * 50], groups=[("the method's long name " * 9, 1)]
    )
    assert sheet.width < 320


def test_a_label_of_several_lines_stands_under_each_other():
    one = grid([[square("#ffdddd", 64)]], row_labels=[["fox"]])
    two = grid([[square("#ffdddd", 64)]], row_labels=[["fox", "1.2 s"]])
    assert one.tobytes() == grid([[square("#ffdddd", 64)]], row_labels=["fox"]).tobytes()
    assert dark(two)[3] - dark(two)[1] > 1.5 * (dark(one)[3] - dark(one)[1]) and two.height == one.height


def dark(image):
    """Bounding box of what is printed."""
    return image.convert("L").point(lambda value: 255 if value < 60 else 0).getbbox()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (([],), "at least one image"),
        (([[]],), "at least one image"),
        (([[square(RED)]], ["a", "b"]), "1 rows need as many labels, got 2"),
        (([[square(RED)]], [], [("a", 2)]), "do not make 1 columns"),
    ],
)
def test_grids_that_cannot_be(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        grid(*arguments)


def test_settings_round_trip(tmp_path):
    path = tmp_path / "new" / "x.png"
    save_png(square(RED), path, SETTINGS)
    settings = read_settings(path)
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    assert set(settings["versions"]) >= {"attngen", "torch", "diffusers"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(path.parent) == ["x.png"]


def test_parameters_are_in_the_form_others_read(tmp_path):
    save_png(square(RED), tmp_path / "x.png", {**SETTINGS, "prompt": "a fox"})
    with Image.open(tmp_path / "x.png") as image:
        first, second, third = image.info["parameters"].split("\n")
    assert (first, second) == ("a fox", "Negative prompt: blur")
    assert third.startswith("Steps: 50, Sampler: ode heun, CFG scale: 2, Seed: 7, Size: 32x32, Model: emoji")
    assert 'Mediators: "1:4,0.5:16"' in third and "Version: attngen 0" in third
    assert parameters_text({}) == "\nVersion: attngen"


def test_a_failure_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_png(square(RED), path, {"seed": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_png(square(BLUE), path, {"seed": 2})
    assert read_settings(path)["seed"] == 1 and os.listdir(tmp_path) == ["x.png"]


def test_write_file_replaces(tmp_path):
    write_file(tmp_path / "x", b"one")
    write_file(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"two"


def png_with(path, text):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(SETTINGS_CHUNK, text)
    square(RED).save(path, pnginfo=chunks)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "damaged"),
        ("[" * 50000, "damaged"),
        ("[1]", "not a JSON object"),
        ("__import__('os').system('echo')", "damaged"),
        (json.dumps({"prompt": "x" * MAX_SETTINGS_CHARACTERS}), "longer than"),
    ],
)
def test_foreign_settings_are_only_parsed(tmp_path, text, sentence):
    png_with(tmp_path / "x.png", text)
    with pytest.raises(ValueError, match=sentence):
        read_settings(tmp_path / "x.png")


def test_files_without_settings(tmp_path):
    square(RED).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="holds no settings"):
        read_settings(tmp_path / "plain.png")
    square(RED).save(tmp_path / "x.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    for name in ("x.jpg", "broken.png", "missing.png"):
        with pytest.raises(ValueError, match="cannot be read as a PNG"):
            read_settings(tmp_path / name)


def test_model_hash_tells_models_apart(tmp_path):
    folder = tmp_path / "model"
    weights = folder / "transformer" / "x.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(bytes(5_000_000))
    first = model_hash(folder)
    assert first is not None and len(first) == 10 and first == model_hash(folder)
    (folder / "README.md").write_text("words")
    assert model_hash(folder) == first, "only weights count"
    with open(weights, "r+b") as file:
        file.seek(4_999_999)
        file.write(b"1")
    assert model_hash(folder) != first
    assert len(model_hash(weights) or "") == 10
    assert model_hash("owner/name") is None and model_hash(tmp_path / "none") is None
