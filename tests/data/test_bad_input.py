"""Every broken rule of the format is an error that says where and what, from the loader and the check before it."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recemb.data.checks import check_split
from recemb.data.label_classes import check_both_labels, only_label
from recemb.data.manifest import CategoricalFeature, DataFile, Manifest, describe_file
from recemb.data.parquet import ParquetLoader
from tests.data.encoded import replace_split, rewrite_column, write_encoded

# Row 130 of 240 in row groups of 50 is row 30 of row group 2.
BAD_ROW = 130
PLACE = r"train/part-00000.parquet: row group 2, column '{column}', row 30 \(row 130 of the file\)"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_encoded(tmp_path / "encoded", 300, lists=(40,), row_group_rows=50)


def column_of(manifest: Manifest, name: str) -> list:
    return pq.read_table(manifest.files("train")[0], columns=[name])[name].to_pylist()


def damaged(manifest: Manifest, column: str, value, kind: pa.DataType) -> Manifest:
    values = column_of(manifest, column)
    values[BAD_ROW] = value
    return rewrite_column(manifest, "train", column, pa.array(values, kind))


def read_all(manifest: Manifest, **arguments) -> None:
    for _ in ParquetLoader(manifest, "train", batch_size=16, **arguments):
        pass


BAD_VALUES = [
    ("label", 2, pa.int8(), "a label must be 0 or 1, got 2"),
    ("label", -1, pa.int8(), "a label must be 0 or 1, got -1"),
    ("label", None, pa.int8(), "must not be null, got null"),
    ("I2", float("nan"), pa.float32(), "numeric values must be finite, got nan"),
    ("I2", float("-inf"), pa.float32(), "numeric values must be finite, got -inf"),
    ("I3", None, pa.float32(), "must not be null, got null"),
    ("C1", -1, pa.int32(), r"an id must be in \[0, 20\) \(num_embeddings\), got -1"),
    ("C3", 1000, pa.int32(), r"an id must be in \[0, 1000\) \(num_embeddings\), got 1000"),
    ("C3", 2**40, pa.int64(), r"an id must be in \[0, 1000\) \(num_embeddings\), got 1099511627776"),
    ("C1", None, pa.int32(), "must not be null, got null"),
    ("L1", None, pa.list_(pa.int32()), "must not be null, got null"),
]
BAD_ENTRIES = [
    ([7, 40], r", entry 1: an id must be in \[0, 40\) \(num_embeddings\), got 40"),
    ([7, -3, 1], r", entry 1: an id must be in \[0, 40\) \(num_embeddings\), got -3"),
    ([7, 8, None], ", entry 2: must not be null, got null"),
]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("column", "value", "kind", "rule"), BAD_VALUES)
def test_the_loader_names_file_row_group_column_row_rule_and_value(manifest, column, value, kind, rule, shuffle):
    manifest = damaged(manifest, column, value, kind)
    with pytest.raises(ValueError, match=f"{PLACE.format(column=column)}: {rule}"):
        read_all(manifest, shuffle=shuffle, shuffle_buffer_rows=120)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("entries", "rule"), BAD_ENTRIES)
def test_the_loader_names_the_entry_of_a_list(manifest, entries, rule, shuffle):
    manifest = damaged(manifest, "L1", entries, pa.list_(pa.int32()))
    with pytest.raises(ValueError, match=PLACE.format(column="L1") + rule):
        read_all(manifest, shuffle=shuffle, shuffle_buffer_rows=120)


def test_a_negative_hashed_id_is_an_error(manifest):
    features = (CategoricalFeature("C1", None), *manifest.categorical[1:])
    manifest = dataclasses.replace(damaged(manifest, "C1", -5, pa.int64()), categorical=features)
    with pytest.raises(ValueError, match=PLACE.format(column="C1") + ": a hashed id must not be negative, got -5"):
        read_all(manifest)


def test_batches_before_the_bad_window_still_come_and_count(manifest, monkeypatch):
    monkeypatch.setattr("recemb.data.parquet.READ_ROWS", 50)
    loader = ParquetLoader(damaged(manifest, "C1", -1, pa.int32()), "train", batch_size=25)
    with pytest.raises(ValueError, match="row group 2"):
        for _ in loader:
            pass
    assert loader.state_dict()["batch"] == 4


@pytest.mark.parametrize(
    ("column", "kind", "required"),
    [
        ("label", pa.int32(), r"\(label\) must be int8, got int32"),
        ("I1", pa.float64(), r"\(numeric\) must be float, got double"),
        ("C1", pa.float32(), r"\(single\) must be int32 or int64, got float"),
        ("C1", pa.string(), r"\(single\) must be int32 or int64, got string"),
    ],
)
@pytest.mark.parametrize("check", [read_all, lambda manifest: check_split(manifest, "train")])
def test_a_column_of_another_type_is_an_error_before_reading(manifest, column, kind, required, check):
    values = pa.array(column_of(manifest, column)).cast(kind)
    manifest = rewrite_column(manifest, "train", column, values)
    with pytest.raises(ValueError, match=f"part-00000.parquet: column '{column}' {required}"):
        check(manifest)


@pytest.mark.parametrize("check", [read_all, lambda manifest: check_split(manifest, "train")])
def test_a_missing_column_is_an_error_that_lists_those_there_are(manifest, check):
    path = manifest.files("train")[0]
    pq.write_table(pq.read_table(path).drop_columns(["C2"]), path)
    manifest = replace_split(manifest, "train", [describe_file(manifest.root, path)])
    with pytest.raises(ValueError, match=r"column 'C2' \(single\) must be there once, found 0 times; .*'C1', 'C3'"):
        check(manifest)


def test_a_list_feature_in_a_single_column_is_an_error(manifest):
    manifest = rewrite_column(manifest, "train", "L1", pa.array(np.zeros(240, np.int32)))
    with pytest.raises(ValueError, match=r"'L1' \(jagged\) must be list<int32> or list<int64>, got int32"):
        read_all(manifest)


def test_extra_columns_must_be_flat_there_and_without_nulls(manifest):
    with pytest.raises(ValueError, match=r"column 'user' \(extra\) must be there once, found 0 times"):
        read_all(manifest, extra_columns=["user"])
    with pytest.raises(ValueError, match=r"column 'L1' \(extra\) must be integer, .*, got list"):
        read_all(manifest, extra_columns=["L1"])
    manifest = damaged(manifest, "true_probability", None, pa.float32())
    with pytest.raises(ValueError, match=PLACE.format(column="true_probability") + ": must not be null, got null"):
        read_all(manifest, extra_columns=["true_probability"])
    read_all(manifest)


@pytest.mark.parametrize("check", [read_all, lambda manifest: check_split(manifest, "train"), Manifest.verify])
def test_a_missing_file_is_an_error(manifest, check):
    manifest.files("train")[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"train/part-00000.parquet: listed in manifest.json, not on disk"):
        check(manifest)


def test_a_truncated_file_is_an_error(manifest):
    path = manifest.files("train")[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"part-00000.parquet: not a readable Parquet file: truncated or replaced"):
        read_all(manifest)
    with pytest.raises(ValueError, match=r"bytes in manifest.json, \d+ on disk: truncated or replaced"):
        check_split(manifest, "train")


def test_a_damaged_page_is_an_error_that_names_row_group_and_column(manifest):
    path = manifest.files("train")[0]
    metadata = pq.read_metadata(path)
    position = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)].index("I2")
    column = metadata.row_group(3).column(position)
    content = bytearray(path.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    for byte in range(first, first + column.total_compressed_size):
        content[byte] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"part-00000.parquet: row group 3, column 'I2': cannot be decoded"):
        read_all(manifest, shuffle=True)


def test_other_row_counts_than_the_manifest_says_are_an_error(manifest):
    entry = manifest.splits["train"].files[0]
    wrong = replace_split(manifest, "train", [DataFile(entry.path, 239, entry.bytes, entry.checksum)])
    for check in (read_all, lambda manifest: check_split(manifest, "train"), Manifest.verify):
        with pytest.raises(ValueError, match=r"239 rows in manifest.json, 240 in the file"):
            check(wrong)


# Statistics leave NaN out and count empty lists as nulls.
VISIBLE = [case for case in BAD_VALUES if not (case[1] != case[1] or case[0] == "L1")]


@pytest.mark.parametrize(("column", "value", "kind", "rule"), VISIBLE)
def test_the_check_before_training_finds_the_row_by_statistics(manifest, column, value, kind, rule, monkeypatch):
    check_split(manifest, "train")
    manifest = damaged(manifest, column, value, kind)
    read = []
    original = pq.ParquetFile.read_row_groups

    def counted(self, row_groups, *args, **kwargs):
        read.extend(row_groups)
        return original(self, row_groups, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    with pytest.raises(ValueError, match=f"{PLACE.format(column=column)}: {rule}"):
        check_split(manifest, "train")
    assert read == [2]


@pytest.mark.parametrize(("entries", "rule"), BAD_ENTRIES[:2])
def test_the_check_before_training_finds_bad_entries_of_lists(manifest, entries, rule):
    manifest = damaged(manifest, "L1", entries, pa.list_(pa.int32()))
    with pytest.raises(ValueError, match=PLACE.format(column="L1") + rule):
        check_split(manifest, "train")


def test_the_check_before_training_accepts_files_without_statistics(manifest):
    path = manifest.files("train")[0]
    pq.write_table(pq.read_table(path), path, write_statistics=False)
    check_split(replace_split(manifest, "train", [describe_file(manifest.root, path)]), "train")


@pytest.mark.parametrize("write_statistics", [True, False])
@pytest.mark.parametrize("label", [0, 1])
def test_a_split_of_one_class_is_refused_with_its_counts_also_without_statistics(tmp_path, label, write_statistics):
    manifest = write_encoded(tmp_path / "encoded", 400, row_group_rows=10, files_per_split=2)
    labels = pa.array([label] * 20, pa.int8())
    for file in (0, 1):
        check_both_labels(manifest, "test")
        manifest = rewrite_column(manifest, "test", "label", labels, file=file)
        path = manifest.files("test")[file]
        pq.write_table(pq.read_table(path), path, row_group_size=10, write_statistics=write_statistics)
        manifest = replace_split(
            manifest, "test", [describe_file(manifest.root, path) for path in manifest.files("test")]
        )
    counts = f"got {40 * label} rows with label 1 and {40 - 40 * label} with label 0"
    with pytest.raises(ValueError, match=rf"encoded: split 'test': labels of both classes are required, {counts}"):
        check_both_labels(manifest, "test")
    for split in manifest.splits:
        seen = {value for path in manifest.files(split) for value in pq.read_table(path)["label"].to_pylist()}
        assert only_label(manifest, split) == (seen.pop() if len(seen) == 1 else None)
