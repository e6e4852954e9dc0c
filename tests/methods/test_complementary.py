"""Complementary partitions against a plain loop of the paper's formula, and the traps of its released code."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.memory import estimate_memory, measure_memory
from recemb.methods.complementary import Complementary
from recemb.methods.full import Full
from recemb.partitions import FAMILIES
from tests.embedding_cases import KEYS, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of

IDS = pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])


def part(method: Complementary, index: int) -> Tensor:
    if method._operation == "concat" or index == 0:
        return rows_of(method, 0, index)
    return rows_of(method, index)


def plain_vector(method: Complementary, config: EmbeddingBagConfig, value: int) -> Tensor:
    """The paper's formula for one id; rows of a table start after those of the tables before it."""
    t = [each.name for each in method.tables].index(config.name)
    concatenates = method._operation == "concat"
    rows = []
    for index, size in enumerate(method.partitions[t].sizes):
        start = sum(before.sizes[index] for before in method.partitions[:t])
        if size:
            rows.append(part(method, index)[start + value // method.partitions[t].divisors[index] % size])
    if concatenates:
        return torch.cat(rows)
    return torch.stack(rows).prod(dim=0) if method._operation == "mult" else torch.stack(rows).sum(dim=0)


@IDS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
@pytest.mark.parametrize(("num_partitions", "num_collisions"), [(1, 4), (2, 1), (2, 4), (2, 61), (3, 30)])
def test_vectors_equal_the_formula(
    ids: list[list[list[int]]], family: str, operation: str, num_partitions: int, num_collisions: int
) -> None:
    method = partial(
        Complementary,
        num_collisions=num_collisions,
        family=family,
        num_partitions=num_partitions,
        operation=operation,
    )
    # The table that stays full comes first, so that the ranges of the others begin behind it.
    collection = CompressedEmbeddingBagCollection(small_tables(24)[::-1], method)
    group = group_of(collection)
    assert isinstance(group, Complementary)
    assert group.is_full[0] and (num_partitions == 1 or num_collisions == 1 or not group.is_full[1])
    check_batch(collection, partial(plain_vector, group), ids)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_one_partition_is_a_full_table(operation: str) -> None:
    tables = small_tables()
    torch.manual_seed(0)
    method = partial(Complementary, num_collisions=100, num_partitions=1, operation=operation)
    collection = CompressedEmbeddingBagCollection(tables, method)
    full = CompressedEmbeddingBagCollection(tables, Full)
    weights = rows_of(group_of(collection)).split([config.num_embeddings for config in tables])
    group_of(full).seed_from({config.name: weight for config, weight in zip(tables, weights, strict=True)})
    features = bags(KEYS, MULTI_HOT)
    torch.testing.assert_close(collection(features).values(), full(features).values())
    assert measure_memory(collection).table_bytes == measure_memory(full).table_bytes


def test_one_collision_is_a_full_table_too() -> None:
    report = estimate_memory(small_tables(), partial(Complementary, num_collisions=1))
    assert report.table_bytes == report.full_bytes


@pytest.mark.parametrize(("operation", "width"), [("mult", 16), ("add", 16), ("concat", 8)])
def test_sizes_follow_the_paper_s_formula(operation: str, width: int) -> None:
    tables = [table("a", 1001, dim=16), table("b", 50_003, dim=16), table("c", 5, dim=16)]
    method = partial(Complementary, num_collisions=4, operation=operation)
    report = estimate_memory(tables, method)
    # The last would need 3 + 2 rows where it has 5; at half the width they are less.
    last = 5 * 16 if operation != "concat" else (3 + 2) * 8
    assert report.table_bytes == 4 * ((251 + 4 + 12_501 + 4) * width + last)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operation", ["mult", "concat"])
@pytest.mark.parametrize("num_partitions", [2, 3])
def test_bytes_fall_with_the_knob_and_never_exceed_full(family: str, operation: str, num_partitions: int) -> None:
    reports = [
        estimate_memory(
            small_tables(24),
            partial(
                Complementary,
                num_collisions=c,
                family=family,
                operation=operation,
                num_partitions=num_partitions,
            ),
        )
        for c in [*range(1, 100), 200, 1000, 6000]
    ]
    sizes = [report.serving_bytes for report in reports]
    assert sizes == sorted(sizes, reverse=True)
    assert all(report.table_bytes <= report.full_bytes for report in reports)


def test_concatenated_vectors_are_distinct() -> None:
    n = 1001
    collection = CompressedEmbeddingBagCollection(
        [table("a", n)], partial(Complementary, num_collisions=31, operation="concat")
    )
    assert torch.unique(all_vectors(collection, "a", n), dim=0).shape[0] == n


def test_concatenation_keeps_compressed_and_full_tables_equally_wide() -> None:
    tables = [table("a", 1000, dim=16), table("b", 2, dim=16)]
    method = partial(Complementary, num_collisions=10, operation="concat")
    collection = CompressedEmbeddingBagCollection(tables, method)
    group = group_of(collection)
    assert isinstance(group, Complementary)
    assert group.is_full == [False, True]
    output = collection(bags(["a", "b"], [[[1]], [[1]]]))
    assert output["a"].shape == output["b"].shape == (1, 16)


@pytest.mark.parametrize(("family", "divisor"), [("mixed_radix", 4096), ("remainder_first", 2**26 // 4096)])
def test_quotients_of_large_ids_are_exact(family: str, divisor: int) -> None:
    """Through float32, 2**24 + 1 and its neighbours are one number."""
    n = 2**26
    method = partial(Complementary, num_collisions=4096, family=family)
    collection = CompressedEmbeddingBagCollection([table("a", n, dim=4)], method)
    first, second = rows_of(group_of(collection), 0), rows_of(group_of(collection), 1)
    quotients, remainders = (first, second) if family == "mixed_radix" else (second, first)
    large = [2**24 + 1, 2**25 - 1, 2**25 + 1, n - 1, n - 4097]
    output = collection(bags(["a"], [[[value] for value in large]]))["a"]
    for row, value in zip(output, large, strict=True):
        assert torch.equal(row, quotients[value // divisor] * remainders[value % divisor])


def test_bags_sum_products_and_do_not_multiply_sums() -> None:
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection([table("a", 100)], partial(Complementary, num_collisions=10))
    remainders, quotients = rows_of(group_of(collection), 0), rows_of(group_of(collection), 1)
    output = collection(bags(["a"], [[[3, 57, 98]]]))["a"][0]
    ids = torch.tensor([3, 57, 98])
    by_definition = (quotients[ids // 10] * remainders[ids % 10]).sum(dim=0)
    pooled_first = quotients[ids // 10].sum(dim=0) * remainders[ids % 10].sum(dim=0)
    torch.testing.assert_close(output, by_definition)
    assert not torch.allclose(output, pooled_first, rtol=0.1)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
@pytest.mark.parametrize("num_partitions", [2, 3])
def test_vectors_start_with_the_variance_of_a_full_table(operation: str, num_partitions: int) -> None:
    torch.manual_seed(0)
    n = 20_001
    tables = [table("a", n, dim=96), table("b", 7, dim=96)]
    method = partial(Complementary, num_collisions=60, operation=operation, num_partitions=num_partitions)
    collection = CompressedEmbeddingBagCollection(tables, method)
    assert 0.7 < float(all_vectors(collection, "a", n).var()) * 3 * n < 1.4
    assert 0.7 < float(all_vectors(collection, "b", 7).var()) * 3 * 7 < 1.4


@pytest.mark.parametrize(
    ("operation", "bounds"),
    [
        ("mult", [1000**-0.5, 3**0.5]),
        ("add", [2000**-0.5] * 2),
        ("concat", [1000**-0.5] * 2),
    ],
)
def test_factors_start_uniform_around_zero(operation: str, bounds: list[float]) -> None:
    collection = CompressedEmbeddingBagCollection(
        [table("a", 1000, dim=64)], partial(Complementary, num_collisions=20, operation=operation)
    )
    group = group_of(collection)
    assert isinstance(group, Complementary)
    for index, bound in enumerate(bounds):
        weight = part(group, index)
        assert 0.97 * bound < float(weight.max()) <= bound
        assert -bound <= float(weight.min()) < -0.97 * bound


@pytest.mark.parametrize("num_partitions", [2, 3])
def test_a_first_step_of_adagrad_moves_a_product_as_far_as_a_row_of_a_full_table(num_partitions: int) -> None:
    """By the learning rate of 0.05 a value, where factors that all start alike move it by a tenth of that or less."""
    torch.manual_seed(0)
    n = 20_001
    method = partial(Complementary, num_collisions=60, num_partitions=num_partitions)
    collection = CompressedEmbeddingBagCollection([table("a", n, dim=32)], method)
    optimizer = torch.optim.Adagrad(collection.parameters(), lr=0.05)
    before = all_vectors(collection, "a", n)
    (collection(bags(["a"], [[[i] for i in range(n)]]))["a"] * torch.randn(32)).sum().backward()
    optimizer.step()
    moved = (all_vectors(collection, "a", n) - before).abs().mean()
    assert 0.5 * 0.05 < float(moved) < 2 * 0.05


# Two tables of products with a brand, a size and a colour; t_b takes computed partitions.
CLASSES = torch.cartesian_prod(torch.arange(9), torch.arange(5), torch.arange(300))[torch.randperm(13_500)[:6001]]


@IDS
@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_known_classes_choose_the_rows(ids: list[list[list[int]]], operation: str) -> None:
    classes = {"t_item": CLASSES[:6000], "t_ad": CLASSES[:4000] % torch.tensor([9, 5, 300])}
    method = partial(Complementary, num_collisions=30, num_partitions=3, operation=operation, classes=classes)
    collection = CompressedEmbeddingBagCollection(small_tables(24), method)
    group = group_of(collection)
    assert isinstance(group, Complementary)
    assert group.is_full == [False, False, False, True]

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        if config.name not in classes:
            return plain_vector(group, config, value)
        order = ["t_ad", "t_item"].index(config.name)
        parts = [
            part(group, j)[order * (int(classes["t_ad"][:, j].max()) + 1) + int(classes[config.name][value, j])]
            for j in range(3)
        ]
        return {
            "mult": torch.stack(parts).prod(0),
            "add": torch.stack(parts).sum(0),
            "concat": torch.cat(parts),
        }[operation]

    check_batch(collection, vector, ids)


def test_known_classes_are_counted_and_saved() -> None:
    tables = [table("a", 6001, dim=16), table("b", 3, dim=16)]
    few = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 1]])
    method = partial(Complementary, num_collisions=30, num_partitions=3, classes={"t_a": CLASSES, "t_b": few})
    report = estimate_memory(tables, method)
    assert report.table_bytes == ((9 + 5 + 300) + 3) * 16 * 4
    # One byte for brand and size, two for the colour; t_b stays full and keeps no classes. 3 x (3 x 2) constants.
    assert report.index_bytes == 6001 * 4 + 3 * 3 * 2 * 8
    first = CompressedEmbeddingBagCollection(tables, method)
    shuffled = partial(method, classes={"t_a": CLASSES.flip(0), "t_b": few})
    second = CompressedEmbeddingBagCollection(tables, shuffled)
    second.load_state_dict(first.state_dict())
    assert torch.equal(all_vectors(first, "a", 6001), all_vectors(second, "a", 6001))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_collisions": 0}, "must be at least 1, got 0 and 2"),
        ({"num_collisions": 2, "operation": "xor"}, "operation must be one of .*, got 'xor'"),
        ({"num_collisions": 2, "family": "prime"}, "families .*, got 'prime'"),
        ({"num_collisions": 2, "num_partitions": 3, "operation": "concat"}, "'t_a'.*got 8 / 3"),
        ({"num_collisions": 2, "classes": {"t_b": torch.zeros(3, 2)}}, r"classes name tables \['t_b'\]"),
        ({"num_collisions": 2, "classes": {"t_a": torch.arange(10).view(-1, 1)}}, "num_partitions = 2 .* got 1"),
        ({"num_collisions": 2, "classes": {"t_a": torch.ones(10, 2).long()}}, "ids 0 and 1 agree in all classes"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Complementary([table("a", 10)], **options)  # type: ignore[arg-type]
