"""The loader against the rows of the files themselves: coverage, order, resuming, KeyedJaggedTensor, exact ids."""

import dataclasses
import functools
import itertools
import json
import tempfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.data.batch import Batch
from recemb.data.manifest import CategoricalFeature, Manifest, Split, describe_file
from recemb.data.parquet import ParquetLoader
from tests.data.encoded import replace_split, write_encoded

LISTS = ("L1", "S1")


@functools.cache
def data_set(rows: int = 500, row_group_rows: int = 64, files: int = 2) -> Manifest:
    """A data set with every kind of column; ``user`` is the number of the row, so that rows can be told apart."""
    root = Path(tempfile.mkdtemp()) / "encoded"
    manifest = write_encoded(
        root,
        rows,
        lists=(40,),
        sequences=(50,),
        max_length=3,
        num_users=9,
        row_group_rows=row_group_rows,
        files_per_split=files,
        split_fractions={"train": 1.0},
    )
    first = 0
    entries = []
    for path in manifest.files("train"):
        table = pq.read_table(path)
        number = pa.array(np.arange(first, first + len(table)))
        table = table.set_column(table.schema.get_field_index("user"), "user", number)
        pq.write_table(table, path, row_group_size=row_group_rows)
        entries.append(describe_file(root, path))
        first += len(table)
    return replace_split(manifest, "train", entries)


@functools.cache
def rows_of(manifest_root: Path) -> list[dict]:
    manifest = Manifest.load(manifest_root)
    return [row for path in manifest.files("train") for row in pq.read_table(path).to_pylist()]


def row_numbers(batches: list[Batch]) -> list[int]:
    return [int(number) for batch in batches for number in batch.extra["user"]]


def make(manifest: Manifest, **arguments) -> ParquetLoader:
    return ParquetLoader(manifest, "train", extra_columns=["user"], **arguments)


def from_lists(manifest: Manifest, rows: list[dict]) -> KeyedJaggedTensor:
    """The batch's KeyedJaggedTensor as TorchRec builds it from plain Python lists."""
    lengths, values = [], []
    for feature in manifest.categorical:
        for row in rows:
            bag = row[feature.name] if feature.kind != "single" else [row[feature.name]]
            bag = bag if feature.max_length is None else bag[-feature.max_length :]
            lengths.append(len(bag))
            values += bag
    return KeyedJaggedTensor.from_lengths_sync(
        manifest.feature_names, torch.tensor(values, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int32)
    )


def assert_same_sparse(found: KeyedJaggedTensor, expected: KeyedJaggedTensor) -> None:
    assert found.keys() == expected.keys()
    assert found.stride() == expected.stride()
    assert found.values().dtype == torch.int64 and torch.equal(found.values(), expected.values())
    assert found.lengths().dtype == torch.int32 and torch.equal(found.lengths(), expected.lengths())
    assert torch.equal(found.offsets(), expected.offsets().long())
    assert found.length_per_key() == expected.length_per_key()
    assert found.offset_per_key() == expected.offset_per_key()
    for key in found.keys():  # noqa: SIM118 a KeyedJaggedTensor is no dict
        assert torch.equal(found[key].values(), expected[key].values())
        assert torch.equal(found[key].lengths(), expected[key].lengths())


def assert_same_batch(left: Batch, right: Batch) -> None:
    assert torch.equal(left.dense, right.dense) and torch.equal(left.labels, right.labels)
    assert_same_sparse(left.sparse, right.sparse)
    assert left.extra.keys() == right.extra.keys()
    assert all(np.array_equal(left.extra[name], right.extra[name]) for name in left.extra)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    world_size=st.integers(1, 7),
    batch_size=st.sampled_from([1, 2, 3, 7, 50, 64, 100, 499, 500, 501, 2000]),
    layout=st.sampled_from([(500, 64, 2), (37, 5, 3), (101, 1, 1), (64, 1000, 1)]),
    shuffle=st.booleans(),
    buffer_rows=st.sampled_from([1, 10, 130, 10_000]),
    seed=st.integers(0, 3),
)
def test_every_row_comes_exactly_once_on_one_rank_in_equally_many_batches(
    world_size, batch_size, layout, shuffle, buffer_rows, seed
):
    manifest = data_set(*layout)
    seen, batches_per_rank = [], set()
    for rank in range(world_size):
        loader = make(
            manifest,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            shuffle_buffer_rows=buffer_rows,
        )
        batches = list(loader)
        sizes = [len(batch) for batch in batches]
        assert len(batches) == len(loader)
        assert sum(sizes) == loader.num_rows
        assert all(size == batch_size for size in sizes[:-1])
        assert 1 <= sizes[-1] <= batch_size + (world_size > 1)
        batches_per_rank.add(len(batches))
        seen += row_numbers(batches)
    assert len(batches_per_rank) == 1
    assert sorted(seen) == list(range(layout[0]))


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


def test_without_shuffling_ranks_read_consecutive_parts_of_the_files_in_order():
    manifest = data_set()
    ranks = [list(make(manifest, batch_size=64, rank=rank, world_size=3)) for rank in range(3)]
    assert [number for batches in ranks for number in row_numbers(batches)] == list(range(500))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    manifest = data_set()

    def epochs(seed: int) -> list[list[int]]:
        loader = make(manifest, batch_size=60, shuffle=True, seed=seed, shuffle_buffer_rows=200)
        return [row_numbers(list(loader)) for _ in range(2)]

    assert epochs(1) == epochs(1)
    assert len({tuple(order) for order in [*epochs(1), *epochs(2)]}) == 4


