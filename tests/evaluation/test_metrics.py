"""The metrics against scikit-learn, brute force and closed forms."""

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.evaluation import metrics

TOLERANCE = 1e-12


@st.composite
def labels_and_probabilities(draw):
    """Both classes, with as many ties as few distinct values make."""
    rows = draw(st.integers(2, 300))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = generator.integers(0, 2, rows)
    labels[:2] = 0, 1
    distinct = draw(st.sampled_from([1, 2, 5, 50, 10**9]))
    probabilities = generator.integers(0, distinct + 1, rows) / distinct
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return labels, probabilities.astype(dtype)


def brute_force_auc(labels, scores):
    wins = 0.0
    pairs = 0
    for positive in scores[labels == 1]:
        for negative in scores[labels == 0]:
            pairs += 1
            wins += 1.0 if positive > negative else 0.5 if positive == negative else 0.0
    return wins / pairs


@settings(max_examples=100, deadline=None)
@given(labels_and_probabilities())
def test_metrics_agree_with_scikit_learn_on_data_with_ties(data):
    labels, probabilities = data
    wide = probabilities.astype(np.float64)
    assert metrics.auc(labels, probabilities) == pytest.approx(
        sklearn.metrics.roc_auc_score(labels, probabilities), abs=TOLERANCE
    )
    expected = sklearn.metrics.log_loss(labels, wide)
    assert metrics.log_loss(labels, probabilities) == pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE)
    constant = sklearn.metrics.log_loss(labels, np.full(len(labels), labels.mean()))
    assert metrics.normalised_entropy(labels, probabilities) == pytest.approx(expected / constant, rel=1e-11)
    assert metrics.calibration(labels, probabilities) == pytest.approx(wide.sum() / labels.sum(), rel=TOLERANCE)


@settings(max_examples=50, deadline=None)
@given(labels_and_probabilities())
def test_auc_is_the_exact_share_of_ordered_pairs(data):
    labels, scores = data
    labels, scores = labels[:60], scores[:60]
    assert metrics.auc(labels, scores) == brute_force_auc(labels, scores)


@pytest.mark.parametrize("positives", [10, 9_990])
def test_auc_is_the_same_whichever_class_is_searched(positives):
    generator = np.random.default_rng(0)
    labels = np.arange(10_000) < positives
    scores = np.round(generator.normal(size=10_000) + labels, 1)
    assert metrics.auc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=TOLERANCE)


def test_auc_keeps_float64_scores_apart_that_float32_would_merge():
    scores = np.array([0.5, 0.5 + 1e-12])
    assert metrics.auc([0, 1], scores) == 1.0
    assert metrics.auc([0, 1], scores.astype(np.float32)) == 0.5


def test_auc_ranks_logits_as_it_ranks_their_probabilities():
    generator = np.random.default_rng(1)
    logits = generator.normal(size=1000)
    labels = generator.random(1000) < 0.3
    assert metrics.auc(labels, logits) == metrics.auc(labels, metrics.sigmoid(logits))


def test_labels_may_be_bool_integer_or_float():
    scores = [0.1, 0.9, 0.4]
    for dtype in (bool, np.int8, np.int64, np.float32, np.float64):
        assert metrics.auc(np.array([0, 1, 1], dtype), scores) == 1.0


def test_log_loss_of_logits_agrees_with_that_of_probabilities_and_stays_finite_beyond_them():
    generator = np.random.default_rng(2)
    labels = generator.random(200_000) < 0.3
    logits = generator.normal(size=200_000) * 3
    by_hand = np.mean(np.logaddexp(0, np.where(labels, -logits, logits)))
    assert metrics.log_loss_from_logits(labels, logits) == pytest.approx(by_hand, rel=TOLERANCE)
    assert metrics.log_loss(labels, metrics.sigmoid(logits)) == pytest.approx(by_hand, rel=TOLERANCE)
    assert metrics.log_loss_from_logits([1, 0], [-1000.0, 1000.0]) == 1000.0
    assert metrics.log_loss_from_logits([1, 0], [1000.0, -1000.0]) == 0.0


