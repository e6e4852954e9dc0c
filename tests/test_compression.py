"""compress_ on models that exist already: TorchRec's own DLRM, sequence models, seeding from trained rows."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compressed_groups
from recemb.compression import compress_
from recemb.hashing import salt
from recemb.initial_rows import unfilled_tables
from recemb.methods.full import Full
from recemb.methods.unified import Unified
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import KEYS, MULTI_HOT, bags, small_tables, table
from tests.test_hashing import plain_slot


def test_torchrecs_dlrm_is_compressed_in_place_and_trains() -> None:
    torch.manual_seed(0)
    model = DLRM(EmbeddingBagCollection(tables=small_tables()), 3, [16, 8], [16, 1])
    before = sum(parameter.numel() for parameter in model.parameters())
    assert compress_(model, partial(Unified, num_embeddings=300), full_below_rows=600) is model
    assert sum(parameter.numel() for parameter in model.parameters()) == before - (4000 + 6000 - 300) * 8
    model, optimizer = prepare(model, EmbeddingOptimizer("rowwise_adagrad", 0.1), partial(torch.optim.Adam, lr=0.01))
    dense, labels, features = torch.randn(3, 3), torch.tensor([[1.0], [0.0], [1.0]]), bags(KEYS, MULTI_HOT)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, features), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


def test_full_tables_are_seeded_exactly() -> None:
    old = EmbeddingBagCollection(tables=small_tables())
    features = bags(KEYS, MULTI_HOT)
    expected = old(features).values()
    new = compress_(old, Full, seed_from_weights=True)
    assert isinstance(new, CompressedEmbeddingBagCollection)
    assert torch.equal(new(features).values(), expected)


def test_hashed_rows_start_at_the_mean_of_their_ids() -> None:
    tables = [table("a", 40, dim=8), table("b", 9, dim=8)]
    old = EmbeddingBagCollection(tables=tables)
    new = compress_(old, partial(Unified, num_embeddings=11, num_lookups=2), seed_from_weights=True)
    [unified] = compressed_groups(new)
    members: dict[int, list[torch.Tensor]] = {}
    for config in tables:
        weight = old.embedding_bags[config.name].weight.detach()
        for chunk in range(2):
            for value in range(config.num_embeddings):
                slot = plain_slot(value, salt(config.name, chunk), 11)
                members.setdefault(slot, []).append(weight[value, 4 * chunk : 4 * chunk + 4])
    rows = unified.collection(0).embedding_bags["unified__0"].weight
    for slot, vectors in members.items():
        torch.testing.assert_close(rows[slot], torch.stack(vectors).mean(dim=0))


def test_methods_that_cannot_be_seeded_say_so(caplog: pytest.LogCaptureFixture) -> None:
    class Unseeded(Unified):
        seed_from = Unified.__mro__[1].seed_from

    with caplog.at_level(logging.WARNING):
        compress_(
            EmbeddingBagCollection(tables=small_tables()), partial(Unseeded, num_embeddings=9), seed_from_weights=True
        )
    assert "start at random" in caplog.text


def test_rows_are_never_seeded_where_there_are_none() -> None:
    model = nn.Sequential(EmbeddingBagCollection(tables=small_tables()))
    with unfilled_tables(), pytest.raises(ValueError, match="seed_from_weights needs tables with rows"):
        compress_(model, Full, seed_from_weights=True)
    unfilled = nn.Sequential(EmbeddingBagCollection(tables=small_tables(), device=torch.device("meta")))
    with pytest.raises(ValueError, match="seed_from_weights needs tables with rows"):
        compress_(unfilled, Full, seed_from_weights=True)


def test_sequence_collections_are_compressed_too() -> None:
    tables = [EmbeddingConfig(name="t_item", num_embeddings=50, embedding_dim=8, feature_names=["target", "history"])]
    model = nn.ModuleDict({"sequence": EmbeddingCollection(tables=tables)})
    compress_(model, partial(Unified, num_embeddings=9))
    assert isinstance(model["sequence"], CompressedEmbeddingCollection)


@pytest.mark.parametrize("method", [Full, partial(Unified, num_embeddings=37, num_lookups=2)], ids=["full", "unified"])
def test_weights_of_ids_scale_their_vectors(method: type) -> None:
    tables = small_tables()
    tables[1].pooling = PoolingType.SUM
    collection = CompressedEmbeddingBagCollection(tables, method, is_weighted=True)
    plain = bags(KEYS, MULTI_HOT)
    weights = torch.linspace(-1, 2, plain.values().numel())
    features = KeyedJaggedTensor(KEYS, plain.values(), weights=weights, lengths=plain.lengths())
    output = collection(features)
    position = 0
    for key, feature in zip(KEYS, MULTI_HOT, strict=True):
        for sample, bag in enumerate(feature):
            expected = torch.zeros(8)
            for value in bag:
                one = bags(KEYS, [[[value] if name == key else []] for name in KEYS])
                one = KeyedJaggedTensor(KEYS, one.values(), weights=torch.ones(1), lengths=one.lengths())
                expected = expected + float(weights[position]) * collection(one)[key][0].detach()
                position += 1
            torch.testing.assert_close(output[key][sample], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="weights must come exactly where is_weighted, got none"):
        collection(plain)


def test_weights_without_and_for_averaged_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tables \['t_item'\]: per-id weights need sum pooling"):
        CompressedEmbeddingBagCollection(small_tables(), Full, is_weighted=True)
    features = KeyedJaggedTensor(["ad"], torch.tensor([1]), weights=torch.ones(1), lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="got some"):
        CompressedEmbeddingBagCollection([table("ad", 5)], Full)(features)


def test_nothing_to_compress_is_an_error() -> None:
    with pytest.raises(ValueError, match="Linear holds no plain EmbeddingBagCollection"):
        compress_(nn.Linear(2, 1), Full)
