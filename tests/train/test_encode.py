"""train.encode: the same files after any interruption, lazy reading, the autoencoder's values."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.cli.seeds import generator_for
from pipelines.engine.autoencoder import load_vae, weights_hash
from tests.train.test_data import assert_batches_are_stateless, class_folders
from train import encode
from train.data import latents
from train.data.latents import INDEX_NAME, LatentData, scale, unscale
from train.data.open import open_data
from train.data.prefetch import Prefetcher

ROOT = Path(__file__).parents[2]
SIZE = 16
SCALING, SHIFT = 0.4, 0.25


def make_vae(folder: Path, seed: int = 0) -> Path:
    """An autoencoder of a few thousand weights: 16 pixels to 8 x 8 x 3 latents."""
    blocks = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=3,
            sample_size=SIZE,
            scaling_factor=SCALING,
            shift_factor=SHIFT,
        )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return class_folders(tmp_path_factory.mktemp("data") / "pictures", {"ant": 5, "bee": 3, "cat": 3})


def arguments(pictures: Path, vae: Path, out: Path, *options: str) -> list[str]:
    given = ["--data", str(pictures), "--vae", str(vae), "--out", str(out), "--image-size", str(SIZE)]
    return [*given, "--cpu", "--batch-size", "2", "--shard-size", "4", *options]


def run(pictures: Path, vae: Path, out: Path, *options: str) -> int:
    return encode.main(arguments(pictures, vae, out, *options))


@pytest.fixture(scope="module")
def encoded(pictures, vae, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "all"
    assert run(pictures, vae, out) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Values


@pytest.mark.parametrize("store,tolerance", [("fp16", 1e-3), ("fp32", 1e-5)])
def test_latents_are_those_of_the_autoencoder(pictures, vae, tmp_path, store, tolerance, global_rng_untouched):
    assert run(pictures, vae, tmp_path / "x", "--store", store) == 0
    plain = open_data(str(pictures), image_size=SIZE, flip=False)
    clean, labels = plain.batch(torch.arange(len(plain)), generator_for(0))
    model, sha256 = load_vae(str(vae))
    data = open_data(str(tmp_path / "x"), image_size=SIZE)
    assert isinstance(data, LatentData) and data.is_latent and (data.channels, data.sample_size) == (3, 8)
    assert data.labels.tolist() == labels.tolist() and data.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert data.names(range(len(data))) == plain.names(range(len(plain)))
    assert data.vae == {"source": str(vae), "scaling_factor": SCALING, "shift_factor": SHIFT, "sha256": sha256}
    for mirrored in (False, True):
        with torch.no_grad():
            posterior = model.encode(clean.flip(-1) if mirrored else clean).latent_dist
        for i in range(len(data)):
            mean, std = data.moments(i, mirrored)
            torch.testing.assert_close(mean, posterior.mean[i], atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(std, posterior.std[i], atol=tolerance, rtol=tolerance)
    assert load_file(tmp_path / "x" / "latents-00000-of-00003.safetensors")["moments"].dtype == getattr(
        torch, {"fp16": "float16", "fp32": "float32"}[store]
    )


def test_a_batch_is_a_sample_of_the_posterior(encoded, global_rng_untouched):
    data = open_data(str(encoded), image_size=SIZE)
    indices = torch.tensor([9, 0, 4, 9, 3, 7])
    generator = generator_for(8)
    clean, labels = data.batch(indices, generator_for(8))
    mirrored = torch.rand(6, generator=generator) < 0.5
    draws = torch.randn(6, 3, 8, 8, generator=generator)
    assert mirrored.any() and not mirrored.all()
    for row, index in enumerate(indices.tolist()):
        mean, std = data.moments(index, bool(mirrored[row]))
        want = (mean + std * draws[row] - SHIFT) * SCALING
        torch.testing.assert_close(clean[row], want, atol=1e-6, rtol=1e-6)
    assert torch.equal(labels, data.labels[indices])
    assert_batches_are_stateless(data)


def test_samples_have_the_mean_and_spread_of_the_posterior(encoded):
    data = open_data(str(encoded), image_size=SIZE, flip=False)
    clean, _ = data.batch(torch.full((4000,), 6), generator_for(0))
    mean, std = data.moments(6)
    assert data.vae is not None
    assert ((clean.mean(0) - scale(mean, data.vae)) / (SCALING * std)).abs().max() < 5 / 4000**0.5
    torch.testing.assert_close(clean.std(0), SCALING * std, rtol=0.08, atol=0)


def test_scaling_there_and_back():
    x = torch.randn(5, generator=generator_for(0))
    for shift in (None, 0.3):
        info = {"scaling_factor": 0.2, "shift_factor": shift}
        torch.testing.assert_close(unscale(scale(x, info), info), x)
    assert torch.equal(scale(x, {"scaling_factor": 0.5, "shift_factor": None}), x * 0.5)


def test_chosen_classes_and_no_mirroring(encoded, pictures, vae, tmp_path, capsys):
    data = open_data(str(encoded), image_size=SIZE, classes=("cat", "ant"))
    assert data.id2label == {0: "cat", 1: "ant"} and data.labels.tolist() == [1] * 5 + [0] * 3
    assert [Path(name).parent.name for name in data.names(range(8))] == ["ant"] * 5 + ["cat"] * 3
    assert data.fingerprint != open_data(str(encoded), image_size=SIZE).fingerprint
    assert run(pictures, vae, tmp_path / "half", "--no-flip") == 0
    with pytest.raises(ValueError, match="has no mirrored images"):
        open_data(str(tmp_path / "half"), image_size=SIZE)
    half = open_data(str(tmp_path / "half"), image_size=SIZE, flip=False)
    unflipped = open_data(str(encoded), image_size=SIZE, flip=False)
    batches = [d.batch(torch.arange(11), generator_for(0))[0] for d in (half, unflipped)]
    assert torch.equal(*batches)


def test_latents_are_read_lazily(encoded, monkeypatch):
    """Only the slices of the samples asked for are read, from a file that is mapped and not loaded."""
    data = open_data(str(encoded), image_size=SIZE)
    read: list[tuple[str, int]] = []
    original = latents.Shard.read

    def noted(shard, row, mirrored):
        read.append((shard.path.name, row))
        return original(shard, row, mirrored)

    monkeypatch.setattr(latents.Shard, "read", noted)
    data.batch(torch.tensor([10, 5, 1, 8]), generator_for(0), part=slice(0, None, 2))
    assert read == [("latents-00002-of-00003.safetensors", 2), ("latents-00000-of-00003.safetensors", 1)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_shard_is_not_loaded(tmp_path, encoded):
    """256 MiB of latents; opening them and reading a batch takes a fraction of that."""
    index = json.loads((encoded / INDEX_NAME).read_text())
    count = 8192
    shard = load_file(encoded / "latents-00000-of-00003.safetensors")
    big = {name: torch.zeros(count, 128, 8, 8, dtype=torch.float16) for name in ("moments", "moments_flip")}
    big |= {"labels": torch.arange(count) % 3, "positions": torch.arange(count), "names": shard["names"]}
    folder = tmp_path / "big"
    folder.mkdir()
    info = json.dumps({"key": index["key"], "broken": {}})
    save_file(big, folder / "latents-00000-of-00001.safetensors", {latents.METADATA_KEY: info})
    index["shards"] = [{"file": "latents-00000-of-00001.safetensors", "count": count}]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    program = (
        "import sys, torch; from pathlib import Path; from train.data.open import open_data\n"
        "from pipelines.cli.seeds import generator_for; torch.zeros(8, 64, 8, 8)\n"
        "import train.data.latents\n"
        "def used():\n"
        "    return int([x for x in open('/proc/self/status') if x.startswith('VmRSS')][0].split()[1]) // 1024\n"
        "before = used(); d = open_data(sys.argv[1], image_size=16)\n"
        "d.batch(torch.tensor([1, 8000]), generator_for(0)); print(used() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 64, "of 256 MiB"


def test_batches_of_latents_ahead(encoded):
    data = open_data(str(encoded), image_size=SIZE)

    def schedule(step):
        return torch.tensor([step % 11, 3]), generator_for(step)

    with Prefetcher(data, schedule, 2, 2, stop=4) as batches:
        for batch in batches:
            assert torch.equal(batch.clean, data.batch(*schedule(batch.step))[0])


# Interruptions


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_encoding_goes_on_to_equal_bytes(pictures, vae, encoded, tmp_path, kills):
    """SIGKILL at a random moment after the first shard, again and again, and then to the end."""
    out, want = tmp_path / "killed", contents(encoded)
    draw = random.Random(0)
    command = [sys.executable, "-m", "train.encode", *arguments(pictures, vae, out)]
    # Encoding is over in an instant, so it is slowed down where it writes; the bytes stay what they are.
    slow = (
        "import sys, time; from train import encode; from train.loop import checkpoint; write = checkpoint.write_file\n"
        "def slowly(path, content): time.sleep(0.15); write(path, content); time.sleep(0.15)\n"
        "checkpoint.write_file = slowly; sys.exit(encode.main(sys.argv[1:]))"
    )
    for shards_made in range(1, kills + 1):
        process = subprocess.Popen([sys.executable, "-c", slow, *command[3:]], cwd=ROOT)
        deadline = time.monotonic() + 300  # of a loaded machine
        while len(list(out.glob(latents.SHARD_PATTERN))) < shards_made and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.wait()
        assert not (out / INDEX_NAME).exists()
        assert all(content == want[name] for name, content in contents(out).items() if name in want)
    with pytest.raises(ValueError, match="encoding was not finished; run train.encode again"):
        open_data(str(out), image_size=SIZE)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob(latents.SHARD_PATTERN)}
    assert kept
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert contents(out) == want
    assert all((out / name).stat().st_mtime_ns == when for name, when in kept.items()), "whole shards are kept"


@pytest.mark.parametrize("cut", [0, 5, 300, -1])
def test_torn_shards_are_named_and_made_again(pictures, vae, encoded, tmp_path, cut):
    out = tmp_path / "torn"
    out.mkdir()
    for name, content in contents(encoded).items():
        (out / name).write_bytes(content)
    torn = out / "latents-00001-of-00003.safetensors"
    torn.write_bytes(torn.read_bytes()[:cut])
    with pytest.raises(ValueError, match="latents-00001-of-00003.safetensors is not a whole shard"):
        open_data(str(out), image_size=SIZE)
    torn.unlink()
    with pytest.raises(ValueError, match="latents-00001-of-00003.safetensors is missing"):
        open_data(str(out), image_size=SIZE)
    torn.write_bytes(b"12345678")
    assert run(pictures, vae, out) == 0
    assert contents(out) == contents(encoded)


def test_processes_share_the_shards(pictures, vae, encoded, tmp_path, monkeypatch, capsys):
    """Two processes as `accelerate launch` starts them; the last to end writes the index."""
    out = tmp_path / "two"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(pictures, vae, out) == 0
    assert [path.name for path in out.iterdir()] == ["latents-00001-of-00003.safetensors"]
    assert "1 of 3 shards" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert run(pictures, vae, out) == 0
    assert "11 images in 3 shards, 0 left out" in capsys.readouterr().out
    assert contents(out) == contents(encoded)


def test_a_full_disk_leaves_no_half_shard(pictures, vae, tmp_path, capsys, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert run(pictures, vae, tmp_path / "out") == 2
    assert "No space left" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_a_whole_folder_is_left_as_it_is(pictures, vae, encoded):
    before = {path: path.stat().st_mtime_ns for path in encoded.glob("*.safetensors")}
    assert run(pictures, vae, encoded) == 0
    assert {path: path.stat().st_mtime_ns for path in encoded.glob("*.safetensors")} == before


# Unreadable pictures


def test_unreadable_pictures_are_left_out_and_counted(vae, tmp_path, capsys):
    broken = ("a/01.png", "b/00.png", "b/01.png", "b/02.png", "b/03.png", "b/04.png")
    made = class_folders(tmp_path / "x", {"a": 3, "b": 6}, broken)
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="cannot be read"):
        assert run(made, vae, out, "--max-broken", "5") == 2
    assert "6 of 9 images cannot be read, more than max_broken = 5" in capsys.readouterr().err
    assert not (out / INDEX_NAME).exists()
    for _ in range(2):  # the second time from the shards alone
        with pytest.warns(UserWarning, match="cannot be read"):
            assert run(made, vae, out, "--max-broken", "6", "--check") == 0
    data = open_data(str(out), image_size=SIZE)
    assert [name[-8:] for name in data.names(range(len(data)))] == ["a/00.png", "a/02.png", "b/05.png"]
    assert data.labels.tolist() == [0, 0, 1] and len(read_index(out)["broken"]) == 6
    assert [entry["count"] for entry in read_index(out)["shards"]] == [2, 0, 1]
    plain = open_data(str(made), image_size=SIZE, flip=False, max_broken=6)
    clean, _ = plain.batch(torch.tensor([0, 2, 8]), generator_for(0))
    model, _ = load_vae(str(vae))
    with torch.no_grad():
        want = model.encode(clean).latent_dist.mean
    for i in range(3):
        torch.testing.assert_close(data.moments(i)[0], want[i], atol=1e-3, rtol=1e-3)
    assert_batches_are_stateless(data)


def read_index(folder: Path) -> dict:
    return json.loads((folder / INDEX_NAME).read_text())


# The check sheet


def test_the_check_sheet_shows_pictures_and_decoded_latents(pictures, vae, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(pictures, vae, out, "--check") == 0
    line = capsys.readouterr().out
    assert "check.png: 11 images" in line
    with Image.open(out / "check.png") as sheet:
        assert sheet.height >= 11 * SIZE and sheet.width >= 3 * SIZE
    data = LatentData(out, SIZE)
    model, _ = load_vae(str(vae))
    clean, _ = open_data(str(pictures), image_size=SIZE, flip=False).batch(torch.arange(11), generator_for(0))
    with torch.no_grad():
        decoded = model.decode(torch.stack([data.moments(i)[0] for i in range(11)])).sample.clamp(-1, 1)
    distance = float((decoded - clean).square().mean()) ** 0.5
    assert f"{distance:.3f} apart" in line


# What cannot be used


def test_another_autoencoder_is_refused(pictures, vae, encoded, tmp_path, capsys):
    other = make_vae(tmp_path / "other", seed=1)
    data = open_data(str(encoded), image_size=SIZE)
    assert data.vae is not None
    assert weights_hash(load_vae(str(vae), data.vae["sha256"])[0]) == data.vae["sha256"]
    with pytest.raises(ValueError, match=f"{other} has weights .* the latents were made with"):
        load_vae(str(other), data.vae["sha256"])
    assert run(pictures, other, encoded) == 2
    assert f"{encoded} holds latents made with other settings" in capsys.readouterr().err
    assert run(pictures, other, tmp_path / "mixed") == 0
    shard = "latents-00002-of-00003.safetensors"
    target = tmp_path / "mixed" / shard
    target.write_bytes((encoded / shard).read_bytes())
    with pytest.raises(ValueError, match=f"{shard} was made with another autoencoder"):
        open_data(str(tmp_path / "mixed"), image_size=SIZE)
    (tmp_path / "mixed" / INDEX_NAME).unlink()
    assert run(pictures, other, tmp_path / "mixed") == 2
    assert f"{shard} was made with other settings" in capsys.readouterr().err


def test_the_hash_follows_values_and_names_not_files(vae, tmp_path):
    model, found = load_vae(str(vae))
    model.save_pretrained(tmp_path / "vae", max_shard_size="5KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    assert load_vae(str(tmp_path / "vae"))[1] == found and load_vae(str(tmp_path))[1] == found
    next(iter(model.parameters())).data.view(-1)[0] += 1e-6
    assert weights_hash(model) != found


def test_a_swapped_index_is_noticed(encoded, tmp_path):
    out = tmp_path / "x"
    out.mkdir()
    for name, content in contents(encoded).items():
        (out / name).write_bytes(content)
    index = read_index(out)
    index["shards"][0]["count"] = 5
    (out / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="latents-00000-of-00003.safetensors holds 4 images, and index.json says 5"):
        open_data(str(out), image_size=SIZE)
    for content, message in (("{", "is damaged"), ("[]", "is damaged"), ('{"format": "x", "version": 1}', "'x' 1")):
        (out / INDEX_NAME).write_text(content)
        with pytest.raises(ValueError, match=message):
            open_data(str(out), image_size=SIZE)


@pytest.mark.parametrize(
    "options,message",
    [
        (("--data", "no/such"), "no/such"),
        (("--vae", "no/such"), "no autoencoder can be loaded from 'no/such'"),
        (("--image-size", "15"), "15 is not a multiple of 2"),
        (("--image-size", "0"), "--image-size must be at least 1"),
        (("--max-broken", "many"), "'many'"),
        (("--classes", "dog"), "no class 'dog'"),
    ],
)
def test_wrong_options_end_before_work(pictures, vae, tmp_path, capsys, options, message):
    try:
        code = run(pictures, vae, tmp_path / "out", *options)
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_misuse_is_named(pictures, vae, encoded, tmp_path, capsys):
    assert run(encoded, vae, tmp_path / "out") == 2
    assert "already encoded" in capsys.readouterr().err
    with pytest.raises(ValueError, match="from 16-pixel images, not 32"):
        open_data(str(encoded), image_size=32)


def test_latents_that_are_not_finite_name_the_picture(pictures, vae, tmp_path, capsys):
    model, _ = load_vae(str(vae))
    model.quant_conv.bias.data[:3] = 1e6  # finite, and beyond half precision
    model.save_pretrained(tmp_path / "vae")
    assert run(pictures, tmp_path / "vae", tmp_path / "out") == 2
    assert f"{pictures / 'ant' / '00.png'} are not finite in fp32, stored as fp16" in capsys.readouterr().err
    assert run(pictures, tmp_path / "vae", tmp_path / "out", "--store", "fp32") == 0


@pytest.mark.parametrize("precision", ["bf16"])
def test_lower_precision_is_close(pictures, vae, encoded, tmp_path, precision):
    assert run(pictures, vae, tmp_path / "x", "--precision", precision) == 0
    low, full = (open_data(str(folder), image_size=SIZE) for folder in (tmp_path / "x", encoded))
    assert low.fingerprint != full.fingerprint
    for i in range(len(low)):
        torch.testing.assert_close(low.moments(i)[0], full.moments(i)[0], atol=0.1, rtol=0.1)


def test_the_emoji_can_be_encoded(vae, tmp_path):
    assert run("emoji", vae, tmp_path / "x", "--classes", "heart", "--shard-size", "20") == 0
    data, emoji = (open_data(str(s), image_size=SIZE, classes=("heart",)) for s in (tmp_path / "x", "emoji"))
    assert data.names(range(len(data))) == emoji.names(range(len(emoji)))


def test_help_is_quick_and_needs_no_torch():
    probe = "import sys; from train.encode import parse_arguments; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True)
    started = time.monotonic()
    ran = subprocess.run([sys.executable, "-m", "train.encode", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and "--vae" in ran.stdout
    assert time.monotonic() - started < (1.0 if os.getloadavg()[0] < 1 else 5.0)  # loaded machines are slow
