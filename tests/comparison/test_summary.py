"""Cells of a study as one line a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from recemb.comparison.study import Study
from recemb.comparison.summary import RunSummary, summaries

NEW = {"training_bytes": 900}
SEARCH = {"search": {"cpu_trainings": 2.0}}


def cell(embedding: dict[str, int] | None = None, search: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "overrides": ["embedding=unified", "embedding.budget=10x"],
        "tuning_trials": 0,
        "test": {"auc": 0.8, "logloss": 0.4},
        "embedding": {"bytes": 100, "full_bytes": 1000, "optimizer_bytes": 10, **(embedding or {})},
        "train": {"samples_per_cpu_second": 5.0},
        "data": {},
        **(search or {}),
    }


def summary_of(cells: list[dict[str, Any]]) -> RunSummary:
    study = SimpleNamespace(cells=lambda: [("unified-10x", cells)], best_setting=lambda name: [])
    [summary] = summaries(cast(Study, study))
    return summary


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([cell(NEW), cell({"training_bytes": 1000})], 950),
        ([cell(NEW, SEARCH)], 900),
        # Before results said it: rows and optimizer state, but of a search nobody knows.
        ([cell()], 110),
        ([cell(NEW), cell()], 505),
        ([cell(search=SEARCH)], None),
        ([cell(NEW, SEARCH), cell(search=SEARCH)], None),
    ],
)
def test_training_bytes_are_those_of_the_cells_where_they_are_known(
    cells: list[dict[str, Any]], expected: int | None
) -> None:
    assert summary_of(cells).training_bytes == expected


def test_bytes_and_their_parts_are_means_over_seeds() -> None:
    first, second = (
        {"bytes": 100, "table_bytes": 70, "index_bytes": 30},
        {"bytes": 60, "table_bytes": 40, "index_bytes": 20},
    )
    summary = summary_of([cell(first), cell({**second, "optimizer_bytes": 20})])
    assert (summary.serving_bytes, summary.optimizer_bytes) == (80, 15)
    assert dict(summary.components) == {"table": 55, "index": 25}


def lost(**why: str) -> dict[str, Any]:
    return {"overrides": ["embedding=unified", "embedding.budget=10x"], "tuning_trials": 0, **why}


def test_seeds_without_figures_are_left_out_of_the_means_and_counted() -> None:
    cells = [lost(refused="budget of 1 bytes"), cell(), lost(diverged="loss is nan"), cell({"bytes": 200})]
    summary = summary_of(cells)
    assert (summary.refused, summary.out_of_reach, summary.diverged) == (None, 1, 1)
    assert (summary.auc, summary.serving_bytes, summary.budget) == ((0.8, 0.8), 150, "10x")


def test_a_run_of_which_no_seed_was_trained_says_why() -> None:
    summary = summary_of([lost(refused="budget of 1 bytes"), lost(refused="budget of 1 bytes")])
    assert (summary.refused, summary.out_of_reach, summary.auc) == ("budget of 1 bytes", 2, ())
    summary = summary_of([lost(diverged="loss is nan in step 3")])
    assert (summary.refused, summary.diverged) == ("diverged: loss is nan in step 3", 1)
