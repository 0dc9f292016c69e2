"""The extractor of FD-emoji: the shipped weights and their card, its arithmetic, what it refuses, and its training."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.cli.seeds import generator_for, sample_order
from train.emoji import features, train_features
from train.emoji import training as feature_training
from train.emoji.dataset import CLASSES, DATA_FILE, EmojiDataset
from train.emoji.features import FeatureExtractor, load_extractor, prepare


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return load_extractor()


@pytest.fixture(scope="module")
def held_out() -> EmojiDataset:
    return EmojiDataset("test", 32)


def random_pictures(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def copy_of_shipped(folder: Path) -> Path:
    for path in (features.WEIGHTS_FILE, features.card_path(features.WEIGHTS_FILE)):
        shutil.copy(path, folder)
    return folder / features.WEIGHTS_FILE.name


# The shipped weights


def test_the_card_is_of_the_weights_and_of_the_data(extractor):
    content, card = features.WEIGHTS_FILE.read_bytes(), extractor.card
    assert card["sha256"] == hashlib.sha256(content).hexdigest() == extractor.sha256
    assert card["bytes"] == len(content) <= 800_000
    tensors = load_file(features.WEIGHTS_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert card["weights"] == sum(tensor.numel() for tensor in tensors.values()) <= 400_000
    assert card["classes"] == list(CLASSES)
    assert card["data"]["sha256"] == hashlib.sha256(DATA_FILE.read_bytes()).hexdigest()
    assert {"python", "torch"} <= set(card["versions"])
    assert extractor.label == f"{features.NAME}-{card['sha256'][:8]}"


def test_the_card_tells_the_accuracy_on_held_out_emoji(extractor, held_out):
    found = extractor.logits(extractor(held_out.pixel_values)).argmax(dim=1)
    share = (found == held_out.labels).double().mean().item()
    assert share == pytest.approx(extractor.card["accuracy"]["held_out"], abs=1e-4)
    assert share > 0.8
    assert extractor.card["pictures"]["held_out"] == len(held_out)


# Arithmetic


def written_out(tensors: dict[str, torch.Tensor], picture: torch.Tensor) -> torch.Tensor:
    """The features of one 32 x 32 picture, (3, 32, 32) in [-1, 1], by sums over shifted pictures."""
    x = picture.double()
    for i, stride in enumerate((1, 2, 2, 1, 2, 1)):
        weight, bias = (tensors[f"convs.{i}.{kind}"].double() for kind in ("weight", "bias"))
        side = x.shape[-1]
        padded = torch.zeros(x.shape[0], side + 2, side + 2, dtype=torch.float64)
        padded[:, 1:-1, 1:-1] = x
        total = bias[:, None, None].expand(-1, side, side)
        for row in range(3):
            for column in range(3):
                shifted = padded[:, row : row + side, column : column + side]
                total = total + torch.einsum("oi,ihw->ohw", weight[:, :, row, column], shifted)
        x = total[:, ::stride, ::stride].clamp(min=0)
    return x.sum(dim=(1, 2)) / (x.shape[1] * x.shape[2])


def test_features_equal_written_out_convolutions(extractor):
    picture = random_pictures(1)
    expected = written_out(load_file(features.WEIGHTS_FILE), picture[0].double() / 127.5 - 1.0)
    torch.testing.assert_close(extractor(picture)[0], expected, rtol=1e-11, atol=1e-12)


def test_features_do_not_depend_on_the_batch(extractor):
    pictures = random_pictures(70)
    together = extractor(pictures)
    assert together.shape == (70, features.NUM_FEATURES) and together.dtype == torch.float64
    alone = torch.cat([extractor(picture[None]) for picture in pictures])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(extractor(pictures.flip(0)).flip(0), together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_picture_and_its_file_have_the_same_features(extractor, dtype):
    levels = torch.tensor([0, 64, 127, 128, 192, 255], dtype=torch.uint8)
    saved = levels[torch.randint(6, (4, 3, 40, 40), generator=torch.Generator().manual_seed(1))]
    drawn = (saved.double() / 127.5 - 1.0).to(dtype)
    back = ((drawn.double() + 1) * 127.5).round().to(torch.uint8)
    if dtype != torch.bfloat16:
        assert torch.equal(back, saved)
    assert torch.equal(extractor(drawn), extractor(back))


def test_rounding_is_to_the_nearest_level():
    wanted = torch.tensor([0.0, 127.0, 128.0, 255.0]).double()
    for off in (-0.3, 0.0, 0.3):
        drawn = ((wanted + off) / 127.5 - 1.0).reshape(4, 1, 1, 1).expand(4, 3, 32, 32)
        assert torch.equal(prepare(drawn)[:, 0, 0, 0], wanted / 127.5 - 1.0)


@pytest.mark.parametrize("size", [16, 24, 32, 64, 100, 128])
def test_a_plain_picture_stays_plain_at_any_size(size):
    colours = torch.tensor([10, 200, 90], dtype=torch.uint8)
    picture = colours[None, :, None, None].expand(2, 3, size, size)
    expected = (colours.double() / 127.5 - 1.0)[None, :, None, None].expand(2, 3, 32, 32)
    torch.testing.assert_close(prepare(picture), expected, rtol=0, atol=1e-12)


def test_a_smaller_picture_is_filtered():
    """Stripes finer than the result's pixels turn grey, away from the edges; the two pixels in the middle are black."""
    stripes = torch.tensor([255, 0, 0, 255], dtype=torch.uint8).repeat(32)
    for fine in (stripes.expand(128, 128), stripes.expand(128, 128).T):
        reduced = prepare(fine.expand(1, 3, 128, 128))
        assert reduced[..., 2:-2, 2:-2].abs().max() < 1e-6


