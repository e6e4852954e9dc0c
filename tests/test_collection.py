"""The drop-in collection: inside TorchRec's own DLRM, groups of methods, and everything it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.method import UNBOUNDED, CompressedTables, Method, physical_table
from recemb.methods.full import Full
from recemb.methods.hashing import Hashing
from recemb.methods.unified import Unified
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import BIG, KEYS, MULTI_HOT, SINGLE, bags, small_tables, table

# TorchRec divides by the number of rows unless it is told how to fill them.
EMPTY = EmbeddingBagConfig(
    name="t_a", num_embeddings=0, embedding_dim=8, feature_names=["a"], init_fn=torch.nn.init.zeros_
)


class TwoLookups(CompressedTables):
    """Two tables that are looked up together and one by itself, each 4 wide: for what methods get wrong."""

    def __init__(self, tables: list[EmbeddingBagConfig]) -> None:
        together = [physical_table(name, 7, 4, 0.1) for name in ("first", "second")]
        super().__init__(tables, [together, [physical_table("third", 7, 4, 0.1)]])

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        slots = bags.ids % 7
        return [[slots, slots], [slots]]


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
def test_full_equals_torchrec_with_the_same_weights(ids: list[list[list[int]]]) -> None:
    torch.manual_seed(0)
    reference = EmbeddingBagCollection(tables=small_tables())
    ours = CompressedEmbeddingBagCollection(small_tables(), Full)
    for group in compressed_groups(ours):
        for index in range(len(group.lookups)):
            for name, bag in group.collection(index).embedding_bags.items():
                bag.weight.data.copy_(reference.embedding_bags[name].weight)
    features = bags(KEYS, ids)
    assert torch.equal(ours(features).values(), reference(features).values())


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
@pytest.mark.parametrize("fused", [False, True])
def test_a_table_alone_serves_all_its_features(pooling: PoolingType, fused: bool) -> None:
    def make() -> EmbeddingBagConfig:
        return table("item", 6000, dim=8, features=["target", "history"], pooling=pooling)

    reference, ours = EmbeddingBagCollection(tables=[make()]), CompressedEmbeddingBagCollection([make()], Full)
    [group] = compressed_groups(ours)
    group.seed_from({"t_item": reference.embedding_bags["t_item"].weight.detach()})
    optimizer = EmbeddingOptimizer("sgd", 0.5)
    if fused:
        prepare(ours, optimizer, partial(torch.optim.SGD, lr=0.5))
    features = bags(["target", "history"], [[[7], [], [5, 7, 5]], [[5999, 0], [7], []]])
    expected, output = reference(features).values(), ours(features).values()
    torch.testing.assert_close(output, expected)
    direction = torch.arange(expected.numel(), dtype=torch.float32).view_as(expected)
    (expected * direction).sum().backward()
    (output * direction).sum().backward()
    weight, gradient = reference.embedding_bags["t_item"].weight, reference.embedding_bags["t_item"].weight.grad
    trained = group.collection(0).embedding_bags["t_item"].weight
    assert gradient is not None
    if fused:
        torch.testing.assert_close(trained, weight - 0.5 * gradient)
    else:
        torch.testing.assert_close(trained.grad, gradient)


def test_it_drops_into_torchrecs_dlrm_and_trains() -> None:
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(small_tables(), partial(Unified, num_embeddings=100, num_lookups=2))
    model = DLRM(
        embedding_bag_collection=collection,
        dense_in_features=3,
        dense_arch_layer_sizes=[16, 8],
        over_arch_layer_sizes=[16, 1],
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    dense, labels, features = torch.randn(3, 3), torch.tensor([[1.0], [0.0], [1.0]]), bags(KEYS, MULTI_HOT)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(dense, features), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


def test_small_tables_stay_full_in_their_own_columns() -> None:
    torch.manual_seed(0)
    method = partial(Unified, num_embeddings=100)
    collection = CompressedEmbeddingBagCollection(small_tables(), method, full_below_rows=501)
    full, unified = compressed_groups(collection)
    assert [t.name for t in full.tables] == ["t_site", "t_one"]
    assert [t.name for t in unified.tables] == ["t_ad", "t_item"]
    output = collection(bags(KEYS, SINGLE))
    assert output.keys() == KEYS
    weight = full.collection(0).embedding_bags["t_site"].weight
    assert torch.equal(output["site"], weight[torch.tensor([499, 0, 250])])


def test_ids_above_float32_integers_are_checked_exactly() -> None:
    with torch.device("meta"):
        collection = CompressedEmbeddingBagCollection([table("a", BIG)], partial(Unified, num_embeddings=10))
    collection._ids.check(bags(["a"], [[[BIG - 1]]]))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=rf"got {BIG} in sample 1 of the batch \(1 of 3 ids"):
        collection._ids.check(bags(["a"], [[[0, 5], [BIG]]]))  # type: ignore[union-attr]


def test_float_ids_and_missing_keys_are_refused() -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), Full)
    floats = KeyedJaggedTensor(KEYS, torch.zeros(5), lengths=torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids must be int64"):
        collection(floats)
    with pytest.raises(ValueError, match=r"keys \['site', 'one'\] are required"):
        collection(bags(KEYS[:3], SINGLE[:3]))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "at least one EmbeddingBagConfig"),
        ([table("a", 5), table("a", 5)], "'t_a': table names must be unique"),
        ([table("a.b", 5)], "must not hold '.' or '@'"),
        ([table("a", 5, dim=6)], "embedding_dim must be a multiple of 4 .*, got 6"),
        ([table("a", 2**63)], "num_embeddings must be at most 9223372036854775807"),
        ([EMPTY], "'t_a': num_embeddings must be .* at least 1, got 0"),
        ([table("a", 5, features=["a", "a"])], "'t_a': features must be named once"),
        ([table("a", UNBOUNDED)], "unbounded .hashed. ids, which Full cannot take"),
    ],
)
def test_tables_are_checked_at_construction(tables: list[EmbeddingBagConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressedEmbeddingBagCollection(tables, Full)


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("chosen", [slice(0, 1), slice(0, 3)], ids=["too narrow", "too wide"])
def test_vectors_of_another_width_are_refused_naming_the_method(chosen: slice, ids: list[list[list[int]]]) -> None:
    class Parts(TwoLookups):
        def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
            return torch.cat([*rows[0], *rows[1]][chosen], dim=1)

    shape = r"shape \(\d+, 8\) \(N, embedding_dim\), got \(\d+, (4|12)\)"
    with pytest.raises(ValueError, match=rf"Parts.compose must return {shape}"):
        CompressedEmbeddingBagCollection(small_tables(), Parts)(bags(KEYS, ids))


def test_pooled_vectors_of_another_width_are_refused_naming_the_method() -> None:
    class Doubled(Hashing):
        def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
            return torch.cat([super().compose(rows, bags)] * 2, dim=1)

    collection = CompressedEmbeddingBagCollection(small_tables(), partial(Doubled, num_embeddings=90))
    # 5 features of 3 bags: the kernel has summed already.
    with pytest.raises(ValueError, match=r"Doubled.compose must return shape \(15, 8\) .*, got \(15, 16\)"):
        collection(bags(KEYS, MULTI_HOT))


@pytest.mark.parametrize("wrong", ["flat", "a table short", "a tensor"])
def test_slots_that_are_not_nested_as_the_lookups_are_refused(wrong: str) -> None:
    class Unnested(TwoLookups):
        def remap(self, bags: Bags) -> list[list[Tensor]]:
            [[first, second], [third]] = super().remap(bags)
            return {"flat": [first, second, third], "a table short": [[first], [third]], "a tensor": first}[wrong]

    wanted = r"\[\['Tensor', 'Tensor'\], \['Tensor'\]\]: a list for each group of lookups"
    with pytest.raises(ValueError, match=rf"Unnested.remap must return {wanted}.*; got "):
        CompressedEmbeddingBagCollection(small_tables(), Unnested)(bags(KEYS, SINGLE))


def test_tables_choose_their_method_by_name_pattern() -> None:
    torch.manual_seed(0)
    methods = {"t_item": Full, "t_s*": partial(Unified, num_embeddings=20), "*": partial(Unified, num_embeddings=30)}
    collection = CompressedEmbeddingBagCollection(small_tables(), methods)
    assert [[t.name for t in g.tables] for g in compressed_groups(collection)] == [
        ["t_item"],
        ["t_site"],
        ["t_ad", "t_one"],
    ]
    features = bags(KEYS, MULTI_HOT)
    output = collection(features)
    assert output.keys() == KEYS
    weight = compressed_groups(collection)[0].collection(0).embedding_bags["t_item"].weight
    torch.testing.assert_close(output["history"][0], weight[torch.tensor([1, 1, 5999, 4])].mean(dim=0))
    with pytest.raises(ValueError, match=r"'t_ad': no pattern of .* matches"):
        CompressedEmbeddingBagCollection(small_tables(), {"t_item": Full})


@pytest.mark.parametrize("method", [Full, partial(Unified, num_embeddings=10)])
def test_a_weighted_batch_of_no_samples_gives_no_rows(method: Method) -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 5), table("b", 5)], method, is_weighted=True)
    none = torch.zeros(0, dtype=torch.int64)
    weighted = KeyedJaggedTensor(["a", "b"], none, weights=torch.zeros(0), lengths=none)
    assert collection(weighted).values().shape == (0, 16)
    with pytest.raises(ValueError, match="weights must come exactly where is_weighted"):
        collection(KeyedJaggedTensor(["a", "b"], none, lengths=none))
    with pytest.raises(ValueError, match=r"keys \['b'\] are required"):
        collection(KeyedJaggedTensor(["a"], none, weights=torch.zeros(0), lengths=none))


def test_checks_can_be_switched_off_where_ids_are_hashed() -> None:
    method = partial(Unified, num_embeddings=10)
    unchecked = CompressedEmbeddingBagCollection([table("a", 5)], method, check_ids=False)
    assert unchecked(bags(["a"], [[[99]]])).values().shape == (1, 8)
