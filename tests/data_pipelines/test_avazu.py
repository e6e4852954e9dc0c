"""Avazu logs as text and Parquet against a plain loop."""

from __future__ import annotations

import datetime
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import avazu
from data_pipelines.splitting import SplitRule
from tests.data_pipelines import truth


def rows_of(count: int, seed: int = 0) -> list[truth.Row]:
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        # Ten days from Tuesday 2014-10-21, hour by hour.
        moment = datetime.datetime(2014, 10, 21) + datetime.timedelta(hours=number * 240 // count)
        row: truth.Row = {"id": str(10**18 + number), "click": int(random.random() < 0.2)}
        row["hour"] = moment.strftime("%y%m%d%H")
        row |= {name: str(random.zipf(1.5) % 30) for name in avazu.CATEGORICAL}
        rows.append(row)
    return rows


def write_csv(path: Path, rows: list[truth.Row]) -> Path:
    lines = [",".join(avazu.COLUMNS), *(",".join(str(row[name]) for name in avazu.COLUMNS) for row in rows)]
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def expected(rows: list[truth.Row], num_train: int, min_count: int) -> dict[str, list[Any]]:
    raw: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in avazu.CATEGORICAL}
    moments = [datetime.datetime.strptime(row["hour"] + "+0000", "%y%m%d%H%z") for row in rows]
    raw["hour"] = [moment.hour for moment in moments]
    raw["weekday"] = [moment.weekday() for moment in moments]
    raw["is_weekend"] = [int(moment.weekday() in (5, 6)) for moment in moments]
    columns: dict[str, list[Any]] = {"click": [row["click"] for row in rows]}
    for name, values in raw.items():
        ids = truth.vocabulary(values[:num_train], min_count)
        columns[name] = [ids.get(value, 0) for value in values]
    columns["timestamp"] = [int(moment.timestamp()) for moment in moments]
    return columns


@pytest.mark.parametrize("form", ["train.csv", "train.gz", "train.parquet"])
def test_every_form_of_the_log_gives_what_a_plain_loop_gives(form: str, tmp_path: Path) -> None:
    rows = rows_of(480)
    raw = (truth.write_parquet if form.endswith("parquet") else write_csv)(tmp_path / form, rows)
    manifest = avazu.prepare(raw, tmp_path / "out", split=SplitRule("last-day"), min_count=2)
    splits = truth.read_all(manifest)
    joined = {name: [value for split in splits.values() for value in split[name]] for name in splits["train"]}
    assert [split.rows for split in manifest.splits.values()] == [432, 24, 24]
    assert joined == expected(rows, 432, 2)
    assert manifest.feature_names == ["hour", *avazu.CATEGORICAL, "weekday", "is_weekend"]
    assert (manifest.time, manifest.numeric) == ("timestamp", ())


@pytest.mark.parametrize("hour", ["2014102100", "14102", "14133100", "1410210x", "", "14102125"])
def test_an_hour_that_is_none_is_named_with_its_line(hour: str, tmp_path: Path) -> None:
    rows = rows_of(30)
    rows[17]["hour"] = hour
    with pytest.raises(ValueError, match=r"train.csv: line 19: column 'hour': YYMMDDHH is required"):
        avazu.prepare(write_csv(tmp_path / "train.csv", rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_click_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("id,hour,C1\n1,14102100,5\n")
    with pytest.raises(ValueError, match=r"test.csv: line 1: columns \['click', 'banner_pos'"):
        avazu.prepare(tmp_path / "test.csv", tmp_path / "out")


def test_command_line(tmp_path: Path) -> None:
    raw = write_csv(tmp_path / "train.csv", rows_of(100))
    avazu.main([str(raw), "--out", str(tmp_path / "out"), "--split", "time", "--min-count", "1"])
    assert (tmp_path / "out" / "manifest.json").is_file()
