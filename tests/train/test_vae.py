"""train.vae: what it reconstructs, resumes, exports and refuses; and latents normalised for each channel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from attngen import InterpolantScheduler, SiTPipeline, SiTTransformer2DModel
from attngen.sit.latents import check_normalization, denormalize_latents, encode_moments, normalize_latents
from pipelines.engine.autoencoder import load_vae
from pipelines.engine.previews import colours_of
from train import encode, vae
from train.autoencoder.config import VaeConfig
from train.autoencoder.images import make_batch, read_images
from train.autoencoder.model import KernelMuon, build_vae, latent_statistics, reconstruction_loss
from train.autoencoder.quality import measure, psnr, reconstruct
from train.data.latents import LatentData, scale, unscale
from train.data.open import open_data
from train.emoji import build as build_emoji
from train.emoji.dataset import DATA_FILE, SKIN_TONES, is_held_out, read_data_file

SIZE = 16
TINY = {
    "image_size": SIZE,
    "crop_size": 8,
    "latent_channels": 4,
    "channels": (8, 8, 8),
    "layers": (1, 1, 1),
    "batch_size": 4,
    "mixed_precision": "no",
}
MEAN, STD = (1.0, -2.0, 0.5), (0.5, 2.0, 4.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """60 images of one colour each, in a folder of two classes."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(60):
        place = folder / ("warm" if i % 2 else "cool")
        place.mkdir(exist_ok=True)
        Image.new("RGB", (SIZE, SIZE), ((53 * i) % 256, (91 * i) % 256, (17 * i) % 256)).save(place / f"{i}.png")
    return folder


def arguments(images: Path, out: Path, *options: str) -> list[str]:
    given = ["--data", str(images), "--out", str(out), "--image-size", str(SIZE), "--crop-size", "8"]
    given += ["--latent-channels", "4", "--channels", "8", "8", "8", "--layers", "1", "1", "1", "--batch-size", "4"]
    return [*given, "--mixed-precision", "no", "--save-every", "3", "--log-every", "2", "--eval-every", "4", *options]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert vae.main(arguments(images, out, "--steps", "8")) == 0
    return out


# Training


def test_a_run_that_was_stopped_equals_one_that_was_not(images, trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "parts"
    whole_step, count = vae_run_step(), 0

    def stopped_after_five(run: Any) -> float:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt  # as a power cut: nothing is saved after step 3
        return whole_step(run)

    monkeypatch.setattr("train.autoencoder.run.VaeRun.train_step", stopped_after_five)
    assert vae.main(arguments(images, out, "--steps", "8")) == 130
    monkeypatch.undo()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000003"]
    assert vae.main(arguments(images, out, "--steps", "8")) == 2  # not without --resume
    assert "--resume" in capsys.readouterr().err
    assert vae.main(arguments(images, out, "--steps", "8", "--resume")) == 0
    for name in ("model", "ema", "optimizer_0", "optimizer_1"):
        here, there = (load_file(run / f"checkpoints/step-00000008/{name}.safetensors") for run in (out, trained))
        assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 4, 6, 8, 8, 8]  # a line each 2 steps, a measurement each 4 and at the end


def vae_run_step() -> Any:
    from train.autoencoder.run import VaeRun

    return VaeRun.train_step


def test_sigterm_saves_and_a_budget_of_minutes_ends(images, tmp_path, monkeypatch, capsys):
    import os
    import signal

    step = vae_run_step()

    def stop_in_the_second(run: Any) -> float:
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        run.seconds += 6
        return step(run)

    monkeypatch.setattr("train.autoencoder.run.VaeRun.train_step", stop_in_the_second)
    given = arguments(images, tmp_path / "x", "--minutes", "0.5")
    assert vae.main(given) == 0 and "stopped after step 2" in capsys.readouterr().err
    assert vae.main([*given, "--resume"]) == 0
    assert [path.name for path in sorted((tmp_path / "x" / "checkpoints").iterdir())][-1] == "step-00000005"


def test_training_lowers_the_error(images, tmp_path):
    options = ["--steps", "150", "--eval-every", "150", "--save-every", "150", "--ema-decay", "0.5"]
    assert vae.main(arguments(images, tmp_path / "x", *options)) == 0
    metrics = json.loads((tmp_path / "x" / "metrics.json").read_text())
    untrained = build_vae(VaeConfig(**TINY))
    held = read_images(str(images), SIZE).held_out
    before = float(psnr(reconstruct(untrained, held), held).mean())
    assert metrics["held_out"]["psnr"] > before + 2
    assert metrics["held_out_fp16"]["psnr"] == pytest.approx(metrics["held_out"]["psnr"], abs=0.2)


