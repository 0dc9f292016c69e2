"""train.data: every source of pictures, batches that depend on nothing read before, and what is said of bad data."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.cli.seeds import generator_for
from train.data import open as data_module
from train.data.broken import Broken, parse_max_broken
from train.data.open import open_data
from train.data.pictures import MAX_PIXELS, center_crop, read_picture
from train.data.prefetch import Prefetcher
from train.data.sources import fingerprint_of
from train.data.tar import expand_braces
from train.emoji.dataset import EmojiDataset, augment

ROOT = Path(__file__).parents[2]
SIZE = 16


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A picture that differs from its mirror image and from every other seed's."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def class_folders(folder: Path, counts: dict[str, int], broken: tuple[str, ...] = ()) -> Path:
    """`folder`/CLASS/NN.png; files in `broken` are cut short."""
    seed = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            content = encoded(picture(seed))
            path = folder / name / f"{i:02d}.png"
            path.write_bytes(content[: len(content) // 2] if f"{name}/{path.name}" in broken else content)
            seed += 1
    return folder


def write_shard(path: Path, samples: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def shards(folder: Path, counts: tuple[int, ...] = (3, 2)) -> Path:
    """Tar shards of the pictures of seeds 0, 1, … with labels 0, 1, 2, 0, …"""
    folder.mkdir(parents=True, exist_ok=True)
    seed = 0
    for number, count in enumerate(counts):
        samples = []
        for _ in range(count):
            samples += [(f"{seed:04d}.png", encoded(picture(seed))), (f"{seed:04d}.cls", b"%d" % (seed % 3))]
            seed += 1
        write_shard(folder / f"part-{number:03d}.tar", samples)
    return folder


def hub_dataset(folder: Path, count: int = 5, split: bool = False) -> Path:
    datasets = pytest.importorskip("datasets", reason="needs the data extra")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [picture(i) for i in range(count)], "label": [i % 3 for i in range(count)]}
    table = datasets.Dataset.from_dict(rows, features=features)
    (datasets.DatasetDict(train=table) if split else table).save_to_disk(str(folder))
    return folder


def reference(seed: int) -> torch.Tensor:
    """What a source must give for `picture(seed)`, not mirrored."""
    pixels = np.asarray(center_crop(picture(seed), SIZE)).transpose(2, 0, 1)
    return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1.0


def assert_batches_are_stateless(data) -> None:
    """Any order of reading and any number of processes give the same, and the generator ends at one place."""
    n = len(data)
    indices = [torch.randint(n, (7,), generator=generator_for("indices", step)) for step in range(3)]
    first = [data.batch(indices[step], generator_for(step)) for step in range(3)]
    for step in (2, 0, 1):
        generator, whole = generator_for(step), generator_for(step)
        again = data.batch(indices[step], generator)
        assert all(torch.equal(a, b) for a, b in zip(first[step], again, strict=True))
        data.batch(indices[step], whole, part=slice(1, None, 3))
        assert torch.equal(generator.get_state(), whole.get_state())
        for world in (2, 3):
            parts = [data.batch(indices[step], generator_for(step), part=slice(r, None, world)) for r in range(world)]
            for rank, (clean, labels) in enumerate(parts):
                assert torch.equal(clean, first[step][0][rank::world])
                assert torch.equal(labels, first[step][1][rank::world])
    clean, labels = first[0]
    assert clean.dtype == torch.float32 and labels.dtype == torch.int64 and clean.is_contiguous()
    assert clean.shape == (7, data.channels, data.sample_size, data.sample_size)
    others = [data.batch(indices[0], generator_for("other", i))[0] for i in range(4)]
    assert sum(torch.equal(other, clean) for other in others) < 2


@pytest.fixture
def folder(tmp_path) -> Path:
    return class_folders(tmp_path / "pictures", {"cat": 3, "ant": 2, "bee": 1})


# Sources


def test_a_folder_of_class_folders(folder, global_rng_untouched):
    (folder / "ant" / "deeper").mkdir()
    (folder / "ant" / "deeper" / "x.JPG").write_bytes(encoded(picture(50), "JPEG"))
    (folder / "ant" / "notes.txt").write_text("no picture")
    (folder / "ant" / "._00.png").write_text("left by a Mac")
    (folder / ".cache").mkdir()
    data = open_data(str(folder), image_size=SIZE)
    assert data.id2label == {0: "ant", 1: "bee", 2: "cat"} and data.num_classes == 3 and len(data) == 7
    assert data.labels.tolist() == [0, 0, 0, 1, 2, 2, 2] and data.vae is None and not data.is_latent
    assert data.names([2, 4]) == [str(folder / "ant/deeper/x.JPG"), str(folder / "cat/00.png")]
    assert (data.channels, data.sample_size) == (3, SIZE)
    clean, labels = open_data(str(folder), image_size=SIZE, flip=False).batch(torch.tensor([4, 0]), generator_for(0))
    # Pictures are numbered in the order they were written: cat 0 to 2, ant 3 and 4, bee 5.
    assert torch.equal(clean, torch.stack([reference(0), reference(3)])) and labels.tolist() == [2, 0]
    assert_batches_are_stateless(data)


def test_chosen_classes_are_labelled_in_their_order(folder):
    data = open_data(str(folder), image_size=SIZE, classes=("cat", "ant"), flip=False)
    assert data.id2label == {0: "cat", 1: "ant"} and data.labels.tolist() == [1, 1, 0, 0, 0]
    clean, labels = data.batch(torch.tensor([2]), generator_for(0))
    assert torch.equal(clean[0], reference(0)) and labels.tolist() == [0]
    every = open_data(str(folder), image_size=SIZE, classes=("cat",))
    assert every.names([0, 2]) == [str(folder / "cat/00.png"), str(folder / "cat/02.png")]
    assert data.fingerprint != open_data(str(folder), image_size=SIZE, classes=("ant", "cat")).fingerprint


def test_fingerprints_follow_the_contents_and_not_the_place(folder, tmp_path):
    before = open_data(str(folder), image_size=SIZE).fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert open_data(str(moved), image_size=SIZE).fingerprint == before
    (moved / "ant" / "00.png").rename(moved / "bee" / "07.png")
    assert open_data(str(moved), image_size=SIZE).fingerprint != before
    labels = torch.tensor([0, 1])
    known = fingerprint_of("x", ["a", "b"], labels, ["1", "2"])
    assert known == fingerprint_of("x", ["a", "b"], labels, ["1", "2"]) and known.startswith("x-2-")
    for names, other, parts in (
        (["a", "c"], labels, ["1", "2"]),
        (["a", "b"], 1 - labels, ["1", "2"]),
        (["a", "b"], labels, ["12"]),
    ):
        assert fingerprint_of("x", names, other, parts) != known


@pytest.mark.parametrize("split", [False, True])
def test_a_hugging_face_data_set(tmp_path, split):
    saved = hub_dataset(tmp_path / "saved", split=split)
    data = open_data(f"hf:{saved}:train" if split else f"hf:{saved}", image_size=SIZE, flip=False)
    assert data.id2label == {0: "a", 1: "b", 2: "c"} and data.labels.tolist() == [0, 1, 2, 0, 1]
    clean, labels = data.batch(torch.tensor([4, 1]), generator_for(0))
    assert torch.equal(clean, torch.stack([reference(4), reference(1)])) and labels.tolist() == [1, 1]
    assert data.names([3]) == [f"hf:{saved}{':train' if split else ''}[3]"]
    assert_batches_are_stateless(open_data(f"hf:{saved}", image_size=SIZE))
    with pytest.raises(ValueError, match=f"pass hf:{saved}"):
        open_data(str(saved), image_size=SIZE)
    if split:
        with pytest.raises(ValueError, match="splits train, not 'test'"):
            open_data(f"hf:{saved}:test", image_size=SIZE)


def test_hugging_face_labels_without_class_names(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the data extra")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.Value("string")})
    rows = {"img": [picture(i) for i in range(4)], "kind": ["x", "b", "x", "a"]}
    table = datasets.Dataset.from_dict(rows, features=features).select([3, 1, 0])
    table.save_to_disk(str(tmp_path / "strings"))
    data = open_data(f"hf:{tmp_path / 'strings'}", image_size=SIZE, flip=False)
    assert data.id2label == {0: "a", 1: "b", 2: "x"} and data.labels.tolist() == [0, 1, 2]
    assert torch.equal(data.batch(torch.tensor([2]), generator_for(0))[0][0], reference(0))
    table.add_column("other", [1, 2, 3]).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"several label columns \(kind, other\)"):
        open_data(f"hf:{tmp_path / 'two'}", image_size=SIZE)
    table.remove_columns("img").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no image column"):
        open_data(f"hf:{tmp_path / 'none'}", image_size=SIZE)


def test_unlabelled_hugging_face_splits_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the data extra")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [picture(0), picture(1)], "label": [-1, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(ValueError, match="labels from -1 to -1 for 2 classes"):
        open_data(f"hf:{tmp_path / 'x'}", image_size=SIZE)


def test_tar_shards(tmp_path):
    made = shards(tmp_path / "shards")
    for spec in (made, made / "*.tar", made / "part-{000..001}.tar", made / "part-{000,001}.tar"):
        data = open_data(str(spec), image_size=SIZE, flip=False)
        assert data.labels.tolist() == [0, 1, 2, 0, 1] and data.id2label == {0: "0", 1: "1", 2: "2"}
        clean, labels = data.batch(torch.tensor([3, 1]), generator_for(0))
        assert torch.equal(clean, torch.stack([reference(3), reference(1)])) and labels.tolist() == [0, 1]
    assert data.names([3]) == [f"{made / 'part-001.tar'}:0003"]
    assert len(open_data(str(made / "part-000.tar"), image_size=SIZE)) == 3
    assert_batches_are_stateless(open_data(str(made), image_size=SIZE))
    (made / "classes.txt").write_text("ant\nbee\ncat\n")
    assert open_data(str(made), image_size=SIZE).id2label == {0: "ant", 1: "bee", 2: "cat"}
    (made / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match="names 2 classes but a label is 2"):
        open_data(str(made), image_size=SIZE)


def test_tar_labels_in_json_and_long_names(tmp_path):
    long = "folder/" + "n" * 200
    samples = [
        (f"{long}.json", json.dumps({"label": 1, "caption": "x"}).encode()),
        (f"{long}.png", encoded(picture(0))),
        ("b.jpg", encoded(picture(1), "JPEG")),
        ("b.cls", b"0\n"),
        ("b.json", b'{"label": 5}'),  # the other label counts
        ("c.cls", b"2"),
        ("c.jpeg", encoded(picture(2), "JPEG")),
        ("c.json", b'{"caption": "no label here"}'),
    ]
    write_shard(tmp_path / "a.tar", samples)
    data = open_data(str(tmp_path / "a.tar"), image_size=SIZE, flip=False)
    assert data.labels.tolist() == [1, 0, 2] and data.names([0])[0].endswith(long)
    assert torch.equal(data.batch(torch.tensor([0]), generator_for(0))[0][0], reference(0))


def test_damaged_shards_are_named(tmp_path):
    made = shards(tmp_path / "shards")
    first, second = sorted(made.glob("*.tar"))
    whole = second.read_bytes()
    for length in (len(whole) - 10240, 512 + 100, 700, 100, 0):  # in the end mark, a file, a header, before all
        second.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"shard .*part-001\.tar"):
            open_data(str(made), image_size=SIZE)
    second.unlink()
    with pytest.raises(ValueError, match=r"part-001\.tar does not exist; .* means 2 of them"):
        open_data(str(made / "part-{000..001}.tar"), image_size=SIZE)


@pytest.mark.parametrize(
    "samples,message",
    [
        ([("a.png", b"x")], "'a' has no label"),
        ([("a.cls", b"1")], "'a' has 0 images"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], "'a' has 2 images"),
        ([("a.png", b"x"), ("a.cls", b"cat")], "not a number: b'cat'"),
        ([("a.png", b"x"), ("a.cls", b"-1")], "label -1"),
        ([("a.png", b"x"), ("a.json", b'{"label": "cat"}')], "label 'cat'"),
        ([], "holds no samples"),
    ],
)
def test_samples_of_shards_are_checked(tmp_path, samples, message):
    write_shard(tmp_path / "a.tar", samples)
    with pytest.raises(ValueError, match=message):
        open_data(str(tmp_path / "a.tar"), image_size=SIZE)


def test_braces():
    assert list(expand_braces("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(expand_braces("{x,y}-{0..1}")) == ["x-0", "x-1", "y-0", "y-1"]
    assert list(expand_braces("plain.tar")) == ["plain.tar"]


def test_emoji_batches_are_those_of_the_emoji_module(global_rng_untouched):
    emoji = EmojiDataset("train", image_size=16, classes=["face", "clock", "heart"])
    data = open_data("emoji", image_size=16, classes=("face", "clock", "heart"), augment=0.7)
    indices, mine, theirs = torch.arange(0, len(emoji), 9), generator_for(5), generator_for(5)
    clean, labels = data.batch(indices, mine)
    want = augment(emoji.pixel_values[indices], emoji.labels[indices], theirs, emoji.classes, 0.7)
    assert torch.equal(clean, want) and torch.equal(labels, emoji.labels[indices])
    assert torch.equal(mine.get_state(), theirs.get_state())
    assert data.names([3]) == [emoji.names[3]] and data.id2label == emoji.id2label
    assert_batches_are_stateless(data)
    still = open_data("emoji", image_size=16, augment=0.0, flip=False)
    torch.testing.assert_close(
        still.batch(torch.arange(4), generator_for(0))[0],
        still.emoji[0][0].new_tensor(np.stack([still.emoji[i][0].numpy() for i in range(4)])),
        atol=1e-4,
        rtol=0,
    )


# Mirroring


def test_half_of_the_pictures_are_mirrored_by_the_draws(folder):
    data, plain = (open_data(str(folder), image_size=SIZE, flip=flip) for flip in (True, False))
    indices = torch.zeros(400, dtype=torch.long)
    got, still = data.batch(indices, generator_for(1))[0], plain.batch(indices, generator_for(1))[0]
    assert torch.equal(still, still[:1].expand_as(still))
    mirrored = (got == still.flip(-1)).flatten(1).all(dim=1)
    assert ((got == still).flatten(1).all(dim=1) ^ mirrored).all()
    assert torch.equal(mirrored, torch.rand(400, generator=generator_for(1)) < 0.5)
    assert 150 < mirrored.sum() < 250


# Pictures


def test_the_crop_by_hand():
    """Box averages halve, and the middle is taken: a picture of 2 x 2 blocks comes out as its blocks."""
    blocks = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(blocks.repeat(2, axis=0).repeat(2, axis=1))
    assert np.array_equal(np.asarray(center_crop(image, 4)), blocks[:, 1:5])
    tall = Image.fromarray(blocks.transpose(1, 0, 2).repeat(4, axis=0).repeat(4, axis=1))
    assert np.array_equal(np.asarray(center_crop(tall, 4)), blocks.transpose(1, 0, 2)[1:5])


@pytest.mark.parametrize("size", [(37, 61), (16, 16), (90, 33), (5, 9), (1, 1), (300, 17)])
def test_the_crop_equals_the_published_steps(size):
    """ADM's numbers: halve while min >= 2 s, scale to min = s, cut (n - s) // 2 from the left and the top."""
    image = picture(1, size)
    want = image
    while min(want.size) >= 2 * SIZE:
        want = want.resize(tuple(side // 2 for side in want.size), Image.Resampling.BOX)
    scale = SIZE / min(want.size)
    want = np.asarray(want.resize(tuple(round(side * scale) for side in want.size), Image.Resampling.BICUBIC))
    top, left = (want.shape[0] - SIZE) // 2, (want.shape[1] - SIZE) // 2
    assert np.array_equal(np.asarray(center_crop(image, SIZE)), want[top : top + SIZE, left : left + SIZE])


def read(content: bytes, size: int = 8) -> np.ndarray:
    return read_picture(io.BytesIO(content), size)


def test_exif_orientation_is_applied():
    values = np.zeros((8, 8, 3), dtype=np.uint8)
    values[0, :6] = 255  # a line along the top, to the left
    expected = {1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1]}
    expected |= {5: values.transpose(1, 0, 2), 6: np.rot90(values, -1)}
    expected |= {7: values[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(values)}
    for orientation, want in expected.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        got = read(encoded(Image.fromarray(values), "PNG", exif=exif)).transpose(1, 2, 0)
        assert np.array_equal(got, want), orientation
    assert np.array_equal(
        read(encoded(Image.fromarray(values), "PNG", exif=b"Exif\0\0nonsense")), read(encoded(Image.fromarray(values)))
    )


def test_transparency_is_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (read(encoded(clear)) == 255).all()
    half = read(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128))))
    assert half[0].min() == 255 and abs(int(half[1, 0, 0]) - 127) <= 1
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0] * 768)
    assert (read(encoded(palette, "PNG", transparency=3)) == 255).all() and (read(encoded(palette)) == 0).all()
    assert (read(encoded(Image.new("LA", (8, 8), (0, 0)))) == 255).all()
    assert (read(encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == 255).all()


def test_grey_and_deep_pictures():
    grey = read(encoded(Image.new("L", (8, 8), 77)))
    assert grey.shape == (3, 8, 8) and (grey == 77).all()
    assert (read(encoded(Image.new("1", (8, 8), 1))) == 255).all()
    for value, want in ((0, 0), (65535, 255), (30000, round(30000 / 257)), (1000, 4)):
        deep = Image.fromarray(np.full((8, 8), value, dtype=np.uint16))
        assert (read(encoded(deep)) == want).all() and (read(encoded(deep, "TIFF")) == want).all()
    wide = Image.fromarray(np.full((8, 8), 65535, dtype=np.int32))
    assert (read(encoded(wide, "TIFF")) == 255).all()
    assert (read(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "TIFF")) == 255).all()
    with pytest.raises(ValueError, match="exceed 16 bits"):
        read(encoded(Image.fromarray(np.full((8, 8), 70000, dtype=np.int32)), "TIFF"))
    with pytest.raises(ValueError, match="floating-point"):
        read(encoded(Image.new("F", (8, 8), 0.5), "TIFF"))


