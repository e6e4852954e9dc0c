"""Calibration error and reliability tables against a plain loop over rows and bins."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.evaluation.metrics import expected_calibration_error, reliability_table


def plain_error(labels, probabilities, edges):
    """ECE over bins [edges[k], edges[k + 1]), the last one closed."""
    error = 0.0
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        last = number == len(edges) - 2
        inside = [i for i, p in enumerate(probabilities) if low <= p and (p < high or (last and p == high))]
        if inside:
            predicted = sum(float(probabilities[i]) for i in inside) / len(inside)
            observed = sum(int(labels[i]) for i in inside) / len(inside)
            error += len(inside) / len(labels) * abs(predicted - observed)
    return error


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 25), st.sampled_from([3, 10, 1000]), st.integers(0, 2**32 - 1))
def test_equal_width_error_equals_a_plain_loop(rows, num_bins, distinct, seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, rows)
    probabilities = generator.integers(0, distinct + 1, rows) / distinct
    edges = [number / num_bins for number in range(num_bins + 1)]
    assert expected_calibration_error(labels, probabilities, num_bins=num_bins) == pytest.approx(
        plain_error(labels, probabilities, edges), abs=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 25), st.sampled_from([1, 3, 1000]), st.integers(0, 2**32 - 1))
def test_equal_mass_error_equals_a_plain_loop(rows, num_bins, distinct, seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, rows)
    probabilities = generator.integers(0, distinct + 1, rows) / distinct
    ordered = sorted(probabilities)
    starts = sorted({ordered[number * rows // num_bins] for number in range(num_bins)})
    expected = plain_error(labels, probabilities, [*starts, 2.0])
    result = expected_calibration_error(labels, probabilities, num_bins=num_bins, binning="mass")
    assert result == pytest.approx(expected, abs=1e-12)


def test_equal_mass_bins_hold_equal_numbers_of_distinct_predictions():
    generator = np.random.default_rng(0)
    probabilities = generator.permutation(np.linspace(0.001, 0.02, 1500))
    table = reliability_table(generator.random(1500) < 0.01, probabilities, num_bins=15, binning="mass")
    assert table.rows.tolist() == [100] * 15


def test_equal_predictions_never_lie_in_two_bins_so_row_order_does_not_matter():
    generator = np.random.default_rng(1)
    labels, probabilities = generator.integers(0, 2, 500), generator.integers(0, 4, 500) / 4
    order = generator.permutation(500)
    first = reliability_table(labels, probabilities, num_bins=10, binning="mass")
    second = reliability_table(labels[order], probabilities[order], num_bins=10, binning="mass")
    assert len(first.rows) <= 4
    assert first.to_dict() == second.to_dict()


def test_a_prediction_on_an_edge_belongs_to_the_bin_above_and_one_to_the_last():
    table = reliability_table([0, 1, 1], [0.3, 0.7, 1.0], num_bins=10)
    assert table.lower.tolist() == [0.3, 0.7, 0.9]
    assert table.rows.tolist() == [1, 1, 1]


def test_perfectly_calibrated_bins_have_no_error_and_the_largest_error_is_named():
    labels = np.array([1, 0, 0, 0, 1, 1, 1, 0])
    probabilities = np.array([0.25] * 4 + [0.75] * 4)
    table = reliability_table(labels, probabilities, num_bins=4)
    assert table.expected_error == 0.0
    worse = reliability_table(labels, np.array([0.25] * 4 + [0.95] * 4), num_bins=4)
    assert worse.expected_error == pytest.approx(0.1)
    assert worse.largest_error == pytest.approx(0.2)


def test_rows_beyond_one_block_are_all_counted():
    generator = np.random.default_rng(2)
    probabilities = generator.random(200_001)
    table = reliability_table(generator.random(200_001) < probabilities, probabilities)
    assert table.rows.sum() == 200_001
    assert table.expected_error < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_bins": 0}, "num_bins: must be at least 1, got 0"), ({"binning": "quantile"}, "binning: must be one of")],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        reliability_table([0, 1], [0.1, 0.2], **options)
