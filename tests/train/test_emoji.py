"""The emoji data set: contents, split, errors, augmentation, and that the font still gives the same pictures."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from train.emoji import build as build_emoji
from train.emoji import dataset as emoji

HAS_SOURCES = all(Path(p).is_file() for p in (build_emoji.DEFAULT_FONT, build_emoji.DEFAULT_EMOJI_TEST))


def same_font() -> bool:
    """Whether the very font of the data file is installed; another version may draw other pictures."""
    if not (HAS_SOURCES and features.check("raqm")):
        return False
    index, _ = emoji.read_data_file(emoji.DATA_FILE)
    return hashlib.sha256(Path(build_emoji.DEFAULT_FONT).read_bytes()).hexdigest() == index["font_sha256"]


needs_font = pytest.mark.skipif(not same_font(), reason="needs RAQM, unicode-data and the font the data was made from")


@pytest.fixture(scope="module")
def everything() -> emoji.EmojiDataset:
    return emoji.EmojiDataset("all", skin_tones=True)


@pytest.fixture(scope="module")
def plain() -> emoji.EmojiDataset:
    return emoji.EmojiDataset("all", image_size=32)


def write_zip(path: Path, **changes: object) -> Path:
    """A copy of the data file of four emoji, with some keys of its index replaced, or removed where None."""
    with zipfile.ZipFile(emoji.DATA_FILE) as archive:
        index = json.loads(archive.read("emoji.json"))
    index.update(size=8, columns=2, emoji=index["emoji"][:4])
    index.update(changes)
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "white").save(stream, "WEBP", lossless=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("emoji.json", json.dumps({k: v for k, v in index.items() if v is not None}))
        archive.writestr("atlas.webp", stream.getvalue())
    return path


# Contents


def test_counts(plain, everything):
    assert len(plain) == 1324
    assert len(everything) == 2564
    counts = dict(zip(plain.classes, torch.bincount(plain.labels).tolist(), strict=True))
    assert counts["face"] == 107 and counts["heart"] == 25 and counts["flag"] == 261
    assert 14 <= len(counts) <= 20 and min(counts.values()) >= 19
    index, _ = emoji.read_data_file(emoji.DATA_FILE)
    assert len(index["emoji"]) == 3641


def test_names_of_the_tables_exist():
    index, _ = emoji.read_data_file(emoji.DATA_FILE)
    subgroups = [s for chosen in emoji.CLASSES.values() for s in chosen]
    assert len(set(subgroups)) == len(subgroups)
    assert set(subgroups) <= {e["subgroup"] for e in index["emoji"]}
    assert {e["name"] for e in index["emoji"]} >= emoji.STRAYS


def test_pictures_are_distinct(everything):
    pictures = {p.numpy().tobytes() for p in everything.pixel_values}
    assert len(pictures) == len(everything)


def test_white_background(everything):
    corners = everything.pixel_values[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all()
    # Not all is white: each picture has ink.
    assert (everything.pixel_values.amin(dim=(1, 2, 3)) < 200).all()


def test_a_known_picture_is_under_its_name(plain):
    heart = plain.pixel_values[plain.names.index("red heart")].float().mean(dim=(1, 2))
    assert heart[0] > 200 and heart[1] < 180 and heart[2] < 180
    assert plain.id2label[int(plain.labels[plain.names.index("red heart")])] == "heart"
    assert plain.id2label[int(plain.labels[plain.names.index("flag: Japan")])] == "flag"


def test_item(plain):
    pixels, label = plain[5]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32 and type(label) is int
    assert -1.0 <= pixels.min() and pixels.max() == 1.0
    assert torch.equal(((pixels + 1) * 127.5).round().to(torch.uint8), plain.pixel_values[5])
    assert plain.num_classes == len(plain.classes) == len(plain.id2label) == len(emoji.CLASSES)
    with pytest.raises(IndexError):
        plain[len(plain)]


def test_labels_follow_the_chosen_classes(plain):
    chosen = emoji.EmojiDataset("all", image_size=32, classes=["flag", "face"])
    assert chosen.id2label == {0: "flag", 1: "face"}
    assert chosen.names[0] == "grinning face" and chosen.labels[0] == 1
    assert len(chosen) == 107 + 261
    assert set(chosen.names) == {
        n for n, k in zip(plain.names, plain.labels.tolist(), strict=True) if plain.id2label[k] in ("flag", "face")
    }


def test_resampled_pictures_do_not_mix_with_their_neighbours(plain, everything):
    position = everything.names.index("flag: Japan")
    alone = Image.fromarray(everything.pixel_values[position].permute(1, 2, 0).numpy())
    small = np.asarray(alone.resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(plain.pixel_values[plain.names.index("flag: Japan")].numpy(), small)


def test_licences_travel_with_the_pictures():
    with zipfile.ZipFile(emoji.DATA_FILE) as archive:
        assert set(archive.namelist()) == {"atlas.webp", "emoji.json", "OFL-1.1.txt", "UNICODE.txt"}
        assert b"SIL OPEN FONT LICENSE Version 1.1" in archive.read("OFL-1.1.txt")
        assert b"UNICODE, INC. LICENSE AGREEMENT" in archive.read("UNICODE.txt")
        assert archive.read("OFL-1.1.txt") == (build_emoji.ROOT / "LICENSES" / "OFL-1.1.txt").read_bytes()
    assert emoji.DATA_FILE.stat().st_size <= 20e6


# Split


@pytest.mark.parametrize("skin_tones", [False, True])
def test_split_by_base(skin_tones):
    parts = {s: emoji.EmojiDataset(s, image_size=8, skin_tones=skin_tones) for s in emoji.SPLITS}
    train, test = set(parts["train"].bases), set(parts["test"].bases)
    assert train.isdisjoint(test)
    assert sorted(parts["train"].names + parts["test"].names) == sorted(parts["all"].names)
    assert 0.07 < len(test) / len(train | test) < 0.13
    assert torch.bincount(parts["test"].labels, minlength=parts["test"].num_classes).min() >= 2


def test_split_does_not_depend_on_the_classes():
    whole = emoji.EmojiDataset("test", image_size=8)
    faces = emoji.EmojiDataset("test", image_size=8, classes=["tool", "face"])
    assert set(faces.names) == {
        n for n, k in zip(whole.names, whole.labels.tolist(), strict=True) if whole.id2label[k] in ("face", "tool")
    }


def test_variants_share_a_base():
    base = build_emoji.base_codepoints
    assert base([0x1F44B, 0x1F3FD]) == base([0x1F44B]) == [0x1F44B]
    runner = [0x1F3C3]
    assert base([0x1F3C3, 0x1F3FB, 0x200D, 0x2640, 0xFE0F]) == base(runner) == runner
    assert base([0x1F468, 0x1F3FF, 0x200D, 0x1F680]) == base([0x1F9D1, 0x200D, 0x1F680])
    assert base([0x1FAF1, 0x1F3FB, 0x200D, 0x1FAF2, 0x1F3FF]) == base([0x1F91D])
    assert base([0x1F469]) != base([0x1F468])
    assert base([0x2640, 0xFE0F]) == [0x2640]


# Determinism


def test_loading_is_deterministic_and_leaves_the_global_rng_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (emoji.EmojiDataset("test", image_size=24) for _ in range(2))
    images = first.pixel_values[:4]
    emoji.augment(images, first.labels[:4], torch.Generator().manual_seed(0))
    assert torch.equal(first.pixel_values, second.pixel_values) and torch.equal(first.labels, second.labels)
    assert first.names == second.names
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "'validation'.*train, test, all"),
        ({"classes": ["face", "dragon"]}, "'dragon'.*face, heart"),
        ({"classes": []}, "at least one"),
        ({"classes": ["face", "face"]}, "each once"),
        ({"image_size": 65}, "65.*8 to 64"),
        ({"image_size": 0}, "8 to 64"),
        ({"image_size": 32.0}, "8 to 64"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        emoji.EmojiDataset(**arguments)


def test_small_file_is_read(tmp_path):
    assert len(emoji.EmojiDataset("all", image_size=8, path=write_zip(tmp_path / "good.zip"))) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"version": 2},
        {"size": "64"},
        {"size": True},
        {"columns": 0},
        {"columns": 3},
        {"columns": 10**12},
        {"emoji": None},
        {"emoji": []},
        {"emoji": [{"name": "x"}]},
        {"emoji": [{"name": "x", "group": "g", "subgroup": "heart", "codepoints": ["1F600"], "base": [1]}]},
    ],
)
def test_foreign_index(tmp_path, changes):
    path = write_zip(tmp_path / "foreign.zip", **changes)
    with pytest.raises(ValueError, match=r"foreign\.zip is not"):
        emoji.EmojiDataset("all", path=path)


def test_unreadable_files(tmp_path):
    good = write_zip(tmp_path / "good.zip").read_bytes()
    path = tmp_path / "bad.zip"
    rng = np.random.default_rng(0)
    cases = [b"", b"PK", b"not a zip at all", *(good[:n] for n in range(0, len(good), 7))]
    for _ in range(300):
        damaged = bytearray(good)
        for place in rng.integers(0, len(good), size=3):
            damaged[place] ^= int(rng.integers(1, 256))
        cases.append(bytes(damaged))
    for case in cases:
        path.write_bytes(case)
        try:
            emoji.EmojiDataset("all", image_size=8, path=path)
        except ValueError as error:
            assert "bad.zip" in str(error)


@pytest.mark.parametrize("kind", ["missing", "folder", "other zip", "truncated", "bit"])
def test_bad_file_is_named(tmp_path, kind):
    path = tmp_path / "bad.zip"
    whole = emoji.DATA_FILE.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello.txt", "hello")
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "bit":
        path.write_bytes(whole[:5_000_000] + bytes([whole[5_000_000] ^ 1]) + whole[5_000_001:])
    with pytest.raises(ValueError, match=r"bad\.zip is not"):
        emoji.EmojiDataset(path=path)


def test_huge_member_is_refused(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("emoji.json", bytes(emoji.MAX_MEMBER_BYTES + 1))
        archive.writestr("atlas.webp", b"")
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        emoji.EmojiDataset(path=path)


# Augmentation


def augmented(data: emoji.EmojiDataset, chosen: torch.Tensor, seed: int = 0, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return emoji.augment(data.pixel_values[chosen], data.labels[chosen], generator, data.classes, **kwargs)


def test_augmentation_range_and_determinism(plain):
    chosen = torch.arange(0, len(plain), 20)
    out = augmented(plain, chosen)
    assert out.shape == (len(chosen), 3, 32, 32) and out.dtype == torch.float32
    assert -1.0 <= out.min() and out.max() <= 1.0
    assert torch.equal(out, augmented(plain, chosen))
    assert not torch.equal(out, augmented(plain, chosen, seed=1))
    floats = emoji.to_float(plain.pixel_values[chosen])
    again = emoji.augment(floats, plain.labels[chosen], torch.Generator().manual_seed(0), plain.classes)
    assert torch.equal(out, again)
    assert (out != floats).flatten(1).any(dim=1).all()


def test_augmentation_is_light(plain):
    """The picture stays the same emoji: it moves by a few pixels, and the amount of ink hardly changes."""
    chosen = torch.arange(len(plain))
    before = 1 - emoji.to_float(plain.pixel_values).mean(dim=(1, 2, 3))
    ratio = (1 - augmented(plain, chosen).mean(dim=(1, 2, 3))) / before
    assert 0.70 < ratio.min() and ratio.max() < 1.30
    assert abs(ratio.mean() - 1) < 0.03


def test_augmentation_does_not_mix_samples(plain):
    images, labels = plain.pixel_values[:6].clone(), plain.labels[:6]
    out = emoji.augment(images, labels, torch.Generator().manual_seed(0))
    images[3] = 0
    changed = emoji.augment(images, labels, torch.Generator().manual_seed(0))
    assert torch.equal(out[[0, 1, 2, 4, 5]], changed[[0, 1, 2, 4, 5]])
    assert not torch.equal(out[3], changed[3])


def test_augmentation_pads_with_white():
    black = torch.full((64, 3, 32, 32), -1.0)
    out = emoji.augment(black, torch.zeros(64, dtype=torch.long), torch.Generator().manual_seed(0), ["face"])
    assert ((out > 0.99).all(dim=1).flatten(1).any(dim=1)).sum() > 30
    white = emoji.augment(-black, torch.zeros(64, dtype=torch.long), torch.Generator().manual_seed(0), ["face"])
    assert torch.equal(white, torch.ones_like(white))


@pytest.mark.parametrize("name", list(emoji.CLASSES))
def test_flip_only_where_harmless(name):
    """With shift, scale and turn off, a result is the picture or its mirror image."""
    ramp = torch.linspace(-1, 1, 16).expand(64, 3, 16, 16)
    labels = torch.zeros(64, dtype=torch.long)
    out = emoji.augment(ramp, labels, torch.Generator().manual_seed(0), [name], amount=0.0)[:, :, :, 4:12]
    same = torch.isclose(out, ramp[:, :, :, 4:12], atol=1e-4).flatten(1).all(dim=1)
    mirrored = torch.isclose(out, ramp.flip(3)[:, :, :, 4:12], atol=1e-4).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert mirrored.sum() == 0 if name in ("sign", "flag", "clock") else 20 < mirrored.sum() < 44


@pytest.mark.parametrize("name", list(emoji.CLASSES))
def test_flags_signs_and_clocks_stay_level(name):
    rows = torch.linspace(-1, 1, 16)[:, None].expand(8, 3, 16, 16)
    out = emoji.augment(rows, torch.zeros(8, dtype=torch.long), torch.Generator().manual_seed(0), [name])
    middle = out[:, :, 4:12, 4:12]
    level = torch.isclose(middle, middle[..., :1], atol=1e-4).flatten(1).all(dim=1)
    assert level.all() if name in ("sign", "flag", "clock") else not level.any()


def test_scale_shift_and_angle_bounds():
    draws = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.0], [0.9, 1.0, 1.0, 1.0, 1.0], [0.1, 0.5, 0.5, 0.5, 0.5]])
    matrices = emoji.random_affine(draws, torch.zeros(3, dtype=torch.long), ["face"], 1.0)
    determinants = torch.linalg.det(matrices[:, :, :2])
    torch.testing.assert_close(determinants, torch.tensor([0.9**-2, 1.1**-2, -1.0]))
    angles = torch.rad2deg(torch.atan2(matrices[:2, 1, 0], matrices[:2, 1, 1]))
    torch.testing.assert_close(angles, torch.tensor([-8.0, 8.0]))
    # Coordinates run over 2, so 0.12 is 6 % of the side.
    torch.testing.assert_close(matrices[:, :, 2].abs(), torch.tensor([[0.12, 0.12], [0.12, 0.12], [0.0, 0.0]]))


@pytest.mark.parametrize(
    ("images", "labels", "kwargs", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(3, dtype=torch.long), {}, r"\(2, 3, 8, 8\) and \(3,\)"),
        (torch.zeros(2, 8, 8, 3), torch.zeros(2, dtype=torch.long), {}, r"expected images \(B, 3, H, W\)"),
        (torch.zeros(3, 8, 8), torch.zeros(3, dtype=torch.long), {}, r"expected images \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8), torch.tensor([1]), {"classes": ["face"]}, "1 to 1; expected 0 to 0"),
        (torch.zeros(1, 3, 8, 8), torch.tensor([-1]), {}, "-1 to -1"),
        (torch.zeros(1, 3, 8, 8), torch.tensor([0]), {"amount": 2.0}, "2.0; expected 0 to 1"),
        (torch.zeros(1, 3, 8, 8), torch.tensor([0]), {"amount": float("nan")}, "nan; expected 0 to 1"),
    ],
)
def test_augmentation_errors(images, labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        emoji.augment(images, labels, torch.Generator(), **kwargs)


# Builder


@needs_font
def test_font_gives_the_same_pictures():
    """Every tenth emoji, drawn again, equals what the file holds."""
    index, atlas = emoji.read_data_file(emoji.DATA_FILE)
    font = build_emoji.load_font(build_emoji.DEFAULT_FONT)
    size, columns = index["size"], index["columns"]
    for position in range(0, len(index["emoji"]), 10):
        left, top = position % columns * size, position // columns * size
        tile = atlas.crop((left, top, left + size, top + size))
        drawn = build_emoji.render(index["emoji"][position]["char"], font, size)
        assert drawn is not None and drawn.tobytes() == tile.tobytes(), index["emoji"][position]["name"]


@needs_font
def test_list_gives_the_same_entries():
    index, _ = emoji.read_data_file(emoji.DATA_FILE)
    version, entries = build_emoji.read_emoji_test(build_emoji.DEFAULT_EMOJI_TEST)
    if version != index["unicode"]:
        pytest.skip(f"unicode-data is {version}, the data was made from {index['unicode']}")
    by_char = {e["char"]: e for e in entries}
    assert all(by_char[e["char"]] == e for e in index["emoji"])
    assert len(entries) == len(index["emoji"]) + 14


@needs_font
def test_build_is_deterministic_and_readable(tmp_path):
    """A short list with a duplicate (France, Clipperton) and an emoji that the font cannot know."""
    listing = tmp_path / "emoji-test.txt"
    listing.write_text(
        "# Version: 15.0\n# group: Flags\n# subgroup: country-flag\n"
        "1F1EB 1F1F7 ; fully-qualified     # 🇫🇷 E2.0 flag: France\n"
        "1F1E8 1F1F5 ; fully-qualified     # 🇨🇵 E2.0 flag: Clipperton Island\n"
        "1F1EF 1F1F5 ; fully-qualified     # 🇯🇵 E0.6 flag: Japan\n"
        "1F3F3 1F308 ; unqualified         # 🏳🌈 E4.0 rainbow flag\n"
        "1F1EF 200D 1F308 ; fully-qualified     # x E99.0 flag: nowhere\n"
        "10FFFE ; fully-qualified     # x E99.0 flag: none\n",
        encoding="utf-8",
    )
    outs = [tmp_path / "new folder" / "a.zip", tmp_path / "b.zip"]
    for out in outs:
        counts = build_emoji.build(build_emoji.DEFAULT_FONT, listing, out, size=32)
        assert {k: counts[k] for k in ("kept", "duplicate", "missing")} == {"kept": 2, "duplicate": 1, "missing": 2}
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert stat.S_IMODE(os.stat(outs[0]).st_mode) == 0o644
    assert [p.name for p in outs[0].parent.iterdir()] == ["a.zip"]
    data = emoji.EmojiDataset("all", image_size=32, classes=["flag"], path=outs[0])
    assert data.names == ["flag: France", "flag: Japan"]
    blue, white, red = (data.pixel_values[0, :, 15, x].tolist() for x in (5, 16, 26))
    assert blue[2] > blue[0] and min(white) > 200 and red[0] > red[2]


def test_missing_inputs(tmp_path, capsys):
    missing = tmp_path / "none.ttf"
    assert build_emoji.main(["--font", str(missing), "--out", str(tmp_path / "x.zip")]) == 2
    error = capsys.readouterr().err
    assert str(missing) in error and "fonts-noto-color-emoji" in error and error.count("\n") == 1
    font = tmp_path / "font.ttf"
    font.write_bytes(b"not a font")
    listing = tmp_path / "none.txt"
    assert build_emoji.main(["--font", str(font), "--emoji-test", str(listing)]) == 2
    error = capsys.readouterr().err
    assert str(listing) in error and "unicode-data" in error and error.count("\n") == 1
    listing.write_text("# Version: 15.0\n1F600 ; fully-qualified # x E1.0 grinning face\n", encoding="utf-8")
    assert build_emoji.main(["--font", str(font), "--emoji-test", str(listing), "--out", str(tmp_path / "x.zip")]) == 2
    assert str(font) in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists()


@pytest.mark.parametrize("content", [b"", b"hello\n", b"# Version: 15.0\n", b"\xff\xfe\x00"])
def test_foreign_list(tmp_path, content):
    listing = tmp_path / "list.txt"
    listing.write_bytes(content)
    with pytest.raises(ValueError, match=r"list\.txt is not an emoji-test\.txt"):
        build_emoji.read_emoji_test(listing)


def test_without_raqm(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ValueError, match="RAQM"):
        build_emoji.load_font("any.ttf")


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "emoji.zip"
    target.write_bytes(b"old")

    def fail(*args):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        build_emoji.write_archive(target, {"a.txt": b"new"})
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_help_is_light():
    code = (
        "import sys; from train.emoji import build as build_emoji\n"
        "try: build_emoji.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'PIL', 'tqdm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=build_emoji.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--emoji-test" in done.stdout and "--size" in done.stdout


@pytest.mark.parametrize("size", ["7", "129", "x"])
def test_wrong_size(size, capsys):
    with pytest.raises(SystemExit) as stop:
        build_emoji.main(["--size", size])
    assert stop.value.code == 2
