"""Paired quality: closed forms of its metrics, its intervals and tests, and what is said where one is not computed."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.engine import paired as module
from pipelines.engine.paired import CLOSE, ERROR, FAR, LPIPS, PSNR, SAME, SSIM, compare_methods, estimate, paired


def flat(level, size=16):
    return Image.new("RGB", (size, size), (level,) * 3)


def test_equal_images_have_no_difference():
    found = paired([flat(90)] * 3, [flat(90)] * 3, ([torch.ones(4)] * 3, [torch.ones(4)] * 3))
    assert found.estimates[ERROR].mean == 0 and found.estimates[SSIM].mean == pytest.approx(1)
    assert str(found.estimates[PSNR]) == "equal" and found.to_dict()["psnr"]["mean"] is None


def test_metrics_of_flat_images_are_their_closed_forms():
    found = paired([flat(51)], [flat(102)], ([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 3.0])]))
    a, b, c = 0.2, 0.4, 0.01**2
    assert found.estimates[PSNR].mean == pytest.approx(-20 * math.log10(0.2))
    assert found.estimates[SSIM].mean == pytest.approx((2 * a * b + c) / (a**2 + b**2 + c))
    assert found.estimates[ERROR].mean == pytest.approx(1 / 5)


def test_each_image_is_compared_with_its_own_pair():
    values = paired([flat(0), flat(100)], [flat(0), flat(151)]).estimates[PSNR].values
    assert values[0] == math.inf and values[1] == pytest.approx(-20 * math.log10(51 / 255))


def test_interval_holds_the_mean_of_many_samples_and_is_always_the_same():
    sample = np.random.default_rng(1).exponential(size=60).tolist()
    found = estimate(sample)
    assert found.low < found.mean < found.high and found == estimate(sample)
    width = 2 * 1.96 * np.std(sample, ddof=1) / math.sqrt(60)
    assert 0.7 * width < found.high - found.low < 1.4 * width


def test_equal_images_are_no_part_of_a_mean():
    found = estimate([math.inf, 20.0, 30.0])
    assert found.mean == 25 and found.to_dict()["values"] == [None, 20.0, 30.0]


def test_paired_t_test_is_that_of_the_differences():
    one, other = estimate([1.0, 2.0, 4.0, 7.0]), estimate([0.0, 2.5, 3.0, 5.0])
    differences = np.array([1.0, -0.5, 1.0, 2.0])
    found = compare_methods(one, other)
    assert found.mean == pytest.approx(differences.mean())
    assert found.t == pytest.approx(differences.mean() / (differences.std(ddof=1) / 2))
    # Student's distribution with 3 degrees of freedom, in closed form.
    x = abs(found.t) / math.sqrt(3)
    assert found.p == pytest.approx(1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x)))


def test_t_test_of_one_pair_is_none_and_of_a_constant_shift_certain():
    assert compare_methods(estimate([1.0]), estimate([2.0])) is None
    shifted = compare_methods(estimate([2.0, 3.0]), estimate([1.0, 2.0]))
    assert (shifted.mean, shifted.p) == (1.0, 0.0)
    assert compare_methods(estimate([2.0, 3.0]), estimate([2.0, 3.0])).p == 1.0


@pytest.mark.parametrize(("distance", "word"), [(0.1, SAME), (0.4, CLOSE), (0.7, FAR)])
def test_verdict_follows_the_mean_lpips(monkeypatch, distance, word):
    monkeypatch.setattr(module, "_lpips", lambda pairs: [distance] * len(pairs))
    assert paired([flat(0)], [flat(9)], lpips=True).verdict == word


def test_lpips_without_weights_has_a_reason_and_ends_nothing(monkeypatch):
    def offline(pairs):
        raise OSError("no network")

    monkeypatch.setattr(module, "_lpips", offline)
    found = paired([flat(0)], [flat(9)], lpips=True)
    assert LPIPS not in found.estimates and "no network" in found.skipped[LPIPS] and found.verdict is None
    assert "not asked for" in paired([flat(0)], [flat(9)]).skipped[LPIPS]


def test_metrics_that_cannot_be_computed_have_a_reason(monkeypatch):
    small = paired([flat(0, 8)], [flat(9, 8)])
    assert "11 pixels a side" in small.skipped[SSIM] and "not kept" in small.skipped[ERROR]
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional.image", None)
    assert "attngen[fid]" in paired([flat(0)], [flat(9)]).skipped[SSIM]


def test_images_without_a_pair_are_refused():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired([flat(0)] * 2, [flat(0)])
