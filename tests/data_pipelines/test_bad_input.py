"""Every wrong input ends in an error that says what and where, and leaves nothing behind."""

from __future__ import annotations

import errno
import gzip
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import criteo, delimited, parquet
from data_pipelines.schema import CategoricalColumn, LogSchema, NumericColumn
from data_pipelines.splitting import SplitRule
from tests.data_pipelines import truth

ROWS = truth.criteo_rows(60)


def fails(tmp_path: Path, raw: Path | list[Path], kind: type[Exception], message: str, **settings: Any) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=message):
        criteo.prepare(raw, tmp_path / "out", **settings)
    assert sorted(tmp_path.iterdir()) == before


def changed_line(tmp_path: Path, line: int, change: Callable[[list[str]], list[str]], name: str = "log.txt") -> Path:
    """A log whose line ``line`` (from 1) is changed cell by cell."""
    path = truth.write_tsv(tmp_path / "whole", ROWS)
    lines = path.read_text().splitlines()
    lines[line - 1] = "\t".join(change(lines[line - 1].split("\t")))
    path.unlink()
    content = ("\n".join(lines) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return tmp_path / name


def test_missing_file(tmp_path: Path) -> None:
    fails(tmp_path, tmp_path / "none.txt", FileNotFoundError, "none.txt: no such file")


def test_directory_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "days").mkdir()
    fails(tmp_path, tmp_path / "days", ValueError, "days: is a directory")


def test_no_file_and_the_same_file_twice(tmp_path: Path) -> None:
    fails(tmp_path, [], ValueError, "no raw file given")
    raw = truth.write_tsv(tmp_path / "log.txt", ROWS)
    fails(tmp_path, [raw, tmp_path / "." / "log.txt"], ValueError, "log.txt: given twice")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "log.txt").touch()
    fails(tmp_path, tmp_path / "log.txt", ValueError, "log.txt: empty file")


@pytest.mark.parametrize("name", ["log.txt", "log.gz"])
@pytest.mark.parametrize("line", [1, 42, 60])
@pytest.mark.parametrize("width", [39, 41])
def test_wrong_number_of_columns(name: str, line: int, width: int, tmp_path: Path) -> None:
    raw = changed_line(tmp_path, line, lambda cells: [*cells, "x"][:width], name)
    fails(tmp_path, raw, ValueError, rf"{name}: line {line}: 40 columns separated by '\\t' are required, got {width}")


def test_text_where_a_number_belongs(tmp_path: Path) -> None:
    raw = changed_line(tmp_path, 33, lambda cells: [*cells[:4], "1.5", *cells[5:]])
    fails(tmp_path, raw, ValueError, "log.txt: line 33: column 'I4': an integer or nothing is required, got '1.5'")


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = truth.write_tsv(tmp_path / "log.txt", ROWS)
    lines = path.read_bytes().splitlines()
    lines[6] = b"\t".join([*lines[6].split(b"\t")[:20], b"\xff\xfe", *lines[6].split(b"\t")[21:]])
    path.write_bytes(b"\n".join(lines) + b"\n")
    fails(tmp_path, path, ValueError, "log.txt: line 7: column 'C7': not UTF-8")


def test_empty_line(tmp_path: Path) -> None:
    raw = changed_line(tmp_path, 9, lambda cells: [])
    fails(tmp_path, raw, ValueError, "log.txt: line 9")


@pytest.mark.parametrize("label", ["2", "-1", ""])
def test_label_in_text_outside_zero_and_one(label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "BATCH_BYTES", 2000)
    raw = changed_line(tmp_path, 50, lambda cells: [label, *cells[1:]])
    fails(tmp_path, raw, ValueError, "log.txt: line 50: column 'label': labels must be 0 or 1, got")


@pytest.mark.parametrize("label", [2, None, math.nan, 0.5])
def test_label_in_parquet_outside_zero_and_one(label: float | None, tmp_path: Path) -> None:
    rows = [{**row, "label": float(row["label"])} for row in ROWS]
    rows[50]["label"] = label
    raw = truth.write_parquet(tmp_path / "log.parquet", rows, row_group_size=20)
    fails(tmp_path, raw, ValueError, "log.parquet: row group 2, row 50: column 'label': labels must be 0 or 1")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e300])
