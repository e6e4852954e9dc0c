"""The click model of the synthetic log, against plain Python loops, closed forms and Criteo's own numbers."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from data_pipelines.synthetic_model import (
    BASE_RATE,
    CHURN,
    CHURN_FROM_IDS,
    CHURN_FROM_RANK,
    GOLDEN,
    LATENT_WEIGHTS,
    LOGISTIC_STD,
    TAIL_RANK,
    WAVE,
    ClickModel,
    Rows,
    key,
    mix,
    raw_values,
)
from data_pipelines.synthetic_shape import CATEGORICAL, NUMERIC, PAIRS, cardinalities

TOTAL_ROWS = 200_000
TOTAL_IDS = 200_000
DAYS = 7


@pytest.fixture(scope="module")
def model() -> ClickModel:
    return ClickModel(seed=3, total_ids=TOTAL_IDS)


@pytest.fixture(scope="module")
def log(model: ClickModel) -> Rows:
    return model.rows(0, TOTAL_ROWS, total_rows=TOTAL_ROWS, days=DAYS)


def hash_in_python(stream: int, counter: int) -> int:
    return mix(stream + counter * GOLDEN)


def uniform_in_python(stream: int, counter: int) -> float:
    return ((hash_in_python(stream, counter) >> 12) + 0.5) * 2.0**-52


def raw_value_in_python(seed: int, name: str, identifier: int) -> int:
    value = identifier ^ (key(seed, name, "value") & 0xFFFFFFFF)
    for multiplier, shift in ((0x7FEB352D, 16), (0x846CA68B, 15)):
        value = ((value ^ (value >> shift)) * multiplier) & 0xFFFFFFFF
    return value ^ (value >> 16)


def row_in_python(model: ClickModel, row: int) -> tuple[dict[str, int | None], float, int]:
    """Values, probability and label of one row, one number at a time, from the formulas of the documentation."""
    seed, time = model.seed, (row + 0.5) / TOTAL_ROWS
    values: dict[str, int | None] = {}
    vectors: dict[str, list[float]] = {}
    bias = interaction = numeric = 0.0

    def is_null(group: str, fraction: float) -> bool:
        return bool(group) and uniform_in_python(key(seed, "row", "null", group), row) < fraction

    for shape in CATEGORICAL:
        size = model.cardinalities[shape.name]
        power = 1 - shape.exponent
        first, last = shape.offset**power, (size + shape.offset) ** power
        draw = uniform_in_python(key(seed, "row", shape.name), row)
        slot = min(size - 1, max(0, math.floor((first + draw * (last - first)) ** (1 / power) - shape.offset)))
        born = uniform_in_python(key(seed, shape.name, "churn"), slot) < CHURN * time
        generation = int(size >= CHURN_FROM_IDS and slot >= CHURN_FROM_RANK and born)
        strength = 1 / math.sqrt(1 + slot / TAIL_RANK)
        null = is_null(shape.null_group, shape.null_fraction)
        if null:
            slot, generation, strength = size, 0, 1.0
        identifier = 2 * slot + generation
        values[shape.name] = None if null else raw_value_in_python(seed, shape.name, identifier)
        hashed = hash_in_python(key(seed, shape.name, "latent"), identifier)
        lanes = [(((hashed >> 16 * lane) & 0xFFFF) + 0.5) / 65536 - 0.5 for lane in (0, 1)]
        vectors[shape.name] = [strength * lane * math.sqrt(12) for lane in lanes]
        bias += shape.bias * vectors[shape.name][0]
    for left, right, weight in PAIRS:
        interaction += weight * sum(
            size * a * size * b for size, a, b in zip(LATENT_WEIGHTS, vectors[left], vectors[right], strict=True)
        )
    for number in NUMERIC:
        draw = uniform_in_python(key(seed, "row", number.name), row)
        logarithm = math.log(draw / (1 - draw)) * number.log_std / LOGISTIC_STD + number.log_mean
        logarithm = min(logarithm, math.log(number.maximum - number.minimum + 1))
        count = min(number.minimum + math.floor(math.exp(logarithm)), number.maximum)
        if is_null(number.null_group, number.null_fraction):
            values[number.name] = None
            numeric += number.effect * (key(seed, number.name, "null") / 2**63 - 1)
        else:
            values[number.name] = count
            phase = (key(seed, number.name, "phase") / 2**64 - 0.5) * 2 * math.pi
            standardised = (math.log1p(max(count, 0)) - number.log_mean) / number.log_std
            numeric += number.effect * math.sin(WAVE * standardised + phase)
    scales = model.scales
    logit = scales.intercept + scales.bias * bias + scales.interaction * interaction + scales.numeric * numeric
    probability = 1 / (1 + math.exp(-logit))
    return values, probability, int(uniform_in_python(key(seed, "row", "label"), row) < probability)


def test_a_row_equals_its_recomputation_in_plain_python(model: ClickModel, log: Rows) -> None:
    for row in (0, 1, 77, 65_535, 65_536, 123_456, TOTAL_ROWS - 1):
        values, probability, label = row_in_python(model, row)
        for name, value in values.items():
            assert bool(log.null.get(name, np.zeros(TOTAL_ROWS, bool))[row]) == (value is None), name
            if value is not None:
                column = log.categorical.get(name, log.numeric.get(name))
                assert column is not None
                assert int(column[row]) == value, name
        assert log.probability[row] == pytest.approx(probability, rel=1e-12)
        assert log.label[row] == label


def test_the_probability_depends_on_nothing_but_the_values_of_the_row(model: ClickModel) -> None:
    # A table of few ids repeats values; rows with the same values in all 39 columns must have the same probability,
    # else the stored optimum would know more than any model can.
    rows = model.rows(0, 50_000, total_rows=TOTAL_ROWS, days=DAYS)
    moved = model.rows(0, 50_000, total_rows=50_001, days=DAYS)
    same = np.ones(50_000, bool)
    for name in rows.categorical:
        same &= rows.categorical[name] == moved.categorical[name]
    assert 100 < same.sum() < 50_000  # churn moved the others
    assert np.array_equal(rows.probability[same], moved.probability[same])


@settings(deadline=None, max_examples=25)
@given(start=st.integers(0, TOTAL_ROWS - 1), size=st.integers(1, 2000))
def test_any_chunk_equals_that_part_of_the_whole(model: ClickModel, log: Rows, start: int, size: int) -> None:
    stop = min(start + size, TOTAL_ROWS)
    chunk = model.rows(start, stop, total_rows=TOTAL_ROWS, days=DAYS)
    assert np.array_equal(chunk.label, log.label[start:stop])
    assert np.array_equal(chunk.day, log.day[start:stop])
    assert np.array_equal(chunk.probability, log.probability[start:stop])
    for whole, part in ((log.categorical, chunk.categorical), (log.numeric, chunk.numeric), (log.null, chunk.null)):
        for name in part:
            assert np.array_equal(part[name], whole[name][start:stop]), name


def test_the_same_seed_gives_the_same_log_and_another_seed_another(model: ClickModel, log: Rows) -> None:
    again = ClickModel(seed=3, total_ids=TOTAL_IDS).rows(0, 1000, total_rows=TOTAL_ROWS, days=DAYS)
    other = ClickModel(seed=4, total_ids=TOTAL_IDS).rows(0, 1000, total_rows=TOTAL_ROWS, days=DAYS)
    assert np.array_equal(again.probability, log.probability[:1000])
    assert not np.any(other.probability == log.probability[:1000])
    assert np.mean(other.categorical["C3"] == log.categorical["C3"][:1000]) < 0.01


def test_labels_are_calibrated_to_the_true_probability(log: Rows) -> None:
    bins = np.digitize(log.probability, np.quantile(log.probability, np.linspace(0, 1, 21)[1:-1]))
    variance = log.probability * (1 - log.probability)
    scores = [
        (log.label[bins == b].sum() - log.probability[bins == b].sum()) / math.sqrt(variance[bins == b].sum())
        for b in range(20)
    ]
    # The sum of 20 squared standard normals exceeds 45.3 once in a thousand seeds.
    assert sum(score**2 for score in scores) < 45.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_base_rate_and_ceiling_are_those_of_criteo(seed: int) -> None:
    rows = ClickModel(seed=seed, total_ids=TOTAL_IDS).rows(0, 100_000, total_rows=100_000, days=DAYS)
    assert rows.label.mean() == pytest.approx(BASE_RATE, abs=0.01)
    assert 0.80 < roc_auc_score(rows.label, rows.probability) < 0.86
    for day in range(DAYS):
        assert rows.label[rows.day == day].mean() == pytest.approx(BASE_RATE, abs=0.03)


def test_ids_follow_zipf_with_the_exponent_of_their_column(log: Rows) -> None:
    for shape in CATEGORICAL:
        if shape.name not in ("C3", "C12", "C21", "C7"):
            continue
        values = log.categorical[shape.name]
        if shape.name in log.null:
            values = values[~log.null[shape.name]]
        counts = np.sort(np.unique(values, return_counts=True)[1])[::-1]
        ranks = np.arange(5, 200)
        slope = np.polyfit(np.log(ranks + shape.offset + 0.5), np.log(counts[ranks]), 1)[0]
        assert slope == pytest.approx(-shape.exponent, abs=0.15), shape.name


def test_the_head_has_the_share_that_the_closed_form_gives(log: Rows) -> None:
    shape = next(shape for shape in CATEGORICAL if shape.name == "C2")
    power, size = 1 - shape.exponent, 583
    total = shape.offset**power - (size + shape.offset) ** power
    counts = np.sort(np.unique(log.categorical["C2"], return_counts=True)[1])[::-1]
    for rank in range(5):
        share = ((rank + shape.offset) ** power - (rank + 1 + shape.offset) ** power) / total
        error = math.sqrt(share * (1 - share) / TOTAL_ROWS)
        assert abs(counts[rank] / TOTAL_ROWS - share) < 5 * error


def test_rank_is_hidden_in_the_raw_values(model: ClickModel) -> None:
    values = raw_values(model.seed, "C3", np.arange(100_000, dtype=np.uint64))
    assert len(np.unique(values)) == 100_000
    assert abs(np.corrcoef(np.arange(100_000), values)[0, 1]) < 0.02


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), unique=True, min_size=2, max_size=200))
def test_two_ids_never_share_a_raw_value(identifiers: list[int]) -> None:
    assert len(np.unique(raw_values(0, "C3", np.array(identifiers, dtype=np.uint64)))) == len(identifiers)


@pytest.mark.parametrize("total_ids", [2_000, 50_000, 1_000_000, 33_762_577, 1_000_000_000])
def test_cardinalities_keep_the_proportions_of_criteo(total_ids: int) -> None:
    sizes = cardinalities(total_ids)
    criteo = {shape.name: shape.cardinality for shape in CATEGORICAL}
    assert sum(sizes.values()) == pytest.approx(total_ids, rel=0.01)
    floor = min(20_000, total_ids // 50)
    for name, size in sizes.items():
        assert size == criteo[name] if criteo[name] <= floor else size >= floor
    scaled = [name for name, size in sizes.items() if size > max(floor, 1000) and criteo[name] > floor]
    for name in scaled:
        assert sizes[name] / sizes["C3"] == pytest.approx(criteo[name] / criteo["C3"], rel=1e-3), name
    order = sorted(criteo, key=lambda name: criteo[name])
    assert [sizes[name] for name in order] == sorted(sizes.values())


def test_at_criteos_own_total_every_cardinality_is_criteos() -> None:
    for shape in CATEGORICAL:
        assert cardinalities(33_762_577)[shape.name] == pytest.approx(shape.cardinality, rel=1e-4)


@pytest.mark.parametrize("total_ids", [0, 1_999, 2_000_000_001])
def test_a_total_that_cannot_be_met_is_refused(total_ids: int) -> None:
    with pytest.raises(ValueError, match=r"total_ids must be in \[2000, 2000000000\]"):
        cardinalities(total_ids)


def test_new_ids_appear_over_the_days_and_replace_old_ones(log: Rows) -> None:
    values, day = log.categorical["C7"], log.day
    frequent_late = [
        value for value, count in zip(*np.unique(values[day == 6], return_counts=True), strict=True) if count >= 10
    ]
    seen_early = np.isin(frequent_late, values[day == 0])
    # An id of ten impressions a day that did not occur on day 0 is new, not merely rare: at most CHURN of them.
    assert 0.05 < 1 - seen_early.mean() < CHURN + 0.05
    unseen = [np.mean(~np.isin(values[day == later], values[day == 0])) for later in range(1, 7)]
    assert unseen == sorted(unseen)
    assert unseen[-1] > unseen[0] + 0.05


def test_nulls_have_criteos_shares_and_come_in_groups(log: Rows) -> None:
    for shape in (*CATEGORICAL, *NUMERIC):
        share = log.null[shape.name].mean() if shape.name in log.null else 0.0
        assert share == pytest.approx(shape.null_fraction, abs=0.005), shape.name
    assert np.array_equal(log.null["C3"], log.null["C12"])
    assert np.array_equal(log.null["I1"], log.null["I10"])


def test_counts_are_heavy_tailed_integers_within_criteos_range(log: Rows) -> None:
    for shape in NUMERIC:
        values = log.numeric[shape.name]
        assert values.min() == shape.minimum
        assert values.max() <= shape.maximum
    assert log.numeric["I5"].mean() > 5 * np.median(log.numeric["I5"])
    assert abs(np.log1p(log.numeric["I5"]).mean() - 7.2) < 0.3


def test_the_planted_interactions_move_the_labels(model: ClickModel, log: Rows) -> None:
    counters = np.arange(TOTAL_ROWS, dtype=np.uint64)
    _, parts = model._draw("row", counters, (counters + 0.5) / TOTAL_ROWS)
    scales = model.scales
    interaction = scales.interaction * parts.interaction
    interaction -= interaction.mean()
    assert interaction.std() == pytest.approx(0.9, abs=0.03)
    without = scales.intercept + scales.bias * parts.bias + scales.numeric * parts.numeric
    # Additive effects alone lose what no additive model can have: several hundredths of AUC.
    loss = roc_auc_score(log.label, log.probability) - roc_auc_score(log.label, without)
    assert 0.03 < loss < 0.08


def test_memory_is_that_of_a_chunk_not_of_the_ids() -> None:
    tracemalloc.start()
    model = ClickModel(seed=0, total_ids=2_000_000_000)
    rows = model.rows(10**9, 10**9 + 4096, total_rows=10**10, days=DAYS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(rows.categorical["C3"])) > 1000
    assert peak < 200e6
