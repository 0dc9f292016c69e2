"""The share of the cases that runs at once."""

import pytest

from tests.cases import share

KINDS = {"one": 1, "two": 2, "three": 3}


def quick(cases):
    return [case for case in cases if not case.marks]


@pytest.mark.parametrize("n", [2, 3])
def test_every_value_has_a_quick_case(n):
    cases = share(n, range(7), KINDS, "abc")
    assert len(cases) == 7 * 3 * 3 and len(quick(cases)) == pytest.approx(len(cases) / n, abs=1)
    for place, values in enumerate((range(7), KINDS.values(), "abc")):
        assert {case.values[place] for case in quick(cases)} == set(values)


def test_names_decide_nothing():
    renamed = share(2, {"uno": 1, "due": 2, "tre": 3}, "abc")
    assert [case.values for case in quick(renamed)] == [case.values for case in quick(share(2, KINDS, "abc"))]
    assert [case.id for case in renamed[:4]] == ["uno-a", "uno-b", "uno-c", "due-a"]


def test_one_list_is_taken_in_turns():
    assert [case.values for case in quick(share(2, [(1, 2), (3, 4), (5, 6)]))] == [((1, 2),), ((5, 6),)]
