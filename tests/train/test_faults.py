"""train.sit: what users and machines do wrong ends in a sentence, and what float16 skips in no fault."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import types
from pathlib import Path

import accelerate.tracking
import pytest
import torch
from PIL import Image

from pipelines.cli.signals import StopOnSignal
from tests.train.test_sit_training import assert_same, run, weights
from train.loop.build import compile_model
from train.loop.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, write_json
from train.loop.meter import append_line
from train.loop.run import MOST_SKIPPED, Run
from train.loop.start import check_same_checkpoint, set_matmul_precision
from train.recipe.presets import PRESETS


def log_of(out) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--attention", "sofmax"), "sofmax"),
        (("--patch-size", "5"), "patches of 5"),
        (("--mediator-counts", "99"), "1 to 16"),
        (("--classes", "dragonfly"), "dragonfly"),
        (("--batch-size", "0"), "batch_size"),
        (("--balance", "2"), "balance"),
        (("--max-minutes", "-3"), "--max-minutes must be a number of at least 0, got -3.0"),
        (("--max-minutes", "nan"), "--max-minutes must be a number of at least 0, got nan"),
        (("--save-every", "-1"), "save_every must be at least 0, got -1"),
        (("--sample-every", "-1"), "sample_every must be at least 0, got -1"),
        (("--workers", "-1"), "workers must be at least 0, got -1"),
        (("--guidance-scale", "nan"), "guidance_scale must be a number of at least 0, got nan"),
        (("--ema-decay", "1"), "ema_decay must be in [0, 1)"),
        (("--ema-stds", "0.1", "0.1"), "ema_stds must differ"),
        (("--seed", "-1"), "seed must be from 0 to 2^63 - 1, got -1"),
        (("--num-mediators", "9999"), "num_mediators must be 1 to 16 (the tokens), got 9999"),
        (("--mixed-precision", "fp16"), "'fp16', which needs a GPU"),
        (("--mixed-precision", "fp8"), "known: no, bf16, fp16"),
        (("--fd-every", "-2"), "fd_every must be a number of steps, 0 (at the end only) or -1 (never), got -2"),
        (("--fd-every", "1", "--fd-pictures", "1"), "fd_pictures must be at least 2, got 1"),
        (("--max-broken", "1.5"), "expected a count (0, 1, 2, …) or a fraction (0.0 to 1.0)"),
        (("--max-broken", "few"), "expected a count (3) or a fraction (0.01)"),
        (("--image-size", "17"), "patches of 4 do not divide images of 17 pixels"),
        (("--init-from", "attngen/assets/emoji_unet"), "is a UNetClassPipeline without a transformer"),
        (("--trackers", "papyrus"), "unknown tracker 'papyrus'; known: none, all, aim"),
        (("--trackers", "aim"), "the tracker 'aim' is not installed; install it, or choose from: none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_values_end_before_work(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    try:
        code = run(tmp_path / "run", *options)
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_pickled_file_to_start_from_names_the_option(tmp_path, capsys):
    torch.save({"x": torch.zeros(1)}, tmp_path / "official.pt")
    assert run(tmp_path / "run", "--init-from", str(tmp_path / "official.pt")) == 2
    assert "pass --allow-pickle" in capsys.readouterr().err
    assert run(tmp_path / "run", "--init-from", str(tmp_path / "official.pt"), "--allow-pickle") == 2
    assert "holds no SiT or DiT: its tensors begin with x" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "run", "--steps", "1") == 2
    assert "Not a directory" in capsys.readouterr().err


def test_resuming_says_from_where(tmp_path, capsys):
    assert run(tmp_path, "--steps", "2", "--max-minutes", "0", "--resume") == 0
    assert f"no checkpoint in {tmp_path}, starting from scratch" in capsys.readouterr().err
    assert run(tmp_path, "--steps", "2", "--resume") == 0
    assert "resuming from" in (said := capsys.readouterr().err) and "step-00000001" in said
    assert run(tmp_path, "--steps", "1", "--resume") == 2
    assert "step-00000002 is beyond --steps 1" in capsys.readouterr().err
    assert run(tmp_path, "--steps", "3", "--resume", "--learning-rate", "0.5") == 2
    assert "learning_rate = 0.001, not 0.5" in (said := capsys.readouterr().err) and "--init-from" in said


def test_unreadable_pictures_are_counted_in_the_log(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 16), (60 * number, 0, 90)).save(tmp_path / "data" / label / f"{number}.png")
    (tmp_path / "data" / "dog" / "3.png").write_bytes(b"torn")
    options = ("--data", str(tmp_path / "data"), "--steps", "2", "--workers", "0")
    with pytest.warns(UserWarning, match=r"dog/3\.png cannot be read and is left out"):
        assert run(tmp_path / "one", *options, "--max-broken", "1") == 0
    assert [line["unreadable"] for line in log_of(tmp_path / "one")][-1] == 1
    assert run(tmp_path / "none", *options, "--max-broken", "0") == 2
    assert "step 1: 1 of 8 images cannot be read" in capsys.readouterr().err


def test_sharding_on_cpus_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run(tmp_path / "run") == 2
    assert "accelerate shards on GPUs only" in capsys.readouterr().err


def test_nodes_with_disks_of_their_own_are_refused(tmp_path):
    class Two:
        device = torch.device("cpu")

        def gather(self, mine):
            return torch.cat([torch.tensor([12]), mine])

    check_same_checkpoint(Two(), tmp_path, [tmp_path / "step-00000006", tmp_path / "step-00000012"])
    with pytest.raises(ValueError, match=r"\(steps 12, 0\); put it on a disk they share"):
        check_same_checkpoint(Two(), tmp_path, [])


def test_matmul_precision_is_set_on_gpus_alone():
    before = torch.get_float32_matmul_precision()
    try:
        for device, tf32, wanted in (("cuda", True, "high"), ("cuda", False, "highest"), ("cpu", True, "highest")):
            set_matmul_precision(torch.device(device), dataclasses.replace(PRESETS["emoji-tiny"], tf32=tf32))
            assert torch.get_float32_matmul_precision() == wanted
    finally:
        torch.set_float32_matmul_precision(before)


def test_torch_is_told_how_many_graphs_it_will_compile():
    """It gives up after 8 and goes on uncompiled, without a word."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=8):
        options = {}
        model = types.SimpleNamespace(compile=options.update)
        compile_model(model, dataclasses.replace(PRESETS["emoji-tiny"], mediator_counts=tuple(range(1, 13))))
        assert torch._dynamo.config.recompile_limit >= 12 and options == {"dynamic": False}