def test_the_export_is_a_folder_of_diffusers_with_statistics_of_its_latents(images, trained):
    folder = trained / "vae"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    model = AutoencoderDC.from_pretrained(folder)
    train = read_images(str(images), SIZE).train
    with torch.no_grad():
        latents = model.encode(train / 127.5 - 1, return_dict=False)[0].transpose(0, 1).flatten(1)
    assert model.config["latents_mean"] == pytest.approx(latents.mean(1).tolist(), abs=2e-3)
    assert model.config["latents_std"] == pytest.approx(latents.std(1, correction=0).tolist(), rel=5e-3)
    averages = load_file(trained / "checkpoints/step-00000008/ema.safetensors")
    assert all(torch.equal(tensors[name], averages[name].half()) for name in averages)
    assert (trained / "samples" / "step-00000008.png").is_file()


def test_a_loss_that_is_not_finite_ends_the_run(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.autoencoder.run.reconstruction_loss", lambda decoded, batch: decoded.mean() * math.nan)
    assert vae.main(arguments(images, tmp_path / "x", "--steps", "3")) == 2
    assert "the loss is nan" in capsys.readouterr().err and not (tmp_path / "x" / "checkpoints").exists()


def test_a_checkpoint_of_another_run_is_refused(images, trained, capsys):
    options = ["--steps", "8", "--resume"]
    assert vae.main(arguments(images, trained, *options, "--latent-noise", "0.5")) == 2
    assert "latent_noise = 0.2, not 0.5" in capsys.readouterr().err
    assert vae.main([*arguments(Path("emoji"), trained, *options)]) == 2
    assert "other images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"image_size": 20}, "multiple of 8"),
        ({"crop_size": 24}, "larger than image_size"),
        ({"steps": 5, "minutes": 1.0}, "steps or minutes"),
        ({"latent_channels": 3}, "latent_channels must divide"),
        ({"channels": (8, 8, 40)}, "four times"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"mixed_precision": "fp16"}, "'no' or 'bf16'"),
    ],
)
def test_wrong_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VaeConfig(**{**TINY, **changes})


# Its parts


def test_a_kernel_is_updated_as_its_matrix_would_be():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    ours, plain = KernelMuon([kernel], lr=0.1), torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        gradient = torch.randn(6, 5, 3, 3)
        kernel.grad, matrix.grad = gradient.to(memory_format=torch.channels_last), gradient.flatten(1)
        ours.step()
        plain.step()
    # Muon does not depend on the order of the columns, but for rounding to bfloat16.
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="channels-last"):
        KernelMuon([torch.nn.Parameter(torch.randn(6, 5, 3, 3))], lr=0.1)


def test_the_loss_of_a_constant_error_and_of_an_edge():
    flat = torch.zeros(2, 3, 16, 16)
    assert float(reconstruction_loss(flat + 0.5, flat)) == pytest.approx(0.5 + 4 * 0.25 + 0.5 * 3 * 0.5)
    striped = torch.zeros(1, 1, 8, 8)
    striped[..., ::2] = 1.0  # L1 and L2 are 1/2, neighbours in a row differ by 1, halves are 1/2 everywhere
    assert float(reconstruction_loss(striped, torch.zeros_like(striped))) == pytest.approx(0.5 + 2 + 0.5 + 0.75)


