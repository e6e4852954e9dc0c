"""The manifest: saved and read back, refused when it is of another version; and that splits share no rows."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recemb.data.manifest import FILE_NAME, CategoricalFeature, Manifest, describe_file
from tests.data.encoded import replace_split, write_encoded


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_encoded(tmp_path / "encoded", 2000, lists=(40,), num_users=20, row_group_rows=100, files_per_split=2)


def test_a_manifest_reads_back_equal(manifest):
    assert Manifest.load(manifest.root) == manifest
    Manifest.load(manifest.root).verify(checksums=True)


def test_a_directory_without_manifest_is_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="its preparation did not finish"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version must be 1, got 99"),
        ({"schema_version": None}, "schema_version must be 1, got None"),
        ({"colour": "red"}, "fields do not match schema version 1.*colour"),
        ({"numeric": [{"nome": "I1"}]}, "fields do not match schema version 1.*nome"),
    ],
)
def test_a_manifest_of_another_version_is_an_error(manifest, change, message):
    path = manifest.root / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        Manifest.load(manifest.root)


def test_a_manifest_that_is_not_json_or_lacks_a_field_is_an_error(manifest):
    path = manifest.root / FILE_NAME
    content = json.loads(path.read_text())
    del content["splits"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="fields do not match schema version 1: 'splits'"):
        Manifest.load(manifest.root)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Manifest.load(manifest.root)


def test_features_of_unknown_kind_or_without_ids_are_errors():
    with pytest.raises(ValueError, match="'C1': kind must be 'single', 'list' or 'sequence', got 'bag'"):
        CategoricalFeature("C1", 5, "bag")
    with pytest.raises(ValueError, match="'C1': num_embeddings must be at least 1, got 0"):
        CategoricalFeature("C1", 0)


def test_train_counts_are_the_rows_of_train_per_id(manifest):
    ids = np.concatenate([pq.read_table(path)["C2"].to_numpy() for path in manifest.files("train")])
    counts = manifest.train_counts("C2").to_numpy()
    assert np.array_equal(counts, np.bincount(ids, minlength=100))
    assert all(counts[1:-1] >= counts[2:])
    with pytest.raises(ValueError, match="'I1' has no vocabulary, so no train counts"):
        manifest.train_counts("I1")


def test_a_changed_byte_shows_in_the_checksum(manifest):
    path = manifest.files("test")[1]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(bytes(content))
    manifest.verify()
    with pytest.raises(ValueError, match=r"test/part-00001.parquet: checksum \w+ in manifest.json, \w+ on disk"):
        manifest.verify(checksums=True)


def copied(manifest: Manifest, table: pa.Table, **writing) -> Manifest:
    """The data set with ``table`` as one more file of the test split."""
    path = manifest.root / "test" / "copy.parquet"
    pq.write_table(table, path, **writing)
    return replace_split(manifest, "test", [*manifest.splits["test"].files, describe_file(manifest.root, path)])


def test_the_same_file_in_two_splits_is_found(manifest):
    path = manifest.root / "test" / "copy.parquet"
    shutil.copy(manifest.files("train")[0], path)
    manifest = replace_split(manifest, "test", [describe_file(manifest.root, path)])
    with pytest.raises(ValueError, match=r"copy.parquet: split 'test' shares this file's rows with split 'train'"):
        manifest.verify()


@pytest.mark.parametrize("row_group_rows", [90, 800])
def test_a_file_copied_in_another_order_and_compression_is_found(manifest, row_group_rows):
    table = pq.read_table(manifest.files("train")[1])
    table = table.take(np.random.default_rng(0).permutation(len(table)))
    changed = copied(manifest, table, compression="snappy", use_dictionary=False, row_group_size=row_group_rows)
    with pytest.raises(ValueError, match=r"test/copy.parquet.* holds the same 800 rows as .*train/part-00001.parquet"):
        changed.verify()


def test_a_single_row_group_copied_among_others_is_found(manifest):
    stolen = pq.ParquetFile(manifest.files("train")[0]).read_row_group(3)
    own = pq.read_table(manifest.files("validation")[0])
    table = pa.concat_tables([own.slice(0, 100).take(np.arange(100)[::-1]), stolen])
    path = manifest.root / "test" / "copy.parquet"
    pq.write_table(table.slice(100), path, row_group_size=100)
    manifest = replace_split(manifest, "test", [*manifest.splits["test"].files, describe_file(manifest.root, path)])
    with pytest.raises(ValueError, match=r"copy.parquet, row group 0, of split 'test' holds the same 100 rows"):
        manifest.verify()


def test_a_split_that_is_train_again_in_other_files_is_found(manifest):
    table = pa.concat_tables([pq.read_table(path) for path in manifest.files("train")])
    entries = []
    for number, (first, rows) in enumerate([(0, 500), (500, 1100)]):
        path = manifest.root / "validation" / f"again-{number}.parquet"
        pq.write_table(table.slice(first, rows), path, row_group_size=130)
        entries.append(describe_file(manifest.root, path))
    manifest = replace_split(manifest, "validation", entries)
    with pytest.raises(ValueError, match=r"the whole of split 'validation' holds the same 1600 rows as the whole"):
        manifest.verify()


def test_honest_splits_of_a_log_with_many_duplicates_pass(tmp_path):
    """Six bits a row: every row of test occurs in train too, and row groups agree in all their bounds."""
    manifest = write_encoded(tmp_path / "encoded", 2000, numeric=0, categorical=(2, 2, 2), row_group_rows=100)
    for split in manifest.splits:
        path = manifest.files(split)[0]
        pq.write_table(pq.read_table(path).drop_columns(["true_probability"]), path, row_group_size=100)
        manifest = replace_split(manifest, split, [describe_file(manifest.root, path)])
    manifest.verify()


def test_honest_row_groups_that_agree_in_their_bounds_pass(tmp_path):
    manifest = write_encoded(tmp_path / "encoded", 4000, numeric=0, categorical=(40, 3), row_group_rows=200)
    for split in manifest.splits:
        path = manifest.files(split)[0]
        table = pq.read_table(path).drop_columns(["true_probability"])
        ids = table["C1"].to_numpy().copy()
        ids[::200], ids[1::200] = 0, 39
        table = table.set_column(table.schema.get_field_index("C1"), "C1", pa.array(ids))
        pq.write_table(table, path, row_group_size=200)
        manifest = replace_split(manifest, split, [describe_file(manifest.root, path)])
    manifest.verify()


def test_splits_without_rows_share_nothing(manifest):
    manifest = replace_split(replace_split(manifest, "test", []), "validation", [])
    manifest.verify()


def test_saving_replaces_the_file_at_once_and_leaves_nothing_behind(manifest):
    dataclasses.replace(manifest, source="criteo").save()
    assert Manifest.load(manifest.root).source == "criteo"
    assert [path.name for path in manifest.root.iterdir() if path.name.startswith(".")] == []


def test_sequences_are_parallel_unless_they_name_another_list_of_events():
    assert CategoricalFeature("item_history", 5, "sequence", table="item").events == "history"
    assert CategoricalFeature("bought", 5, "sequence", table="item", events="purchases").events == "purchases"
    with pytest.raises(ValueError, match="'item': events is for sequences, got kind 'single'"):
        CategoricalFeature("item", 5, events="history")
