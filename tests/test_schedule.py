"""Time to stage, and the schedule that follows the change of the latents."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attngen import ChangeSchedule, Schedule
from attngen.schedule import stage_at
from tests import oracles
from tests.golden_cases import golden_cases


@pytest.mark.parametrize(
    ("time", "value"),
    [(1.0, 4), (0.999, 4), (0.501, 4), (0.5, 16), (0.499, 16), (0.201, 16), (0.2, 64), (0.0, 64), (1.5, 4), (-1, 64)],
)
def test_a_value_holds_from_its_start_down_to_the_next(time, value):
    assert Schedule(starts=(1.0, 0.5, 0.2), values=(4, 16, 64))(time) == value


def test_a_schedule_is_data():
    schedule = Schedule((1, 0.5), ["a", "b"])
    assert schedule == Schedule(starts=(1.0, 0.5), values=("a", "b"))
    assert hash(schedule) == hash(Schedule((1.0, 0.5), ("a", "b")))
    assert Schedule((1.0,), (3,))(0.0) == 3


@given(st.lists(st.floats(0, 0.999), unique=True, max_size=5), st.floats(0, 1))
def test_the_stage_is_the_last_whose_start_is_not_below_the_time(later, time):
    starts = (1.0, *sorted(later, reverse=True))
    index = stage_at(starts, time)
    assert starts[index] >= time and (index + 1 == len(starts) or starts[index + 1] < time)


@pytest.mark.parametrize(
    ("starts", "values"),
    [
        ((), ()),
        ((0.9,), (1,)),
        ((1.0, 1.0), (1, 2)),
        ((1.0, 0.2, 0.5), (1, 2, 3)),
        ((1.0, -0.1), (1, 2)),
        ((1.0, math.nan), (1, 2)),
        ((math.nan,), (1,)),
        ((2.0, 1.0), (1, 2)),
        ((1.0, 0.5), (1,)),
        ((1.0,), (1, 2)),
        (("a",), (1,)),
    ],
)
def test_bad_schedules_are_refused(starts, values):
    with pytest.raises(ValueError):
        Schedule(starts, values)


def test_no_stage_at_nan():
    with pytest.raises(ValueError, match="NaN"):
        Schedule((1.0,), (1,))(math.nan)


# Change


@pytest.mark.parametrize("case", golden_cases("switch_*"), ids=lambda case: case[0])
def test_golden_switch(case):
    _, tensors, arguments = case
    ratios = (arguments["switch_ratio1"], arguments["switch_ratio2"])
    schedule = ChangeSchedule(arguments["first_several_num"], ratios, arguments["distance"])
    levels = []
    for latents in tensors["latents"]:
        levels.append(schedule.level)
        schedule.observe(latents)
    assert levels == tensors["level"].tolist()


def steps(*distances, shape=(2, 3)):
    """Latents whose mean absolute changes are `distances`."""
    return [torch.full(shape, float(total)) for total in torch.tensor([0.0, *distances]).cumsum(0)]


def levels_of(schedule, latents, **kwargs):
    return [schedule.observe(x, **kwargs) for x in latents]


@pytest.mark.parametrize("distance", ["mae", "mse"])
def test_levels_against_the_definition(distance):
    changes = torch.randn(40, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    latents = (changes * torch.linspace(1, 0.3, 40)[:, None, None, None]).cumsum(0)
    schedule = ChangeSchedule(warmup=3, ratios=(0.7, 0.3), distance=distance)
    levels = []
    for x in latents:
        levels.append(schedule.level)
        schedule.observe(x)
    assert levels == oracles.change_switch(latents, 3, (0.7, 0.3), distance)
    assert set(levels) == {0, 1, 2}


def test_levels_rise_and_stay():
    schedule = ChangeSchedule(warmup=2, ratios=(0.8, 0.5), values=(4, 16, 64))
    assert levels_of(schedule, steps(1, 1, 0.9, 0.7, 2, 0.4, 5)) == [0, 0, 0, 0, 1, 1, 2, 2]
    assert schedule.value == 64


def test_both_levels_in_one_step():
    assert levels_of(ChangeSchedule(warmup=1, ratios=(0.8, 0.5)), steps(1, 0.1)) == [0, 0, 2]


def test_the_value_is_the_level_without_values():
    schedule = ChangeSchedule(warmup=1, ratios=(0.8,))
    levels_of(schedule, steps(1, 0.1))
    assert schedule.value == schedule.level == 1


def test_a_new_picture_begins_where_time_runs_back():
    schedule, latents = ChangeSchedule(warmup=1, ratios=(0.8,)), steps(1, 0.1, 0.1)
    times = [0.9, 0.6, 0.3, 0.0]
    first = [schedule.observe(x, t) for x, t in zip(latents, times, strict=True)]
    second = [schedule.observe(x, t) for x, t in zip(latents, times, strict=True)]
    assert first == second == [0, 0, 1, 1]


def test_a_new_picture_begins_with_another_shape():
    schedule = ChangeSchedule(warmup=1, ratios=(0.8,))
    assert levels_of(schedule, steps(1, 0.1)) == [0, 0, 1]
    assert levels_of(schedule, steps(1, 0.1, shape=(4, 3))) == [0, 0, 1]
    schedule.observe(steps(0, shape=(1, 3))[0], 0.4)
    schedule.observe(steps(0, shape=(2, 3))[0], 0.3)
    assert schedule.level == 0
    levels_of(schedule, steps(1, 0.1), time=0.2)
    assert schedule.observe(torch.zeros(2, 3), 0.9) == 0  # back towards noise, also after a change of shape


def test_reset_forgets_everything():
    schedule = ChangeSchedule(warmup=1, ratios=(0.8,))
    assert levels_of(schedule, steps(1, 0.1)) == [0, 0, 1]
    schedule.reset()
    assert schedule.level == 0 and levels_of(schedule, steps(1, 0.1)) == [0, 0, 1]


def test_it_keeps_no_reference_to_the_latents_and_changes_none():
    schedule, x = ChangeSchedule(warmup=1, ratios=(0.5,)), torch.ones(2, 3, requires_grad=True)
    kept = x.detach().clone()
    schedule.observe(x)
    with torch.no_grad():
        x.add_(1)  # in place, as samplers do
    schedule.observe(x)
    assert torch.equal(x, kept + 1)
    assert schedule.observe(x.detach() + 0.25) == 1  # a change of 0.25 after a base of 1


def test_half_precision_does_not_lose_the_distance():
    schedule = ChangeSchedule(warmup=1, ratios=(0.5,), distance="mse")
    big = torch.full((8,), 300.0, dtype=torch.float16)
    assert [schedule.observe(x) for x in (0 * big, big, big - 200)] == [0, 0, 1]  # 300 squared is not a float16


class TestCallback:
    def run(self, schedule, latents):
        """The levels in force at each step of a pipeline."""
        levels = []
        for i, x in enumerate(latents):
            levels.append(schedule.level)
            given = {"latents": x}
            assert schedule(None, i, 999 - i, given) is given and list(given) == ["latents"]
        return levels

    def test_it_observes(self):
        assert self.run(ChangeSchedule(warmup=1, ratios=(0.8,)), steps(1, 0.1, 0.1)) == [0, 0, 0, 1]

    def test_a_second_run_is_like_the_first(self):
        """From its first callback on; before it, a patch or a pipeline that sees the time asks `at`."""
        schedule, latents = ChangeSchedule(warmup=1, ratios=(0.8,)), steps(1, 0.1, 0.1)
        assert self.run(schedule, latents)[1:] == self.run(schedule, latents)[1:]

    def test_time_that_runs_back_begins_a_new_picture(self):
        schedule = ChangeSchedule(warmup=1, ratios=(0.8,))
        for time, latents in zip((1.0, 0.8, 0.6, 0.4), steps(1, 0.1, 0.1), strict=True):
            schedule.at(time)
            schedule.observe(latents)
        assert schedule.level == 1 and schedule.at(0.2) == 1 and schedule.at(1.0) == 0

    def test_a_run_after_a_stopped_one_is_like_the_first(self):
        schedule, latents = ChangeSchedule(warmup=1, ratios=(0.8,)), steps(1, 0.1, 0.1)
        first = self.run(ChangeSchedule(warmup=1, ratios=(0.8,)), latents)
        self.run(schedule, latents[:3])
        assert self.run(schedule, latents)[1:] == first[1:]

    def test_latents_are_asked_for(self):
        with pytest.raises(ValueError, match="latents"):
            ChangeSchedule()(None, 0, 999, {})
        assert tuple(ChangeSchedule.tensor_inputs) == ("latents",)


@pytest.mark.parametrize(
    "arguments",
    [
        {"warmup": 0},
        {"warmup": -1},
        {"warmup": 1.5},
        {"warmup": True},
        {"warmup": None},
        {"ratios": ()},
        {"ratios": (0.0,)},
        {"ratios": (-0.5,)},
        {"ratios": (math.nan,)},
        {"ratios": (math.inf,)},
        {"ratios": ("a",)},
        {"ratios": 0.5},
        {"distance": "cosine"},
        {"distance": None},
        {"values": (1,)},
        {"values": (1, 2, 3, 4)},
    ],
)
def test_bad_arguments_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ChangeSchedule(**arguments)


def test_equal_by_settings_and_copies_are_independent():
    schedule = ChangeSchedule(warmup=1, ratios=[0.8], values=[1, 2])
    assert schedule == ChangeSchedule(warmup=1, ratios=(0.8,), values=(1, 2)) != ChangeSchedule()
    assert schedule != "x" and eval(repr(schedule)) == schedule
    levels_of(schedule, steps(1, 0.1))
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other == schedule and other.level == 1
        other.reset()
        assert schedule.level == 1