def test_statistics_do_not_depend_on_the_batches():
    model = build_vae(VaeConfig(**TINY))
    images = torch.randint(256, (7, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for few, all_at_once in zip(latent_statistics(model, images, 2), latent_statistics(model, images, 7), strict=True):
        assert few == pytest.approx(all_at_once, abs=1e-5)


def test_the_emoji_are_held_out_by_their_base():
    index, _ = read_data_file(DATA_FILE)
    plain = [entry for entry in index["emoji"] if SKIN_TONES.isdisjoint(entry["codepoints"])]
    found = read_images("emoji", 16)
    assert found.names == [entry["name"] for entry in plain if is_held_out(entry["base"])]
    assert len(found.train) + len(found.held_out) == len(plain) and len(found.held_out) == len(found.names)
    with pytest.raises(ValueError, match="train.emoji.build --size 128"):
        read_images("emoji", 128)


def test_larger_emoji_can_be_drawn_without_skin_tones(tmp_path, monkeypatch):
    def codepoints(*values: int) -> dict[str, Any]:
        return {"codepoints": list(values), "name": "hand", "group": "g", "subgroup": "hands", "base": [values[0]]}

    drawn: list[list[int]] = []

    def render_all(entries: list[dict[str, Any]], font: object, size: int) -> Any:
        drawn.extend(entry["codepoints"] for entry in entries)
        images = [Image.new("RGB", (size, size), (i, 0, 0)) for i in range(len(entries))]
        return entries, images, {"missing": 0, "duplicate": 0}

    hands = [codepoints(0x1F44B), codepoints(0x1F44B, 0x1F3FB)]
    monkeypatch.setattr(build_emoji, "read_emoji_test", lambda path: ("15.0", hands))
    monkeypatch.setattr(build_emoji, "load_font", lambda path: None)
    monkeypatch.setattr(build_emoji, "render_all", render_all)
    given = ["--font", __file__, "--emoji-test", __file__, "--size", "128", "--out", str(tmp_path / "x.zip")]
    assert build_emoji.main([*given, "--no-skin-tones"]) == 0 and drawn == [[0x1F44B]]
    data = open_data(str(tmp_path / "x.zip"), image_size=128, classes=("hand",))
    assert (len(data), data.sample_size) == (1, 128)
    assert build_emoji.main(given) == 0 and drawn[1:] == [[0x1F44B], [0x1F44B, 0x1F3FB]]


def test_a_batch_depends_on_seed_and_step_alone():
    images = torch.arange(5 * 3 * 16 * 16).remainder(251).to(torch.uint8).view(5, 3, 16, 16)
    first = make_batch(images, 0, 7, 4, 8)
    assert first.shape == (4, 3, 8, 8) and torch.equal(first, make_batch(images, 0, 7, 4, 8))
    assert not torch.equal(first, make_batch(images, 0, 8, 4, 8))
    whole = make_batch(images, 0, 7, 4, None)
    originals = torch.cat([images, images.flip(-1)]).float() / 127.5 - 1
    assert all(any(torch.allclose(image, original) for original in originals) for image in whole)
    crops = originals.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    assert all((crops - crop).abs().flatten(1).amax(1).min() < 1e-6 for crop in first)


def test_numbers_on_reconstructions():
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    images[1, 0] = 100  # no pixel of the second is white
    decoded = images.clone()
    decoded[0] -= 3
    decoded[1, 0] += 10
    found = measure(decoded, images, ["a", "b"])
    values = [20 * math.log10(255 / 3), 10 * math.log10(255**2 / (100 / 3))]
    assert found["psnr"] == pytest.approx(sum(values) / 2, abs=1e-3) and found["worst"] == "b"
    assert found["white_error"] == 3 and found["shift_rgb"] == pytest.approx([3.5, -1.5, -1.5])
    assert found["colour_shift"] == pytest.approx((3 * 3 + 10) / 6, abs=1e-4)


# Normalisation of latents


def make_kl(**factors: Any) -> AutoencoderKL:
    build: Any = AutoencoderKL  # whose annotations are tuples of one
    return build(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=3,
        sample_size=SIZE,
        **factors,
    ).eval()


def make_dc() -> AutoencoderDC:
    model = AutoencoderDC(
        latent_channels=3,
        attention_head_dim=4,
        encoder_block_out_channels=(12, 12),
        decoder_block_out_channels=(12, 12),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    model.register_to_config(latents_mean=list(MEAN), latents_std=list(STD))
    return model.eval()


def column(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


# A VAE, and by hand what its normalised latents are: (z - shift) * factor.
KINDS = {
    "one factor and shift": (lambda: make_kl(scaling_factor=0.4, shift_factor=0.25), 0.25, 0.4),
    "by channel, and a factor": (
        lambda: make_kl(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD),
        column(MEAN),
        0.5 / column(STD),
    ),
    "by channel, without randomness": (make_dc, column(MEAN), 1 / column(STD)),
}


@pytest.fixture(params=list(KINDS))
def kind(request) -> Any:
    make, shift, factor = KINDS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(), shift, factor


def test_training_and_drawing_normalise_alike(kind, tmp_path, images):
    """train.encode writes what the network is trained on, and SiTPipeline undoes it before it decodes."""
    model, shift, factor = kind
    model.save_pretrained(tmp_path / "vae")
    given = ["--data", str(images), "--vae", str(tmp_path / "vae"), "--image-size", str(SIZE), "--cpu"]
    assert encode.main([*given, "--out", str(tmp_path / "latents"), "--store", "fp32", "--check"]) == 0
    data = open_data(str(tmp_path / "latents"), image_size=SIZE)
    assert isinstance(data, LatentData) and data.vae is not None
    pixels = open_data(str(images), image_size=SIZE, flip=False).batch(torch.arange(4), torch.Generator())[0]
    with torch.no_grad():
        mean, _ = encode_moments(model, pixels)
    stored = torch.stack([data.moments(i)[0] for i in range(4)])
    torch.testing.assert_close(stored, mean, atol=1e-5, rtol=1e-4)
    wanted = (mean - shift) * factor
    torch.testing.assert_close(scale(stored, data.vae), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(unscale(wanted, data.vae), mean, atol=1e-4, rtol=1e-4)

    network = SiTTransformer2DModel(
        sample_size=8, in_channels=3, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=2
    )
    pipe = SiTPipeline(network, InterpolantScheduler(), vae=load_vae(str(tmp_path / "vae"))[0])
    with torch.no_grad():
        decoded = model.decode(mean).sample
    torch.testing.assert_close(pipe._decode(wanted, "pt"), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-3)


def test_previews_use_normalised_latents(kind):
    model, shift, factor = kind
    raw = make_kl() if isinstance(model, AutoencoderKL) else make_dc()
    raw.load_state_dict(model.state_dict())
    raw.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    colours, of_raw = colours_of(model), colours_of(raw)
    assert colours is not None and of_raw is not None
    latents = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    normal = (latents - shift) * factor
    here = normal[0].permute(1, 2, 0) @ colours[:-1] + colours[-1]
    there = latents[0].permute(1, 2, 0) @ of_raw[:-1] + of_raw[-1]
    torch.testing.assert_close(here, there, atol=0.1, rtol=0.1)  # up to a ridge


def test_statistics_that_do_not_fit_are_refused():
    latents = torch.zeros(1, 3, 2, 2)
    for config, message in (
        ({"latents_mean": [0.0] * 4}, "latents_mean of the vae has 4 values"),
        ({"latents_std": [1.0, 0.0, 1.0]}, "latents_std"),
        ({"scaling_factor": 0.0}, "scaling_factor"),
    ):
        for change in (normalize_latents, denormalize_latents):
            with pytest.raises(ValueError, match=message):
                change(latents, config)
        with pytest.raises(ValueError, match=message):
            check_normalization(config, 3)
    pipe_vae = make_kl(latents_mean=(0.0, 0.0), latents_std=(1.0, 1.0))
    network = SiTTransformer2DModel(
        sample_size=8, in_channels=3, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=2
    )
    with pytest.raises(ValueError, match="2 values"):
        SiTPipeline(network, InterpolantScheduler(), vae=pipe_vae)([0], num_inference_steps=1)


# Variants of the emoji


def test_variants_are_drawn_by_picture_and_all_are_used(tmp_path):
    make_dc().save_pretrained(tmp_path / "vae")
    given = ["--data", "emoji", "--classes", "heart", "clock", "--vae", str(tmp_path / "vae"), "--image-size", "16"]
    given += ["--cpu", "--variants", "3", "--store", "fp32"]
    assert encode.main([*given, "--out", str(tmp_path / "a"), "--batch-size", "16"]) == 0
    assert encode.main([*given, "--out", str(tmp_path / "b"), "--batch-size", "5"]) == 0
    data, other = (open_data(str(tmp_path / name), image_size=16) for name in "ab")
    assert isinstance(data, LatentData) and isinstance(other, LatentData)
    for index in (0, 17, 40):
        views = [data.moments(index, view)[0] for view in range(3)]
        assert all((views[a] - views[b]).abs().max() > 1e-3 for a, b in ((0, 1), (0, 2), (1, 2)))
        for view in range(3):
            torch.testing.assert_close(views[view], other.moments(index, view)[0], atol=1e-4, rtol=1e-4)
    assert data.vae is not None
    drawn, _ = data.batch(torch.full((60,), 17), torch.Generator().manual_seed(0))
    normal = scale(torch.stack([data.moments(17, view)[0] for view in range(3)]), data.vae)
    distances = (drawn[:, None] - normal[None]).abs().flatten(2).amax(2)
    assert distances.amin(1).max() < 1e-4 and set(distances.argmin(1).tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="variants"):
        open_data(str(tmp_path / "a"), image_size=16, flip=False)


def test_mirrored_clocks_are_left_as_they_are(tmp_path):
    make_dc().save_pretrained(tmp_path / "vae")
    given = ["--data", "emoji", "--classes", "heart", "clock", "--vae", str(tmp_path / "vae"), "--image-size", "16"]
    assert encode.main([*given, "--cpu", "--out", str(tmp_path / "x"), "--store", "fp32"]) == 0
    data = open_data(str(tmp_path / "x"), image_size=16)
    assert isinstance(data, LatentData)
    same = [torch.equal(data.moments(i)[0], data.moments(i, 1)[0]) for i in range(len(data))]
    assert [bool(label) for label in data.labels.tolist()] == same


def test_variants_are_for_the_emoji(images, tmp_path, capsys):
    make_dc().save_pretrained(tmp_path / "vae")
    given = ["--data", str(images), "--vae", str(tmp_path / "vae"), "--image-size", str(SIZE), "--variants", "2"]
    assert encode.main([*given, "--cpu", "--out", str(tmp_path / "x")]) == 2
    assert "--variants is for the emoji" in capsys.readouterr().err
