"""Plots are whole PNG files for every shape of data, and their intervals are the known ones."""

import numpy as np
import pytest
import scipy.stats

from recemb.evaluation.evaluator import evaluate_predictions
from recemb.evaluation.plots import auc_standard_error, reliability_plot, slice_plot, wilson_interval
from recemb.evaluation.predictions import Predictions


def make_evaluation(shift, rows=3000):
    generator = np.random.default_rng(0)
    probabilities = 1 / (1 + np.exp(-generator.normal(shift, 1, rows)))
    labels = generator.random(rows) < probabilities
    labels[:2] = True, False
    columns = {
        "site": np.array([f"a site with a rather long name {value}" for value in range(60)])[np.arange(rows) % 60]
    }
    return evaluate_predictions(Predictions(labels, probabilities, False, columns), slice_columns=["site"])


def is_png(path):
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and content.rstrip().endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("shift", [0.0, -5.0, 5.0])
def test_reliability_plot_of_ordinary_rare_and_frequent_clicks(tmp_path, shift):
    reliability_plot(make_evaluation(shift), tmp_path / "plot.png", title="test split")
    assert is_png(tmp_path / "plot.png")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("scores", [[0.5, 0.5], [0.0, 0.0], [0.01, 0.01], [1.0, 1.0], [0.0, 1.0]])
def test_reliability_plot_of_constant_and_certain_predictions(tmp_path, scores):
    evaluation = evaluate_predictions(Predictions(np.array([True, False]), np.array(scores), False))
    reliability_plot(evaluation, tmp_path / "plot.png", title="two rows")
    assert is_png(tmp_path / "plot.png")


def test_slice_plot(tmp_path):
    slice_plot(make_evaluation(-1.0), "site", tmp_path / "plot.png", title="test split")
    assert is_png(tmp_path / "plot.png")


def test_slice_plot_without_a_slice_that_has_both_classes(tmp_path):
    predictions = Predictions(np.array([True, False]), np.array([0.4, 0.5]), False, {"s": np.arange(2)})
    slice_plot(evaluate_predictions(predictions, slice_columns=["s"]), "s", tmp_path / "plot.png", title="two rows")
    assert is_png(tmp_path / "plot.png")


def test_wilson_interval_agrees_with_scipy():
    clicks, rows = np.array([0.0, 3.0, 10.0]), np.array([10, 1000, 10])
    low, high = wilson_interval(clicks, rows)
    for number in range(3):
        expected = scipy.stats.binomtest(int(clicks[number]), int(rows[number])).proportion_ci(0.95, "wilson")
        assert low[number] == pytest.approx(expected.low, abs=1e-12)
        assert high[number] == pytest.approx(expected.high, abs=1e-12)


def test_auc_standard_error_of_chance_is_that_of_the_rank_sum():
    # Var of the Mann-Whitney statistic under chance: (P + N + 1) / (12 P N).
    assert auc_standard_error(0.5, 30, 70) == pytest.approx(np.sqrt(101 / (12 * 30 * 70)), rel=1e-9)
