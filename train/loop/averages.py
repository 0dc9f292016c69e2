"""Averages of the weights over a run whose width is chosen afterwards, see `train.export --weights std:X`.

A run with `--ema-stds 0.05 0.1` keeps two averages with power-function profiles and saves them at every checkpoint. Any
other width, up to any saved step, is a combination of what was saved (section 3.2 and appendix C of arXiv 2312.02696).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NAME = re.compile(r"step-(\d{8})-std-([0-9.]+)\.safetensors")


class Profile(NamedTuple):
    """The average up to `step` with weight (γ + 1) · t^γ / step^(γ + 1) for the weights of step t.

    Attributes:
        step: optimiser steps done.
        gamma: γ.
    """

    step: int
    gamma: float


class PowerAverage:
    """A running average with a power-function profile.

    Args:
        parameters: the weights, as they are before the first step.
        std: relative width of the profile: its standard deviation over the length of the run.
    """

    def __init__(self, parameters: Iterable[Tensor], std: float) -> None:
        self.std, self.gamma = std, gamma_of(std)
        self.shadow = [parameter.detach().clone().float() for parameter in parameters]

    def update(self, parameters: Iterable[Tensor], step: int) -> None:
        """Take in the weights after `step` optimiser steps, 1 for the first; the profile forgets what was before."""
        import torch

        rate = 1.0 - (1.0 - 1.0 / step) ** (self.gamma + 1)
        torch._foreach_lerp_(self.shadow, [parameter.detach().float() for parameter in parameters], rate)


def gamma_of(std: float) -> float:
    """The exponent of a power-function profile of relative width `std` (eq. 126 of arXiv 2312.02696).

    Raises:
        ValueError: for a width that no such profile has.
    """
    import numpy as np

    if not 0 < std < 12**-0.5:
        raise ValueError(f"the relative width of an average must be between 0 and 0.288, got {std}")
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return float(roots.real.max())


def combination(kept: Sequence[Profile], wanted: Profile) -> list[float]:
    """How much of each kept average makes up the wanted one, by least squares between the profiles.

    Raises:
        ValueError: if nothing is kept, or the wanted one ends after all that is.
    """
    import numpy as np

    if not kept or wanted.step > max(profile.step for profile in kept):
        last = max((profile.step for profile in kept), default=0)
        raise ValueError(f"averages are kept up to step {last}, so none up to step {wanted.step} can be made")
    products = np.array([[_product(a, b) for b in kept] for a in kept])
    return np.linalg.lstsq(products, np.array([_product(a, wanted) for a in kept]), rcond=None)[0].tolist()


def _product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles, with t/step written as ratios so that no power overflows."""
    short, long = (a, b) if a.step <= b.step else (b, a)
    scale = (a.gamma + 1) * (b.gamma + 1) / ((a.gamma + b.gamma + 1) * long.step)
    return scale * (short.step / long.step) ** long.gamma


def snapshot_path(run: Path, step: int, std: float) -> Path:
    """Where a run keeps an average."""
    return run / "averages" / f"step-{step:08d}-std-{std:g}.safetensors"


def snapshots(run: Path) -> dict[Path, Profile]:
    """The averages that a run kept."""
    found = {}
    for path in sorted((run / "averages").glob("*.safetensors")):
        match = _NAME.fullmatch(path.name)
        if match:
            found[path] = Profile(int(match[1]), gamma_of(float(match[2])))
    return found


def reconstruct(run: Path, std: float, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """The weights of the average of relative width `std` up to `step`, by default the last one kept; and that step.

    Raises:
        ValueError: if the run kept no averages, or a file of them is damaged.
    """
    from safetensors.torch import load_file

    kept = snapshots(run)
    if not kept:
        raise ValueError(f"{run} kept no averages; train with --ema-stds 0.05 0.1")
    wanted = Profile(step or max(profile.step for profile in kept.values()), gamma_of(std))
    shares = combination(list(kept.values()), wanted)
    total: dict[str, torch.Tensor] = {}
    for path, share in zip(kept, shares, strict=True):
        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors raises its own class
            raise ValueError(f"{path} is damaged: {error}") from error
        for name, tensor in tensors.items():
            part = share * tensor.double()
            total[name] = total[name] + part if name in total else part
    return wanted.step, {name: tensor.float() for name, tensor in total.items()}