def test_numbers_that_are_not_finite(number: float, tmp_path: Path) -> None:
    rows = [{**row, "I3": 1.0} for row in ROWS]
    rows[41]["I3"] = number
    raw = truth.write_parquet(tmp_path / "log.parquet", rows, row_group_size=40)
    fails(tmp_path, raw, ValueError, "log.parquet: row group 1, row 41: column 'I3': numbers must be finite")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_parquet(kept: float, tmp_path: Path) -> None:
    raw = truth.write_parquet(tmp_path / "log.parquet", ROWS)
    content = raw.read_bytes()
    raw.write_bytes(content[: int(len(content) * kept)])
    fails(tmp_path, raw, ValueError, r"log.parquet: not a readable Parquet file, truncated\? \(\d+ bytes")


def test_damaged_parquet_page(tmp_path: Path) -> None:
    raw = truth.write_parquet(tmp_path / "log.parquet", ROWS, row_group_size=30, compression="zstd")
    metadata = pq.ParquetFile(raw).metadata
    start = metadata.row_group(1).column(20).data_page_offset
    content = bytearray(raw.read_bytes())
    content[start : start + 60] = bytes(60)
    raw.write_bytes(content)
    fails(tmp_path, raw, ValueError, "log.parquet: row group 1 is damaged")


@pytest.mark.parametrize("lost", [4, 200])
def test_truncated_gzip(lost: int, tmp_path: Path) -> None:
    raw = truth.write_tsv(tmp_path / "log.gz", ROWS)
    raw.write_bytes(raw.read_bytes()[:-lost])
    fails(tmp_path, raw, ValueError, r"log.gz: gzip stream is truncated or damaged after line \d+")


def test_text_that_is_called_gzip(tmp_path: Path) -> None:
    raw = truth.write_tsv(tmp_path / "log.txt", ROWS).rename(tmp_path / "log.gz")
    fails(tmp_path, raw, ValueError, "log.gz: gzip stream is truncated or damaged after line 0")


def test_column_missing_or_of_another_type(tmp_path: Path) -> None:
    without = truth.write_parquet(tmp_path / "without.parquet", [{**row, "C9": row["C9"]} for row in ROWS])
    table = pq.read_table(without)
    pq.write_table(table.drop_columns(["C9"]), without)
    fails(tmp_path, without, ValueError, "without.parquet: column 'C9' is missing; the file has")
    position = table.schema.get_field_index("C9")
    pq.write_table(table.set_column(position, "C9", pa.array([1.5] * 60)), without)
    fails(tmp_path, without, ValueError, "column 'C9' must be string or integer, got double")
    pq.write_table(table.set_column(position, "I9", pa.array(["1"] * 60)), without)
    fails(tmp_path, without, ValueError, "column 'I9' occurs more than once")


def test_day_column_in_some_files_only(tmp_path: Path) -> None:
    without = truth.write_parquet(tmp_path / "without.parquet", ROWS)
    having = truth.write_parquet(tmp_path / "having.parquet", [{**row, "day": 1} for row in ROWS])
    message = r"having.parquet: of \['day', 'true_probability'\] it has \['day'\], but .*without.parquet has \[\]"
    fails(tmp_path, [without, having], ValueError, message)


def test_later_file_is_checked_before_the_first_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = truth.write_tsv(tmp_path / "day_0", ROWS)
    second = tmp_path / "day_1.parquet"
    second.write_bytes(b"PAR1 and no more")
    monkeypatch.setattr(delimited.DelimitedFile, "batches", lambda self: pytest.fail("read before all were checked"))
    fails(tmp_path, [first, second], ValueError, "day_1.parquet: not a readable Parquet file")


def test_split_without_rows(tmp_path: Path) -> None:
    raw = truth.write_tsv(tmp_path / "log.txt", ROWS[:4])
    fails(tmp_path, raw, ValueError, r"\['validation'\] would be empty \(rows: {'train': 3", split=SplitRule("time"))


