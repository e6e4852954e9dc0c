"""Memory reports against counts by hand, and budgets against brute force."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hydra.utils import instantiate

from recemb.budget import BudgetOutOfReach, fit_to_budget, parse_budget
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.memory import estimate_memory, full_table_bytes, measure_memory
from recemb.method import UNBOUNDED, Method, method_class
from recemb.methods.full import Full
from recemb.methods.robe import Robe
from recemb.methods.unified import Unified
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import embedding_configs, load_embedding_config, small_tables, table

TABLES = [table("a", 1000, dim=16), table("b", 50, dim=16)]
METHODS = {name: instantiate(load_embedding_config(name)["method"]) for name in embedding_configs()}
HASHING = {name: method for name, method in METHODS.items() if method_class(method).supports_unbounded}


def test_full_tables_by_hand() -> None:
    report = estimate_memory(TABLES, Full)
    assert report.serving_bytes == report.full_bytes == (1000 + 50) * 16 * 4
    assert report.optimizer_bytes == (1000 + 50) * 4
    assert report.ratio == 1.0


def test_unified_by_hand_with_its_salts() -> None:
    report = estimate_memory(TABLES, partial(Unified, num_embeddings=100, num_lookups=2))
    assert report.table_bytes == 100 * 8 * 4
    assert report.index_bytes == 2 * 2 * 8
    assert report.serving_bytes == 3200 + 32


@pytest.mark.parametrize(("name", "expected"), [("rowwise_adagrad", 4), ("adagrad", 64), ("sgd", 0), ("adam", 128)])
def test_optimizer_bytes_equal_the_state_that_is_allocated(name: str, expected: int) -> None:
    optimizer = EmbeddingOptimizer(name, 0.1)
    collection = CompressedEmbeddingBagCollection(TABLES, Full)
    assert measure_memory(collection, optimizer).optimizer_bytes == 1050 * expected
    if name != "adam":
        _, training = prepare(collection, optimizer, partial(torch.optim.SGD, lr=0.1))
        [fused] = training.fused.values()
        allocated = sum(tensor.nbytes for state in fused.optimizer_state().values() for tensor in state)
        assert allocated == 1050 * expected


def test_report_survives_preparation() -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), partial(Unified, num_embeddings=99))
    before = measure_memory(collection)
    prepare(collection, EmbeddingOptimizer(), partial(torch.optim.SGD, lr=0.1))
    assert measure_memory(collection) == before


class Halved(Full):
    """Serves the first half of its rows."""

    def serving_method(self) -> Method:
        return lambda tables: Unified(tables, num_embeddings=sum(table.num_embeddings for table in tables) // 2)


def test_a_method_that_serves_in_another_form_is_counted_in_both() -> None:
    report = estimate_memory(TABLES, Halved, optimizer=EmbeddingOptimizer("adagrad", 0.1))
    assert report.serving_bytes == 525 * 64 + 2 * 8
    assert report.trained_bytes == report.optimizer_bytes == 1050 * 64
    assert report.training_bytes == report.to_dict()["training_bytes"] == 2 * 1050 * 64
    assert fit_to_budget(TABLES, Halved, 525 * 64 + 2 * 8) is Halved
    with pytest.raises(ValueError, match="Halved takes 33,616 bytes"):
        fit_to_budget(TABLES, Halved, 525 * 64 + 2 * 8 - 1)


def test_estimates_allocate_nothing() -> None:
    huge = [table("a", 10**10, dim=128)]
    assert estimate_memory(huge, Full).serving_bytes == 10**10 * 128 * 4


def test_a_budget_is_met_where_full_tables_are_larger_than_a_method_can_number() -> None:
    # 1.28e12 floats; ROBE numbers 2**40 of its array.
    method = fit_to_budget([table("a", 10**10, dim=128)], partial(Robe, block_length=16), 51_200_000_000)
    size = estimate_memory([table("a", 10**10, dim=128)], method).serving_bytes
    assert 0.98 * 51_200_000_000 < size <= 51_200_000_000


@pytest.mark.parametrize("method", HASHING.values(), ids=HASHING)
def test_unbounded_ids_use_a_budget_up_beside_a_small_table(method: Method) -> None:
    tables = [table("ad", UNBOUNDED, dim=16), table("hour", 24, dim=16)]
    report = estimate_memory(tables, fit_to_budget(tables, method, 50_000_000))
    assert 0.95 * 50_000_000 < report.serving_bytes <= 50_000_000


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        *[("10x", 100), ("2.5x", 400), (0.1, 100), ("0.1", 100), (1, 1000), (1.0, 1000), (500, 500), ("500", 500)],
        *[("2kB", 2000), ("2KiB", 2048), ("1.5MB", 1_500_000), ("1x", 1000)],
    ],
)
def test_budgets_are_parsed(budget: str | float, expected: int) -> None:
    assert parse_budget(budget, 1000) == expected


@pytest.mark.parametrize("budget", ["0x", "0.5x", 0, -3, "ten", 2.5, "", "nan", "10 x 3", "inf", "1e400MB"])
def test_budgets_that_mean_nothing_are_refused(budget: str | float) -> None:
    with pytest.raises(ValueError, match="budget"):
        parse_budget(budget, 1000)


def test_ratios_need_full_tables_with_a_size() -> None:
    with pytest.raises(ValueError, match="unbounded ids have none"):
        parse_budget("10x", sum(full_table_bytes([table("a", UNBOUNDED)]).values()))


@pytest.mark.parametrize("budget", [200, 1234, 6_000, 30_000])
def test_the_largest_size_that_fits_is_found(budget: int) -> None:
    method = fit_to_budget(TABLES, partial(Unified, num_lookups=2), budget)
    best = max(
        rows
        for rows in range(1, 1200)
        if estimate_memory(TABLES, partial(Unified, num_lookups=2, num_embeddings=rows)).serving_bytes <= budget
    )
    assert method.keywords["num_embeddings"] == best  # type: ignore[attr-defined]


def test_tables_that_stay_full_count_against_the_budget() -> None:
    method = fit_to_budget(TABLES, Unified, 10_000, full_below_rows=51)
    report = estimate_memory(TABLES, method, full_below_rows=51)
    assert 9_900 < report.serving_bytes <= 10_000
    assert [t.name for t in report.tables] == ["t_b", "unified__0"]


def test_unreachable_budgets_name_the_smallest_size() -> None:
    with pytest.raises(
        BudgetOutOfReach, match=r"budget of 50 bytes cannot be met: the smallest Unified .* takes 80 bytes"
    ):
        fit_to_budget(TABLES, Unified, 50)
    with pytest.raises(BudgetOutOfReach, match="Full takes 67,200 bytes and has no smaller form"):
        fit_to_budget(TABLES, Full, 60_000)


def test_a_bound_knob_and_a_budget_contradict() -> None:
    with pytest.raises(ValueError, match="give num_embeddings or a budget, not both") as caught:
        fit_to_budget(TABLES, partial(Unified, num_embeddings=5), 5000)
    # A mistake of whoever asks, not a method that cannot be so small.
    assert not isinstance(caught.value, BudgetOutOfReach)
