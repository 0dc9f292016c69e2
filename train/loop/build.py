"""What a training run is made of, from its configuration: network, optimisers, weights of the pictures, meter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attngen.sit.model import SiTTransformer2DModel
from train.data.base import Data
from train.loop.meter import Meter, matmul_flops, training_flops
from train.recipe.config import TrainingConfig
from train.recipe.objectives import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.recipe.unet import ClassUNet


def build_model(config: TrainingConfig, data: Data, objective: Objective) -> SiTTransformer2DModel | ClassUNet:
    """The network of a configuration, with weights drawn from its seed and the global RNG left alone."""
    if config.architecture == "unet":
        from train.recipe.unet import build_unet

        return build_unet(config, data)
    needed = objective.model_config
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed seeds GPUs too
        return SiTTransformer2DModel(
            sample_size=data.sample_size,
            patch_size=config.patch_size,
            in_channels=data.channels,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            num_classes=data.num_classes,
            class_dropout_prob=config.class_dropout_prob,
            attention=config.attention,
            num_mediators=config.num_mediators,
            feature_map=config.feature_map,
            convolution=config.convolution,
            **{**needed, "learn_sigma": needed["learn_sigma"] or config.learn_sigma},
        )


def build_optimizers(
    model: SiTTransformer2DModel | ClassUNet, config: TrainingConfig, fused: bool = False
) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices inside the blocks and AdamW for all else."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and ".transformer_blocks." in f".{name}" and config.optimizer == "muon"
        (matrices if is_matrix else rest).append(parameter)
    decay = config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.learning_rate, weight_decay=decay, fused=fused)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=decay))
    return optimizers


def compile_model(model: SiTTransformer2DModel | ClassUNet, config: TrainingConfig) -> None:
    """Have torch.compile compile the network, in place, when it is first called.

    One graph a number of mediators: pooling to a size that is kept symbolic does not compile. torch gives up compiling
    after a few graphs of one function and goes on without a word, so it is told how many there will be.
    """
    import torch._dynamo

    graphs = max(1, len(config.mediator_counts)) + 4  # beside them: with and without gradients, the batch's last part
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, graphs)
    model.compile(dynamic=False)


def class_weights(data: Data, balance: float) -> torch.Tensor:
    """(N,) how often each picture is drawn, by the size of its class."""
    sizes = torch.bincount(data.labels, minlength=data.num_classes).double()
    return sizes[data.labels] ** -balance


def example_inputs(data: Data) -> dict[str, Any]:
    """Arguments of the network for one picture, to count its operations with."""
    shape = (1, data.channels, data.sample_size, data.sample_size)
    return {"hidden_states": torch.empty(shape), "timestep": torch.zeros(1), "class_labels": torch.zeros(1).long()}


def make_meter(
    model: SiTTransformer2DModel | ClassUNet, config: TrainingConfig, data: Data, accelerator: Accelerator
) -> Meter:
    """The meter of a run; measures for a moment what the machine can reach."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision, torch.float32)
    peak = matmul_flops(accelerator.device, dtype) * accelerator.num_processes
    return Meter(config.batch_size, training_flops(model, example_inputs(data)), peak)
