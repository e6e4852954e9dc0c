"""TT-Rec against the element-wise sum over both ranks, and its traps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.bags import Bags
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.compression import compress_
from recemb.memory import estimate_memory
from recemb.method import WIDEST_ROW
from recemb.methods import tensor_train
from recemb.methods.tensor_train import (
    TensorTrain,
    choose_ranks,
    factorise_columns,
    factorise_rows,
    tensor_train_svd,
)
from tests.embedding_cases import BIG, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of

# Each pair's product by itself or those of a middle row at once; a product for each distinct id or each id.
WAYS = [(True, 0), (True, 1 << 62), (False, 0)]


def plain_vector(method: TensorTrain, name: str, value: int) -> Tensor:
    """Sum over r and s of A[i1][p, r] * B[i2][r, q, s] * C[i3][s, t], element (p, q, t) with p slowest."""
    full = {config.name: config for config in method.full}
    if name in full:
        start = 0
        for config in method.full:
            if config.name == name:
                return rows_of(method, len(method.lookups) - 1)[start + value]
            start += config.num_embeddings
    firsts = [0, 0, 0]
    for config in method.decomposed:
        sizes = factorise_rows(config.num_embeddings)
        if config.name == name:
            break
        firsts = [first + size for first, size in zip(firsts, sizes, strict=True)]
    _, n2, n3 = sizes
    indices = (value // (n2 * n3), value // n3 % n2, value % n3)
    d1, d2, d3 = method.column_factors
    first_rank, second_rank = method.ranks
    a, b, c = (rows_of(method, k)[firsts[k] + indices[k]].tolist() for k in range(3))
    vector = []
    for p in range(d1):
        for q in range(d2):
            for t in range(d3):
                total = 0.0
                for r in range(first_rank):
                    for s in range(second_rank):
                        total += a[p * first_rank + r] * b[(r * d2 + q) * second_rank + s] * c[s * d3 + t]
                vector.append(total)
    return torch.tensor(vector)


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        *(({"rank": rank}, (rank, rank)) for rank in (1, 3, 8, 20, 200)),
        # Whose nearest ranks differ.
        ({"num_parameters": 15_000}, None),
    ],
)
@pytest.mark.parametrize(("merge_ids", "group_from"), WAYS)
def test_vectors_equal_a_plain_sum_over_ranks(
    ids: list[list[list[int]]],
    options: dict[str, int],
    ranks: tuple[int, int] | None,
    merge_ids: bool,
    group_from: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensor_train, "_GROUP_FROM", group_from)
    method = partial(TensorTrain, merge_ids=merge_ids, **options)
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    group = group_of(collection)
    assert isinstance(group, TensorTrain)
    assert group.ranks == ranks if ranks is not None else group.ranks[0] != group.ranks[1]
    assert bool(group.decomposed) is (ranks != (200, 200))

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        return plain_vector(group, config.name, value)

    check_batch(collection, vector, ids)


def test_merging_ids_and_grouping_pairs_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for merge_ids, group_from in WAYS:
        monkeypatch.setattr(tensor_train, "_GROUP_FROM", group_from)
        torch.manual_seed(0)
        method = partial(TensorTrain, rank=4, merge_ids=merge_ids)
        collection = CompressedEmbeddingBagCollection(small_tables(), method)
        output = collection(bags(["ad", "target", "history", "site", "one"], MULTI_HOT)).values()
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        gradients.append([parameter.grad for parameter in collection.parameters()])
    grouped, merged, plain = gradients
    torch.testing.assert_close(grouped, plain)
    torch.testing.assert_close(merged, plain)


def test_large_middle_rows_are_read_once_a_batch() -> None:
    torch.manual_seed(0)
    # (40, 40, 40) rows; the middle ones of 2 * 32 * 32 floats.
    collection = CompressedEmbeddingBagCollection([table("a", 64_000)], partial(TensorTrain, rank=32))
    group = group_of(collection)
    ids = torch.randint(64_000, (500,)).tolist()
    [[first], [middle], [third]] = group.remap(Bags.of(bags(["a"], [[[value] for value in ids]])))
    assert sorted(middle.tolist()) == sorted({value // 40 % 40 for value in ids})
    pairs = [value // 40 for value in ids]
    assert sorted(first.tolist()) == sorted(pair // 40 for pair in set(pairs))
    assert sorted(third.tolist()) == sorted(value % 40 for value in set(ids))
    # Few pairs a row: copies of rows cost less than products one by one.
    [[first], [middle], _] = group.remap(Bags.of(bags(["a"], [[[0], [1], [1600]]])))
    assert (first.tolist(), middle.tolist()) == ([0, 1], [0, 0])


@given(st.integers(1, 2**40))
def test_rows_are_factorised_near_the_cube_root(num_embeddings: int) -> None:
    n1, n2, n3 = factorise_rows(num_embeddings)
    assert n1 * n2 * n3 >= num_embeddings
    root = num_embeddings ** (1 / 3)
    assert max(n1, n2, n3) <= root + 2
    # No slice of the first core is without ids.
    assert (n1 - 1) * n2 * n3 < num_embeddings


def test_factors_of_known_sizes() -> None:
    assert sorted(factorise_rows(10_131_227)) == [216, 217, 217]
    assert factorise_rows(1) == (1, 1, 1)
    assert factorise_rows(10**9) == (1000, 1000, 1000)
    assert [factorise_columns(dim) for dim in (8, 16, 32, 64, 12)] == [
        (2, 2, 2),
        (2, 2, 4),
        (4, 2, 4),
        (4, 4, 4),
        (2, 2, 3),
    ]


def test_ids_above_float32_integers_stay_apart() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 2**26)], partial(TensorTrain, rank=4))
    group = group_of(collection)
    assert isinstance(group, TensorTrain)
    output = collection(bags(["a"], [[[BIG], [BIG + 1], [2**26 - 1]]]))["a"]
    for row, value in zip(output, (BIG, BIG + 1, 2**26 - 1), strict=True):
        torch.testing.assert_close(row, plain_vector(group, "t_a", value))
    assert torch.unique(output, dim=0).shape[0] == 3


def test_tables_that_cores_would_not_shrink_stay_full() -> None:
    tables = [table("a", 50), table("b", 100_000)]
    report = estimate_memory(tables, partial(TensorTrain, rank=8))
    sizes = {physical.name: (physical.num_embeddings, physical.embedding_dim) for physical in report.tables}
    n1, n2, n3 = factorise_rows(100_000)
    assert sizes == {
        "tensor_train__0": (n1, 16),
        "tensor_train__1": (n2, 128),
        "tensor_train__2": (n3, 16),
        "tensor_train__full": (50, 8),
    }
    assert estimate_memory(tables, partial(TensorTrain, rank=200)).table_bytes == 100_050 * 32


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_vectors_start_with_a_full_tables_variance_at_every_rank(rank: int) -> None:
    torch.manual_seed(0)
    tables = [table(f"t{index}", 4000, dim=16) for index in range(20)]
    collection = CompressedEmbeddingBagCollection(tables, partial(TensorTrain, rank=rank))
    vectors = torch.stack([all_vectors(collection, f"t{index}", 4000) for index in range(20)])
    assert 0.85 < float(vectors.var()) * 3 * 4000 < 1.15
    # Draws come from the tails: none near 0.
    core = rows_of(group_of(collection), 1)
    assert float(core.abs().min() / core.std()) > 0.8


def test_svd_recovers_a_table_of_low_rank_and_trained_tables_seed_it() -> None:
    torch.manual_seed(0)
    full = EmbeddingBagCollection(tables=[table("a", 1000), table("b", 10)])
    cores = (torch.randn(10, 2, 3), torch.randn(10, 3, 2, 3), torch.randn(10, 3, 2))
    rows = torch.einsum("apr,brqs,cst->abcpqt", *cores).reshape(1000, 8)
    first, second, third = tensor_train_svd(rows, (10, 10, 10), (2, 2, 2), (5, 5))
    assert (first.shape, second.shape, third.shape) == ((10, 10), (10, 50), (10, 10))
    # The table has ranks 3 and 3.
    cores = tensor_train_svd(rows, (10, 10, 10), (2, 2, 2), (4, 3))
    assert [core.shape for core in cores] == [(10, 8), (10, 24), (10, 6)]
    factors = cores[0].view(10, 2, 4), cores[1].view(10, 4, 2, 3), cores[2].view(10, 3, 2)
    torch.testing.assert_close(
        torch.einsum("apr,brqs,cst->abcpqt", *factors).reshape(1000, 8), rows, rtol=1e-3, atol=1e-3
    )
    with torch.no_grad():
        full.embedding_bags["t_a"].weight.copy_(rows)
    small = full.embedding_bags["t_b"].weight.detach().clone()
    compressed = compress_(full, partial(TensorTrain, rank=5), seed_from_weights=True)
    assert isinstance(compressed, CompressedEmbeddingBagCollection)
    torch.testing.assert_close(all_vectors(compressed, "a", 1000), rows, rtol=1e-3, atol=1e-3)
    assert torch.equal(all_vectors(compressed, "b", 10), small)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"give rank or a budget .*, one of them; got rank=4, num_parameters=9"):
        TensorTrain([table("a", 10)], rank=4, num_parameters=9)
    with pytest.raises(ValueError, match="num_parameters must be at least 1 float, got 0"):
        TensorTrain([table("a", 10)], num_parameters=0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        TensorTrain([table("a", 10)], rank=0)


def test_ranks_end_where_kernels_do() -> None:
    # A budget of half of 5 million rows of 16 would pay for middle rows of 58,708 values.
    first, second = choose_ranks((5_000_000,), 16, 40_000_000)
    _, d2, _ = factorise_columns(16)
    assert d2 * first * second <= WIDEST_ROW < d2 * (first + 1) * (second + 1)
    with pytest.raises(ValueError, match=r"'tensor_train__1': embedding_dim must be .* up to 16,384 .*, got 20,000"):
        TensorTrain([table("a", 5_000_000, dim=16)], rank=100)
