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
