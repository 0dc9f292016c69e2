"""Which method in which layer and stage: the cheapest total under an error, or the smallest error under a cost.

Errors of different layers and stages are taken as independent, so their squares add up, as costs do.
That makes a multiple-choice knapsack. Its solutions along the lower convex hull of each place's choices are exact:
nothing cheaper has as small an error. Between two of them single places are changed as long as it pays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BORDER = 16
"""Solutions nearest to the bound from which single changes are tried."""


class Choice(NamedTuple):
    """One way to compute a layer in a stage.

    Attributes:
        cost: seconds or operations.
        square: square of the error it adds to the result.
    """

    cost: float
    square: float


Place = Any
"""A hashable name of a place."""
Picks = dict[Place, int]
"""The index of the choice taken at each place."""


class Step(NamedTuple):
    """From one choice of a place to the next cheaper one on its hull."""

    rate: float
    place: Place
    pick: int


def hull(choices: Sequence[Choice]) -> list[int]:
    """Indices of the choices on the lower convex hull of error over cost, from the most exact to the cheapest.

    Among equals the first in order is taken, so the result is deterministic.
    """
    order = sorted(range(len(choices)), key=lambda i: (choices[i].square, choices[i].cost, i))
    kept: list[int] = []
    for i in order:
        if kept and choices[i].cost >= choices[kept[-1]].cost:
            continue
        while len(kept) > 1 and _rate(choices[kept[-2]], choices[kept[-1]]) <= _rate(choices[kept[-2]], choices[i]):
            kept.pop()
        kept.append(i)
    return kept


def _rate(exact: Choice, cheap: Choice) -> float:
    """Cost saved by unit of squared error."""
    added = cheap.square - exact.square
    return (exact.cost - cheap.cost) / added if added > 0 else float("inf")


class Chooser:
    """The choices of all places.

    Args:
        places: choices by place; each has at least one.
    """

    def __init__(self, places: Mapping[Place, Sequence[Choice]]) -> None:
        self.places = {place: list(choices) for place, choices in places.items()}
        hulls = {place: hull(choices) for place, choices in self.places.items()}
        self.start: Picks = {place: indices[0] for place, indices in hulls.items()}
        steps = [
            Step(_rate(self.places[place][before], self.places[place][after]), place, after)
            for place, indices in hulls.items()
            for before, after in zip(indices, indices[1:], strict=False)
        ]
        # Stable: equal rates keep the order of the places, and a place's own rates fall along its hull.
        self.steps = sorted(steps, key=lambda step: -step.rate)

    def cost(self, picks: Picks) -> float:
        return sum(self.places[place][i].cost for place, i in picks.items())

    def square(self, picks: Picks) -> float:
        return sum(self.places[place][i].square for place, i in picks.items())

    def path(self) -> list[Picks]:
        """Picks from the most exact to the cheapest, each the cheapest of all with at most its error."""
        picks, found = dict(self.start), [dict(self.start)]
        for step in self.steps:
            picks[step.place] = step.pick
            found.append(dict(picks))
        return found

    def cheapest(self, square: float) -> Picks:
        """The lowest cost found with a squared error of at most `square`; the most exact picks where none has."""
        picks = dict(self.start)
        total = self.square(picks)
        for step in self.steps:
            added = self.places[step.place][step.pick].square - self.places[step.place][picks[step.place]].square
            if total + added <= square:
                picks[step.place] = step.pick
                total += added
        within = [found for found in self.path() if self.square(found) <= square]
        return min((self._cheaper(found, square) for found in [picks, *within[-BORDER:]]), key=self.cost)

    def most_exact(self, cost: float) -> Picks | None:
        """The smallest squared error found at a cost of at most `cost`, or None where nothing is so cheap."""
        within = [found for found in self.path() if self.cost(found) <= cost]
        return min((self._more_exact(found, cost) for found in within[:BORDER]), key=self.square, default=None)

    def lowest_cost(self) -> float:
        return sum(min(choice.cost for choice in choices) for choices in self.places.values())

    def _cheaper(self, picks: Picks, square: float) -> Picks:
        """Change single places while that saves cost within the error, the largest saving first."""
        while True:
            left = square - self.square(picks)
            savings = [
                (now.cost - choice.cost, place, i)
                for place, now in ((place, self.places[place][i]) for place, i in picks.items())
                for i, choice in enumerate(self.places[place])
                if choice.cost < now.cost and choice.square - now.square <= left
            ]
            if not savings:
                return picks
            _, place, i = max(savings, key=lambda saving: saving[0])
            picks = {**picks, place: i}

    def _more_exact(self, picks: Picks, cost: float) -> Picks:
        """Change single places while that lowers the error within the cost, the largest gain first."""
        while True:
            left = cost - self.cost(picks)
            gains = [
                (now.square - choice.square, place, i)
                for place, now in ((place, self.places[place][i]) for place, i in picks.items())
                for i, choice in enumerate(self.places[place])
                if choice.square < now.square and choice.cost - now.cost <= left
            ]
            if not gains:
                return picks
            _, place, i = max(gains, key=lambda gain: gain[0])
            picks = {**picks, place: i}


def least_square(choices: Sequence[Choice]) -> int:
    """The most exact choice that has an error at all; 0 where none has."""
    return min((i for i, choice in enumerate(choices) if choice.square > 0), key=lambda i: choices[i].square, default=0)
