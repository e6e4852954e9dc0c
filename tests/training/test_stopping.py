from __future__ import annotations

import pytest

from recemb.training.stopping import EarlyStopping


def feed(stopping: EarlyStopping, values: list[float]) -> list[bool]:
    return [
        stopping.update(step, {"auc": value, "logloss": value})
        for step, value in enumerate(values)
        if not stopping.should_stop
    ]


def test_stops_after_as_many_validations_without_improvement_as_its_patience():
    stopping = EarlyStopping(metric="auc", patience=2)
    assert feed(stopping, [0.7, 0.71, 0.70, 0.705, 0.9]) == [True, True, False, False]
    assert stopping.should_stop
    assert (stopping.best_step, stopping.best_value) == (1, 0.71)


def test_log_loss_improves_downwards():
    stopping = EarlyStopping(metric="logloss", patience=1)
    assert feed(stopping, [0.5, 0.4, 0.45]) == [True, True, False]
    assert stopping.best_step == 1


def test_an_improvement_restarts_the_wait():
    stopping = EarlyStopping(patience=2)
    feed(stopping, [0.7, 0.6, 0.8, 0.6])
    assert not stopping.should_stop


def test_a_gain_of_min_delta_is_not_yet_an_improvement():
    stopping = EarlyStopping(patience=None, min_delta=0.25)
    assert feed(stopping, [0.5, 0.75, 0.8]) == [True, False, True]


def test_without_patience_it_never_stops_and_knows_the_best():
    stopping = EarlyStopping(patience=None)
    feed(stopping, [0.9] + [0.1] * 50)
    assert not stopping.should_stop
    assert stopping.best_step == 0


def test_state_goes_on_where_it_was():
    first = EarlyStopping(patience=3)
    feed(first, [0.7, 0.6, 0.6])
    second = EarlyStopping(patience=3)
    second.load_state_dict(first.state_dict())
    assert not second.update(3, {"auc": 0.65})
    assert second.should_stop
    assert second.best_step == 0


def test_a_metric_that_is_not_finite_or_missing_is_an_error():
    with pytest.raises(ValueError, match="auc after step 7 is nan"):
        EarlyStopping().update(7, {"auc": float("nan")})
    with pytest.raises(ValueError, match="not 'auc'"):
        EarlyStopping().update(7, {"logloss": 0.5})


@pytest.mark.parametrize(
    "arguments", [{"metric": "f1"}, {"patience": 0}, {"min_delta": -1.0}, {"min_delta": float("nan")}]
)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        EarlyStopping(**arguments)
