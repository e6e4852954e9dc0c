"""What batches hold, against the rows of the files and the tensors TorchRec builds from plain lists."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.data.manifest import CategoricalFeature, Split, describe_file
from recemb.data.parquet import ParquetLoader
from tests.data.encoded import replace_split, write_encoded
from tests.data.numbered import assert_same_batch, assert_same_sparse, data_set, from_lists, make, rows_of

LISTS = ("L1", "S1")


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [7, 64, 300])
def test_batches_hold_the_rows_of_the_files_and_the_tensors_torchrec_builds_from_lists(shuffle, batch_size):
    manifest = data_set()
    rows = rows_of(manifest.root)
    for batch in make(manifest, batch_size=batch_size, shuffle=shuffle, shuffle_buffer_rows=150):
        expected = [rows[number] for number in batch.extra["user"]]
        assert_same_sparse(batch.sparse, from_lists(manifest, expected))
        assert batch.dense.dtype == torch.float32 and batch.dense.is_contiguous()
        numeric = [[row[name] for name in manifest.numeric_names] for row in expected]
        assert torch.equal(batch.dense, torch.tensor(numeric, dtype=torch.float32))
        assert batch.labels.dtype == torch.float32
        assert batch.labels.tolist() == [row["label"] for row in expected]


def test_lists_are_empty_whole_and_cut_to_their_latest_entries_in_the_test_data():
    rows = rows_of(data_set().root)
    for name in LISTS:
        lengths = {len(row[name]) for row in rows}
        assert {0, 1, 3, 5} <= lengths


def test_single_id_features_share_lengths_and_offsets_between_batches(tmp_path):
    manifest = write_encoded(tmp_path / "encoded", 1000)
    first, second, *_ = ParquetLoader(manifest, "train", batch_size=100)
    assert first.sparse.lengths().data_ptr() == second.sparse.lengths().data_ptr()
    assert first.sparse.offsets().data_ptr() == second.sparse.offsets().data_ptr()
    rows = [row for path in manifest.files("train") for row in pq.read_table(path).to_pylist()]
    assert_same_sparse(first.sparse, from_lists(manifest, rows[:100]))
    assert_same_sparse(second.sparse, from_lists(manifest, rows[100:200]))


def test_batches_go_through_an_embedding_bag_collection():
    manifest = data_set()
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature.name}",
            num_embeddings=feature.num_embeddings,
            embedding_dim=4,
            feature_names=[feature.name],
        )
        for feature in manifest.categorical
    ]
    collection = EmbeddingBagCollection(tables=tables)
    rows = rows_of(manifest.root)
    batch = next(iter(make(manifest, batch_size=50, shuffle=True)))
    expected = collection(from_lists(manifest, [rows[number] for number in batch.extra["user"]])).values()
    assert torch.equal(collection(batch.sparse).values(), expected)


@pytest.mark.parametrize("num_embeddings", [2**24 + 3, 2**33, None])
def test_ids_at_both_ends_of_their_range_and_above_float32_integers_are_exact(tmp_path, num_embeddings):
    largest = num_embeddings - 1 if num_embeddings else 2**63 - 1
    ids = np.array([0, 1, 2**24, 2**24 + 1, largest - 1, largest] * 20)
    manifest = write_encoded(tmp_path / "encoded", 120, split_fractions={"train": 1.0}, row_group_rows=50)
    path = manifest.files("train")[0]
    table = pq.read_table(path)
    kind = pa.int32() if largest < 2**31 else pa.int64()
    bags = pa.ListArray.from_arrays(pa.array(np.arange(121, dtype=np.int32)), pa.array(ids, kind))
    table = table.set_column(table.schema.get_field_index("C2"), "C2", pa.array(ids, kind)).append_column("L1", bags)
    pq.write_table(table, path, row_group_size=50)
    features = [*manifest.categorical, CategoricalFeature("L1", num_embeddings, "list")]
    features[1] = CategoricalFeature("C2", num_embeddings)
    manifest = dataclasses.replace(
        manifest, categorical=tuple(features), splits={"train": Split((describe_file(manifest.root, path),))}
    )
    batches = list(ParquetLoader(manifest, "train", batch_size=31, shuffle=True, extra_columns=["C2"]))
    for name in ("C2", "L1"):
        found = np.concatenate([batch.sparse[name].values().numpy() for batch in batches])
        assert np.array_equal(found, np.concatenate([batch.extra["C2"] for batch in batches]))
        assert sorted(found) == sorted(ids)


def test_a_split_without_numeric_or_without_categorical_features(tmp_path):
    only_ids = write_encoded(tmp_path / "ids", 100, numeric=0)
    batch = next(iter(ParquetLoader(only_ids, "train", batch_size=10)))
    assert batch.dense.shape == (10, 0) and batch.sparse.values().shape == (30,)
    only_numbers = write_encoded(tmp_path / "numbers", 100, categorical=())
    batch = next(iter(ParquetLoader(only_numbers, "train", batch_size=10)))
    assert batch.dense.shape == (10, 3) and batch.sparse.keys() == [] and batch.sparse.stride() == 10


def test_extra_columns_of_every_kind_stay_with_their_rows(tmp_path):
    manifest = write_encoded(tmp_path / "encoded", 300, split_fractions={"train": 1.0}, row_group_rows=50)
    path = manifest.files("train")[0]
    table = pq.read_table(path).append_column("site", pa.array([f"site-{row % 7}" for row in range(300)]))
    table = table.append_column("row", pa.array(np.arange(300)))
    pq.write_table(table, path, row_group_size=50)
    manifest = replace_split(manifest, "train", [describe_file(manifest.root, path)])
    names = ["site", "row", "true_probability", "C1", "label"]
    for batch in ParquetLoader(manifest, "train", batch_size=41, shuffle=True, extra_columns=names):
        assert sorted(batch.extra) == sorted(names)
        for position, row in enumerate(batch.extra["row"]):
            assert batch.extra["site"][position] == f"site-{row % 7}"
        assert np.array_equal(batch.extra["C1"], batch.sparse["C1"].values().numpy())
        assert np.array_equal(batch.extra["label"], batch.labels.numpy())
        expected = table["true_probability"].to_numpy()[batch.extra["row"]]
        assert np.array_equal(batch.extra["true_probability"], expected)


def test_batches_do_not_change_while_later_windows_are_read():
    """Window buffers are used again; what was handed out must not lie in them."""
    manifest = data_set()
    arguments = {"batch_size": 50, "shuffle": True, "shuffle_buffer_rows": 64}
    kept = list(make(manifest, **arguments))
    for batch, again in zip(kept, make(manifest, **arguments), strict=True):
        assert_same_batch(batch, again)


def test_to_moves_tensors_and_keeps_the_rest():
    batch = next(iter(make(data_set(), batch_size=10)))
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert {moved.dense.device.type, moved.labels.device.type, moved.sparse.device().type} == {"meta"}
    assert moved.sparse.length_per_key() == batch.sparse.length_per_key()
    assert moved.extra is batch.extra and len(moved) == 10


@pytest.mark.gpu
def test_to_gives_equal_batches_on_a_gpu():
    batch = next(iter(make(data_set(), batch_size=10)))
    assert_same_batch(batch.to("cuda").to("cpu"), batch)
