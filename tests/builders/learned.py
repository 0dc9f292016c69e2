"""Learned layers with random weights, as if they had been trained."""

import dataclasses

import torch

from attngen import LearnedLayers, LearnedLinear, LearnedMediators

NAMES = ("sd15", "dit", "sit")
METHODS = {
    "mediator": LearnedMediators(4),
    "mediator-input": LearnedMediators(4, convolution="input"),
    "mediator-own": LearnedMediators(4, own_projections=True),
    "mediator-plain": LearnedMediators(4, maps="none"),
    "linear": LearnedLinear(),
    "linear-elu": LearnedLinear("elu", "heads", convolution=False),
    "linear-input": LearnedLinear("elu", "input", reduction=2),
    "linear-own": LearnedLinear("relu", "none", convolution=False, own_projections=True),
}


def learned(model, method, seed=0, spread=0.3):
    """Layers with random numbers in all their weights, as if they had been trained."""
    layers = LearnedLayers.create(model, method)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        layer: {n: t + spread * torch.randn(t.shape, generator=generator) for n, t in weights.items()}
        for layer, weights in layers.tensors.items()
    }
    return dataclasses.replace(layers, tensors=tensors)
