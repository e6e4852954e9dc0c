"""A data set whose rows know their number, and the plain-list truth that its batches are compared with."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.data.batch import Batch
from recemb.data.manifest import Manifest, describe_file
from recemb.data.parquet import ParquetLoader
from tests.data.encoded import replace_split, write_encoded


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
