"""The fit of gain and shortcut."""

from __future__ import annotations

import pytest
import torch

from attngen.calibration.fit import Products

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
