"""Static methods in the ways of calling them beside plain bags: ids with weights, and unpooled sequences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from torchrec.modules.embedding_configs import EmbeddingConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.budget import fit_to_budget
from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.method import Method
from recemb.methods.complementary import Complementary
from tests.embedding_cases import KEYS, MULTI_HOT, bags, load_embedding_config, small_tables, table

SUMMED = [
    table(config.name[2:], config.num_embeddings, features=config.feature_names, pooling=PoolingType.SUM)
    for config in small_tables()[::-1]
]
METHODS = {
    name: instantiate(load_embedding_config(name)["method"])
    for name in (
        *("hashing", "quotient_remainder", "generalised_quotient_remainder", "chinese_remainder"),
        *("memcom", "double_hash", "hash_embeddings", "path"),
    )
} | {operation: partial(Complementary, operation=operation) for operation in ("add", "concat")}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return fit_to_budget(SUMMED, METHODS[request.param], 10_501 * 8 * 4 // 4)


def test_weights_scale_vectors_before_the_sum(method: Method) -> None:
    torch.manual_seed(0)
    plain = CompressedEmbeddingBagCollection(SUMMED, method)
    weighted = CompressedEmbeddingBagCollection(SUMMED, method, is_weighted=True)
    weighted.load_state_dict(plain.state_dict())
    features = bags(KEYS, MULTI_HOT)
    weights = torch.randn(features.values().numel())
    output = weighted(KeyedJaggedTensor(KEYS, features.values(), weights, lengths=features.lengths()))
    position = 0
    for key, feature in zip(KEYS, MULTI_HOT, strict=True):
        for sample, bag in enumerate(feature):
            expected = torch.zeros(8)
            for value in bag:
                one = bags(KEYS, [[[value]] if name == key else [[]] for name in KEYS])
                expected = expected + weights[position] * plain(one)[key][0]
                position += 1
            torch.testing.assert_close(output[key][sample], expected, rtol=1e-5, atol=1e-6)


def test_unpooled_vectors_are_those_of_bags_of_one(method: Method) -> None:
    pooled = CompressedEmbeddingBagCollection(SUMMED, method)
    tables = [
        EmbeddingConfig(
            name=config.name,
            num_embeddings=config.num_embeddings,
            embedding_dim=config.embedding_dim,
            feature_names=config.feature_names,
        )
        for config in SUMMED
    ]
    unpooled = CompressedEmbeddingCollection(tables, method)
    unpooled.load_state_dict(pooled.state_dict())
    output = unpooled(bags(KEYS, MULTI_HOT))
    for key, feature in zip(KEYS, MULTI_HOT, strict=True):
        ids = [value for bag in feature for value in bag]
        alone = pooled(bags(KEYS, [[[value] for value in ids] if name == key else [[]] * len(ids) for name in KEYS]))
        torch.testing.assert_close(output[key].values(), alone[key])
