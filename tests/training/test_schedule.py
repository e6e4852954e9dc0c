from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recemb.training.schedule import LearningRateSchedule


def test_warm_up_rises_in_equal_steps_to_one():
    schedule = LearningRateSchedule(total_steps=10, warmup_steps=4)
    assert [schedule.factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_falls_in_equal_steps_to_the_final_factor_in_the_last_step():
    schedule = LearningRateSchedule(total_steps=8, decay="linear", decay_start_step=4, final_factor=0.2)
    assert [schedule.factor(step) for step in range(4)] == [1.0] * 4
    assert [schedule.factor(step) for step in range(4, 8)] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_cosine_decay_is_half_way_down_after_half_its_steps():
    schedule = LearningRateSchedule(total_steps=100, decay="cosine", final_factor=0.0)
    assert schedule.factor(49) == pytest.approx(0.5)
    assert schedule.factor(99) == pytest.approx(0.0)
    assert schedule.factor(24) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_decay_waits_for_the_end_of_the_warm_up():
    schedule = LearningRateSchedule(total_steps=10, warmup_steps=5, decay="linear", decay_start_step=2)
    assert schedule.factor(4) == 1.0
    assert schedule.factor(5) == pytest.approx(0.8)


@given(
    total=st.integers(1, 200),
    data=st.data(),
    decay=st.sampled_from(["none", "linear", "cosine"]),
    final=st.floats(0, 1),
)
def test_factor_rises_then_falls_and_stays_between_zero_and_one(total, data, decay, final):
    warmup = data.draw(st.integers(0, total))
    start = data.draw(st.integers(0, total))
    schedule = LearningRateSchedule(total, warmup, decay, start, final)
    factors = [schedule.factor(step) for step in range(total)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"total_steps": 5, "warmup_steps": 6}, r"warmup_steps must be in \[0, 5\].*got 6"),
        ({"total_steps": 5, "decay_start_step": -1}, r"decay_start_step must be in \[0, 5\].*got -1"),
        ({"total_steps": 5, "decay": "exponential"}, "decay must be .*got 'exponential'"),
        ({"total_steps": 5, "final_factor": 1.5}, r"final_factor must be in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningRateSchedule(**arguments)
