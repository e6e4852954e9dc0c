"""What a run prints at its end."""

from __future__ import annotations

import pytest

from recemb.training.report import summary_table


@pytest.mark.parametrize(
    ("full_bytes", "lines"),
    [
        (640, ["bytes of full tables 640", "ratio 10.00x"]),
        (0, ["bytes of full tables none ids are hashes"]),
    ],
)
def test_ids_without_full_tables_have_no_ratio(full_bytes: int, lines: list[str]) -> None:
    embedding = {"bytes": 64, "method": "unified", "full_bytes": full_bytes, "ratio": full_bytes / 64}
    shown = summary_table(
        {
            "test": {"auc": 0.7, "logloss": 0.5},
            "embedding": embedding,
            "train": {"samples_per_second": 1000.0, "samples": 64},
            "data": {"source": "log", "path": "d"},
            "run": "r",
        }
    ).splitlines()
    assert [" ".join(line.split()) for line in shown if line.startswith(("bytes of full", "ratio"))] == lines
