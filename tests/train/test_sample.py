"""train.sample: a picture is a function of seed and number, whatever the batch, the processes and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attngen import InterpolantScheduler, SiTPipeline, SiTTransformer2DModel
from pipelines.cli import UserError
from train import sample as program
from train.sampling.files import SampleFolder, read_shard
from train.sampling.model import Sampler, make_mediators
from train.sampling.subjects import choose_labels, class_prompts, picture_seed, read_prompts, repeat

ROOT = Path(__file__).parents[2]
CLASSES = ["face", "heart", "animal", "clock", "fruit"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SiTTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=3,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_classes=5,
            attention="mediator",
            num_mediators=4,
        )
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    SiTPipeline(network, InterpolantScheduler(), id2label=dict(enumerate(CLASSES))).save_pretrained(folder / "pipeline")
    return folder  # a training run, whose pipeline is found


def parsed(model: Path, out: Path, *arguments: object):
    given = ["--model", model, "--out", out, "--device", "cpu", "--steps", 2, "--guidance-scale", 2, *arguments]
    return program.parse_arguments([str(argument) for argument in given])


def draw(model: Path, out: Path, *arguments: object, stopped=None) -> dict:
    return program.sample(parsed(model, out, *arguments), stopped)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "set"
    draw(model, out, "--num", 40, "--npz")
    return out


# One picture, one result


@pytest.mark.parametrize("batch_size", [8, 64])
def test_the_batch_size_does_not_matter(model, whole, tmp_path, batch_size):
    draw(model, tmp_path / "set", "--num", 40, "--npz", "--batch-size", batch_size)
    assert files(tmp_path / "set") == files(whole)


class Process:
    """accelerate's state of one of two processes."""

    device, num_processes = torch.device("cpu"), 2

    def __init__(self, rank: int) -> None:
        self.process_index, self.is_main_process = rank, rank == 0

    def wait_for_everyone(self) -> None:
        pass


def test_two_processes_draw_the_same_set(model, whole, tmp_path, monkeypatch):
    """Each draws its groups and no other; the first lists the set when both are done."""
    for rank in (1, 0):
        if rank == 1:  # the manifest is the first one's
            manifest = json.loads((whole / "manifest.json").read_text())
            (tmp_path / "set").mkdir()
            (tmp_path / "set" / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
        monkeypatch.setattr(program, "start_processes", lambda options, rank=rank: Process(rank))
        draw(model, tmp_path / "set", "--num", 40, "--npz")
        if rank == 1:
            assert len(list((tmp_path / "set").rglob("*.png"))) == 16
    assert files(tmp_path / "set") == files(whole)


@pytest.mark.slow
def test_two_real_processes_draw_the_same_set(model, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "train.sample"]
    command += ["--model", model, "--out", tmp_path / "set", "--device", "cpu", "--steps", 2, "--guidance-scale", 2]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*map(str, command), "--num-pictures", "40", "--npz"]
    done = subprocess.run(command, check=True, env=environment, timeout=600, stdout=subprocess.PIPE, text=True)
    assert "40 images, 40 drawn now" in done.stdout
    assert files(tmp_path / "set") == files(whole)


def test_more_pictures_begin_with_the_same_ones(model, whole, tmp_path):
    draw(model, tmp_path / "set", "--num", 21)
    few, many = files(tmp_path / "set" / "pictures"), files(whole / "pictures")
    assert few == {name: many[name] for name in few} and len(few) == 21


def test_raw_values_are_the_same_for_any_composition_of_a_group(model, tmp_path):
    """Not only the rounded ones: a group is always of one size."""
    sampler = Sampler(parsed(model, tmp_path, "--num", 1), torch.device("cpu"))
    kept = []
    sampler.pipe.image_processor.register_to_config()
    original = sampler.pipe._decode
    sampler.pipe._decode = lambda sample, kind: (kept.append(sample.clone()), original(sample, kind))[1]
    subjects = [program_subject(index % 5) for index in range(20)]
    program.draw_group(sampler, subjects, range(16), 16, 0)
    program.draw_group(sampler, subjects[:3], range(3), 16, 0)
    assert len(kept[1]) == 16 and torch.equal(kept[0][:3], kept[1][:3])


def program_subject(label: int):
    from train.sampling.subjects import Subject

    return Subject(label)


