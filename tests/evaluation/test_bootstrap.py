"""Bootstrap intervals against DeLong's variance, closed forms and a plain resampling."""

import numpy as np
import pytest
import scipy.stats

from recemb.evaluation import bootstrap as module
from recemb.evaluation import metrics
from recemb.evaluation.bootstrap import bootstrap
from recemb.evaluation.grouped import grouped_auc


def draw(seed, rows, distinct=None):
    generator = np.random.default_rng(seed)
    probabilities = 1 / (1 + np.exp(-generator.normal(-1, 1, rows)))
    labels = generator.random(rows) < probabilities
    return labels, np.round(probabilities * distinct) / distinct if distinct else probabilities


def delong_standard_error(labels, scores):
    """DeLong et al. 1988: variance of the placements of either class."""
    positives, negatives = scores[labels], scores[~labels]
    wins = (positives[:, None] > negatives[None]) + 0.5 * (positives[:, None] == negatives[None])
    of_positives, of_negatives = wins.mean(axis=1), wins.mean(axis=0)
    return np.sqrt(of_positives.var(ddof=1) / len(positives) + of_negatives.var(ddof=1) / len(negatives))


@pytest.mark.parametrize("distinct", [None, 20])
def test_standard_errors_agree_with_closed_forms_with_and_without_ties(distinct):
    labels, probabilities = draw(0, 2000, distinct)
    result = bootstrap(labels, probabilities, replicates=1000).intervals
    assert result["auc"].standard_error == pytest.approx(delong_standard_error(labels, probabilities), rel=0.1)
    losses = metrics.row_losses(labels, probabilities)
    assert result["logloss"].standard_error == pytest.approx(losses.std() / np.sqrt(len(labels)), rel=0.1)


def test_intervals_agree_with_a_plain_resampling_of_rows():
    labels, probabilities = draw(1, 500)
    generator = np.random.default_rng(7)
    plain = {"auc": [], "logloss": [], "normalised_entropy": [], "calibration": []}
    functions = [metrics.auc, metrics.log_loss, metrics.normalised_entropy, metrics.calibration]
    for _ in range(1000):
        rows = generator.integers(0, 500, 500)
        for name, function in zip(plain, functions, strict=True):
            plain[name].append(function(labels[rows], probabilities[rows]))
    result = bootstrap(labels, probabilities, replicates=1000)
    for name, values in plain.items():
        low, high = np.quantile(values, [0.025, 0.975])
        spread = np.std(values)
        assert result.intervals[name].low == pytest.approx(low, abs=0.3 * spread), name
        assert result.intervals[name].high == pytest.approx(high, abs=0.3 * spread), name
        assert result.intervals[name].standard_error == pytest.approx(spread, rel=0.1), name
    assert (result.replicates, result.left_out, result.resampled) == (1000, 0, "rows")


def test_95_percent_intervals_cover_the_truth_about_95_percent_of_the_time():
    labels, probabilities = draw(2, 400_000)
    truth = metrics.auc(labels, probabilities)
    covered = 0
    for trial in range(150):
        part = slice(trial * 1000, (trial + 1) * 1000)
        interval = bootstrap(labels[part], probabilities[part], replicates=200, seed=trial).intervals["auc"]
        covered += interval.low <= truth <= interval.high
    # 150 trials at 95%: below 134 or above 149 happens once in a thousand.
    assert 134 <= covered <= 150


def test_users_are_resampled_whole():
    generator = np.random.default_rng(3)
    labels, probabilities = draw(3, 300)
    # Ten copies of every row under one user: ten times the rows, not one bit more information.
    labels, probabilities = np.repeat(labels, 10), np.repeat(probabilities, 10)
    users = np.repeat(np.arange(300), 10)
    by_rows = bootstrap(labels, probabilities, replicates=500)
    flipped = labels.copy()
    flipped[::10] = ~flipped[::10]
    groups = grouped_auc(flipped, probabilities + 1e-6 * generator.random(3000), users)
    by_users = bootstrap(labels, probabilities, users=groups, replicates=500)
    ratio = by_users.intervals["auc"].standard_error / by_rows.intervals["auc"].standard_error
    assert ratio == pytest.approx(np.sqrt(10), rel=0.15)
    assert by_users.resampled == "users"


