"""What conversion replaces, and what it leaves alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.conversion import convert
from recemb.methods.pruned import Pruned
from recemb.methods.unified import Unified
from recemb.optimizers import EmbeddingOptimizer
from recemb.packed_tables import PackedTables
from recemb.plan import CompressionPlan, TablePlan
from recemb.preparation import prepare
from tests.embedding_cases import KEYS, SINGLE, bags, small_tables

PLAN = CompressionPlan({"t_ad": TablePlan(4000, 8, kept_rows=torch.arange(4000) % 3 == 0)}, source="by hand")
MIXED = {"t_ad": partial(Pruned, plan=PLAN), "*": partial(Unified, num_embeddings=100)}


def test_only_groups_that_have_another_form_are_replaced() -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), MIXED)
    unified = next(group for group in compressed_groups(collection) if isinstance(group, Unified))
    model = nn.Sequential(collection)
    assert convert(model) is model
    assert [type(group) for group in compressed_groups(model)] == [PackedTables, Unified]
    assert compressed_groups(model)[1] is unified
    # And again, which changes nothing.
    before = compressed_groups(model)
    assert compressed_groups(convert(model)) == before


@pytest.mark.parametrize("training", [False, True])
def test_modes_stay(training: bool) -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), MIXED).train(training)
    assert all(module.training == training for module in convert(collection).modules())


def test_a_prepared_model_converts_like_a_plain_one() -> None:
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(small_tables(), MIXED)
    expected = collection(bags(KEYS, SINGLE)).values().detach()
    prepared, _ = prepare(collection, EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1))
    assert torch.equal(convert(prepared)(bags(KEYS, SINGLE)).values(), expected)


def test_tables_alone_are_returned_as_what_takes_their_place() -> None:
    group = Pruned(small_tables()[:1], plan=PLAN)
    assert isinstance(convert(group), PackedTables)
    static = Unified(small_tables(), num_embeddings=100)
    assert convert(static) is static
