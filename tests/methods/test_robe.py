"""ROBE against the paper's formula for one float at a time, and its traps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.compression import compress_
from recemb.hashing import mix, salt
from recemb.method import UNBOUNDED
from recemb.methods.robe import Robe
from tests.embedding_cases import BIG, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of
from tests.test_hashing import plain_slot


def plain_place(name: str, value: int, element: int, dim: int, block: int, length: int) -> int:
    """Where in the array one float lies: float ``e`` of the flattened table is in block ``e // Z``."""
    flat = value * dim + element
    number, inside = divmod(flat, block)
    # Blocks shorter than a vector are hashed by (id, number of the block in its vector).
    key, lookup = (number, 0) if block >= dim else (value, element // block)
    return (plain_slot(key, salt(name, lookup), length) + inside) % length


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("block", [4, 8, 16, 40])
@pytest.mark.parametrize("signs", [False, True])
def test_vectors_equal_a_plain_loop_over_floats(ids: list[list[list[int]]], block: int, signs: bool) -> None:
    method = partial(Robe, array_length=1000, block_length=block, signs=signs)
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    array = rows_of(group_of(collection)).reshape(-1)
    assert array.numel() == 1000

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        floats = torch.stack([array[plain_place(config.name, value, i, 8, block, 1000)] for i in range(8)])
        if signs:
            word = int(mix(torch.tensor(value), torch.tensor(salt(config.name, 2 if block == 4 else 1))))
            floats = floats * torch.tensor([-1.0 if word >> i & 1 else 1.0 for i in range(8)])
        return floats

    check_batch(collection, vector, ids)


def test_blocks_wrap_around_the_end_of_the_array() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 2000)], partial(Robe, array_length=24))
    array = rows_of(group_of(collection)).reshape(-1)
    vectors = all_vectors(collection, "a", 2000)
    starts = {plain_place("t_a", value, 0, 8, 8, 24) for value in range(2000)}
    # Offsets are not aligned: all 24 are taken, the last 7 of which wrap.
    assert starts == set(range(24))
    for value in range(2000):
        start = plain_place("t_a", value, 0, 8, 8, 24)
        assert torch.equal(vectors[value], array.roll(-start)[:8])


@pytest.mark.parametrize("length", [8, 16])
def test_an_array_may_be_shorter_than_a_block(length: int) -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 50)], partial(Robe, array_length=length, block_length=64))
    array = rows_of(group_of(collection)).reshape(-1)
    vectors = all_vectors(collection, "a", 50)
    for value in range(50):
        expected = torch.stack([array[plain_place("t_a", value, i, 8, 64, length)] for i in range(8)])
        assert torch.equal(vectors[value], expected)


def test_block_length_is_the_papers_and_not_a_number_of_chunks() -> None:
    """With Z = 2D two ids that follow each other lie side by side; with Z = D nothing ties them."""
    for block, together in ((16, True), (8, False)):
        method = partial(Robe, array_length=100_000, block_length=block)
        collection = CompressedEmbeddingBagCollection([table("a", 1000)], method)
        array = rows_of(group_of(collection)).reshape(-1)
        pair = all_vectors(collection, "a", 2).view(-1)
        start = plain_place("t_a", 0, 0, 8, block, 100_000)
        assert torch.equal(array[start : start + 16], pair) is together


def test_the_gradient_of_a_float_is_the_sum_over_all_that_read_it() -> None:
    tables = [table("a", 300), table("b", 40)]
    collection = CompressedEmbeddingBagCollection(tables, partial(Robe, array_length=104, signs=True))
    output = collection(bags(["a", "b"], [[[7, 7, 299], [0]], [[39], [39, 1]]])).values()
    upstream = torch.randn_like(output)
    (output * upstream).sum().backward()
    [weight] = collection.parameters()
    assert weight.grad is not None
    # The output is linear in the array: its gradient is the output of every unit array, float by float.
    gradient = weight.grad.clone().view(-1)
    for place in range(104):
        with torch.no_grad():
            weight.zero_().view(-1)[place] = 1
            unit = collection(bags(["a", "b"], [[[7, 7, 299], [0]], [[39], [39, 1]]])).values()
        torch.testing.assert_close(gradient[place], (unit * upstream).sum())


def test_bytes_do_not_depend_on_the_vocabulary_and_ids_may_be_unbounded() -> None:
    for block in (4, 8, 32):
        method = partial(Robe, array_length=800, block_length=block)
        unbounded = CompressedEmbeddingBagCollection([table("a", UNBOUNDED)], method)
        vectors = unbounded(bags(["a"], [[[2**63 - 1], [2**63 - 1 - 2**62], [BIG], []]])).values()
        assert torch.unique(vectors, dim=0).shape[0] == 4
        assert sum(parameter.numel() for parameter in unbounded.parameters()) == 800


def test_ids_above_float32_integers_stay_apart() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 2**26)], partial(Robe, array_length=100_000))
    output = collection(bags(["a"], [[[BIG], [BIG + 1], [BIG + 2]]]))["a"]
    assert torch.unique(output, dim=0).shape[0] == 3


@pytest.mark.parametrize("signs", [False, True])
def test_floats_can_start_at_the_mean_of_trained_ones(signs: bool) -> None:
    full = EmbeddingBagCollection(tables=[table("a", 300), table("b", 40)])
    trained = {name: bag.weight.detach().clone() for name, bag in full.embedding_bags.items()}
    compressed = compress_(full, partial(Robe, array_length=200, signs=signs), seed_from_weights=True)
    assert isinstance(compressed, CompressedEmbeddingBagCollection)
    array = rows_of(group_of(compressed)).reshape(-1)
    members: list[list[float]] = [[] for _ in range(200)]
    for name, rows in trained.items():
        for value, row in enumerate(rows.tolist()):
            word = int(mix(torch.tensor(value), torch.tensor(salt(name, 1)))) if signs else 0
            for i, number in enumerate(row):
                place = plain_place(name, value, i, 8, 8, 200)
                members[place].append(-number if word >> i & 1 else number)
    expected = torch.tensor([sum(values) / len(values) for values in members])
    torch.testing.assert_close(array, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"array_length": 0}, r"array_length must be in \[1, 1099511627776\] floats, got 0"),
        ({"array_length": 100, "block_length": 2}, "block_length must be a multiple of 4 .*, got 2"),
        ({"array_length": 100, "block_length": 12}, r"divides embedding_dim \(8\) or is divided by it, got 12"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Robe([table("a", 10)], **options)  # type: ignore[arg-type]
