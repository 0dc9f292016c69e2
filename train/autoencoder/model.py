"""The autoencoder of `python -m train.vae`: its network, optimisers, losses and latent statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor, nn

from train.autoencoder.config import VaeConfig

# Weights of the terms of the loss beside L1.
L2_WEIGHT, EDGE_WEIGHT, SCALES_WEIGHT, LATENT_WEIGHT = 4.0, 0.5, 0.5, 1e-3
SCALES = 3
"""Times that the image is halved for the multi-scale term."""


def build_vae(config: VaeConfig) -> AutoencoderDC:
    """The network of a configuration, with weights drawn from its seed and the global RNG left alone."""
    # The first size has no blocks of its own: the image is unshuffled to the second at once.
    channels, layers = (config.channels[0] // 2, *config.channels), (0, *config.layers)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed seeds GPUs too
        vae = AutoencoderDC(
            latent_channels=config.latent_channels,
            attention_head_dim=8,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=layers,
            decoder_layers_per_block=layers,
            encoder_qkv_multiscales=((),) * len(layers),
            decoder_qkv_multiscales=((),) * len(layers),
        )
    return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class KernelMuon(torch.optim.Muon):
    """Muon for the kernels of convolutions, (out, in, h, w), each taken as a matrix (out, h · w · in).

    Args:
        kernels: parameters in torch's channels-last order, in which such a matrix shares their memory.
        lr: learning rate.

    Raises:
        ValueError: if a kernel is in another order.
    """

    def __init__(self, kernels: Iterable[nn.Parameter], lr: float) -> None:
        self.kernels = list(kernels)
        matrices = [nn.Parameter(_matrix(kernel.detach())) for kernel in self.kernels]
        for kernel, matrix in zip(self.kernels, matrices, strict=True):
            if kernel.data_ptr() != matrix.data_ptr():
                raise ValueError(f"a kernel of shape {tuple(kernel.shape)} is not in channels-last order")
        super().__init__(matrices, lr=lr, weight_decay=0.0)

    def step(self, closure: Any = None) -> Any:
        """One step over the gradients of the kernels."""
        for kernel, matrix in zip(self.kernels, self.param_groups[0]["params"], strict=True):
            assert kernel.grad is not None
            matrix.grad = _matrix(kernel.grad)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the kernels and of their matrices."""
        super().zero_grad(set_to_none)
        for kernel in self.kernels:
            kernel.grad = None


def _matrix(kernel: Tensor) -> Tensor:
    """(out, in, h, w) -> (out, h · w · in), a view of a kernel in channels-last order."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def build_optimizers(vae: nn.Module, config: VaeConfig) -> list[torch.optim.Optimizer]:
    """AdamW for biases and norms, Muon for the kernels."""
    kernels = [parameter for parameter in vae.parameters() if parameter.ndim == 4]
    rest = [parameter for parameter in vae.parameters() if parameter.ndim != 4]
    return [
        torch.optim.AdamW(rest, lr=config.learning_rate, weight_decay=0.0),
        KernelMuon(kernels, lr=config.muon_learning_rate),
    ]


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1, L2, L1 of neighbouring pixels' differences (edges), and L1 at a half, a quarter and an eighth of the size.

    Args:
        decoded: (B, 3, H, W), what the autoencoder makes of `images`.
        images: (B, 3, H, W) in [-1, 1].

    Returns:
        A scalar, in float32.
    """
    error = decoded.float() - images.float()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    loss = error.abs().mean() + L2_WEIGHT * error.square().mean() + EDGE_WEIGHT * edges
    for _ in range(SCALES):
        error = F.avg_pool2d(error, 2)
        loss = loss + SCALES_WEIGHT * error.abs().mean()
    return loss


def latent_loss(latents: Tensor) -> Tensor:
    """Holds the latents near zero: half their mean square, weighted. A scalar in float32."""
    return LATENT_WEIGHT * 0.5 * latents.float().square().mean()


@torch.no_grad()
def latent_statistics(vae: Any, images: Tensor, batch_size: int = 32) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the latents of images, over images and places.

    Args:
        vae: an autoencoder whose `encode` returns latents, without randomness.
        images: (N, 3, H, W), uint8.
        batch_size: images encoded together.

    Returns:
        `latents_mean` and `latents_std`, as diffusers' autoencoders have them in their configuration.
    """
    from train.emoji.dataset import to_float

    total = square = torch.zeros((), dtype=torch.float64)
    count = 0
    for part in images.split(batch_size):
        latents = vae.encode(to_float(part), return_dict=False)[0].double()
        total = total + latents.sum(dim=(0, 2, 3))
        square = square + latents.square().sum(dim=(0, 2, 3))
        count += latents.numel() // latents.shape[1]
    mean = total / count
    std = (square / count - mean.square()).clamp(min=1e-12).sqrt()
    return [round(x, 6) for x in mean.tolist()], [round(x, 6) for x in std.tolist()]