def test_a_killed_save_leaves_nothing_behind(tmp_path):
    (tmp_path / ".tmp-step-00000007").mkdir()
    (tmp_path / ".old-step-00000001").mkdir()
    for step in (8, 8):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.zeros(1)}}, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_second_interrupt_ends_at_once(capsys):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and "again" in capsys.readouterr().err
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_mediator_recipes_of_higher_resolutions():
    """80, 20 and 5 epochs of ImageNet in batches of 256, 64 and 16 (arXiv 2408.05710)."""
    found = [PRESETS[f"sit-s2-{size}-mediators"] for size in (256, 512, 1024)]
    epochs = [round(config.batch_size * config.steps / 1_281_167) for config in found]
    assert epochs == [80, 20, 5] and PRESETS["sit-s2-1024"].batch_size == 256
    assert PRESETS["sit-s8-256-mediators"].num_mediators == 16  # no more than tokens
    for config in PRESETS.values():
        config.check_tokens(config.image_size if config.data == "emoji" else config.image_size // 8)


def test_the_log_of_a_killed_run_has_every_step_once(tmp_path):
    assert run(tmp_path, "--steps", "4", "--max-minutes", "0") == 0
    whole = (tmp_path / "log.jsonl").read_text()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert run(tmp_path, "--steps", "4", "--resume") == 0
    assert (tmp_path / "log.jsonl").read_text().startswith(whole)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_full_disk_is_named_and_leaves_no_half_line(tmp_path, monkeypatch):
    append_line(tmp_path / "log.jsonl", {"step": 1})
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        append_line(tmp_path / "full", {"step": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_line(tmp_path / "log.jsonl", {"step": 2, "loss": math.nan})
    assert log_of(tmp_path) == [{"step": 1}]
    monkeypatch.setattr(Path, "with_name", lambda path, name: tmp_path / "full")
    with pytest.raises(OSError, match=r"No space left on device: .*a\.json"):
        write_json(tmp_path / "a.json", {})


# float16's gradient scaler, which accelerate has on GPUs only


def scaled(monkeypatch, overflows: int = 0, **options) -> None:
    """Have runs scale their gradients; those of the first steps overflow."""

    class ScaledAccelerator(accelerate.Accelerator):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.scaler = torch.amp.GradScaler("cpu", **options)
            self.left = overflows

        def backward(self, loss, **kwargs):
            self.left -= 1
            super().backward(loss * float("inf") if self.left >= 0 else loss, **kwargs)

        def unscale_gradients(self, optimizer=None):
            for prepared in self._optimizers:
                self.scaler.unscale_(prepared.optimizer)

    monkeypatch.setattr(accelerate, "Accelerator", ScaledAccelerator)


def test_scaled_gradients_change_nothing(tmp_path, monkeypatch):
    """Scales are powers of two, so not even the rounding differs, for either of two optimisers, resumed or not."""
    options = ("--steps", "6", "--max-grad-norm", "0.01")
    assert run(tmp_path / "plain", *options) == 0
    scaled(monkeypatch, init_scale=2.0**20, growth_interval=2)
    assert run(tmp_path / "scaled", *options) == 0
    assert run(tmp_path / "parts", *options, "--max-minutes", "0") == 0
    assert run(tmp_path / "parts", *options, "--resume") == 0
    for name in ("scaled", "parts"):
        assert_same(weights(tmp_path / "plain"), weights(tmp_path / name))
        _, state = load_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1])
        assert state["scaler"]["scale"] == 2.0**23


def test_steps_that_overflow_are_skipped_by_all_optimizers(tmp_path, monkeypatch):
    scaled(monkeypatch, overflows=3, init_scale=2.0**10)
    assert run(tmp_path, "--steps", "6", "--log-every", "2") == 0
    log = log_of(tmp_path)
    assert [line.get("skipped_steps") for line in log] == [2, 1, None] and log[0]["grad_norm"] == 0 < log[1][
        "grad_norm"
    ]
    tensors, state = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    steps = {value.item() for name, value in tensors["optimizer_0"].items() if name.endswith(".step")}
    assert steps == {3.0} and state["scaler"]["scale"] == 2.0**7
    assert all(value.isfinite().all() for value in tensors["optimizer_1"].values())


def test_steps_that_overflow_forever_stop(tmp_path, capsys, monkeypatch):
    scaled(monkeypatch)
    monkeypatch.setattr(Run, "_limit_gradients", lambda self: float("nan"))
    monkeypatch.setattr(Run, "_scaled_update", lambda self, scaler: None)
    assert run(tmp_path, "--steps", str(MOST_SKIPPED + 5), "--save-every", "0", "--workers", "0") == 2
    assert f"the norm of the gradient is nan in step {MOST_SKIPPED};" in capsys.readouterr().err


def test_a_gradient_that_is_not_a_number_stops_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Run, "_limit_gradients", lambda self: float("inf"))
    assert run(tmp_path, "--steps", "2") == 2
    assert "the norm of the gradient is inf in step 1; there is no checkpoint yet" in capsys.readouterr().err
    assert not list_checkpoints(tmp_path / "checkpoints")


def test_a_bar_tells_pictures_a_second_and_the_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run(tmp_path, "--steps", "3") == 0
    last = capsys.readouterr().err.split("\r")[-1]
    assert "step 3/3: 100%" in last and "24.0/24.0" in last and "pictures/s, loss=" in last
