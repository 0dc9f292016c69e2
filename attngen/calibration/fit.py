"""The continuous options of agents and tiles, fitted in closed form to a layer's exact output.

A layer's output is affine in the gain and the shortcut: y = c + gain · P + shortcut · S, where P is the output of the
agents and S the values, both projected, and c the output without either. So the best of both solve a least-squares
problem with two unknowns, of which only six inner products are kept, for any number of tokens and calls. With tiles it
is affine in the gain of each head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass
class Gains:
    """Inner products of the first-order terms P_h of heads with each other and with T = exact output - y without them.

    Attributes:
        terms: <P_h, P_k>, H rows.
        target: <P_h, T>.
        square: <T, T>.
    """

    terms: list[list[float]] = field(default_factory=list[list[float]])
    target: list[float] = field(default_factory=list[float])
    square: float = 0.0

    def add(self, terms: Sequence[Tensor], target: Tensor) -> None:
        """Add one call; all tensors have one shape."""
        rows = torch.stack([x.flatten().double() for x in (*terms, target)])
        products = rows @ rows.T
        if self.terms:
            products[:-1, :-1] += torch.tensor(self.terms, dtype=torch.float64)
            products[:-1, -1] += torch.tensor(self.target, dtype=torch.float64)
        self.terms, self.target = products[:-1, :-1].tolist(), products[:-1, -1].tolist()
        self.square += float(products[-1, -1])

    def fit(self) -> tuple[list[float], float]:
        """The best gains, none below 0, and the squared error that remains."""
        terms, target = (torch.tensor(x, dtype=torch.float64) for x in (self.terms, self.target))
        gains, kept = torch.zeros_like(target), terms.diagonal() > 0
        while kept.any():
            gains = torch.zeros_like(target)
            gains[kept] = torch.linalg.lstsq(terms[kept][:, kept], target[kept, None], driver="gelsd").solution[:, 0]
            if (gains >= 0).all():
                break
            kept &= gains > 0
            gains = gains.clamp_min(0)
        square = self.square - 2 * gains @ target + gains @ terms @ gains
        return gains.tolist(), max(0.0, float(square))
