"""Weights from one model to another: dense layers as they are, rows of every table, or an error that says what not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from recemb.carry_over import carry_over
from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.method import Method
from recemb.methods.full import Full
from recemb.methods.magnitude import Magnitude
from recemb.methods.pruned import Pruned
from recemb.methods.unified import Unified
from recemb.plan import CompressionPlan, TablePlan
from tests.embedding_cases import KEYS, MULTI_HOT, bags, small_tables

KEEPS_ALL = CompressionPlan(
    {table.name: TablePlan(table.num_embeddings, table.embedding_dim) for table in small_tables()}, source="test"
)


class Model(nn.Module):
    def __init__(self, method: Method, seed: int, *, width: int = 3, full_below_rows: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embeddings = CompressedEmbeddingBagCollection(small_tables(), method, full_below_rows=full_below_rows)
        self.head = nn.Sequential(nn.Linear(40, width), nn.BatchNorm1d(width))

    def forward(self, ids: list[list[list[int]]]) -> Tensor:
        return self.head(self.embeddings(bags(KEYS, ids)).values())


@pytest.mark.parametrize("full_below_rows", [0, 1000])
@pytest.mark.parametrize("target", [Magnitude, Full, partial(Pruned, plan=KEEPS_ALL)], ids=["search", "full", "pruned"])
def test_the_target_computes_what_the_source_does(target: Method, full_below_rows: int) -> None:
    source = Model(Magnitude, 0, full_below_rows=full_below_rows).eval()
    other = Model(target, 1, full_below_rows=full_below_rows).eval()
    carry_over(source, other, folded=False)
    torch.testing.assert_close(other(MULTI_HOT), source(MULTI_HOT), rtol=1e-5, atol=1e-6)


def test_it_is_a_copy() -> None:
    source, other = Model(Magnitude, 0).eval(), Model(Magnitude, 1).eval()
    carry_over(source, other, folded=False)
    before = other(MULTI_HOT)
    for parameter in source.parameters():
        parameter.data.zero_()
    assert torch.equal(other(MULTI_HOT), before)


def test_folded_rows_are_the_searchs_vectors_stored_ones_what_is_below() -> None:
    class Doubled(Magnitude):
        def folded_tables(self) -> dict[str, Tensor]:
            return {name: 2 * rows for name, rows in self.stored_tables().items()}

    source = Model(Doubled, 0)
    [group] = compressed_groups(source)
    for folded, factor in ((True, 2), (False, 1)):
        other = Model(Magnitude, 1)
        carry_over(source, other, folded=folded)
        [taken] = compressed_groups(other)
        for name, rows in taken.stored_tables().items():
            assert torch.equal(rows, factor * group.stored_tables()[name])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"dense layers differ: head.0.weight of shape \(3, 40\) has no counterpart"):
        carry_over(Model(Magnitude, 0), Model(Magnitude, 1, width=4), folded=False)
    hashed = Model(partial(Unified, num_embeddings=100), 0)
    with pytest.raises(ValueError, match=r"tables \['t_ad', .*have no row for every id to start from"):
        carry_over(hashed, Model(Magnitude, 1), folded=False)