def test_a_window_mixes_rows_of_several_row_groups_and_files():
    order = row_numbers(list(make(data_set(), batch_size=500, shuffle=True, shuffle_buffer_rows=192)))
    row_groups = {number // 64 for number in order[:64]}
    assert len(row_groups) >= 3
    # Hardly any row is still followed by the one that follows it in the file.
    assert sum(b == a + 1 for a, b in itertools.pairwise(order)) < 10


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch_size=st.sampled_from([1, 7, 64, 130, 600]),
    world=st.sampled_from([(0, 1), (1, 3), (6, 7)]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2),
    share=st.floats(0, 1),
)
def test_a_resumed_loader_continues_the_uninterrupted_sequence(batch_size, world, shuffle, epoch, share):
    arguments = {
        "batch_size": batch_size,
        "rank": world[0],
        "world_size": world[1],
        "shuffle": shuffle,
        "shuffle_buffer_rows": 150,
    }
    manifest = data_set(101, 10, 2)
    uninterrupted = make(manifest, **arguments)
    uninterrupted.set_epoch(epoch)
    expected = [*uninterrupted, *uninterrupted]

    before = make(manifest, **arguments)
    before.set_epoch(epoch)
    taken = round(share * len(before))
    iterator = iter(before)
    found = [next(iterator) for _ in range(taken)]
    state = json.loads(json.dumps(before.state_dict()))
    iterator.close()

    after = make(manifest, **arguments)
    after.load_state_dict(state)
    assert after.epoch == epoch
    found += [*after]
    assert after.epoch == epoch + 1
    found += [*after]
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert_same_batch(left, right)


def test_the_state_counts_batches_consumed_not_those_read_ahead():
    loader = make(data_set(), batch_size=10, shuffle=True, shuffle_buffer_rows=10_000)
    iterator = iter(loader)
    for consumed in range(1, 6):
        next(iterator)
        assert loader.state_dict()["batch"] == consumed


def test_a_second_iterator_goes_on_where_the_first_was_left_and_voids_it():
    loader = make(data_set(), batch_size=100)
    first = iter(loader)
    assert row_numbers([next(first)]) == list(range(100))
    assert row_numbers([next(iter(loader))]) == list(range(100, 200))
    with pytest.raises(RuntimeError, match="this iterator is void"):
        next(first)


def test_resuming_does_not_read_windows_that_are_finished(monkeypatch):
    read = []
    original = pq.ParquetFile.read_row_groups

    def counted(self, row_groups, *args, **kwargs):
        read.extend(row_groups)
        return original(self, row_groups, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    monkeypatch.setattr("recemb.data.parquet.READ_ROWS", 64)
    loader = make(data_set(), batch_size=64)
    loader.load_state_dict({**loader.state_dict(), "batch": 6})
    assert row_numbers(list(loader)) == list(range(384, 500))
    # Two files of 250 rows have row groups of 64, 64, 64 and 58 rows: row 384 lies in the third of the second file.
    assert set(read) == {2, 3}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 11}, "batch_size was 10, is 11"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"world_size": 2}, "world_size was 1, is 2"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"shuffle_buffer_rows": 64}, "window_rows was 128, is 64"),
    ],
)
def test_resuming_with_another_order_is_an_error(changed, message):
    arguments = {"batch_size": 10, "shuffle": True, "shuffle_buffer_rows": 128}
    state = make(data_set(), **arguments).state_dict()
    with pytest.raises(ValueError, match=f"cannot resume the loader of split 'train'.*{message}"):
        make(data_set(), **{**arguments, **changed}).load_state_dict(state)


def test_resuming_on_other_files_or_with_a_foreign_state_is_an_error(tmp_path):
    state = make(data_set(), batch_size=10).state_dict()
    with pytest.raises(ValueError, match="files was"):
        make(data_set(37, 5, 3), batch_size=10).load_state_dict(state)
    with pytest.raises(ValueError, match=r"must have \['epoch', 'batch'\]"):
        loader = make(data_set(), batch_size=10)
        loader.load_state_dict({key: state[key] for key in state if key not in ("epoch", "batch")})
    with pytest.raises(ValueError, match=r"batch must be in \[0, 50\], got 51"):
        make(data_set(), batch_size=10).load_state_dict({**state, "batch": 51})


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


def test_an_abandoned_iterator_stops_its_thread():
    def loader_threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "recemb-loader"]

    iterator = iter(make(data_set(), batch_size=10, shuffle=True, shuffle_buffer_rows=64))
    next(iterator)
    assert loader_threads()
    iterator.close()
    assert not loader_threads()


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\) \(world_size\), got 2"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"shuffle_buffer_rows": 0}, "shuffle_buffer_rows must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParquetLoader(data_set(), "train", **{"batch_size": 10, **arguments})


def test_a_split_that_is_unknown_empty_or_smaller_than_the_ranks_is_an_error(tmp_path):
    manifest = write_encoded(tmp_path / "encoded", 30)
    with pytest.raises(ValueError, match="no split 'holdout'; it has"):
        ParquetLoader(manifest, "holdout", batch_size=10)
    with pytest.raises(ValueError, match="split 'test' has 3 rows; it needs one at least for each of world_size=4"):
        ParquetLoader(manifest, "test", batch_size=10, world_size=4)
    with pytest.raises(ValueError, match="split 'test' has 0 rows"):
        ParquetLoader(replace_split(manifest, "test", []), "test", batch_size=10)
