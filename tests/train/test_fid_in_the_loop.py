"""FID in the training loop: that of train.fid on the same pictures, and wrong settings before the training begins."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.test_fid import inception_file, small_groups  # noqa: F401
from tests.train.test_sit_training import run
from train import fid
from train.data.open import open_data
from train.loop import distance as evaluate
from train.metrics import frechet
from train.metrics import numbers as fid_metrics
from train.recipe.config import TrainingConfig


@pytest.fixture
def reference(tmp_path):
    folder = tmp_path / "reference"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(pixels[number + 2 * (label == "dog")]).save(folder / label / f"{number}.png")
    return folder


@pytest.mark.filterwarnings("ignore:.*images are fewer than")
def test_the_value_is_that_of_train_fid(tmp_path, reference, inception_file, small_groups, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    drawn = []
    batches = evaluate._batches

    def kept(*arguments):
        for batch in batches(*arguments):
            drawn.append(batch)
            yield batch

    def moments(a, b, warn=True):
        """The distance itself is tested elsewhere and takes many seconds."""
        return float((a.mean - b.mean).square().sum() + (a.covariance - b.covariance).square().sum())

    monkeypatch.setattr(evaluate, "_batches", kept)
    for module in (frechet, fid_metrics):
        monkeypatch.setattr(module, "frechet_distance", moments)
    options = ("--data", str(reference), "--steps", "1", "--sample-steps", "2", "--num-mediators", "4")
    distance = ("--fd-every", "0", "--fd-pictures", "4", "--fd-reference", str(reference))
    more = ("--fd-weights", str(inception_file), "--mediator-counts", "4")
    assert run(tmp_path / "run", *options, *distance, *more) == 0
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 1 and line["pictures"] == 4
    (tmp_path / "drawn").mkdir()
    for number, pixels in enumerate((torch.cat(drawn) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(tmp_path / "drawn" / f"{number}.png")
    command = [str(tmp_path / "drawn"), str(reference), "--metrics", "fid", "--inception-weights", str(inception_file)]
    assert line["FID 4 mediators"] == pytest.approx(fid.fid(fid.parse_arguments(command))["values"]["FID"], rel=1e-4)


def test_latents_need_their_autoencoder(reference, monkeypatch):
    data = open_data(str(reference), image_size=16)
    data.vae = {"source": "nowhere/at-all", "sha256": "0"}
    config = TrainingConfig(data=str(reference), image_size=16, fd_every=0, fd_reference=str(reference))
    with pytest.raises(ValueError, match="no autoencoder can be loaded from 'nowhere/at-all'"):
        evaluate.open_distance(config, data, torch.device("cpu"))
    assert evaluate.open_distance(TrainingConfig(), data, torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"attngen\[fid\]"):
        evaluate.open_distance(config, data, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fd-every", "1"), "needs an fd_reference: images, or their mu and sigma"),
        (("--fd-reference", "x.npz"), "fd_reference is 'x.npz' and fd_every -1, so it is not used"),
        (("--fd-every", "1", "--fd-reference", "nowhere.npz"), "there is no file or folder 'nowhere.npz'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_settings_end_before_work(tmp_path, reference, capsys, options, message):
    try:
        code = run(tmp_path / "run", "--data", str(reference), *options)
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