def test_gauc_interval_agrees_with_a_plain_resampling_of_users():
    generator = np.random.default_rng(4)
    labels, probabilities = draw(4, 3000)
    groups = grouped_auc(labels, probabilities, generator.integers(0, 200, 3000))
    plain = {"gauc": [], "gauc_users": []}
    for _ in range(1000):
        chosen = generator.integers(0, groups.num_groups, groups.num_groups)
        chosen = chosen[~np.isnan(groups.auc[chosen])]
        plain["gauc"].append(np.average(groups.auc[chosen], weights=groups.rows[chosen]))
        plain["gauc_users"].append(groups.auc[chosen].mean())
    result = bootstrap(labels, probabilities, users=groups, replicates=1000).intervals
    for name, values in plain.items():
        assert result[name].standard_error == pytest.approx(np.std(values), rel=0.12), name


def test_the_seed_decides_the_interval():
    labels, probabilities = draw(5, 500)
    first, second = (bootstrap(labels, probabilities, seed=3, replicates=20) for _ in range(2))
    other = bootstrap(labels, probabilities, seed=4, replicates=20)
    assert first == second
    assert first.intervals["auc"] != other.intervals["auc"]


def test_weights_are_poisson_distributed():
    weights = module._poisson_weights(np.random.Generator(np.random.SFC64(0)), 400_001)
    counts = np.bincount(weights, minlength=6)
    expected = 400_001 * scipy.stats.poisson.pmf(np.arange(6), 1)
    assert np.all(np.abs(counts[:6] - expected) < 4.5 * np.sqrt(expected))
    table = module._POISSON_TABLE.astype(np.float64)
    assert len(table) == 65536
    assert table.mean() == pytest.approx(1, abs=1e-4) and table.var() == pytest.approx(1, abs=1e-4)


def test_replicates_without_both_classes_are_left_out_and_counted():
    result = bootstrap([1, 0, 0, 0, 0, 0], [0.9, 0.1, 0.2, 0.3, 0.4, 0.5], replicates=300)
    # The single click has weight 0 in one replicate of e.
    assert result.left_out == pytest.approx(300 / np.e, abs=35)
    assert result.replicates == 300 - result.left_out


def test_without_a_user_of_both_classes_only_gauc_has_no_interval():
    labels, probabilities = draw(6, 600)
    users = np.arange(600) % 30 + 100 * labels
    result = bootstrap(labels, probabilities, users=grouped_auc(labels, probabilities, users), replicates=300)
    assert (result.replicates, result.left_out, result.resampled) == (300, 0, "users")
    assert set(result.intervals) == {"auc", "logloss", "normalised_entropy", "calibration"}
    generator, distinct = np.random.default_rng(8), np.unique(users)
    rows_of = {user: np.flatnonzero(users == user) for user in distinct}
    plain = []
    for _ in range(1000):
        rows = np.concatenate([rows_of[user] for user in generator.choice(distinct, len(distinct))])
        plain.append(metrics.auc(labels[rows], probabilities[rows]))
    assert result.intervals["auc"].standard_error == pytest.approx(np.std(plain), rel=0.15)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 0], {}, "labels of both classes are required"),
        ([0, 1], {"replicates": 1}, "at least 2 replicates"),
        ([0, 1], {"confidence": 1.0}, r"a confidence in \(0, 1\)"),
        ([0, 1], {"scores": [1.0]}, "got 1 scores and 2 labels"),
        ([0, 1], {"replicates": 100}, "replicates have labels of one class only; 2 rows are too few"),
    ],
)
def test_bad_input_is_an_error(labels, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(labels, [0.1, 0.2], **options)
