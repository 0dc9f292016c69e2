"""Agents under rotation: means of rotated queries (core host) are as good as rotated means (layer host of FLUX.1)."""

import math
from statistics import median

import pytest
import torch

from attngen.tokens import nearest_positions, pool_tokens
from tests.hosts.numbers import rotate

SIDE, HEAD = 32, 128
GRID = (SIDE, SIDE)


def tables():
    """FLUX's cosines and sines of a grid: 16 channels of nothing, 56 for rows, 56 for columns."""
    place = torch.arange(SIDE * SIDE).double()
    axes = zip((16, 56, 56), (0 * place, place // SIDE, place % SIDE), strict=True)
    angles = [at[:, None] / 10_000 ** (torch.arange(0, size, 2).double() / size) for size, at in axes]
    angle = torch.cat(angles, 1).repeat_interleave(2, 1)
    return angle.cos(), angle.sin()


def smooth(generator, width):
    """Noise (1, 2, N, D) that is smooth over `width` tokens, with variance 1."""
    noise = torch.randn(1, 2 * HEAD, SIDE, SIDE, dtype=torch.double, generator=generator)
    reach = 4 * width + 1
    bell = torch.exp(-torch.arange(-reach, reach + 1).double().square() / (2 * width**2))
    for kernel in (bell.view(-1, 1), bell.view(1, -1)):
        shape = kernel.expand(2 * HEAD, 1, -1, -1)
        padded = torch.nn.functional.pad(noise, (kernel.shape[1] // 2,) * 2 + (kernel.shape[0] // 2,) * 2, "replicate")
        noise = torch.nn.functional.conv2d(padded, shape, groups=2 * HEAD)
    return (noise / noise.std()).view(1, 2, HEAD, -1).transpose(2, 3)


def attend(query, key, value):
    return (query @ key.mT / math.sqrt(HEAD)).softmax(dim=-1) @ value


@pytest.mark.parametrize(("width", "agents"), [(1, 64), (1, 256), (3, 64), (3, 256)])
def test_means_before_and_after_rotation(width, agents):
    """Queries look for what is like them; errors against exact attention, median of three."""
    cos_sin, size = tables(), (math.isqrt(agents),) * 2
    everywhere, centres = torch.arange(SIDE * SIDE), nearest_positions(GRID, size, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(3):
        query = 1.5 * smooth(generator, width)
        key = query + 0.3 * torch.randn(query.shape, dtype=torch.double, generator=generator)
        value = smooth(generator, width)
        rotated = rotate(query, cos_sin, everywhere)
        key = rotate(key, cos_sin, everywhere)
        exact, errors = attend(rotated, key, value), []
        for pooled in (pool(rotated, size), rotate(pool(query, size), cos_sin, centres)):
            errors.append((attend(rotated, pooled, attend(pooled, key, value)) - exact).norm().item())
        ratios.append(errors[0] / errors[1])
    assert 0.97 < median(ratios) < 1.03


def pool(query, size):
    """Means of cells, (1, 2, M, D)."""
    return pool_tokens(query.flatten(0, 1), GRID, size)[None]
