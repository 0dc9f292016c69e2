"""The continuous options of agent attention, fitted in closed form to a layer's exact output.

A layer's output is affine in the gain and the shortcut: y = c + gain · P + shortcut · S, where P is the output of the
agents and S the values, both projected, and c the output without either. So the best of both solve a least-squares
problem with two unknowns, of which only six inner products are kept, for any number of tokens and calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Fit(NamedTuple):
    """Options and the squared error that remains with them.

    Attributes:
        gain: factor of the output of the agents.
        shortcut: share of the values added.
        square: sum of the squared errors.
    """

    gain: float
    shortcut: float
    square: float


@dataclass
class Products:
    """Inner products of P, S and the target T = exact output - c, summed over calls."""

    pp: float = 0.0
    ps: float = 0.0
    ss: float = 0.0
    pt: float = 0.0
    st: float = 0.0
    tt: float = 0.0

    def add(self, through: Tensor, values: Tensor, target: Tensor) -> None:
        """Add one call; all three tensors have one shape."""
        rows = torch.stack([x.flatten().double() for x in (through, values, target)])
        (pp, ps, pt), (_, ss, st), (_, _, tt) = (rows @ rows.T).tolist()
        self.pp, self.ps, self.ss = self.pp + pp, self.ps + ps, self.ss + ss
        self.pt, self.st, self.tt = self.pt + pt, self.st + st, self.tt + tt

    def square(self, gain: float, shortcut: float) -> float:
        """Squared error with these options."""
        bent = gain * gain * self.pp + 2 * gain * shortcut * self.ps + shortcut * shortcut * self.ss
        return max(0.0, self.tt - 2 * (gain * self.pt + shortcut * self.st) + bent)

    def fit(self, with_shortcut: bool) -> Fit:
        """The best gain, and the best shortcut if `with_shortcut`; neither is below 0."""
        gain = max(0.0, self.pt / self.pp) if self.pp > 0 else 0.0
        best = Fit(gain, 0.0, self.square(gain, 0.0))
        determinant = self.pp * self.ss - self.ps * self.ps
        if not with_shortcut or determinant <= 1e-12 * self.pp * self.ss:
            return best
        gain = (self.pt * self.ss - self.st * self.ps) / determinant
        shortcut = (self.st * self.pp - self.pt * self.ps) / determinant
        if gain < 0 or shortcut < 0:
            return best
        return min(best, Fit(gain, shortcut, self.square(gain, shortcut)), key=lambda fit: fit.square)
