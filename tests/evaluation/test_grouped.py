"""GAUC against a loop over users with scikit-learn."""

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.evaluation.grouped import grouped_auc
from recemb.evaluation.metrics import gauc


def plain_gauc(labels, scores, users, weighting):
    total = weights = 0.0
    for user in sorted(set(users.tolist())):
        rows = users == user
        if 0 < labels[rows].sum() < rows.sum():
            weight = rows.sum() if weighting == "impressions" else 1
            total += weight * sklearn.metrics.roc_auc_score(labels[rows], scores[rows])
            weights += weight
    return total / weights


@st.composite
def grouped_data(draw):
    rows = draw(st.integers(4, 200))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = generator.integers(0, 2, rows)
    users = generator.integers(-3, draw(st.sampled_from([1, 5, 60])), rows)
    labels[:2], users[:2] = (0, 1), 0
    distinct = draw(st.sampled_from([2, 10, 10**12]))
    scores = generator.integers(-distinct, distinct, rows) / distinct
    return labels, scores.astype(draw(st.sampled_from([np.float32, np.float64]))), users


@settings(max_examples=100, deadline=None)
@given(grouped_data(), st.sampled_from(["impressions", "users"]), st.booleans())
def test_gauc_equals_a_loop_over_users(data, weighting, as_text):
    labels, scores, users = data
    keys = np.array([f"user-{user}" for user in users], dtype=object) if as_text else users
    assert gauc(labels, scores, keys, weighting=weighting) == pytest.approx(
        plain_gauc(labels, scores, users, weighting), abs=1e-12
    )


def test_users_of_one_class_are_left_out_and_counted():
    labels = np.array([1, 0, 1, 1, 0, 0, 0])
    scores = np.array([0.9, 0.1, 0.5, 0.6, 0.2, 0.3, 0.4])
    users = np.array(["a", "a", "b", "b", "c", "c", "c"])
    result = grouped_auc(labels, scores, users)
    assert result.values.tolist() == ["a", "b", "c"]
    assert result.auc[0] == 1.0 and math.isnan(result.auc[1]) and math.isnan(result.auc[2])
    assert (result.num_groups, result.num_left_out, result.rows_left_out) == (3, 2, 5)
    assert result.rows.tolist() == [2, 2, 3] and result.positives.tolist() == [1, 2, 0]


def test_the_two_weightings_differ_as_their_weights_do():
    # User 1: 4 rows, AUC 1. User 2: 2 rows, AUC 0.
    labels, scores, users = [1, 1, 0, 0, 1, 0], [0.9, 0.8, 0.1, 0.2, 0.3, 0.4], [1, 1, 1, 1, 2, 2]
    assert gauc(labels, scores, users) == pytest.approx(4 / 6)
    assert gauc(labels, scores, users, weighting="users") == 0.5


def test_negative_and_positive_zero_tie():
    for dtype in (np.float32, np.float64):
        assert gauc([0, 1], np.array([-0.0, 0.0], dtype), [1, 1]) == 0.5


def test_integer_scores_beyond_float64_are_kept_apart():
    scores = np.array([2**53, 2**53 + 1], dtype=np.int64)
    assert gauc([0, 1], scores, [1, 1]) == 1.0


def test_user_ids_beyond_float64_are_kept_apart():
    users = np.array([2**53, 2**53, 2**53 + 1, 2**53 + 1], dtype=np.int64)
    assert grouped_auc([0, 1, 1, 0], [0.1, 0.2, 0.1, 0.2], users).auc.tolist() == [1.0, 0.0]


def test_a_missing_user_is_an_error_and_a_missing_slice_a_value():
    values = np.array(["a", None, "a", None], dtype=object)
    with pytest.raises(ValueError, match=r"a user in every row is required, missing in row 1 \(2 of 4 rows"):
        grouped_auc([0, 1, 1, 0], [0.1, 0.2, 0.3, 0.4], values)
    result = grouped_auc([0, 1, 1, 0], [0.1, 0.2, 0.3, 0.4], values, missing_is_a_group=True)
    assert result.rows.tolist() == [2, 2] and result.auc.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("labels", "scores", "users", "message"),
    [
        ([0, 1], [0.1, 0.2], [1], r"one value a label is required, got shape \(1,\) and 2 labels"),
        ([0, 1], [0.1, math.nan], [1, 1], "must be finite, got nan in row 1"),
        ([0, 3], [0.1, 0.2], [1, 1], "must be 0 or 1, got 3"),
        ([0, 1], [0.1, 0.2], [1, 2], "all 2 users have one class only"),
    ],
)
def test_bad_input_is_an_error(labels, scores, users, message):
    with pytest.raises(ValueError, match=message):
        gauc(labels, scores, users)


def test_another_weighting_is_an_error():
    with pytest.raises(ValueError, match=r"must be one of \('impressions', 'users'\), got 'clicks'"):
        gauc([0, 1], [0.1, 0.2], [1, 1], weighting="clicks")
