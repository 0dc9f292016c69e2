"""The fit of gain and shortcut."""

from __future__ import annotations

import pytest
import torch

from attngen.calibration.fit import Gains, Products

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def test_the_fit_is_that_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    calls = [torch.randn(3, 40, generator=generator, dtype=torch.float64).abs() for _ in range(3)]
    products = Products()
    for call in calls:
        products.add(*call)
    through, values, target = torch.cat(calls, 1)
    columns = torch.stack([through, values], 1)
    wanted = torch.linalg.lstsq(columns, target[:, None]).solution.flatten()
    fit = products.fit(with_shortcut=True)
    assert (fit.gain, fit.shortcut) == pytest.approx(wanted.tolist())
    assert fit.square == pytest.approx(float((columns @ wanted - target).square().sum()))
    alone = products.fit(with_shortcut=False)
    assert alone.gain == pytest.approx(float(through @ target / (through @ through))) and alone.shortcut == 0
    assert alone.square >= fit.square
    opposed = Products()
    opposed.add(through, values, -target)
    assert opposed.fit(True) == (0.0, 0.0, opposed.tt)


def test_the_gains_of_heads_are_those_of_least_squares():
    generator = torch.Generator().manual_seed(1)
    calls = [torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(2)]
    for call in calls:
        call[-1] = 0.7 * call[0] + 0.2 * call[1] + 0.05 * call[2] + 0.1 * call[-1]
    gains = Gains()
    for call in calls:
        gains.add(list(call[:-1]), call[-1])
    *terms, target = torch.cat(calls, 1)
    wanted = torch.linalg.lstsq(torch.stack(terms, 1), target[:, None]).solution.flatten()
    found, square = gains.fit()
    assert found == pytest.approx(wanted.tolist()) and min(found) > 0
    assert square == pytest.approx(float((torch.stack(terms, 1) @ wanted - target).square().sum()))


def test_no_gain_is_below_0():
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    gains = Gains()
    gains.add([first, second], 0.5 * first - 0.5 * second)
    (one, none), square = gains.fit()
    target = 0.5 * first - 0.5 * second
    assert none == 0 and one == pytest.approx(float(first @ target / (first @ first)))
    assert square == pytest.approx(float((one * first - target).square().sum()))
    nothing = Gains()
    nothing.add([torch.zeros(3), torch.zeros(3)], torch.ones(3))
    assert nothing.fit() == ([0.0, 0.0], 3.0)
