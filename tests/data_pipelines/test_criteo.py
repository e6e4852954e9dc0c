"""Criteo logs in every form they come in, against a plain loop over their rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from data_pipelines import criteo, delimited, parts, sources
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import Manifest
from recemb.evaluation.metrics import auc, log_loss
from tests.data_pipelines import truth

ROWS = truth.criteo_rows(200)
TIME = SplitRule("time", (8, 1, 1))


def expected_columns(rows: list[truth.Row], num_train: int, min_count: int) -> dict[str, list[Any]]:
    """All columns of a log whose first rows are train, log1p numbers and bucket categories included."""
    columns: dict[str, list[Any]] = {"label": [row["label"] for row in rows]}
    for name in criteo.NUMERIC:
        values = [row[name] for row in rows]
        columns[name] = [truth.log1p(value) for value in values]
        buckets = [truth.bucket(value) for value in values]
        ids = truth.vocabulary(buckets[:num_train], 1)
        columns[f"{name}_bucket"] = [ids.get(value, 0) for value in buckets]
    for name in criteo.CATEGORICAL:
        values = [row[name] for row in rows]
        ids = truth.vocabulary(values[:num_train], min_count)
        columns[name] = [ids.get(value, 0) for value in values]
    return columns


def joined(manifest: Manifest) -> dict[str, list[Any]]:
    splits = truth.read_all(manifest)
    return {name: splits["train"][name] + splits["validation"][name] + splits["test"][name] for name in splits["train"]}


def plain_text(folder: Path) -> list[Path]:
    return [truth.write_tsv(folder / "train.txt", ROWS)]


def gzip_text(folder: Path) -> list[Path]:
    return [truth.write_tsv(folder / "train.txt.gz", ROWS)]


def day_files(folder: Path) -> list[Path]:
    days = [truth.write_tsv(folder / f"day_{day}.gz", ROWS[day * 20 : day * 20 + 20]) for day in range(10)]
    return days


def parquet_file(folder: Path) -> list[Path]:
    return [truth.write_parquet(folder / "log.parquet", ROWS, row_group_size=37)]


def torchrec_parquet(folder: Path) -> list[Path]:
    return [truth.write_parquet(folder / "log.parquet", ROWS, criteo.TORCHREC_NAMES)]


def parquet_with_dictionaries(folder: Path) -> list[Path]:
    table = pq.read_table(parquet_file(folder)[0])
    for name in criteo.CATEGORICAL:
        table = table.set_column(table.schema.get_field_index(name), name, table[name].dictionary_encode())
    pq.write_table(table, folder / "dictionaries.parquet")
    return [folder / "dictionaries.parquet"]


@pytest.mark.parametrize(
    "write", [plain_text, gzip_text, day_files, parquet_file, torchrec_parquet, parquet_with_dictionaries]
)
def test_every_form_of_the_log_gives_what_a_plain_loop_gives(
    write: Callable[[Path], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BATCH_ROWS", 29)
    monkeypatch.setattr(delimited, "BATCH_BYTES", 5000)
    monkeypatch.setattr(delimited, "PARSED_BYTES", 2000)
    monkeypatch.setattr(parts, "ROW_GROUP_ROWS", 32)
    monkeypatch.setattr(parts, "PART_ROWS", 64)
    manifest = criteo.prepare(write(tmp_path), tmp_path / "out", split=TIME, min_count=2, numeric="both")
    manifest.verify(checksums=True)
    assert {name: split.rows for name, split in manifest.splits.items()} == {"train": 160, "validation": 20, "test": 20}
    assert joined(manifest) == expected_columns(ROWS, 160, 2)
    assert len(manifest.files("train")) > 1
    assert pq.ParquetFile(manifest.files("train")[0]).metadata.row_group(0).num_rows == 32
    assert not list(tmp_path.glob("*partial*"))


def test_manifest_says_what_the_files_hold(tmp_path: Path) -> None:
    made = criteo.prepare(plain_text(tmp_path), tmp_path / "out", split=TIME, min_count=3, numeric="both")
    manifest = Manifest.load(tmp_path / "out")
    assert manifest == made
    assert (manifest.source, manifest.label, manifest.user, manifest.time) == ("criteo", "label", None, None)
    assert manifest.numeric_names == list(criteo.NUMERIC)
    assert {feature.transform for feature in manifest.numeric} == {"log1p"}
    assert manifest.feature_names == [*criteo.CATEGORICAL, *(f"{name}_bucket" for name in criteo.NUMERIC)]
    assert manifest.preparation["missing_numbers"]["I1"] == sum(row["I1"] is None for row in ROWS)
    schema = pq.read_schema(manifest.files("train")[0])
    assert schema.field("label").type == pa.int8()
    for feature in manifest.categorical:
        assert schema.field(feature.name).type == pa.int32()
        stored = truth.stored_vocabulary(manifest, feature.name)
        ids = truth.read(manifest, "train")[feature.name]
        assert feature.num_embeddings == len(stored["value"])
        assert feature.out_of_vocabulary == 0
        assert feature.min_count == (1 if feature.name.endswith("_bucket") else 3)
        assert stored["train_count"] == np.bincount(ids, minlength=feature.num_embeddings).tolist()
        assert manifest.train_counts(feature.name).to_pylist() == stored["train_count"]
        shares = manifest.preparation["out_of_vocabulary_share"]["train"]
        assert shares[feature.name] == pytest.approx(ids.count(0) / 160, abs=1e-6)


def test_vocabulary_knows_nothing_of_validation_and_test(tmp_path: Path) -> None:
    """Changing every held-out row changes neither the vocabulary nor the train files."""
    changed = ROWS[:160] + [
        {**row, **{name: f"new{number}" for name in criteo.CATEGORICAL}} for number, row in enumerate(ROWS[160:])
    ]
    first = criteo.prepare(truth.write_tsv(tmp_path / "a", ROWS), tmp_path / "one", split=TIME)
    second = criteo.prepare(truth.write_tsv(tmp_path / "b", changed), tmp_path / "two", split=TIME)
    one, two = truth.files_of(first.root), truth.files_of(second.root)
    shared = [name for name in one if name.startswith(("vocabulary/", "train/"))]
    assert len(shared) == 27
    assert all(one[name] == two[name] for name in shared)
    assert all(set(truth.read(second, "test")[name]) == {0} for name in criteo.CATEGORICAL)


def test_two_runs_give_equal_bytes_whatever_the_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BATCH_BYTES", 3000)
    monkeypatch.setattr(delimited, "BATCH_BYTES", 2000)
    raw = plain_text(tmp_path)
    one = truth.files_of(criteo.prepare(raw, tmp_path / "one", workers=1).root)
    eight = truth.files_of(criteo.prepare(raw, tmp_path / "eight", workers=8).root)
    assert one == eight


def test_random_split_divides_every_row_once(tmp_path: Path) -> None:
    manifest = criteo.prepare(plain_text(tmp_path), tmp_path / "out", split=SplitRule(seed=5), min_count=1)
    splits = truth.read_all(manifest)
    assert sum(len(columns["label"]) for columns in splits.values()) == 200
    # Row order is kept within a split, so the numbers found again must be those of the log.
    held_in = {name: iter(zip(*(columns[n] for n in criteo.NUMERIC), strict=True)) for name, columns in splits.items()}
    following = {name: next(rows, None) for name, rows in held_in.items()}
    for row in ROWS:
        numbers = tuple(truth.log1p(row[name]) for name in criteo.NUMERIC)
        name = next(name for name, candidate in following.items() if candidate == numbers)
        following[name] = next(held_in[name], None)
    assert set(following.values()) == {None}


def test_last_of_several_files_is_the_last_day(tmp_path: Path) -> None:
    manifest = criteo.prepare(day_files(tmp_path), tmp_path / "out", split=SplitRule("last-day"))
    labels = {name: columns["label"] for name, columns in truth.read_all(manifest).items()}
    expected = [row["label"] for row in ROWS]
    assert labels == {"train": expected[:180], "validation": expected[180:190], "test": expected[190:]}


def test_day_column_gives_days_within_one_file_in_any_order(tmp_path: Path) -> None:
    days = [(number * 7) % 4 for number in range(200)]
    rows = [{**row, "day": day, "exact": True} for row, day in zip(ROWS, days, strict=True)]
    raw = truth.write_parquet(tmp_path / "log.parquet", rows)
    manifest = criteo.prepare(raw, tmp_path / "out", split=SplitRule("last-day"))
    assert manifest.time == "day"
    splits = truth.read_all(manifest)
    last = [row["label"] for row, day in zip(ROWS, days, strict=True) if day == 3]
    assert splits["validation"]["label"] == last[:25]
    assert splits["test"]["label"] == last[25:]
    assert set(splits["train"]["day"]) == {0, 1, 2}
    assert "exact" not in splits["train"]
    by_time = criteo.prepare(raw, tmp_path / "by_time", split=SplitRule("time", (2, 1, 1)))
    assert set(truth.read(by_time, "validation")["day"]) == {2}


def test_known_probabilities_are_carried_and_their_quality_on_test_is_the_optimum(tmp_path: Path) -> None:
    probabilities = np.random.default_rng(0).random(200)
    rows = [{**row, "true_probability": p} for row, p in zip(ROWS, probabilities, strict=True)]
    manifest = criteo.prepare(
        truth.write_parquet(tmp_path / "log.parquet", rows), tmp_path / "out", split=TIME, source_name="synthetic"
    )
    test = truth.read(manifest, "test")
    carried = probabilities[180:].astype(np.float32)
    np.testing.assert_array_equal(np.array(test["true_probability"], np.float32), carried)
    assert manifest.source == "synthetic"
    assert manifest.optimum == {"auc": auc(test["label"], carried), "logloss": log_loss(test["label"], carried)}


def test_hashed_ids_need_no_vocabulary(tmp_path: Path) -> None:
    manifest = criteo.prepare(plain_text(tmp_path), tmp_path / "out", split=TIME, encoding="hash", numeric="none")
    columns = joined(manifest)
    for feature in manifest.categorical:
        assert (feature.num_embeddings, feature.vocabulary, feature.out_of_vocabulary) == (None, None, None)
        expected = [row[feature.name] for row in ROWS]
        assert columns[feature.name] == [
            0 if value is None else xxhash.xxh64_intdigest(value.encode()) >> 1 for value in expected
        ]
    assert pq.read_schema(manifest.files("test")[0]).field("C1").type == pa.int64()
    assert columns["I1"] == [row["I1"] or 0 for row in ROWS]
    assert not (manifest.root / "vocabulary").exists()


def test_buckets_alone_leave_no_numeric_column(tmp_path: Path) -> None:
    manifest = criteo.prepare(plain_text(tmp_path), tmp_path / "out", split=TIME, numeric="bucket")
    assert manifest.numeric == ()
    assert manifest.feature_names == [*criteo.CATEGORICAL, *criteo.NUMERIC]
    assert joined(manifest)["I3"] == expected_columns(ROWS, 160, 2)["I3_bucket"]


def test_command_line_prepares_and_says_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw,) = plain_text(tmp_path)
    arguments = [str(raw), "--out", str(tmp_path / "out"), "--split", "time", "--fractions", "6:2:2"]
    criteo.main([*arguments, "--min-count", "3", "--numeric", "both"])
    assert Manifest.load(tmp_path / "out").split("test").rows == 40
    with pytest.raises(SystemExit) as stop:
        criteo.main(arguments)
    assert stop.value.code == 1
    assert "exists already" in capsys.readouterr().err
    criteo.main([*arguments, "--overwrite"])
    for wrong, message in [
        (["--fractions", "8:2"], "three numbers like 8:1:1"),
        (["--split", "last-day"], "takes no fractions"),
        (["--seed", "1"], "takes no seed"),
        (["--encoding", "hash", "--min-count", "3"], "min_count needs encoding 'vocabulary'"),
    ]:
        with pytest.raises(SystemExit):
            criteo.main([*arguments, *wrong])
        assert message in capsys.readouterr().err


REAL_LOG = Path(__file__).parents[3] / "shared" / "data" / "criteo_head80k.parquet"


@pytest.mark.skipif(not REAL_LOG.exists(), reason="needs real Criteo rows, which are not redistributed")
def test_real_criteo_rows_split_by_time(tmp_path: Path) -> None:
    manifest = criteo.prepare(REAL_LOG, tmp_path / "out", split=TIME, min_count=2)
    table = pq.read_table(REAL_LOG)
    assert {name: split.rows for name, split in manifest.splits.items()} == {
        "train": 64_000,
        "validation": 8_000,
        "test": 8_000,
    }
    values = table["C3"].to_pylist()
    ids = truth.vocabulary(values[:64_000], 2)
    assert truth.read(manifest, "test")["C3"] == [ids.get(value, 0) for value in values[72_000:]]