def test_sigmoid_is_the_logistic_function_without_overflow():
    logits = np.array([-1000.0, -30.0, -1.0, 0.0, 1.0, 30.0, 1000.0])
    expected = [0.0, math.exp(-30) / (1 + math.exp(-30)), 1 / (1 + math.e), 0.5, math.e / (1 + math.e)]
    with np.errstate(all="raise", under="ignore"):
        result = metrics.sigmoid(logits)
    np.testing.assert_allclose(result[:5], expected, rtol=1e-15)
    assert result[6] == 1.0


def test_a_wrong_certainty_costs_36_nats_as_in_scikit_learn():
    labels, probabilities = np.array([0, 1, 1, 0]), np.array([1.0, 0.0, 1.0, 0.0])
    expected = sklearn.metrics.log_loss(labels, probabilities)
    assert metrics.log_loss(labels, probabilities) == pytest.approx(expected, rel=TOLERANCE)
    assert metrics.log_loss([0], [1.0]) == pytest.approx(-math.log(np.finfo(np.float64).eps))


def test_normalised_entropy_of_the_constant_click_rate_is_one():
    labels = np.arange(1000) < 37
    assert metrics.normalised_entropy(labels, np.full(1000, 0.037)) == pytest.approx(1.0, rel=TOLERANCE)


def test_calibration_is_promised_over_observed_clicks():
    assert metrics.calibration([1, 0, 0, 1], [0.9, 0.6, 0.5, 0.2]) == pytest.approx(2.2 / 2)


def test_relative_improvement_reproduces_the_published_table_of_din():
    # DIN, Amazon Electronics: BaseModel 0.8624, DIN 0.8818, RelaImpr 5.35%; logistic regression 0.7742, -24.34%.
    assert metrics.relative_improvement(0.8818, 0.8624) == pytest.approx(5.35, abs=0.005)
    assert metrics.relative_improvement(0.7742, 0.8624) == pytest.approx(-24.34, abs=0.005)
    assert metrics.relative_improvement(0.75, 0.75) == 0.0


@pytest.mark.parametrize("baseline", [0.5, 0.4, math.nan, 1.1])
def test_relative_improvement_refuses_a_baseline_no_better_than_chance(baseline):
    with pytest.raises(ValueError, match=r"baseline in \(0.5, 1\] are required"):
        metrics.relative_improvement(0.7, baseline)


ALL = [metrics.auc, metrics.log_loss, metrics.log_loss_from_logits, metrics.normalised_entropy, metrics.calibration]
ALL += [metrics.expected_calibration_error, metrics.reliability_table]


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1, 1], [0.1, math.nan, 0.3], r"must be finite, got nan in row 1 \(1 of 3 rows"),
        ([0, 1, 1], [0.1, 0.2, math.inf], r"must be finite, got inf in row 2"),
        ([0, 2, 1], [0.1, 0.2, 0.3], r"must be 0 or 1, got 2 in row 1 \(1 of 3 rows"),
        ([0.0, math.nan, 1.0], [0.1, 0.2, 0.3], r"must be 0 or 1, got nan in row 1"),
        ([0, 1], [0.1, 0.2, 0.3], r"got 3 scores and 2 labels"),
        ([], [], r"at least one row"),
        ([[0, 1]], [[0.1, 0.2]], r"one-dimensional array is required, got shape \(1, 2\)"),
        (["0", "1"], [0.1, 0.2], r"numbers are required, got dtype"),
    ],
)
def test_bad_input_is_an_error_that_says_where(metric, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metric(labels, scores)


@pytest.mark.parametrize("metric", [metrics.auc, metrics.normalised_entropy])
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_an_error_where_the_metric_does_not_exist(metric, label):
    with pytest.raises(ValueError, match=r"labels of both classes are required"):
        metric([label, label], [0.1, 0.2])


def test_log_loss_and_calibration_of_clicks_only_exist():
    assert metrics.log_loss([1, 1], [0.5, 0.5]) == pytest.approx(math.log(2))
    assert metrics.calibration([1, 1], [0.5, 0.25]) == 0.375
    with pytest.raises(ValueError, match="a row with label 1 is required"):
        metrics.calibration([0, 0], [0.5, 0.5])


@pytest.mark.parametrize(
    "metric",
    [metrics.log_loss, metrics.normalised_entropy, metrics.calibration, metrics.expected_calibration_error],
)
def test_logits_given_as_probabilities_are_an_error(metric):
    with pytest.raises(ValueError, match=r"a probability in \[0, 1\] is required, got -1.5 in row 1"):
        metric([1, 0], [0.5, -1.5])
