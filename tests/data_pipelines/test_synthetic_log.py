"""The raw files of the synthetic log: columns, reproducibility, agreement of Parquet, TSV and click model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from data_pipelines.synthetic_log import batches, default_total_ids, generate
from data_pipelines.synthetic_model import ClickModel
from recemb.evaluation.metrics import auc
from recemb.evaluation.metrics import log_loss as our_log_loss

ROWS = 70_000  # more than one chunk


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("synthetic") / "log.parquet", rows=ROWS, seed=1)


def test_parquet_has_the_columns_of_the_criteo_log_and_the_truth(log: Path) -> None:
    schema = pq.read_schema(log)
    numeric, categorical = [f"I{i}" for i in range(1, 14)], [f"C{i}" for i in range(1, 27)]
    assert schema.names == ["label", *numeric, *categorical, "day", "true_probability"]
    assert {schema.field(name).type for name in numeric} == {pa.int32()}
    assert {schema.field(name).type for name in categorical} == {pa.string()}
    assert schema.field("true_probability").type == pa.float32()


def test_cells_are_the_values_of_the_click_model(log: Path) -> None:
    table = pq.read_table(log)
    rows = ClickModel(seed=1, total_ids=ROWS).rows(0, ROWS, total_rows=ROWS, days=7)
    columns: dict[str, np.ndarray] = {**rows.categorical, **rows.numeric}
    for name, values in columns.items():
        null = rows.null.get(name, np.zeros(ROWS, bool))
        cells = [f"{value:08x}" if name.startswith("C") else value for value in values.tolist()]
        expected = [None if missing else cell for cell, missing in zip(cells, null, strict=True)]
        assert table[name].to_pylist() == expected, name
    assert table["label"].to_pylist() == rows.label.tolist()
    assert np.array_equal(table["true_probability"].to_numpy(), rows.probability.astype(np.float32))


def test_days_are_in_order_and_of_equal_length(log: Path) -> None:
    day = pq.read_table(log, columns=["day"])["day"].to_numpy()
    assert np.array_equal(np.unique(day, return_counts=True)[1], np.full(7, ROWS // 7))
    assert np.all(np.diff(day) >= 0)


def test_the_same_arguments_give_the_same_bytes(log: Path, tmp_path: Path) -> None:
    assert generate(tmp_path / "again.parquet", rows=ROWS, seed=1).read_bytes() == log.read_bytes()
    assert generate(tmp_path / "other.parquet", rows=ROWS, seed=2).read_bytes() != log.read_bytes()


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000, 5000])
def test_the_size_of_chunks_changes_no_value(chunk_rows: int) -> None:
    model = ClickModel(seed=1, total_ids=5000)
    whole = pa.Table.from_batches(batches(model, rows=500 if chunk_rows == 1 else 5000, days=3))
    parts = pa.Table.from_batches(batches(model, rows=whole.num_rows, days=3, chunk_rows=chunk_rows))
    assert parts.combine_chunks() == whole.combine_chunks()


def test_tsv_has_criteos_forty_columns_with_the_same_cells(log: Path, tmp_path: Path) -> None:
    lines = generate(tmp_path / "log.tsv", rows=ROWS, seed=1, format="tsv").read_text().splitlines()
    columns = pq.read_table(log).drop_columns(["day", "true_probability"]).slice(0, 2000).to_pylist()
    assert len(lines) == ROWS
    for line, row in zip(lines, columns, strict=False):
        assert line.split("\t") == ["" if cell is None else str(cell) for cell in row.values()]


def test_the_ceiling_agrees_with_scikit_learn(log: Path) -> None:
    table = pq.read_table(log, columns=["label", "true_probability"])
    labels, probability = (table[name].to_numpy() for name in ("label", "true_probability"))
    assert auc(labels, probability) == pytest.approx(roc_auc_score(labels, probability), abs=1e-12)
    expected = log_loss(labels, probability.astype(np.float64))
    assert our_log_loss(labels, probability) == pytest.approx(expected, abs=1e-12)


def test_ids_default_to_one_a_row_up_to_criteos_own_number() -> None:
    assert [default_total_ids(rows) for rows in (10, 10**6, 10**9)] == [2000, 10**6, 33_762_577]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"rows": 10, "days": 0}, r"days must be in \[1, 127\], got 0"),
        ({"rows": 10, "days": 128}, r"days must be in \[1, 127\], got 128"),
        ({"rows": 10, "format": "csv"}, "format must be 'parquet' or 'tsv', got 'csv'"),
        ({"rows": 10, "total_ids": 3}, "total_ids must be in"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "sub" / "log.parquet", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_log_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "log.parquet", rows=100)
    assert list(tmp_path.iterdir()) == []
