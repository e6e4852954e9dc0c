"""A feature that several tables name: TorchRec's collections are the truth."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

import recemb
from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.method import Method
from recemb.methods.complementary import Complementary
from recemb.methods.full import Full
from recemb.methods.unified import Unified
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import bags, table

TABLES = [table("wide", 50, dim=16, features=["user", "item"]), table("narrow", 60, dim=4, features=["item", "site"])]
KEYS = ["site", "item", "user"]
IDS = [[[5], []], [[1, 2, 2], [49]], [[], [7]]]


def test_output_is_torchrecs() -> None:
    reference = EmbeddingBagCollection(tables=TABLES)
    model = torch.nn.Sequential(reference)
    expected = reference(bags(KEYS, IDS))
    compressed = recemb.compress_(model, Full, seed_from_weights=True)[0]
    output = compressed(bags(KEYS, IDS))
    assert output.keys() == expected.keys() == ["user", "item@t_wide", "item@t_narrow", "site"]
    assert output.length_per_key() == expected.length_per_key()
    torch.testing.assert_close(output.values(), expected.values())
    assert compressed.embedding_bag_configs() == TABLES


def test_unpooled_output_is_torchrecs() -> None:
    tables = [
        EmbeddingConfig(name=t.name, num_embeddings=t.num_embeddings, embedding_dim=8, feature_names=t.feature_names)
        for t in TABLES
    ]
    reference = EmbeddingCollection(tables=tables)
    compressed = CompressedEmbeddingCollection(tables, Full)
    for group in compressed.groups:
        group.seed_from({name: bag.weight.detach() for name, bag in reference.embeddings.items()})
    expected, output = reference(bags(KEYS, IDS)), compressed(bags(KEYS, IDS))
    assert list(output) == list(expected)
    for name in expected:
        torch.testing.assert_close(output[name].values(), expected[name].values())
        assert torch.equal(output[name].lengths(), expected[name].lengths())


@pytest.mark.parametrize("method", [partial(Unified, num_embeddings=40), partial(Complementary, num_collisions=4)])
def test_every_table_gives_its_own_vector_and_trains(method: Method, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tables = [dataclasses.replace(t, embedding_dim=8) for t in TABLES]
    collection = CompressedEmbeddingBagCollection(tables, method)
    alone = CompressedEmbeddingBagCollection([tables[1]], Full)
    output = collection(bags(KEYS, IDS))
    assert not torch.equal(output["item@t_wide"], output["item@t_narrow"])
    assert alone(bags(KEYS, IDS)).keys() == ["item", "site"]
    recemb.save(collection, tmp_path / "model")
    assert torch.equal(recemb.load(tmp_path / "model")(bags(KEYS, IDS)).values(), output.values())
    model, optimizer = prepare(collection, EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1))
    optimizer.zero_grad()
    model(bags(KEYS, IDS))["item@t_narrow"].sum().backward()
    optimizer.step()
    after = model(bags(KEYS, IDS))
    assert after["item@t_narrow"].sum() < output["item@t_narrow"].sum()


def test_errors_name_feature_and_table() -> None:
    collection = CompressedEmbeddingBagCollection(TABLES, Full)
    with pytest.raises(ValueError, match=r"'item@t_wide' \(table 't_wide'\): ids must be in \[0, 50\), got 55"):
        collection(bags(KEYS, [[[5]], [[55]], [[1]]]))
    with pytest.raises(ValueError, match=r"keys \['user', 'item'\] are required"):
        collection(bags(["site"], [[[5]]]))
