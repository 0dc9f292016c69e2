"""Randomness without state: every draw is a function of seed, purpose and step, so a resumed run repeats it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def generator_for(*key: Any) -> torch.Generator:
    """A CPU generator whose stream depends only on `key` (seed, purpose, step, rank …)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_order(seed: int, weights: Tensor, start: int, count: int) -> Tensor:
    """Positions `start` to `start + count` of an endless stream of epochs: (count,) indices of samples.

    The stream is a function of seed and weights alone: it does not depend on batch size, number of processes or what
    was read before. Equal weights make every epoch a permutation; others draw with replacement.

    Args:
        seed: of the stream.
        weights: (N,) how often each sample is wanted, relative to the others.
        start: first position.
        count: number of positions.
    """
    pieces = []
    while count > 0:
        epoch, offset = divmod(start, len(weights))
        order = _epoch(seed, weights, epoch)[offset : offset + count]
        pieces.append(order)
        start, count = start + len(order), count - len(order)
    return torch.cat(pieces)


_recent: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}


def _epoch(seed: int, weights: Tensor, epoch: int) -> Tensor:
    """The order of one epoch; the last ones are remembered, because a million samples take a while to shuffle."""
    key = seed, id(weights), epoch
    if key not in _recent:
        generator, num_samples = generator_for(seed, "order", epoch), len(weights)
        if bool((weights == weights[0]).all()):
            order = torch.randperm(num_samples, generator=generator)
        else:
            order = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
        while len(_recent) > 3:
            _recent.pop(next(iter(_recent)))
        _recent[key] = weights, order  # the weights too, so that no other tensor gets their id
    return _recent[key][1]
