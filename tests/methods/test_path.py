"""Path-based embeddings against a plain loop, and grouped layers against a loop over rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.memory import estimate_memory
from recemb.methods.path import Path
from tests.embedding_cases import MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("hidden_units", [None, 3, 16])
@pytest.mark.parametrize("num_collisions", [1, 4, 77])
def test_vectors_equal_the_formula(ids: list[list[list[int]]], hidden_units: int | None, num_collisions: int) -> None:
    method = partial(Path, num_collisions=num_collisions, hidden_units=hidden_units)
    # The table that stays full comes first, so that the ranges of the others begin behind it.
    collection = CompressedEmbeddingBagCollection(small_tables()[::-1], method)
    group = group_of(collection)
    assert isinstance(group, Path)
    for parameter in group.layers.parameters():
        torch.nn.init.normal_(parameter)
    rows = rows_of(group)

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        t = [each.name for each in group.tables].index(config.name)
        start, first_map = 0, 0
        for before, c in zip(group.tables[:t], group.num_collisions[:t], strict=True):
            start += -(-before.num_embeddings // c)
            first_map += c if c > 1 else 0
        c = group.num_collisions[t]
        m = -(-config.num_embeddings // c)
        row = rows[start + value % m]
        for number, layer in enumerate(group.layers if c > 1 else []):
            row = torch.relu(row) if number else row
            weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
            row = row @ weight[first_map + value // m] + bias[first_map + value // m]
        return row.detach()

    check_batch(collection, vector, ids)
    if num_collisions == 4 and hidden_units is None:
        assert group.num_collisions == [1, 4, 4, 4]


def test_sizes_follow_the_formula() -> None:
    tables = [table("a", 10_001, dim=16), table("b", 60, dim=16)]
    linear = estimate_memory(tables, partial(Path, num_collisions=4))
    # The 60-row table stays full: even 2 maps of 17 rows' size each beside 30 rows are no less.
    assert linear.table_bytes == (2501 + 60) * 16 * 4
    assert linear.dense_bytes == 4 * (16 * 16 + 16) * 4
    deep = estimate_memory(tables, partial(Path, num_collisions=4, hidden_units=64))
    assert deep.dense_bytes == 4 * (2 * 16 * 64 + 64 + 16) * 4


@pytest.mark.parametrize("hidden_units", [None, 32])
def test_bytes_fall_with_the_knob_and_never_exceed_full(hidden_units: int | None) -> None:
    reports = [
        estimate_memory(small_tables(), partial(Path, num_collisions=c, hidden_units=hidden_units))
        for c in range(1, 79)
    ]
    sizes = [report.serving_bytes for report in reports]
    assert sizes == sorted(sizes, reverse=True)
    assert all(report.table_bytes + report.dense_bytes <= report.full_bytes for report in reports)
    assert reports[0].table_bytes == reports[0].full_bytes


@pytest.mark.parametrize("hidden_units", [None, 64])
def test_vectors_start_with_the_variance_of_a_full_table(hidden_units: int | None) -> None:
    torch.manual_seed(0)
    n = 50_000
    method = partial(Path, num_collisions=30, hidden_units=hidden_units)
    collection = CompressedEmbeddingBagCollection([table("a", n, dim=16)], method)
    assert 0.8 < float(all_vectors(collection, "a", n).var()) * 3 * n < 1.25


def test_ids_of_one_row_differ_and_quotients_of_large_ids_are_exact() -> None:
    n, c = 2**26, 2048
    collection = CompressedEmbeddingBagCollection([table("a", n, dim=4)], partial(Path, num_collisions=c))
    group = group_of(collection)
    assert isinstance(group, Path)
    large = [2**24 + 1, 2**24 + 1 + n // c, n - 1]
    output = collection(bags(["a"], [[[value] for value in large]]))["a"]
    for row, value in zip(output, large, strict=True):
        expected = rows_of(group)[value % (n // c)] @ group.layers[0].weight[value // (n // c)]  # type: ignore[index]
        torch.testing.assert_close(row, expected)
    assert not torch.equal(output[0], output[1])


def test_full_tables_alone_need_no_maps() -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), partial(Path, num_collisions=1))
    group = group_of(collection)
    assert isinstance(group, Path)
    assert len(group.layers) == 0
    assert collection(bags(["ad", "target", "history", "site", "one"], SINGLE)).values().shape == (3, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_collisions": 0}, "must be at least 1, got 0 and 2"),
        ({"num_collisions": 4, "hidden_units": 0}, "hidden_units must be at least 1, or None for linear maps, got 0"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Path([table("a", 10)], **options)