def test_seeds_differ_between_sets_and_pictures():
    seeds = [picture_seed(seed, index) for seed in range(3) for index in range(100)]
    assert len(set(seeds)) == 300 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_listed_seed_draws_the_picture_again(model, whole):
    line = json.loads((whole / "pictures.jsonl").read_text().splitlines()[7])
    assert line["class"] == CLASSES[7 % 5] and line["file"] == "pictures/000007.png"
    pipe = SiTPipeline.from_pretrained(model / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(line["seed"])
    (picture,) = pipe(line["label"], num_inference_steps=2, guidance_scale=2.0, generator=generator).images
    again = np.asarray(picture).astype(int)
    saved = np.asarray(Image.open(whole / line["file"])).astype(int)
    assert np.abs(again - saved).max() <= 1  # alone, products may round otherwise


# Stopping and going on


class StopAfter:
    """Asks to stop after a number of looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def by(self) -> int | None:
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else None


@pytest.mark.parametrize("form", ["png", "tar"])
def test_a_stopped_set_goes_on_and_equals_a_whole_one(model, tmp_path, form):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    draw(model, whole, "--num", 40, "--format", form, "--npz")
    for looks, there in ((1, 16), (1, 32)):
        done = draw(model, stopped, "--num", 40, "--format", form, "--npz", stopped=StopAfter(looks))
        assert done["missing"] == 40 - there and not (stopped / "samples.npz").exists()
    assert draw(model, stopped, "--num", 40, "--format", form, "--npz")["drawn"] == 8
    assert files(stopped) == files(whole)
    assert draw(model, stopped, "--num", 40, "--format", form, "--npz")["drawn"] == 0
    assert files(stopped) == files(whole)


def test_damaged_and_missing_pictures_are_drawn_again(model, whole, tmp_path):
    draw(model, tmp_path / "set", "--num", 40, "--npz")
    pictures = tmp_path / "set" / "pictures"
    (pictures / "000003.png").unlink()
    (pictures / "000020.png").write_bytes(b"half")
    assert draw(model, tmp_path / "set", "--num", 40, "--npz")["drawn"] == 2
    assert files(tmp_path / "set") == files(whole)


def test_a_journal_cut_short_costs_one_picture(model, whole, tmp_path):
    draw(model, tmp_path / "set", "--num", 40, "--npz", stopped=StopAfter(1))
    (journal,) = (tmp_path / "set" / ".journal").iterdir()
    journal.write_text(journal.read_text()[:-10])
    assert draw(model, tmp_path / "set", "--num", 40, "--npz")["drawn"] == 25
    assert files(tmp_path / "set") == files(whole)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (["--seed", 1], "seed"),
        (["--labels", "random"], "labels"),
        (["--steps", 3], "num_inference_steps"),
        (["--guidance-scale", 3], "guidance_scale"),
        (["--mediators", "1:1,0.5:4"], "mediators"),
        (["--sampler", "ode"], "scheduler_config"),
        (["--group-size", 4], "group_size"),
        (["--format", "tar"], "format"),
        (["--num", 41], "num"),
    ],
)
def test_other_settings_are_refused_by_name(model, whole, changed, name):
    before = files(whole)
    with pytest.raises(UserError, match=f"drawn with {name} = "):
        draw(model, whole, "--num", 40, *changed)
    assert files(whole) == before


def test_a_folder_of_other_things_is_refused(model, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds 'photo\.jpg'"):
        draw(model, tmp_path, "--num", 2)
    assert files(tmp_path) == {"photo.jpg": b"mine"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_end_cleanly(model, tmp_path, monkeypatch, number, code, capsys):
    original = program.draw_group

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(program, "draw_group", interrupted)
    arguments = [
        "--model",
        str(model),
        "--out",
        str(tmp_path / "set"),
        "--num",
        "40",
        "--device",
        "cpu",
        "--steps",
        "2",
    ]
    before = signal.getsignal(number)
    assert program.main(arguments) == code
    assert signal.getsignal(number) is before
    assert "16 images, 24 missing" in capsys.readouterr().out


def test_a_picture_that_is_not_finite_is_named_and_not_written(model, tmp_path, monkeypatch):
    original = SiTPipeline._decode
    monkeypatch.setattr(
        SiTPipeline,
        "_decode",
        lambda self, x, kind: np.full((len(x), 8, 8, 3), np.nan) if hits() else original(self, x, kind),
    )
    calls = iter([False, True])
    hits = lambda: next(calls)
    with pytest.raises(FloatingPointError, match="image 16 is not finite"):
        draw(model, tmp_path / "set", "--num", 40)
    assert len(list((tmp_path / "set" / "pictures").iterdir())) == 16


# What is written


def test_the_npz_is_as_adm_s(whole):
    with np.load(whole / "samples.npz") as archive:
        pictures, labels = archive["arr_0"], archive["arr_1"]
    assert pictures.shape == (40, 8, 8, 3) and pictures.dtype == np.uint8
    assert labels.tolist() == [index % 5 for index in range(40)]
    assert np.array_equal(pictures[13], np.asarray(Image.open(whole / "pictures" / "000013.png")))


def test_shards_hold_pictures_and_labels_and_are_training_data(model, whole, tmp_path):
    from train.data.tar import TarSource

    draw(model, tmp_path / "set", "--num", 40, "--format", "tar")
    shard = tmp_path / "set" / "shards" / "00000.tar"
    assert dict(read_shard(shard)) == {i: (whole / "pictures" / f"{i:06d}.png").read_bytes() for i in range(40)}
    assert TarSource(str(shard)).labels.tolist() == [index % 5 for index in range(40)]
    assert not (tmp_path / "set" / "pictures").exists()
    with tarfile.open(shard) as archive:
        assert archive.getnames()[:2] == ["000000.png", "000000.cls"]


def test_many_pictures_are_in_folders_of_a_thousand(tmp_path):
    folder = SampleFolder(tmp_path, 2500)
    assert folder.picture(1999) == tmp_path / "pictures" / "00001" / "001999.png"
    assert [len(folder.in_shard(number)) for number in range(folder.num_shards)] == [1000, 1000, 500]
    assert SampleFolder(tmp_path, 1000).picture(999) == tmp_path / "pictures" / "000999.png"


def test_the_manifest_says_how(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["complete"] and manifest["pictures"] == 40
    assert manifest["settings"]["guidance_scale"] == 2.0 and "torch" in manifest["settings"]["versions"]
    assert manifest["settings"]["model_hash"] and str(Path.cwd()) not in json.dumps(manifest)


def test_train_fid_measures_the_set(whole):
    pytest.importorskip("torch_fidelity")
    from train.metrics.sets import open_input

    pictures = open_input(str(whole)).pictures
    assert pictures is not None
    pictures.check()
    assert pictures.count == 40 and pictures.size == (8, 8)


# Labels, prompts, options


def test_labels(tmp_path):
    names = dict(enumerate(CLASSES))
    find = lambda text: CLASSES.index(text)
    assert choose_labels("balanced", 7, 0, names, 5, find) == [0, 1, 2, 3, 4, 0, 1]
    assert choose_labels("clock", 3, 0, names, 5, find) == [3, 3, 3]
    random = choose_labels("random", 500, 0, names, 5, find)
    assert choose_labels("random", 100, 0, names, 5, find) == random[:100]
    assert min(np.bincount(random, minlength=5)) > 60 and random != choose_labels("random", 500, 1, names, 5, find)
    data = np.bincount(choose_labels("data", 300, 0, names, 5, find), minlength=5)
    assert data[2] > data[3] > 0 and data.sum() == 300
    (tmp_path / "l.txt").write_text("fruit\nface\n")
    assert choose_labels(str(tmp_path / "l.txt"), 2, 0, names, 5, find) == [4, 0]
    with pytest.raises(UserError, match="2 labels for 3 images"):
        choose_labels(str(tmp_path / "l.txt"), 3, 0, names, 5, find)
    with pytest.raises(UserError, match="unknown class 'cow'"):
        choose_labels("data", 3, 0, {0: "cow"}, 1, find)


def test_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a fox\n\na hen\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a fox", "negative_prompt": "fog", "label": 3}\n')
    assert [s.prompt for s in repeat(read_prompts(tmp_path / "p.txt"), 3)] == ["a fox", "a hen", "a fox"]
    (subject,) = read_prompts(tmp_path / "p.jsonl")
    assert (subject.prompt, subject.negative_prompt, subject.label) == ("a fox", "fog", 3)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a fox"}\n{"text": "a hen"}\n')
    with pytest.raises(UserError, match="line 2 of"):
        read_prompts(tmp_path / "p.jsonl")
    assert class_prompts(["tench, Tinca tinca", "goldfish"], "a photo of a {}")[0].prompt == "a photo of a tench"
    with pytest.raises(UserError, match="expected one {}"):
        class_prompts(["tench"], "a photo")


def test_mediators():
    assert make_mediators("16") == 16
    assert make_mediators("1:4,0.5:16").values == (4, 16)
    assert make_mediators("change:4,16,25").values == (4, 16, 25)
    assert make_mediators("change:4,16:0.7").ratios == (0.7,)
    with pytest.raises(UserError, match="--mediators 'many'"):
        make_mediators("many")


def test_a_unet_draws_its_classes(tmp_path):
    """The one that ships, which is no transformer and has no mediators."""
    done = draw(ROOT / "attngen/assets/emoji_unet", tmp_path / "set", "--num", 2, "--steps", 1, "--group-size", 2)
    assert not done["missing"] and len(list((tmp_path / "set").rglob("*.png"))) == 2
    with pytest.raises(UserError, match="UNetClassPipeline takes no num_mediators"):
        draw(ROOT / "attngen/assets/emoji_unet", tmp_path / "other", "--num", 2, "--mediators", "4")


def test_a_change_driven_schedule_looks_at_one_picture_at_a_time(model, tmp_path):
    draw(model, tmp_path / "set", "--num", 3, "--mediators", "change:1,4:0.9")
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["settings"]["group_size"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "cow"], "'cow' is not a class"),
        (["--prompts", "p.txt"], "draws classes, not texts"),
        (["--scheduler", "NoScheduler"], "diffusers has no scheduler"),
        (["--method", "none-such"], "none-such"),
        (["--guidance-channels", "9"], "guidance_channels must be a whole number from 1 to 3"),
        (["--height", "9", "--width", "8"], "height must be a positive multiple"),
        (["--mediators", "1:1,0.001:999"], "999 is more than"),
        (["--mediators", "change:1,999:0.1"], "999 is more than"),
    ],
)
def test_wrong_options_are_refused(model, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        draw(model, tmp_path / "set", "--num", 2, *arguments)
    assert not list((tmp_path / "set").rglob("*.png"))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a pipeline folder"):
        draw(tmp_path, tmp_path / "set", "--num", 2)


def test_help_is_fast_and_needs_no_torch():
    code = "import sys; sys.argv = ['x', '--help']\nfrom train import sample, fid\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
