"""Every file that attngen and its programs read: how to make a good one, and how it is read."""

from __future__ import annotations

import functools
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

import attngen
from attngen import AgentAttention, LearnedMediators, Plan, SiTTransformer2DModel, Stage, TokenMerging
from attngen.calibration.notes import Notes
from attngen.learned.file import LearnedLayers
from attngen.sit.pipeline import SiTPipeline
from attngen.sit.scheduler import InterpolantScheduler
from tests.builders.hosts import fresh, normal, randomised
from train.loop.checkpoint import load_checkpoint, save_checkpoint

SIT = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 8,
    "num_classes": 2,
    "learn_sigma": False,
}


@functools.cache
def _model() -> SiTTransformer2DModel:
    with torch.random.fork_rng():
        return randomised(SiTTransformer2DModel(**SIT))  # type: ignore[return-value]


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Attributes:
        name: of the file or folder, made in an empty folder.
        write: makes a good one at a path.
        read: reads it; raises ValueError or OSError for what it cannot use, naming the path.
        part: the file within a folder that is damaged; the path itself if empty.
    """

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    part: str = ""

    def file(self, path: Path) -> Path:
        return path / self.part if self.part else path


def _write_plan(path: Path) -> None:
    stages = (Stage(1.0, {"*": TokenMerging(0.5)}), Stage(0.5, {"a.*": AgentAttention(num_agents=4)}))
    Plan(stages, min_tokens=4).save(path)


def _write_measured(path: Path) -> None:
    notes = Notes(path, {"seed": 0})
    notes.exact, notes.runs = (3.5, 0.25), 2
    notes.recorded.tokens, notes.recorded.times = {"a": 16}, {"a": {-1: 0.5, 3: 0.25}}
    notes.errors = {Plan.of(AgentAttention(num_agents=4)): 0.125}
    notes.keep()


def _write_learned(path: Path) -> None:
    LearnedLayers.create(fresh("dit"), LearnedMediators(4)).save(path)


def _write_picture(path: Path) -> None:
    from pipelines.images import save_png

    save_png(Image.new("RGB", (8, 8), "red"), path, {"prompt": "a cat", "seed": 3, "size": "8x8", "steps": 2})


def _read_picture(path: Path) -> Any:
    from pipelines.images import read_settings

    return read_settings(path)


def _write_run(path: Path) -> None:
    save_checkpoint(path, 7, {"model": {"weight": normal(4, 4)}, "ema": {"weight": normal(4, 4)}}, {"seed": 1}, keep=1)


def _read_run(path: Path) -> Any:
    return load_checkpoint(path / "step-00000007")


def _write_pipeline(path: Path) -> None:
    pipe = SiTPipeline(_model(), InterpolantScheduler(), id2label={0: "a", 1: "b"})
    pipe.save_pretrained(path)


def _read_pipeline(path: Path) -> Any:
    """As the programs read a folder."""
    from pipelines import class2image, cli
    from pipelines.engine.models import ModelStore

    try:
        return ModelStore("cpu", dtype="float32").get(class2image.find_model(str(path))).pipe
    except cli.UserError as error:
        raise ValueError(str(error)) from error


def _official() -> dict[str, torch.Tensor]:
    """A checkpoint in the layout of the published code."""
    generator = torch.Generator().manual_seed(0)
    width, tokens = 8, 16
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, 3, 2, 2),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (3, width),
        "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.0.attn.qkv.bias": (3 * width,),
        "blocks.0.attn.proj.weight": (width, width),
        "blocks.0.attn.proj.bias": (width,),
        "blocks.0.mlp.fc1.weight": (4 * width, width),
        "blocks.0.mlp.fc1.bias": (4 * width,),
        "blocks.0.mlp.fc2.weight": (width, 4 * width),
        "blocks.0.mlp.fc2.bias": (width,),
        "blocks.0.adaLN_modulation.1.weight": (6 * width, width),
        "blocks.0.adaLN_modulation.1.bias": (6 * width,),
        "final_layer.linear.weight": (12, width),
        "final_layer.linear.bias": (12,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _read_official(path: Path) -> Any:
    return SiTTransformer2DModel.from_original(path, num_attention_heads=1, allow_pickle=path.suffix == ".pt")


def _write_emoji(path: Path) -> None:
    """A data file of four pictures."""
    from train.emoji import dataset as emoji

    entry = {"name": "a face", "group": "g", "subgroup": "s", "codepoints": [1], "base": [1]}
    index = {"format": emoji.FORMAT, "version": emoji.VERSION, "size": 8, "columns": 2, "emoji": [entry] * 4}
    atlas = io.BytesIO()
    Image.new("RGB", (16, 16), "green").save(atlas, "WEBP", lossless=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("emoji.json", json.dumps(index))
        archive.writestr("atlas.webp", atlas.getvalue())


def _read_emoji(path: Path) -> Any:
    from train.emoji.dataset import read_data_file

    return read_data_file(path)


def _write_statistics(path: Path) -> None:
    from train.emoji.features import default_extractor
    from train.metrics.frechet import Statistics, save_statistics

    extractor = default_extractor()
    features = normal(9, 4).double()
    save_statistics(
        path, Statistics(features.mean(0), features.T.cov(), 9, extractor.label, extractor.sha256, features)
    )


def _read_statistics(path: Path) -> Any:
    from train.metrics.frechet import load_statistics

    return load_statistics(path)


def _write_shard(path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "blue").save(picture, "PNG")
    with tarfile.open(path, "w") as archive:
        for key in ("a", "b"):
            for name, content in ((f"{key}.png", picture.getvalue()), (f"{key}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _read_shard(path: Path) -> Any:
    """As training reads a data set: its index, and every picture."""
    from train.data.tar import TarSource

    return TarSource(str(path))


READERS = {
    "plan": Reader("plan.json", _write_plan, Plan.load),
    "measured": Reader("measured.json", _write_measured, lambda path: Notes(path, {"seed": 0})),
    "learned": Reader("layers.safetensors", _write_learned, lambda path: attngen.apply(fresh("dit"), path)),
    "picture": Reader("picture.png", _write_picture, _read_picture),
    "run-weights": Reader("run", _write_run, _read_run, "step-00000007/model.safetensors"),
    "run-state": Reader("run", _write_run, _read_run, "step-00000007/state.json"),
    "pipeline-index": Reader("pipe", _write_pipeline, _read_pipeline, "model_index.json"),
    "pipeline-config": Reader("pipe", _write_pipeline, _read_pipeline, "transformer/config.json"),
    "pipeline-weights": Reader(
        "pipe", _write_pipeline, _read_pipeline, "transformer/diffusion_pytorch_model.safetensors"
    ),
    "official": Reader("official.safetensors", lambda path: save_file(_official(), path), _read_official),
    "official-pickle": Reader("official.pt", lambda path: torch.save({"ema": _official()}, path), _read_official),
    "emoji": Reader("emoji.zip", _write_emoji, _read_emoji),
    "statistics": Reader("statistics.safetensors", _write_statistics, _read_statistics),
    "shard": Reader("shard.tar", _write_shard, _read_shard),
}
