"""train.fid: equal to torch-fidelity and to closed forms, whatever the order, batch and container; checked inputs."""

from __future__ import annotations

import io
import json
import math
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import Dataset

torch_fidelity = pytest.importorskip("torch_fidelity")

from train import fid  # noqa: E402
from train.emoji.dataset import EmojiDataset  # noqa: E402
from train.emoji.features import default_extractor, register_with_torch_fidelity  # noqa: E402
from train.metrics import extractors  # noqa: E402
from train.metrics import inception as fid_extractors  # noqa: E402
from train.metrics import measure as fid_measure  # noqa: E402
from train.metrics import numbers as fid_metrics  # noqa: E402
from train.metrics import sets as fid_inputs  # noqa: E402
from train.metrics.frechet import Statistics, save_statistics, statistics_of  # noqa: E402
from train.metrics.inception import EmojiExtractor, Extractor, InceptionExtractor  # noqa: E402

CLASSES = ["face", "animal", "clock", "fruit"]


class Pictures(Dataset):
    """uint8 (N, 3, H, W) as torch-fidelity takes them."""

    def __init__(self, pictures: torch.Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pictures[index]


@pytest.fixture(scope="module")
def emoji() -> torch.Tensor:
    return EmojiDataset("train", 32, CLASSES).pixel_values


@pytest.fixture(scope="module")
def noisy(emoji) -> torch.Tensor:
    noise = 20 * torch.randn(emoji.shape, generator=torch.Generator().manual_seed(0))
    return (emoji + noise).round().clamp(0, 255).to(torch.uint8)[:150]


def write_folder(folder: Path, pictures: torch.Tensor, names: list[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        name = names[index] if names else f"{index:06d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name)
    return folder


def write_npz(path: Path, pictures: torch.Tensor, **others: np.ndarray) -> Path:
    np.savez(path, pictures.permute(0, 2, 3, 1).numpy(), **others)
    return path


def write_tar(path: Path, pictures: torch.Tensor) -> Path:
    with tarfile.open(path, "w") as archive:
        for index, picture in enumerate(pictures):
            content = io.BytesIO()
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(content, "PNG")
            info = tarfile.TarInfo(f"{index:06d}.png")
            info.size = len(content.getvalue())
            archive.addfile(info, io.BytesIO(content.getvalue()))
    return path


def measure(*arguments: object, extractor: str = "emoji") -> dict:
    given = [str(argument) for argument in arguments]
    options = fid.parse_arguments([*given, "--extractor", extractor, *([] if "--cache" in given else ["--no-cache"])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fid.fid(options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, emoji, noisy) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sets")
    return write_folder(root / "noisy", noisy), write_folder(root / "emoji", emoji)


@pytest.fixture(scope="module")
def measured(folders) -> dict:
    return measure(*folders)


# Equal to torch-fidelity and to closed forms


def test_numbers_equal_torch_fidelity_s_own(measured, folders):
    ours = measured["values"]
    label = register_with_torch_fidelity()
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor=label,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=150,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    assert ours[f"FD-emoji[{label}]"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours[f"IS-emoji[{label}]"]["mean"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours[f"IS-emoji[{label}]"]["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-6)
    assert ours[f"KD-emoji[{label}]"]["mean"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert ours[f"KD-emoji[{label}]"]["std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])
    assert 0 < ours["precision"] < 1 or ours["recall"] < 1


class Pixels(Extractor):
    """Pixels as features: whatever is wrong with order, rounding or transposing shows in the distance."""

    label, sha256, preprocessing, metric, kernel_metric = "pixels", "0" * 64, "none", "FD-pixels", "KD-pixels"
    keys = ("features", "logits")

    def _features(self, pictures):
        flat = pictures.flatten(1).double()
        return {"features": flat, "logits": flat[:, :5] / 255}


def test_the_whole_path_equals_the_nuclear_norm_form(tmp_path):
    """tr (S1 S2)^1/2 is the nuclear norm of A B^T for centred features A and B: no covariance, no eigenvalues."""
    generator = torch.Generator().manual_seed(3)
    sets = [torch.randint(0, high, (60, 3, 4, 4), dtype=torch.uint8, generator=generator) for high in (256, 200)]
    extractor, found = Pixels(), []
    for number, pictures in enumerate(sets):
        given = fid_inputs.open_input(str(write_folder(tmp_path / str(number), pictures)))
        given.pictures.check()
        found.append(fid_measure.measure_input(given, extractor, None))
    with pytest.warns(UserWarning, match="60 generated images are fewer than 2048"):
        value = fid_metrics.compare(found[0], found[1], extractor, ("fid",))["values"]["FD-pixels"]
    x, y = (pictures.flatten(1).double() for pictures in sets)
    a, b = (x - x.mean(0)) / math.sqrt(59), (y - y.mean(0)) / math.sqrt(59)
    nuclear = torch.linalg.svdvals(a @ b.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * nuclear
    assert value == pytest.approx(expected.item(), rel=1e-9)


def test_kid_of_one_full_subset_equals_the_written_out_mmd(emoji, noisy):
    """Without bias: pairs of one set without a picture and itself."""
    x, y = (default_extractor()(pictures[:40]) for pictures in (noisy, emoji))
    a, b = (fid_measure.Measured("s", Statistics(f.mean(0), torch.cov(f.T), 40), f, f[:, :3]) for f in (x, y))
    values: dict = {}
    fid_metrics._add_kid(a, b, EmojiExtractor(), values, {})
    kernel = lambda p, q: (p @ q.T / 128 + 1) ** 3
    within = [(kernel(f, f).sum() - kernel(f, f).diagonal().sum()) / (40 * 39) for f in (x, y)]
    expected = (within[0] + within[1] - 2 * kernel(x, y).mean()).item()
    (found,) = values.values()
    assert found["subset_size"] == 40 and found["std"] == pytest.approx(0, abs=1e-9)
    assert found["mean"] == pytest.approx(expected, rel=1e-9)
    assert found["all_pairs"] == pytest.approx(expected, rel=1e-9)


# Order, batch, workers, container


def same(a: dict, b: dict) -> bool:
    return a["values"] == b["values"] and a.get("floor") == b.get("floor")


def test_containers_and_workers_do_not_matter(tmp_path, folders, emoji, noisy, measured):
    npz, tar = write_npz(tmp_path / "n.npz", noisy), write_tar(tmp_path / "n.tar", noisy)
    nested = write_folder(tmp_path / "deep", emoji, [f"{i // 100}/x/{i:06d}.png" for i in range(len(emoji))])
    assert same(measure(npz, folders[1], "--workers", 1), measured)
    assert same(measure(tar, nested, "--workers", 3), measured)


def test_a_picture_has_the_same_features_in_any_company(emoji):
    extractor = EmojiExtractor()
    together = torch.cat([extractor.features(part.numpy())["features"] for part in emoji[:40].split(16)])
    alone = torch.cat([extractor.features(picture[None].numpy())["features"] for picture in emoji[:40]])
    turned = torch.cat([extractor.features(part.numpy())["features"] for part in emoji[:40].flip(0).split(7)]).flip(0)
    assert torch.equal(together, alone) and torch.equal(together, turned)


def test_order_changes_no_distance(tmp_path, folders, noisy, measured):
    order = torch.randperm(len(noisy), generator=torch.Generator().manual_seed(1))
    turned = measure(write_npz(tmp_path / "n.npz", noisy[order]), folders[1])["values"]
    for name, value in measured["values"].items():
        if name.startswith("KD"):  # subsets of all pictures, in another order
            assert turned[name]["mean"] == pytest.approx(value["mean"], rel=1e-9)
            assert turned[name]["all_pairs"] == pytest.approx(value["all_pairs"], rel=1e-9)
        elif not name.startswith("IS"):  # whose splits are torch-fidelity's, and follow the order
            assert turned[name] == pytest.approx(value, rel=1e-9)


# Statistics and the cache


def test_saved_statistics_stand_for_their_pictures(tmp_path, folders, measured):
    file = tmp_path / "new" / "reference.safetensors"
    assert same(measure(*folders, "--save-statistics", file), measured)
    assert same(measure(folders[0], file), measured)


def test_statistics_of_frechet_can_be_read(tmp_path, folders, emoji, measured):
    save_statistics(tmp_path / "s.safetensors", statistics_of(emoji))
    found = measure(folders[0], tmp_path / "s.safetensors")["values"]
    for name in found:
        if name.startswith("FD"):
            assert found[name] == pytest.approx(measured["values"][name], rel=1e-9)


def test_the_cache_is_used_and_knows_what_it_holds(tmp_path, folders, noisy, measured, monkeypatch):
    cache = tmp_path / "cache"
    assert same(measure(*folders, "--cache", cache), measured)
    assert len(list(cache.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(EmojiExtractor, "_features", lambda *_: pytest.fail("computed again"))
        assert same(measure(*folders, "--cache", cache), measured)
    changed = write_folder(tmp_path / "changed", noisy)
    Image.new("RGB", (32, 32)).save(changed / "000003.png")
    assert not same(measure(changed, folders[1], "--cache", cache), measured)
    assert len(list(cache.iterdir())) == 3


def test_the_cache_key_has_pictures_extractor_and_treatment(folders):
    given = fid_inputs.open_input(str(folders[0])).pictures
    given.check()
    extractor = EmojiExtractor()
    keys = {fid_measure.cache_key(given, extractor)}
    for name, value in (("sha256", "1"), ("preprocessing", "other")):
        other = EmojiExtractor()
        setattr(other, name, value)
        keys.add(fid_measure.cache_key(given, other))
    given.image_size = 16
    keys.add(fid_measure.cache_key(given, extractor))
    given.sha256 = "2"
    keys.add(fid_measure.cache_key(given, extractor))
    assert len(keys) == 5


def test_a_damaged_cache_is_made_anew(tmp_path, folders, measured):
    cache = tmp_path / "cache"
    measure(*folders, "--cache", cache)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert same(measure(*folders, "--cache", cache), measured)
    for file in cache.iterdir():
        assert fid_measure.read_measured(file, EmojiExtractor()).statistics.num_pictures in (150, 273)


# Inputs


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_broken_picture_is_named_before_anything_is_computed(tmp_path, folders, emoji, content, monkeypatch):
    folder = write_folder(tmp_path / "set", emoji[:5])
    broken = folder / "000003.png"
    broken.write_bytes(broken.read_bytes()[:-40] if content is None else content)
    monkeypatch.setattr(extractors, "make_extractor", lambda *_: pytest.fail("made the extractor first"))
    for pair in ((folder, folders[1]), (folders[0], folder)):
        with pytest.raises(ValueError, match=r"000003\.png cannot be read as an image"):
            measure(*pair)


def test_a_broken_picture_in_a_shard_is_named(tmp_path, folders, emoji):
    tar = write_tar(tmp_path / "s.tar", emoji[:5])
    content = bytearray(tar.read_bytes())
    at = content.index(b"IDAT", content.index(b"000002.png"))
    content[at + 8 : at + 40] = bytes(32)
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"s\.tar:000002\.png cannot be read"):
        measure(tar, folders[1])


def test_an_npz_cut_short_is_refused(tmp_path, folders, emoji):
    npz = write_npz(tmp_path / "s.npz", emoji[:5])
    npz.write_bytes(npz.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"s\.npz"):
        measure(npz, folders[1])


def test_sizes_must_be_equal_or_made_equal(tmp_path, folders, emoji):
    mixed = write_folder(tmp_path / "mixed", emoji[:3])
    Image.new("RGB", (40, 36)).save(mixed / "000001.png")
    with pytest.raises(ValueError, match=r"000001\.png has 40 x 36 pixels and the first image 32 x 32"):
        measure(mixed, folders[1])
    large = write_folder(tmp_path / "large", emoji[:3].repeat_interleave(2, 2).repeat_interleave(2, 3))
    with pytest.raises(ValueError, match="32 x 32.*64 x 64|64 x 64.*32 x 32"):
        measure(large, folders[1])
    assert measure(large, folders[1], "--image-size", 32, "--metrics", "fid")["generated"]["size"] == "32x32"
    assert measure(mixed, folders[1], "--image-size", 24, "--metrics", "fid")["reference"]["size"] == "24x24"


def test_too_few_pictures_are_refused_and_few_are_warned_of(tmp_path, folders, emoji):
    with pytest.raises(ValueError, match="has 1 images; a distance needs at least 2"):
        measure(write_folder(tmp_path / "one", emoji[:1]), folders[1])
    with pytest.raises(ValueError, match="holds no images"):
        measure(write_folder(tmp_path / "none", emoji[:0]), folders[1])
    options = fid.parse_arguments([*map(str, folders), "--extractor", "emoji", "--no-cache", "--metrics", "fid"])
    with pytest.warns(UserWarning, match="150 generated images are fewer than 2048"):
        result = fid.fid(options)
    assert "its floor" in fid.table(result) and result["floor"]["pictures"] == 136


def test_metrics_that_cannot_be_are_skipped_with_the_reason(tmp_path, folders, emoji):
    result = measure(write_folder(tmp_path / "three", emoji[:3]), folders[1])
    assert {name.split("[")[0] for name in result["skipped"]} == {"sFID", "IS-emoji", "precision, recall"}
    assert "not computed: it needs 10 images" in fid.table(result)


def test_copies_are_warned_of(tmp_path, folders, emoji):
    copies = write_folder(tmp_path / "copies", torch.cat([emoji[:10], emoji[:10]]))
    options = fid.parse_arguments([str(folders[0]), str(copies), "--extractor", "emoji", "--no-cache"])
    with pytest.warns(UserWarning, match="10 images of .* are copies of others"):
        assert fid.fid(options)["reference"]["duplicates"] == 10


def test_transparent_pictures_are_on_white(tmp_path):
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (32, 32), 9).save(tmp_path / "b.png")
    pictures = fid_inputs.open_input(str(tmp_path)).pictures
    assert [int(picture.max()) for picture in pictures.pixels()] == [255, 9]


def test_an_unfinished_set_is_refused(tmp_path, folders, emoji):
    folder = write_folder(tmp_path / "set", emoji[:5])
    (folder / "manifest.json").write_text('{"format": "attngen-samples-1", "complete": false}')
    with pytest.raises(ValueError, match="unfinished set"):
        measure(folder, folders[1])


@pytest.mark.parametrize("name", ["nothing", "x.txt", "x.safetensors", "x.npz"])
def test_other_files_are_refused(tmp_path, folders, name):
    if name != "nothing":
        (tmp_path / name).write_bytes(b"text")
    with pytest.raises(ValueError, match=name):
        measure(folders[0], tmp_path / name)


# The emoji as reference


def test_the_emoji_are_a_reference_in_the_classes_of_the_manifest(tmp_path, emoji, folders, measured):
    labels = EmojiDataset("train", 32, CLASSES).labels[:150].tolist()
    folder = write_folder(tmp_path / "set", emoji[:150])
    settings = {"id2label": {str(number): name for number, name in enumerate(CLASSES)}}
    manifest = {"format": "attngen-samples-1", "complete": True, "settings": settings}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "pictures.jsonl").write_text("\n".join(json.dumps({"label": label}) for label in labels))
    options = fid.parse_arguments([str(folder), "emoji", "--extractor", "emoji", "--no-cache", "--metrics", "fid"])
    with pytest.warns(UserWarning, match="of another class"):
        assert fid.fid(options)["reference"]["pictures"] == 273
    found = measure(folders[0], "emoji", "--classes", ",".join(CLASSES))
    assert same(found, measured)
    with pytest.raises(ValueError, match="unknown class 'cow'"):
        measure(folders[0], "emoji", "--classes", "cow")


# Inception, with random weights


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Random weights in torch-fidelity's layout, whose activations neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        state = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    for tensor in state.values():
        if tensor.ndim == 4:
            tensor.normal_(0, math.sqrt(2 / tensor[0].numel()), generator=generator)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(dict(state), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file) -> InceptionExtractor:
    return InceptionExtractor(inception_file)


@pytest.fixture
def small_groups(monkeypatch):
    """Inception takes a quarter of a second a picture, and groups are filled up."""
    monkeypatch.setattr(fid_extractors, "GROUP", 4)


def test_inception_features_are_torch_fidelity_s(inception, inception_file, emoji, small_groups):
    pictures = emoji[:4]
    theirs = torch_fidelity.utils.create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        feature_extractor_weights_path=str(inception_file),
        verbose=False,
    )
    features, logits = theirs(pictures)
    found = inception.features(pictures.numpy())
    torch.testing.assert_close(found["features"], features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-5)
    assert found["spatial"].shape == (4, 17 * 17 * 7) and found["features"].std() > 1e-3
    # The same picture alone.
    assert torch.equal(inception.features(pictures[2:3].numpy())["features"][0], found["features"][2])


def test_spatial_features_are_the_first_channels_of_mixed_6_conv(inception, emoji, small_groups):
    """By position, then channel, of the branch of 1x1 convolutions of the fourth block of the middle grid."""
    seen: list[torch.Tensor] = []
    handle = inception.network.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = inception.features(emoji[:2].numpy())["spatial"]
    handle.remove()
    # The branch comes first where the block puts its branches together.
    assert torch.equal(found[1].reshape(17, 17, 7), seen[0][1, :7].permute(1, 2, 0))


def test_inception_measures_and_reads_adm_s_statistics(tmp_path, inception_file, folders, emoji, noisy):
    """Distances use mu and sigma of the whole data, precision and recall the pictures in the same file."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for mean, covariance, width in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
        arrays |= {mean: rng.normal(size=width), covariance: np.diag(rng.uniform(1, 2, width))}
    reference = write_npz(tmp_path / "adm.npz", emoji[:12], **arrays)
    weights = ("--inception-weights", inception_file)
    drawn = write_npz(tmp_path / "drawn.npz", noisy[:16])
    found = measure(drawn, reference, *weights, "--metrics", "is,kid,pr", extractor="inception")
    assert set(found["values"]) == {"IS", "KID", "precision", "recall"}
    assert found["values"]["KID"]["subset_size"] == 12 and found["reference"]["pictures"] is None
    given = fid_inputs.open_input(str(reference))
    given.pictures.check()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid_measure, "measure_cached", lambda *_: fid_measure.Measured("m", None, torch.ones(12, 2048)))
        extractor = EmojiExtractor()
        extractor.keys = ("features", "spatial", "logits")
        merged = fid_measure.measure_input(given, extractor, None)
    assert torch.equal(merged.statistics.mean, torch.from_numpy(arrays["mu"]))
    assert merged.spatial is not None and merged.spatial.covariance.shape == (2023, 2023)
    assert merged.features is not None
    with pytest.raises(ValueError, match="2048 of Inception are expected"):
        short = replace(given, arrays={"mu": np.ones(5), "sigma": np.eye(5)}, pictures=None)
        fid_measure.measure_input(short, extractor, None)


@pytest.mark.slow
def test_inception_equals_torch_fidelity_s_own_numbers(inception_file, tmp_path, emoji, noisy):
    sets = [write_folder(tmp_path / name, pictures[:16]) for name, pictures in (("a", noisy), ("b", emoji))]
    ours = measure(*sets, "--inception-weights", inception_file, extractor="inception")["values"]
    theirs = torch_fidelity.calculate_metrics(
        input1=str(sets[0]),
        input2=str(sets[1]),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=16,
        batch_size=16,
        cuda=False,
        cache=False,
        verbose=False,
    )
    # Its eigenvalues of a product of rank 15 are not exact: 2,048 of them are rounding.
    assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["IS"]["mean"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["KID"]["mean"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])
    assert ours["sFID"] > 0


def test_weights_are_known_by_their_tensors(tmp_path, inception_file, inception):
    state = torch.load(inception_file, weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    assert fid_extractors.hash_of(fid_extractors.read_weights(tmp_path / "w.safetensors")) == inception.sha256
    state["fc.bias"] = state["fc.bias"] + 1
    assert fid_extractors.hash_of(state) != inception.sha256


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


def test_weights_are_read_without_running_anything(tmp_path, capsys):
    for name, content in (("a.pth", {"fc.weight": Harmful()}), ("b.pth", [1, 2]), ("c.pth", {"x": torch.ones(2)})):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            InceptionExtractor(tmp_path / name)
    assert "ran" not in capsys.readouterr().out


def test_without_a_network_the_way_out_is_named(tmp_path, monkeypatch, folders, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fails(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    assert fid.main([*map(str, folders), "--no-cache"]) == 1
    error = capsys.readouterr().err
    assert "--inception-weights FILE" in error and "no network" in error


# The program


def test_the_program_prints_a_table_and_writes_json(tmp_path, emoji, folders, capsys):
    folder = write_folder(tmp_path / "set", emoji[:20])
    arguments = [str(folder), str(folders[1]), "--extractor", "emoji", "--no-cache", "--metrics", "fid,pr", "--json"]
    assert fid.main(arguments) == 0
    written = json.loads((folder / "fid.json").read_text())
    out = capsys.readouterr().out
    assert "FD-emoji[" in out and "FID" not in out and str(folder / "fid.json") in out
    assert set(written["values"]) == {f"FD-emoji[{default_extractor().label}]", "precision", "recall"}
    assert written["generated"]["pictures"] == 20 and "torch-fidelity" in written["versions"]


@pytest.mark.parametrize(
    "arguments",
    [["a"], ["a", "b", "--metrics", "fod"], ["a", "b", "--extractor", "emoji", "--inception-weights", "w"]],
)
def test_wrong_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        fid.main(arguments)
    assert error.value.code == 2 and capsys.readouterr().err.startswith("train.fid: ")


def test_a_missing_folder_is_one_sentence(capsys, folders):
    assert fid.main(["nowhere", str(folders[1]), "--extractor", "emoji"]) == 2
    assert capsys.readouterr().err == "train.fid: there is no file or folder 'nowhere'\n"


def test_the_global_random_state_is_left_alone(folders):
    state = torch.get_rng_state()
    measure(*folders)
    assert torch.equal(torch.get_rng_state(), state)


def test_spread_limit_and_further_distances_through_the_program(folders, capsys):
    found = measure(*folders, "--metrics", "fd", "mind,cmmd", "--intervals", "3", "--extrapolate")
    label = default_extractor().label
    names = {f"FD-emoji[{label}]", f"MIND[{label}]", f"MMD[{label}]"}
    assert set(found["values"]) == set(found["spread"]) == names
    assert all(0 < found["spread"][name] < found["values"][name] for name in names)
    assert "more than" in found["skipped"][f"FD-emoji[{label}] at infinity"]
    assert "(resampled)" in fid.table(found) and "at infinity" in fid.table(found)


def test_metrics_are_words_or_a_list(folders):
    names = [
        fid.parse_arguments(["a", "b", "--metrics", *text.split()]).metrics for text in ("fid,pr", "fid recall pr")
    ]
    assert names == [("fid", "pr"), ("fid", "pr")]
