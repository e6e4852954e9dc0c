"""The unpooled collection: TorchRec's EmbeddingCollection with any method behind it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compressed_groups
from recemb.method import Method
from recemb.methods.full import Full
from recemb.methods.unified import Unified
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import KEYS, MULTI_HOT, SINGLE, bags, embedding_configs, quarter_sized, small_tables

TABLES = [
    EmbeddingConfig(
        name=t.name, num_embeddings=t.num_embeddings, embedding_dim=t.embedding_dim, feature_names=t.feature_names
    )
    for t in small_tables()
]
CASES = pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE, [[[]] * 2] * 5], ids=["multi-hot", "single", "all empty"])


@pytest.fixture(params=embedding_configs())
def method(request: pytest.FixtureRequest) -> Method:
    return quarter_sized(request.param)


@CASES
def test_full_equals_torchrecs_with_the_same_weights(ids: list[list[list[int]]]) -> None:
    reference, ours = EmbeddingCollection(tables=TABLES), CompressedEmbeddingCollection(TABLES, Full)
    for group in compressed_groups(ours):
        for name, bag in group.collection(0).embedding_bags.items():
            bag.weight.data.copy_(reference.embeddings[name].weight)
    expected, output = reference(bags(KEYS, ids)), ours(bags(KEYS, ids))
    assert list(output) == KEYS
    for key in KEYS:
        assert torch.equal(output[key].values(), expected[key].values())
        assert torch.equal(output[key].lengths(), expected[key].lengths())


@CASES
def test_vectors_are_those_of_single_ids(method: Method, ids: list[list[list[int]]]) -> None:
    # In training, batch normalisation ties the ids of a batch to each other.
    collection = CompressedEmbeddingCollection(TABLES, method).eval()
    output = collection(bags(KEYS, ids))
    for key, feature in zip(KEYS, ids, strict=True):
        flat = [value for bag in feature for value in bag]
        assert output[key].values().shape == (len(flat), 8)
        for value, vector in zip(flat, output[key].values(), strict=True):
            alone = collection(bags(KEYS, [[[value] if name == key else []] for name in KEYS]))[key].values()
            torch.testing.assert_close(alone[0], vector)


def test_a_batch_of_no_samples_gives_no_vectors(method: Method) -> None:
    for features in (bags(KEYS, [[]] * 5), bags(["other", *reversed(KEYS)], [[]] * 6)):
        output = CompressedEmbeddingCollection(TABLES, method)(features)
        assert list(output) == KEYS
        for vectors in output.values():
            assert vectors.values().shape == (0, 8) and vectors.values().dtype == torch.float32
            assert vectors.lengths().tolist() == [] and vectors.offsets().tolist() == [0]


@CASES
def test_int32_ids_have_the_vectors_of_int64_ids(method: Method, ids: list[list[list[int]]]) -> None:
    collection = CompressedEmbeddingCollection(TABLES, method).eval()
    expected, output = collection(bags(KEYS, ids)), collection(bags(KEYS, ids, torch.int32))
    for key in KEYS:
        assert torch.equal(output[key].values(), expected[key].values())


def test_target_and_history_share_rows_and_train_fused(method: Method) -> None:
    collection = CompressedEmbeddingCollection(TABLES, method)
    model, optimizer = prepare(collection, EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1))
    ids = [[[0]], [[4321]], [[17, 4321]], [[3]], [[0]]]
    before = model(bags(KEYS, ids))
    # To rounding: products of matrices of one row and of two need not agree in the last digit.
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-8)
    close(before["target"].values()[0], before["history"].values()[1])
    before["history"].values().square().sum().backward()
    optimizer.step()
    after = model(bags(KEYS, ids))
    close(after["target"].values()[0], after["history"].values()[1])
    assert not torch.equal(after["target"].values(), before["target"].values())


@pytest.mark.parametrize(("num_lookups", "num_sub_tables"), [(2, 2), (1, 2), (2, 3)])
def test_unified_sub_tables_give_the_same_vector_to_history_and_target(num_lookups: int, num_sub_tables: int) -> None:
    method = partial(Unified, num_embeddings=60, num_lookups=num_lookups, num_sub_tables=num_sub_tables)
    collection = CompressedEmbeddingCollection(TABLES, method)
    output = collection(bags(KEYS, SINGLE))
    assert output["target"].values().shape == (3, 8)
    same = bags(KEYS, [[[0]], [[4321]], [[4321]], [[3]], [[0]]])
    output = collection(same)
    assert torch.equal(output["target"].values(), output["history"].values())
    pooled = CompressedEmbeddingBagCollection(small_tables(), method)
    pooled.load_state_dict(collection.state_dict())
    assert torch.equal(pooled(same)["history"], output["target"].values())
    assert torch.equal(pooled(same)["target"], output["target"].values())
