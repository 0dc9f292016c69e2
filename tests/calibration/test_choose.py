"""The choice of methods: as good as the best of all choices."""

from __future__ import annotations

import itertools

import pytest
import torch

from attngen.calibration.choose import Choice, Chooser, hull

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def random_places(seed, places=4, choices=4):
    numbers = torch.rand(places, choices, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    found = {}
    for i, rows in enumerate(numbers):
        found["layer", i] = [Choice(1.0, 0.0), *(Choice(cost, square) for cost, square in rows)]
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_near_the_best_of_all(seed):
    places = random_places(seed)
    chooser = Chooser(places)
    every = [dict(zip(places, picks, strict=True)) for picks in itertools.product(range(5), repeat=len(places))]
    for bound in (0.1, 0.4, 0.9, 2.0):
        picks = chooser.cheapest(bound)
        best = min(chooser.cost(p) for p in every if chooser.square(p) <= bound)
        assert chooser.square(picks) <= bound and chooser.cost(picks) <= 1.15 * best
    for cost in (1.0, 1.8, 3.0):
        picks = chooser.most_exact(cost)
        possible = [chooser.square(p) for p in every if chooser.cost(p) <= cost]
        assert (picks is None) == (not possible)
        if picks is not None:
            assert chooser.cost(picks) <= cost and chooser.square(picks) <= 1.6 * min(possible)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_cheaper_is_as_exact_as_a_corner_of_the_hull(seed):
    places = random_places(seed)
    chooser = Chooser(places)
    every = [dict(zip(places, picks, strict=True)) for picks in itertools.product(range(5), repeat=len(places))]
    for picks in chooser.path():
        least = min(chooser.cost(p) for p in every if chooser.square(p) <= chooser.square(picks) + 1e-12)
        assert chooser.cost(picks) == pytest.approx(least)
    assert chooser.lowest_cost() == pytest.approx(min(map(chooser.cost, every)))


def test_the_hull():
    assert hull([Choice(4, 0), Choice(3, 3), Choice(2, 2), Choice(1, 6), Choice(5, 1), Choice(2, 2)]) == [0, 2, 3]
    assert hull([Choice(1, 0), Choice(1, 0)]) == [0]