def test_bombs_are_not_decoded():
    huge = encoded(Image.new("1", (20000, 5000)))
    assert 20000 * 5000 > MAX_PIXELS and len(huge) < 100_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="20000 x 5000 pixels exceed the limit"):
            read(huge)
        with pytest.raises(ValueError, match="exceed"):
            read(encoded(Image.new("L", (1, 60000))), size=64)  # small, and large once its short side is 64


@pytest.mark.parametrize("content", [b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_other_files_are_no_pictures(content):
    with pytest.raises(ValueError, match="not an image of a known format") as caught:
        read(content)
    assert "0x" not in str(caught.value)


# Unreadable pictures


@pytest.fixture
def torn(tmp_path) -> Path:
    return class_folders(tmp_path / "torn", {"a": 3, "b": 3}, broken=("a/02.png", "b/00.png"))


def test_unreadable_pictures_are_replaced_by_the_next(torn):
    data = open_data(str(torn), image_size=SIZE, flip=False, max_broken=2)
    first, second = (pytest.warns(UserWarning, match=rf"{n}\.png cannot be read") for n in ("a/02", "b/00"))
    with first, second:
        clean, labels = data.batch(torch.tensor([2, 0]), generator_for(0))
    # Seeds count from 0 in the order of writing; after a/02 comes b/00, torn too, and then b/01.
    assert torch.equal(clean, torch.stack([reference(4), reference(0)])) and labels.tolist() == [1, 0]
    assert sorted(Path(name).parent.name + "/" + Path(name).name for name in data.broken.reasons) == [
        "a/02.png",
        "b/00.png",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each file is reported once
        again = data.batch(torch.tensor([3, 2]), generator_for(0))
    assert torch.equal(again[0][0], reference(4)) and torch.equal(again[0][1], reference(4))
    fresh = open_data(str(torn), image_size=SIZE, flip=False, max_broken=2)
    with pytest.warns(UserWarning):
        assert torch.equal(fresh.batch(torch.tensor([3, 2]), generator_for(0))[0], again[0])


@pytest.mark.parametrize("limit", [1, 0.2])
def test_too_many_unreadable_pictures_end_the_run(torn, limit):
    data = open_data(str(torn), image_size=SIZE, max_broken=limit)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=rf"2 of 6 .*max_broken = {limit}") as caught:
        data.batch(torch.tensor([2]), generator_for(0))
    assert "a/02.png" in str(caught.value) and "b/00.png" in str(caught.value)
    with pytest.raises(ValueError, match="1 of 6"):
        open_data(str(torn), image_size=SIZE, max_broken=0).batch(torch.tensor([2]), generator_for(0))


def test_a_share_counts_exactly(torn):
    data = open_data(str(torn), image_size=SIZE, max_broken=2 / 6)
    with pytest.warns(UserWarning):
        data.batch(torch.arange(6), generator_for(0))
    broken = Broken(0.29, 100)  # 0.29 * 100 is under 29 in floating point
    with pytest.warns(UserWarning):
        for i in range(29):
            broken.add(str(i), "bad")
    with pytest.raises(ValueError, match="30 of 100"):
        broken.add("29", "bad")


def test_missing_files_and_data_without_a_good_picture(tmp_path):
    made = class_folders(tmp_path / "x", {"a": 1, "b": 1}, broken=("a/00.png",))
    data = open_data(str(made), image_size=SIZE, max_broken=1.0)
    (made / "b" / "00.png").unlink()
    first, second = (pytest.warns(UserWarning, match=text) for text in ("truncated", "No such file"))
    with first, second, pytest.raises(ValueError, match="none of the 2 images"):
        data.batch(torch.tensor([0]), generator_for(0))


def test_broken_is_counted_once_by_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    broken = Broken(3, 10)
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("always")
        list(pool.map(lambda i: broken.add(f"p{i % 3}", "bad"), range(300)))
    assert len(caught) == 3 and len(broken.reasons) == 3


def test_max_broken_from_the_command_line():
    assert parse_max_broken("3") == 3 and isinstance(parse_max_broken("1"), int)
    assert parse_max_broken("0.01") == 0.01 and isinstance(parse_max_broken("1.0"), float)
    for text in ("-1", "1.5", "few", "nan.", ""):
        with pytest.raises(ValueError, match="max_broken is"):
            parse_max_broken(text)


# What cannot be used


def test_specs_that_name_no_data(tmp_path, folder):
    def message(spec, **options) -> str:
        with pytest.raises(ValueError) as caught:
            open_data(str(spec), image_size=SIZE, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "empty of images and class folders; expected" in message(tmp_path / "empty")
    assert "holds 3 images but no class folders" in message(folder / "cat")
    (folder / "dog").mkdir()
    assert f"{folder / 'dog'} holds no images" in message(folder)
    (folder / "dog").rmdir()
    assert "'no/such'" in message("no/such") and "expected 'emoji'" in message("emojis")
    assert "matches no file" in message(tmp_path / "*.tar")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    assert "decompress" in message(tmp_path / "a.tar.gz")
    assert "no class 'dog'; it has ant, bee, cat" in message(folder, classes=("dog",))
    assert "each name once" in message(folder, classes=("cat", "cat"))
    for options in ({"augment": 2.0}, {"image_size": 0}, {"max_broken": -1}, {"max_broken": 2.0}):
        with pytest.raises(ValueError, match=str(next(iter(options)))):
            open_data(str(folder), **{"image_size": SIZE, **options})


def test_one_class_must_be_named(tmp_path):
    made = class_folders(tmp_path / "x", {"cat": 2})
    with pytest.raises(ValueError, match="holds one class, 'cat'; choose it by --classes"):
        open_data(str(made), image_size=SIZE)
    assert open_data(str(made), image_size=SIZE, classes=("cat",)).num_classes == 1


def test_splits_are_no_classes(tmp_path):
    class_folders(tmp_path / "train", {"a": 1, "b": 1})
    class_folders(tmp_path / "val", {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=f"splits, not classes .*; pass {tmp_path / 'train'}"):
        open_data(str(tmp_path), image_size=SIZE)


def test_a_missing_package_is_named(monkeypatch):
    from train.data import hub as data_hub

    monkeypatch.setattr(data_hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'attngen\[data\]'"):
        open_data("hf:cifar10", image_size=SIZE)


def test_what_the_hub_does_not_have_is_one_sentence(tmp_path):
    pytest.importorskip("datasets", reason="needs the data extra")
    with pytest.raises(ValueError, match="hf:.* cannot be loaded") as caught:
        open_data(f"hf:{tmp_path / 'nothing'}", image_size=SIZE)
    assert "\n" not in str(caught.value)


# Batches ahead


def schedule(data):
    def of_step(step: int) -> tuple[torch.Tensor, torch.Generator]:
        generator = generator_for("batch", step)
        return torch.randint(len(data), (6,), generator=generator_for("order", step)), generator

    return of_step


@pytest.mark.parametrize("workers,ahead", [(0, 1), (1, 1), (3, 2), (4, 5)])
def test_batches_ahead_are_in_order_and_the_same_for_any_number_of_threads(folder, workers, ahead):
    data = open_data(str(folder), image_size=SIZE)
    with Prefetcher(data, schedule(data), workers, ahead, start=3, stop=11, part=slice(1, None, 2)) as batches:
        got = list(batches)
    assert [batch.step for batch in got] == list(range(3, 11))
    for batch in got:
        indices, generator = schedule(data)(batch.step)
        clean, labels = data.batch(indices, generator, part=slice(1, None, 2))
        assert torch.equal(batch.indices, indices)
        assert torch.equal(batch.clean, clean) and torch.equal(batch.labels, labels)
        assert torch.equal(batch.generator.get_state(), generator.get_state())
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_name_step_and_picture(torn, workers):
    data = open_data(str(torn), image_size=SIZE, max_broken=0)
    order = [0, 1, 2]
    with Prefetcher(data, lambda step: (torch.tensor([order[step]]), generator_for(step)), workers) as batches:
        assert next(batches).step == 0 and next(batches).step == 1
        with pytest.raises(ValueError, match=r"step 3: 1 of 6 .*a/02\.png"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_of_the_program_name_step_and_pictures_too(folder, workers, monkeypatch):
    def fault(file, size):
        raise TypeError("a fault")

    data = open_data(str(folder), image_size=SIZE)
    read = data_module.read_picture
    monkeypatch.setattr(data_module, "read_picture", lambda f, n: fault(f, n) if "ant/01" in f.name else read(f, n))
    with Prefetcher(data, lambda step: (torch.tensor([0, 1]), generator_for(step)), workers, start=7) as batches:
        with pytest.raises(RuntimeError, match=r"step 8: [^ ]*ant/01\.png: TypeError: a fault"):
            next(batches)
    with Prefetcher(data, lambda step: (torch.tensor([99]), generator_for(step)), workers) as batches:
        with pytest.raises(RuntimeError, match="step 1, images 99: IndexError"):
            next(batches)


def test_closing_ends_the_threads(folder):
    import threading

    before = threading.active_count()
    data = open_data(str(folder), image_size=SIZE)
    with Prefetcher(data, schedule(data), 3, 2) as batches:
        next(batches)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_batches_are_ready_when_they_are_wanted(folder):
    """With a consumer slower than the reading, nothing is waited for after the first batch."""
    data = open_data(str(folder), image_size=SIZE)
    with Prefetcher(data, schedule(data), 2, 2, stop=12) as batches:
        next(batches)
        batches.waited = 0.0
        for _ in batches:
            time.sleep(0.05)
    assert batches.waited < 0.5 * 11 * 0.05


def test_a_program_that_forgets_to_close_ends(folder):
    program = (
        "import sys; from train.data.open import open_data; from train.data.prefetch import Prefetcher\n"
        "from pipelines.cli.seeds import generator_for; import torch\n"
        f"d = open_data(sys.argv[1], image_size={SIZE})\n"
        "p = Prefetcher(d, lambda s: (torch.tensor([0, 1]), generator_for(s)), 2, 2); print(next(p).step)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0 and ran.stdout == "0\n", ran.stderr
