"""Numbers drawn without the global random state, and how near two results must be."""

import re

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0, dtype=torch.float32):
    """Standard normal numbers that leave the global random state alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def max_error(got, want):
    assert got.shape == want.shape, (tuple(got.shape), tuple(want.shape))
    return (got.double() - want.double()).abs().max().item()


def assert_close(got, want, tolerance=1e-5):
    """The greatest error is at most `tolerance`, relative to the greatest wanted magnitude where that is above 1."""
    error = max_error(got, want) / max(1.0, want.double().abs().max().item())
    assert error <= tolerance, f"{error:.2e} > {tolerance:.0e}"


def assert_no_worse(got, plain, oracle):
    """The error is at most twice that of the plain expression in the same dtype, and half a rounding of the result."""
    assert got.dtype == plain.dtype
    floor = torch.finfo(got.dtype).eps / 2 * oracle.abs().max().item()
    error, plain_error = max_error(got, oracle), max_error(plain, oracle)
    assert error <= 2 * plain_error + floor, f"{error:.2e}, but the plain expression has {plain_error:.2e}"


def assert_same_rows(got, want, tolerance=1e-5):
    """Each (N, C) of the batch has the wanted rows, in any order."""
    assert got.shape == want.shape
    for rows, wanted in zip(got.double(), want.double(), strict=True):
        distances = (rows[:, None] - wanted[None]).abs().amax(-1)
        assert distances.amin(1).max() <= tolerance
        assert distances.argmin(1).unique().numel() == wanted.shape[0]


def assert_matching(got, want, num_targets, tolerance=1e-5):
    """Merged tokens agree: the ones left over in their order, the targets in any."""
    assert got.shape == want.shape
    if num_targets < got.shape[1]:
        assert_close(got[:, :-num_targets], want[:, :-num_targets], tolerance)
    assert_same_rows(got[:, -num_targets:], want[:, -num_targets:], tolerance)


def names(*sizes):
    """A pattern for a message with all these sizes in it, in any order."""
    return re.compile("".join(rf"(?=.*\b{size}\b)" for size in sizes), re.DOTALL)
