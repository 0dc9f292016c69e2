"""Which cases of a test run at once, where all of them would take minutes."""

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def share(n: int, *lists: Collection[Any]) -> list[Any]:
    """Every combination of the values for `pytest.mark.parametrize`, one in `n` of them quick and the others slow.

    The quick ones are a diagonal: the places of their values in the lists add up to a multiple of `n`. So every value
    of a list is in one of them if another list has at least `n` values, and which ones are quick depends on no name.

    Args:
        n: one in so many is quick.
        lists: the values of one argument each; of a mapping its keys are the ids.
    """
    named = [list(_named(values)) for values in lists]
    cases = []
    for places in itertools.product(*(range(len(values)) for values in named)):
        ids, values = zip(*(named[i][place] for i, place in enumerate(places)), strict=True)
        cases.append(pytest.param(*values, id="-".join(ids), marks=pytest.mark.slow if sum(places) % n else ()))
    return cases


def _named(values: Collection[Any]) -> Iterable[tuple[str, Any]]:
    return values.items() if isinstance(values, Mapping) else ((str(value), value) for value in values)
