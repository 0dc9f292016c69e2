"""The configuration of a training run and its checks."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.data.broken import MAX_BROKEN, check_max_broken

if TYPE_CHECKING:
    from attngen.methods.linear import FeatureMapName
    from attngen.sit.attention import AttentionKind
    from attngen.sit.model import ConvolutionKind

# As in `train.recipe.objectives`, which imports torch; a program's --help should not wait for that.
ARCHITECTURES = ("sit", "unet")
OBJECTIVES = ("velocity", "epsilon", "score", "dit")
TIME_SAMPLINGS = ("uniform", "logit-normal")
WEIGHTINGS = ("velocity", "likelihood")
CHOICES: dict[str, tuple[str, ...]] = {
    "architecture": ARCHITECTURES,
    "attention": ("softmax", "mediator", "linear"),
    "feature_map": ("elu", "relu", "focused"),
    "convolution": ("values", "input"),
    "objective": OBJECTIVES,
    "path": ("linear", "gvp", "vp"),
    "weighting": ("", *WEIGHTINGS),
    "time_sampling": TIME_SAMPLINGS,
    "interpolation": ("consistent", "reference"),
    "optimizer": ("adamw", "muon"),
    "mixed_precision": ("no", "bf16", "fp16"),
}
# First field of each group of options in a program's --help.
GROUPS = {
    "data": "data",
    "architecture": "model",
    "num_mediators": "mediators",
    "learn_sigma": "objective",
    "init_from": "warm start",
    "optimizer": "optimiser",
    "mixed_precision": "performance",
    "log_every": "log, samples and checkpoints",
    "fd_every": "evaluation",
}
# Groups of a UNet's group norms.
NORM_GROUPS = 8


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a training run. Saved beside it as JSON.

    Attributes:
        data: "emoji", a folder of class folders, "hf:NAME", tar shards, or latents made by `train.encode`.
        image_size: side of the images, in pixels; for latents, of the images they were encoded from.
        classes: class names to use, in the order of their labels; none: all.
        augment: strength of the emoji's augmentation, 0 to 1.
        flip: mirror images at random.
        balance: 0 draws every image equally often, 1 every class, 0.5 is between (a class by the root of its size).
        max_broken: unreadable images allowed: an integer is a count, a number with a decimal point a fraction.
        workers: threads that read images; their number does not change the batches.
        architecture: "sit" (also DiT's network), or "unet": diffusers' `UNet2DConditionModel`, see `train.recipe.unet`.
        block_channels: channels of a UNet per resolution, from the highest; attention in all but the last.
        patch_size: patch size, in pixels or latent pixels.
        num_layers: depth (blocks); for a UNet, layers per block.
        num_attention_heads: number of heads; a UNet has its channels divided by `attention_head_dim`.
        attention_head_dim: head dimension.
        attention: "softmax", "mediator" or "linear".
        feature_map: feature map of linear attention: "elu", "relu" or "focused".
        num_mediators: number of mediators (size of the bias tables).
        convolution: input of the mediator layers' convolution: "values" as published, or "input", which is faster.
        mediator_counts: numbers of mediators, one drawn at every step (elastic mediators); none: always
            `num_mediators`.
        mediator_starts: noise levels from which each of `mediator_counts` applies (1 is noise and comes first), so a
            step draws its timesteps from one stage; none: counts are drawn whatever the timestep.
        learn_sigma: predict twice the channels, as the published SiT checkpoints do; the objective "dit" always does.
        class_dropout_prob: label dropout probability for classifier-free guidance.
        objective: "velocity", "epsilon" or "score" on an interpolant, or "dit": noise and variance at 1,000 timesteps.
        path: interpolant: "linear", "gvp" or "vp".
        weighting: loss weighting of an interpolant: none, "velocity" or "likelihood".
        time_sampling: distribution of the timesteps: "uniform" or "logit-normal" (SD3, arXiv 2403.03206).
        init_from: checkpoint, pipeline folder or run to initialise the weights from.
        interpolation: how its position biases are resized: "consistent" or "reference".
        optimizer: "adamw", or "muon" (Muon for the blocks' matrices, AdamW for the rest).
        learning_rate: learning rate of AdamW.
        muon_learning_rate: learning rate of Muon.
        weight_decay: weight decay of both optimisers.
        warmup_steps: steps of linear learning rate warm-up.
        cooldown: fraction of the steps, at the end, with linear decay to zero.
        max_grad_norm: clip the gradient norm to this value; 0 disables.
        ema_decay: EMA decay; the averaged weights are sampled and exported.
        ema_stds: relative widths of further, power-function averages, such as 0.05 0.1; see `train.export`.
        batch_size: global batch size, over all processes and gradient accumulation steps.
        accumulate: gradient accumulation steps.
        steps: optimiser steps.
        seed: seed of weights, data order, noise and label dropout.
        mixed_precision: "no", "bf16" or "fp16".
        tf32: TensorFloat-32 for float32 matrix products on GPUs, as in the published recipes.
        compile: compile the network with torch.compile.
        gradient_checkpointing: activation checkpointing.
        log_every: steps between log lines.
        sample_every: steps between sample grids; 0: at the end only.
        save_every: steps between checkpoints; 0: at the end only.
        keep: number of checkpoints kept.
        keep_every: steps between checkpoints that are kept for good, a multiple of `save_every`; 0: none.
        sample_steps: network evaluations per sample (NFE).
        guidance_scale: guidance scale of the samples.
        fd_every: steps between Fréchet distances; 0: at the end only, -1: never.
        fd_pictures: number of images generated for it.
        fd_reference: reference of FID, as for `train.fid`: images or statistics; none: FD-emoji to the training
            images, which must be the emoji.
        fd_weights: file of FID's Inception weights; none: those that torch-fidelity downloads.
    """

    data: str = "emoji"
    image_size: int = 32
    classes: tuple[str, ...] = ()
    augment: float = 0.5
    flip: bool = True
    balance: float = 0.0
    max_broken: int | float = MAX_BROKEN
    workers: int = 2
    architecture: str = "sit"
    block_channels: tuple[int, ...] = ()
    patch_size: int = 4
    num_layers: int = 8
    num_attention_heads: int = 5
    attention_head_dim: int = 32
    attention: AttentionKind = "mediator"
    feature_map: FeatureMapName = "elu"
    num_mediators: int = 16
    convolution: ConvolutionKind = "values"
    mediator_counts: tuple[int, ...] = (4, 9, 16, 25)
    mediator_starts: tuple[float, ...] = ()
    learn_sigma: bool = False
    class_dropout_prob: float = 0.1
    objective: str = "velocity"
    path: str = "linear"
    weighting: str = ""
    time_sampling: str = "logit-normal"
    init_from: str = ""
    interpolation: str = "consistent"
    optimizer: str = "muon"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02
    weight_decay: float = 0.0
    warmup_steps: int = 100
    cooldown: float = 0.3
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    ema_stds: tuple[float, ...] = ()
    batch_size: int = 64
    accumulate: int = 1
    steps: int = 5000
    seed: int = 0
    mixed_precision: str = "no"
    tf32: bool = True
    compile: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 1
    sample_every: int = 1000
    save_every: int = 500
    keep: int = 2
    keep_every: int = 0
    sample_steps: int = 50
    guidance_scale: float = 2.0
    fd_every: int = -1
    fd_pictures: int = 512
    fd_reference: str = ""
    fd_weights: str = ""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_mediators()
        self._check_unet()

    def _check_choices(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; known: {', '.join(k or '(empty)' for k in known)}"
                )
        if self.objective == "dit" and (self.path, self.weighting, self.time_sampling) != ("linear", "", "uniform"):
            raise ValueError(
                "the objective 'dit' has its own path, weighting and times: leave path at 'linear', "
                "weighting empty and time_sampling at 'uniform'"
            )

    def _check_numbers(self) -> None:
        positive = ("batch_size", "accumulate", "steps", "keep", "sample_steps", "num_layers", "num_attention_heads")
        for name in (*positive, "attention_head_dim", "patch_size", "num_mediators", "image_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("sample_every", "save_every", "keep_every", "workers", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.keep_every and (not self.save_every or self.keep_every % self.save_every):
            raise ValueError(
                f"keep_every must be a multiple of save_every, got {self.keep_every} and {self.save_every}"
            )
        for name in ("augment", "balance", "class_dropout_prob", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("learning_rate", "muon_learning_rate", "weight_decay", "max_grad_norm", "guidance_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for std in self.ema_stds:
            if not 0.01 <= std <= 0.28:
                raise ValueError(f"ema_stds must be in [0.01, 0.28], got {std}")
        if len(set(self.ema_stds)) < len(self.ema_stds):
            raise ValueError(f"ema_stds must differ, got {self.ema_stds}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        check_max_broken(self.max_broken)
        if self.data == "emoji" and self.image_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not divide images of {self.image_size} pixels")
        self._check_distance()

    def _check_distance(self) -> None:
        if self.fd_every < -1:
            raise ValueError(
                f"fd_every must be a number of steps, 0 (at the end only) or -1 (never), got {self.fd_every}"
            )
        if self.fd_every >= 0 and self.fd_pictures < 2:
            raise ValueError(f"fd_pictures must be at least 2, got {self.fd_pictures}")
        if self.fd_every >= 0 and self.data not in ("emoji", "") and not self.fd_reference:
            raise ValueError(
                f"the Fréchet distance on {self.data!r} needs an fd_reference: images, or their mu and sigma (.npz); "
                "or set fd_every to -1"
            )
        for name in ("fd_reference", "fd_weights"):
            if getattr(self, name) and self.fd_every < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r} and fd_every -1, so it is not used; set fd_every")

    def _check_mediators(self) -> None:
        for count in self.mediator_counts:
            if count < 1:
                raise ValueError(f"mediator_counts must be at least 1, got {count}")
        if self.mediator_starts:
            if len(self.mediator_starts) != len(self.mediator_counts):
                raise ValueError(
                    f"{len(self.mediator_starts)} mediator_starts need as many mediator_counts, got "
                    f"{len(self.mediator_counts)}"
                )
            falling = all(a > b for a, b in zip(self.mediator_starts, self.mediator_starts[1:], strict=False))
            if self.mediator_starts[0] != 1 or not falling or self.mediator_starts[-1] <= 0:
                raise ValueError(f"mediator_starts must fall from 1 and stay above 0, got {self.mediator_starts}")

    def _check_unet(self) -> None:
        if self.architecture != "unet":
            if self.block_channels:
                raise ValueError(f"block_channels={self.block_channels} are for the architecture 'unet'")
            return
        only = {"attention": "softmax", "objective": "velocity", "path": "linear", "patch_size": 1, "init_from": ""}
        for name, value in only.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} is not for a UNet; leave it at {value!r}")
        if len(self.block_channels) < 2:
            raise ValueError(f"a UNet needs block_channels for two resolutions or more, got {self.block_channels}")
        for channels in self.block_channels:
            if channels < 1 or channels % self.attention_head_dim or channels % NORM_GROUPS:
                raise ValueError(
                    f"block_channels must be multiples of attention_head_dim ({self.attention_head_dim}) and of"
                    f" {NORM_GROUPS}, got {channels}"
                )

    def check_tokens(self, sample_size: int) -> None:
        """What can be checked only with the data open.

        Args:
            sample_size: side of a sample, in pixels or latents.

        Raises:
            ValueError: if patches do not divide it, or there would be more mediators than tokens.
        """
        if sample_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not divide samples of {sample_size} x {sample_size}")
        factor = 2 ** max(0, len(self.block_channels) - 1)
        if sample_size % factor:
            raise ValueError(
                f"{len(self.block_channels)} block_channels halve samples {len(self.block_channels) - 1} times, and"
                f" {sample_size} is not a multiple of {factor}"
            )
        tokens = (sample_size // self.patch_size) ** 2
        for name in ("num_mediators", "mediator_counts") if self.attention == "mediator" else ():
            value = getattr(self, name)
            for count in value if isinstance(value, tuple) else (value,):
                if count > tokens:
                    raise ValueError(f"{name} must be 1 to {tokens} (the tokens), got {count}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def describe_fields() -> dict[str, str]:
    """What each field is, from the docstring of `TrainingConfig`; Python without docstrings (-OO) has none."""
    text = (TrainingConfig.__doc__ or "").partition("Attributes:")[2]
    found = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", text, flags=re.MULTILINE)
    described = {name: " ".join(words.split()).rstrip(".") for name, words in found}
    return {field.name: described.get(field.name, "") for field in dataclasses.fields(TrainingConfig)}