def test_size_changes_features_little(extractor):
    """The same emoji at 32 and 64 pixels are nearer to each other than to the other emoji."""
    small, large = (extractor(EmojiDataset("test", size).pixel_values) for size in (32, 64))
    distances = torch.cdist(small, large)
    assert (distances.argmin(dim=1) == torch.arange(len(small))).double().mean() > 0.95


def test_orientation_matters(extractor):
    picture = random_pictures(1)
    assert not torch.allclose(extractor(picture), extractor(picture.transpose(2, 3)), rtol=1e-4)


def test_no_pictures_have_no_features(extractor):
    assert extractor(random_pictures(0)).shape == (0, features.NUM_FEATURES)


@pytest.mark.gpu
def test_the_gpu_computes_the_same(extractor):
    pictures = random_pictures(5, 48)
    on_gpu = load_extractor(device="cuda")(pictures).cpu()
    torch.testing.assert_close(on_gpu, extractor(pictures), rtol=1e-9, atol=1e-10)


# Wrong pictures


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32), r"\(2, 1, 32, 32\)"),
        (torch.zeros(2, 3, 32, 48), r"\(2, 3, 32, 48\)"),
        (torch.zeros(2, 3, 15, 15), "15 pixels a side; expected 16 to 128"),
        (torch.zeros(2, 3, 129, 129), "129 pixels a side"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "int64"),
        (torch.full((2, 3, 32, 32), 255.0), "run from 255 to 255"),
        (torch.full((2, 3, 32, 32), -1.2), "run from -1.2"),
        (torch.tensor([0.0, float("nan"), float("inf")])[:, None, None, None].expand(3, 3, 32, 32), "2 of 3 images"),
    ],
)
def test_wrong_pictures_are_refused(extractor, pictures, message):
    with pytest.raises(ValueError, match=message):
        extractor(pictures)


def test_a_stream_may_mix_batches_and_single_pictures(extractor):
    pictures = random_pictures(5)
    parts = list(features.features_of([pictures[:3], pictures[3], pictures[4:]], extractor))
    torch.testing.assert_close(torch.cat(parts), extractor(pictures), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="got str"):
        list(features.features_of(["a.png"], extractor))  # type: ignore[list-item]


# Wrong files


