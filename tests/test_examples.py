"""The scripts in examples/ run from end to end, with tiny models in place of the published ones."""

import re
from pathlib import Path

import diffusers
import pytest
import torch

from tests.builders.programs import build_sd, build_sdxl
from tests.builders.zoo import ZOO
from tests.hosts.test_core_pipelines import wan

EXAMPLES = Path(__file__).parent.parent / "examples"


def flux2():
    """FLUX.2 [klein] with a text encoder that is not run: prompts are random."""
    row = ZOO["Flux2Transformer2DModel"]
    transformer = row.model(0)
    width = transformer.config.joint_attention_dim
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=transformer.config.in_channels // 4,
            norm_num_groups=2,
        )
    pipe = diffusers.Flux2KleinPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, None, None, transformer
    )
    text = torch.randn(1, 7, width, generator=torch.Generator().manual_seed(1))
    pipe.encode_prompt = lambda *args, **kwargs: (text, torch.zeros(1, 7, 4))
    return pipe


def wan_with_prompts():
    pipe, _ = wan()
    channels = pipe.vae.config.z_dim
    pipe.vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    text = torch.randn(1, 7, pipe.transformer.config.text_dim, generator=torch.Generator().manual_seed(1))
    pipe.encode_prompt = lambda *args, **kwargs: (text, 0.5 * text)
    return pipe


CASES = {
    "sd15": ("StableDiffusionPipeline", build_sd, {"SIZE": 64, "STEPS": 2}, ["exact.png", "agent.png"]),
    "sdxl_large": (
        "StableDiffusionXLPipeline",
        build_sdxl,
        {"SIZE": 64, "STEPS": 4, "MIN_TOKENS": 0},
        ["lighthouse.png", "plan.json"],
    ),
    "flux2_references": ("Flux2KleinPipeline", flux2, {"SIZE": 64, "STEPS": 2, "NUM_AGENTS": 8}, ["lighthouse.png"]),
    "wan_video": (
        "WanPipeline",
        wan_with_prompts,
        {"HEIGHT": 64, "WIDTH": 96, "FRAMES": 9, "STEPS": 2, "NUM_AGENTS": 8},
        ["lighthouse.mp4"],
    ),
    "train_sit": (None, None, {"SIZE": 16, "STEPS": 20, "BATCH_SIZE": 4}, ["left.png", "sit/model_index.json"]),
}


def with_constants(source, values):
    """The script with other values for its constants, each of which it must have."""
    for name, value in values.items():
        pattern = rf"^((?:[A-Z_0-9]+, )*{name}(?:, [A-Z_0-9]+)*) = (.+)$"
        (line,) = re.findall(pattern, source, flags=re.MULTILINE)
        names, old = line[0].split(", "), line[1].split(", ")
        new = [str(value) if one == name else was for one, was in zip(names, old, strict=True)]
        source = source.replace(f"{line[0]} = {line[1]}", f"{line[0]} = {', '.join(new)}")
    return source


@pytest.mark.parametrize("name", sorted(CASES))
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    pipeline, build, constants, files = CASES[name]
    if name.startswith("sd"):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if pipeline is not None:
        tiny = build()
        tiny.set_progress_bar_config(disable=True)
        monkeypatch.setattr(getattr(diffusers, pipeline), "from_pretrained", lambda *args, **kwargs: tiny)
    if name == "wan_video":  # writes files by a package that is not needed otherwise
        monkeypatch.setattr(diffusers.utils, "export_to_video", lambda frames, path, fps: Path(path).touch())
    source = with_constants((EXAMPLES / f"{name}.py").read_text(), constants)
    exec(compile(source, name, "exec"), {"__name__": "__main__"})
    assert all((tmp_path / file).exists() for file in files)
    printed = capsys.readouterr().out
    assert ("loss" if name == "train_sit" else "agent") in printed


def test_every_example_has_a_case():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CASES)
