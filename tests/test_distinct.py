"""Distinct keys of a batch against numpy's, and the gradient of their expansion against autograd's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recemb.bags import Bags
from recemb.distinct import Distinct, DistinctIds


# 2**62 leaves no bits to pack a position beside the key.
@pytest.mark.parametrize("num_keys", [50, 2**40, 2**62], ids=["few", "packed", "unpacked"])
@given(data=st.data())
def test_distinct_keys_equal_numpys(num_keys: int, data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.integers(0, min(num_keys - 1, 60)), max_size=40))
    keys = [num_keys - 1 - key if key % 2 else key for key in keys]
    found = Distinct.of(torch.tensor(keys, dtype=torch.int64), num_keys)
    expected, inverse, counts = np.unique(np.array(keys, dtype=np.int64), return_inverse=True, return_counts=True)
    assert found.keys.tolist() == expected.tolist()
    assert found.inverse.tolist() == inverse.tolist()
    assert found.counts.tolist() == counts.tolist()
    assert found.order.tolist() == np.argsort(inverse, kind="stable").tolist()


def test_unmerged_keys_are_only_sorted() -> None:
    keys = torch.tensor([7, 3, 7, 9, 3, 7])
    found = Distinct.of(keys, 10, merge=False)
    assert found.keys.tolist() == [3, 3, 7, 7, 7, 9]
    assert torch.equal(found.keys[found.inverse], keys)
    assert found.counts.tolist() == [1] * 6
    vectors = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(found.expand, [vectors])


def test_gradients_of_repeated_keys_are_summed() -> None:
    found = Distinct.of(torch.tensor([7, 3, 7, 9, 3, 7]), 10)
    vectors = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(found.expand(vectors), vectors[torch.tensor([1, 0, 1, 2, 0, 1])])
    assert torch.autograd.gradcheck(found.expand, [vectors])


def test_no_keys_have_no_vectors() -> None:
    found = Distinct.of(torch.zeros(0, dtype=torch.int64), 10)
    vectors = torch.zeros(0, 4, requires_grad=True)
    found.expand(vectors).sum().backward()
    assert vectors.grad is not None and vectors.grad.shape == (0, 4)


OWNERS = [0, 1, 1, 2]


# Ids of tables that are too many to count through are told apart by their hashes.
@pytest.mark.parametrize(
    "sizes", [[7, 2**20, 3], [7, 2**40, 3], [7, 2**63 - 1, 3]], ids=["counted", "counted far", "hashed"]
)
@pytest.mark.parametrize("single", [True, False], ids=["single", "bags"])
@given(data=st.data())
def test_merged_ids_are_those_that_came(sizes: list[int], single: bool, data: st.DataObject) -> None:
    draw_ids = [st.sampled_from([0, 1, sizes[owner] - 1, sizes[owner] // 2]) for owner in OWNERS]
    ids = [[data.draw(one) for _ in range(1 if single else data.draw(st.integers(0, 4)))] for one in draw_ids]
    flat = torch.tensor([value for feature in ids for value in feature], dtype=torch.int64)
    lengths = torch.tensor([[len(feature)] for feature in ids])
    came = Bags(flat.view(1, -1) if single else flat, lengths, single)
    merged = DistinctIds(sizes, OWNERS).merge(came)
    assert merged is not None
    distinct, chosen = merged
    features = [feature for feature, count in enumerate(chosen.lengths.view(-1).tolist()) for _ in range(count)]
    pairs = [(OWNERS[feature], value) for feature, value in zip(features, chosen.ids.tolist(), strict=True)]
    assert len(set(pairs)) == len(pairs)
    # Under the first feature of their table.
    assert set(features) <= {0, 1, 3}
    expected = [(OWNERS[feature], value) for feature, values in enumerate(ids) for value in values]
    assert [pairs[place] for place in distinct.inverse.tolist()] == expected


def test_colliding_hashes_are_not_merged() -> None:
    ids = DistinctIds([2**63 - 1], [0])
    # One bit of hash for three ids.
    ids._hash_bits = 1
    assert ids.merge(Bags(torch.tensor([[1], [2], [3]]), torch.ones(1, 3, dtype=torch.int64), single=True)) is None