def test_changed_weights_are_refused(tmp_path):
    path = copy_of_shipped(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        load_extractor(path)


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"python -m train\.emoji\.train_features"):
        load_extractor(tmp_path / "none.safetensors")
    path = copy_of_shipped(tmp_path)
    features.card_path(path).write_text("{}")
    with pytest.raises(ValueError, match="no feature extractor"):
        load_extractor(path)
    copy_of_shipped(tmp_path).write_bytes(b"no weights")
    with pytest.raises(ValueError, match="no feature extractor"):
        load_extractor(path)


@pytest.mark.parametrize("change", ["missing", "superfluous", "shape", "nan"])
def test_weights_of_another_network_are_refused(tmp_path, change):
    path = copy_of_shipped(tmp_path)
    tensors = load_file(path)
    if change == "missing":
        del tensors["convs.3.bias"]
    elif change == "superfluous":
        tensors["convs.6.bias"] = torch.zeros(3)
    elif change == "shape":
        tensors["convs.3.bias"] = torch.zeros(95)
    else:
        tensors["head.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    card = json.loads(features.card_path(path).read_text())
    card["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    features.card_path(path).write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"convs\.[36]\.bias|head\.weight is not finite"):
        load_extractor(path)


# Training


def test_folding_leaves_the_logits_alone():
    network = feature_training.TrainingNetwork(7, generator_for(0, "test"))
    with torch.no_grad():
        for norm in network.norms:
            size = norm.num_features
            norm.running_mean.copy_(torch.linspace(-0.2, 0.3, size))
            norm.running_var.copy_(torch.linspace(0.5, 2.0, size))
            norm.weight.copy_(torch.linspace(1.5, 0.5, size))
            norm.bias.copy_(torch.linspace(-0.1, 0.2, size))
        network.head.bias.copy_(torch.linspace(-1, 1, 7))
    network.eval().double()
    pictures = random_pictures(3)
    extractor = FeatureExtractor(network.folded(), "test", "0" * 64)
    expected = network(pictures.double() / 127.5 - 1.0)
    torch.testing.assert_close(extractor.logits(extractor(pictures)), expected, rtol=1e-9, atol=1e-10)


def test_training_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    first = feature_training.train(2, 8, seed=0).folded()
    torch.manual_seed(1)
    changed = torch.get_rng_state()
    again = feature_training.train(2, 8, seed=0).folded()
    assert torch.equal(torch.get_rng_state(), changed)
    torch.set_rng_state(state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = feature_training.train(2, 8, seed=1).folded()
    assert not torch.equal(first["convs.0.weight"], other["convs.0.weight"])
    assert not torch.equal(first["convs.0.bias"], other["convs.0.bias"])


def test_the_order_of_pictures_depends_on_the_seed(monkeypatch):
    calls = []

    def noting(*arguments):
        calls.append(arguments)
        return sample_order(*arguments)

    monkeypatch.setattr(feature_training, "sample_order", noting)
    feature_training.train(1, 4, seed=5)
    (seed, weights, start, count), classes = calls[0], feature_training.training_pictures()[0].labels
    assert (seed, start, count) == (5, 0, 4)
    # A heart, of which there are 22, is drawn more often than a flag, of which there are 240.
    hearts, flags = (weights[classes == label].unique() for label in (1, 18))
    assert float(hearts / flags) == pytest.approx((240 / 22) ** 0.5)


def test_the_program_writes_weights_and_card(tmp_path, capsys):
    out = tmp_path / "new" / "features.safetensors"
    assert train_features.WEIGHTS_FILE == features.WEIGHTS_FILE
    assert train_features.main(["--out", str(out), "--steps", "2", "--batch-size", "8", "--seed", "3"]) == 0
    card = load_extractor(out).card
    assert card["training"]["steps"] == 2 and card["training"]["seed"] == 3
    assert card["pictures"] == {"train": 1198, "held_out": 126}
    assert 0.0 <= card["accuracy"]["held_out"] <= 1.0
    assert "held-out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--batch-size", "1"], ["--threads", "0"], ["--out", "weights.bin"]]
)
def test_wrong_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        train_features.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_rate_rises_and_falls():
    rates = [feature_training.rate(step / 100) for step in range(101)]
    assert rates[0] < 0.02 and max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert rates.index(max(rates)) == 10
