"""The whole result of one set of predictions."""

import json

import numpy as np
import pytest
import sklearn.metrics

from recemb.evaluation import metrics
from recemb.evaluation.evaluator import evaluate, evaluate_predictions
from recemb.evaluation.predictions import Predictions, collect
from tests.evaluation.test_predictions import Sum, batches


def make_predictions(rows=2000, seed=0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(-1, 1, rows).astype(np.float32)
    truth = metrics.sigmoid(logits)
    sites = np.array(["big"] * (rows // 2) + ["small"] * (rows // 4) + [None] * (rows - 3 * rows // 4), dtype=object)
    labels = generator.random(rows) < truth
    columns = {"user": generator.integers(0, 300, rows), "site": sites, "true_probability": truth}
    return Predictions(labels, logits, True, columns)


def test_every_part_agrees_with_its_own_metric():
    predictions = make_predictions()
    labels, probabilities = predictions.labels, predictions.probabilities()
    result = evaluate_predictions(predictions, user_column="user", slice_columns=["site"], baseline_auc=0.6)
    assert result.auc == metrics.auc(labels, probabilities)
    assert result.logloss == pytest.approx(metrics.log_loss(labels, probabilities), rel=1e-12)
    assert result.normalised_entropy == pytest.approx(metrics.normalised_entropy(labels, probabilities), rel=1e-12)
    assert result.calibration == metrics.calibration(labels, probabilities)
    assert result.users is not None and result.optimum is not None
    assert result.users.gauc == metrics.gauc(labels, probabilities, predictions.column("user"))
    assert result.users.gauc_users == metrics.gauc(labels, probabilities, predictions.column("user"), weighting="users")
    assert result.optimum.auc == result.auc
    assert result.relative_improvement == metrics.relative_improvement(result.auc, 0.6)
    assert result.bootstrap is None


def test_slices_agree_with_scikit_learn_on_their_rows():
    predictions = make_predictions()
    part = evaluate_predictions(predictions, slice_columns=["site"]).slices["site"]
    assert [item.value for item in part.slices] == ["big", "small", None]
    sites = predictions.column("site")
    for item in part.slices:
        rows = np.array([site == item.value for site in sites])
        labels, probabilities = predictions.labels[rows], predictions.probabilities()[rows]
        assert item.rows == rows.sum() and item.positives == labels.sum()
        assert item.auc == pytest.approx(sklearn.metrics.roc_auc_score(labels, probabilities), abs=1e-12)
        assert item.logloss == pytest.approx(sklearn.metrics.log_loss(labels, probabilities), rel=1e-12)
        assert item.calibration == pytest.approx(probabilities.sum() / labels.sum(), rel=1e-12)


def test_slices_of_one_class_have_no_auc_and_only_the_largest_are_listed():
    labels = np.array([1, 0, 1, 0, 0, 1])
    predictions = Predictions(labels == 1, np.full(6, 0.5), False, {"s": np.array([1, 1, 1, 2, 2, 3])})
    part = evaluate_predictions(predictions, slice_columns=["s"], max_slices=2).slices["s"]
    assert [(item.value, item.rows, item.auc, item.calibration) for item in part.slices] == [
        (1, 3, 0.5, 0.75),
        (2, 2, None, None),
    ]
    assert (part.num_values, part.num_one_class, part.rows_not_listed) == (3, 2, 1)


def test_the_result_is_plain_json_and_the_table_shows_its_numbers():
    result = evaluate_predictions(
        make_predictions(), user_column="user", slice_columns=["site"], replicates=20, baseline_auc=0.6
    )
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["auc"] == result.auc
    assert content["users"]["num_users"] == 300
    assert content["slices"]["site"]["slices"][2]["value"] is None
    assert content["bootstrap"]["resampled"] == "users"
    assert set(content["bootstrap"]["intervals"]) >= {"auc", "logloss", "gauc", "gauc_users"}
    low, high = (content["bootstrap"]["intervals"]["auc"][end] for end in ("low", "high"))
    assert low < result.auc < high
    table = result.table()
    for shown in (f"{result.auc:.6f}", f"{result.logloss:.6f}", "users left out", "optimum auc", "RelaImpr"):
        assert shown in table


def test_probabilities_of_zero_and_one_that_are_wrong_are_counted():
    predictions = Predictions(np.array([True, True, False, False]), np.array([0.0, 1.0, 1.0, 0.0]), False)
    result = evaluate_predictions(predictions)
    assert result.rows_certain_and_wrong == 2
    assert result.logloss == pytest.approx(36.04 / 2, abs=0.01)


def test_without_a_user_of_both_classes_gauc_is_undefined_and_everything_else_is_there():
    predictions = make_predictions(400)
    labels = predictions.labels
    # User 2k has what was not clicked, user 2k + 1 what was.
    predictions.columns["user"][:] = 2 * (np.arange(400) % 50) + labels
    result = evaluate_predictions(predictions, user_column="user", replicates=20)
    assert result.users is not None and (result.users.gauc, result.users.gauc_users) == (None, None)
    num_users = len(set(predictions.columns["user"]))
    assert result.users.num_users == result.users.num_users_left_out == num_users
    assert result.users.rows_left_out == 400
    assert result.auc == pytest.approx(sklearn.metrics.roc_auc_score(labels, predictions.scores), abs=1e-12)
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["users"]["gauc"] is None and content["users"]["gauc_users"] is None
    assert set(content["bootstrap"]["intervals"]) == {"auc", "logloss", "normalised_entropy", "calibration"}
    assert content["bootstrap"]["resampled"] == "users"
    lines = [line.split("  ")[0] for line in result.table().splitlines()]
    assert "auc" in lines and "users left out of gauc" in lines and "gauc" not in lines and "gauc users" not in lines


def test_evaluate_runs_a_model_over_a_loader():
    parts = batches([50, 50, 7])
    options = {"user_column": "user", "slice_columns": ["site"], "replicates": 10}
    result = evaluate(Sum(), parts, **options)
    assert result.rows == 107
    assert result.to_dict() == evaluate_predictions(collect(Sum(), parts), **options).to_dict()


def test_bad_input_is_an_error():
    predictions = make_predictions(100)
    with pytest.raises(ValueError, match=r"no column 'nobody' among the predictions"):
        evaluate_predictions(predictions, user_column="nobody")
    with pytest.raises(ValueError, match=r"user column 'site': groups: a user in every row is required"):
        evaluate_predictions(predictions, user_column="site")
    with pytest.raises(ValueError, match="max_slices: must be at least 1"):
        evaluate_predictions(predictions, slice_columns=["site"], max_slices=0)
    with pytest.raises(ValueError, match="labels of both classes are required"):
        evaluate_predictions(Predictions(np.zeros(3, bool), np.zeros(3), True))