def test_a_split_with_labels_of_one_class_is_written_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"y": int(number < 7), "a": number} for number in range(10)]
    raw = truth.write_parquet(tmp_path / "log.parquet", rows)
    schema = LogSchema("y", categorical=(CategoricalColumn("a"),))
    with caplog.at_level(logging.WARNING, logger="data_pipelines"):
        parquet.prepare(raw, tmp_path / "out", schema=schema, split=SplitRule("time", (6, 2, 2)))
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        f"{tmp_path / 'out'}: all 2 rows of split test have label 0"
    ]


def test_last_day_of_a_log_without_days(tmp_path: Path) -> None:
    raw = truth.write_tsv(tmp_path / "log.txt", ROWS)
    fails(tmp_path, raw, ValueError, "log.txt: split last-day needs days", split=SplitRule("last-day"))


def test_days_in_alphabetic_order(tmp_path: Path) -> None:
    days = [truth.write_tsv(tmp_path / f"day_{day}", ROWS) for day in (0, 1, 10, 11, 2, 3)]
    fails(tmp_path, days, ValueError, "the numbers in the names say", split=SplitRule("last-day"))


@pytest.mark.parametrize("identifier", [-1, 24, None])
def test_given_ids_out_of_range(identifier: int | None, tmp_path: Path) -> None:
    rows: list[truth.Row] = [{"y": number % 2, "hour": number % 24, "past": [number % 24] * 2} for number in range(60)]
    single = LogSchema("y", (), (CategoricalColumn("hour", encoding="ids", num_embeddings=24),))
    lists = LogSchema("y", (), (CategoricalColumn("past", kind="list", encoding="ids", num_embeddings=24),))
    raw = truth.write_parquet(tmp_path / "log.parquet", rows)
    for schema in (single, lists):
        parquet.prepare(raw, tmp_path / f"good-{schema.categorical[0].name}", schema=schema)
    rows[41] |= {"hour": identifier, "past": [3, identifier]}
    truth.write_parquet(raw, rows)
    for schema in (single, lists):
        name = schema.categorical[0].name
        with pytest.raises(ValueError, match=rf"row 41: column '{name}': ids must be in \[0, 24\).*got {identifier}"):
            parquet.prepare(raw, tmp_path / "out", schema=schema)


def test_given_ids_that_are_text(tmp_path: Path) -> None:
    raw = truth.write_parquet(tmp_path / "log.parquet", [{"y": 0, "hour": "3"}])
    schema = LogSchema("y", (), (CategoricalColumn("hour", encoding="ids", num_embeddings=24),))
    with pytest.raises(ValueError, match="column 'hour' must be integer, got string"):
        parquet.prepare(raw, tmp_path / "out", schema=schema)


def test_null_user_and_time(tmp_path: Path) -> None:
    schema = LogSchema("y", (NumericColumn("x"),), user="who", time="when")
    rows: list[truth.Row] = [{"y": 0, "x": 1, "who": "a", "when": number} for number in range(20)]
    for name in ("who", "when"):
        raw = truth.write_parquet(
            tmp_path / "log.parquet", [{**row, name: None if row["when"] == 7 else row[name]} for row in rows]
        )
        with pytest.raises(ValueError, match=f"row 7: column '{name}': a value is required in every row"):
            parquet.prepare(raw, tmp_path / "out", schema=schema, split=SplitRule("time"))


def test_table_shared_by_strings_and_integers(tmp_path: Path) -> None:
    raw = truth.write_parquet(tmp_path / "log.parquet", [{"y": 0, "a": "1", "b": 1}])
    schema = LogSchema("y", (), (CategoricalColumn("a"), CategoricalColumn("b", table="a")))
    with pytest.raises(
        ValueError, match=r"log.parquet: row group 0, row 0: column 'b': values of one table must be all"
    ):
        parquet.prepare(raw, tmp_path / "out", schema=schema)


@pytest.mark.parametrize("target", ["pyarrow.parquet.ParquetWriter.write_table", "pyarrow.ipc.new_file"])
def test_full_disk(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    raw = truth.write_tsv(tmp_path / "log.txt", ROWS)
    monkeypatch.setattr(target, full)
    fails(tmp_path, raw, OSError, "out: no space left on its disk .* Nothing was kept")


def test_disk_that_is_too_small_is_seen_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = truth.write_tsv(tmp_path / "log.txt", ROWS)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    fails(tmp_path, raw, OSError, "GB of free disk are required")
