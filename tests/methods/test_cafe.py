"""CAFE against a plain sketch that inserts key after key, and against hand-made gradients."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.memory import estimate_memory, measure_memory
from recemb.method import UNBOUNDED
from recemb.methods.cafe import Cafe, HotSketch
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import BIG, KEYS, bags, small_tables, table
from tests.test_sequence_collection import TABLES


class PlainSketch:
    """Buckets of [key, score, hot row]; one key at a time, in the order the module's docstring gives."""

    def __init__(self, num_rows: int, threshold: float, decay: float) -> None:
        self.buckets: list[list[list[float]]] = [[] for _ in range(num_rows)]
        self.free = set(range(num_rows))
        self.threshold, self.decay, self.inserted = threshold, decay, 0.0

    def insert(self, batch: dict[int, float]) -> dict[int, int]:
        size = len(self.buckets)
        if self.inserted > 10 * size * self.threshold:
            self.inserted = 0.0
            for slot in (slot for bucket in self.buckets for slot in bucket):
                slot[1] *= self.decay
                if slot[1] < self.threshold and slot[2] >= 0:
                    self.free.add(int(slot[2]))
                    slot[2] = -1
        self.inserted += sum(batch.values())
        seen = {slot[0]: slot for bucket in self.buckets for slot in bucket}
        ready = []
        for key in sorted(batch):
            if key in seen:
                seen[key][1] += batch[key]
                if seen[key][1] >= self.threshold and seen[key][2] < 0:
                    ready.append(seen[key])
        promoted = {}
        for slot in sorted(ready, key=lambda slot: (-slot[1], slot[0])):
            if self.free:
                slot[2] = min(self.free)
                self.free.remove(slot[2])
                promoted[int(slot[0])] = int(slot[2])
        for number, bucket in enumerate(self.buckets):
            unknown = [key for key in batch if key not in seen and key % size == number]
            unknown.sort(key=lambda key: (-batch[key], key))
            while unknown and len(bucket) < 4:
                key = unknown.pop(0)
                bucket.append([key, batch[key], -1])
            cold = [slot for slot in bucket if slot[2] < 0]
            if unknown and cold:
                weakest = min(cold, key=lambda slot: slot[1])
                for key in reversed(unknown):
                    weakest[0] = key
                    weakest[1] += batch[key]
        return promoted


# Multiples of 1/4, so that sums are exact and ties happen.
BATCHES = st.lists(
    st.dictionaries(st.integers(0, 40), st.integers(0, 12).map(lambda n: n / 4), max_size=25), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None)
@given(BATCHES, st.integers(1, 7), st.sampled_from([0.5, 2.0, 5.0]), st.sampled_from([0.5, 0.25, 1.0]))
def test_sketch_equals_one_that_inserts_key_after_key(
    batches: list[dict[int, float]], num_rows: int, threshold: float, decay: float
) -> None:
    sketch = HotSketch(num_rows, key_dtype=torch.int32, threshold=threshold, decay=decay)
    plain = PlainSketch(num_rows, threshold, decay)
    for batch in batches:
        keys = torch.tensor(sorted(batch), dtype=torch.int64)
        promoted, rows = sketch.insert(keys, torch.tensor([batch[int(key)] for key in keys], dtype=torch.float32))
        expected = plain.insert(batch)
        assert dict(zip(keys[promoted].tolist(), rows.tolist(), strict=True)) == expected
        for number, bucket in enumerate(plain.buckets):
            slots = zip(*(part[number].tolist() for part in (sketch.keys, sketch.scores, sketch.hot_rows)), strict=True)
            assert [list(slot) for slot in slots] == bucket + [[-1, 0.0, -1]] * (4 - len(bucket))
        hot = {int(slot[0]): slot[2] for bucket in plain.buckets for slot in bucket}
        assert sketch.find(torch.arange(50)).tolist() == [hot.get(key, -1) for key in range(50)]


def build(num_embeddings: int = 400, seed: int = 0, **options: Any) -> tuple[CompressedEmbeddingBagCollection, Any]:
    torch.manual_seed(seed)
    method = partial(Cafe, num_embeddings=num_embeddings, **options)
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    return collection, collection.groups[0]


def scores_of(cafe: Cafe) -> dict[int, float]:
    assert cafe.sketch is not None
    slots = zip(cafe.sketch.keys.view(-1).tolist(), cafe.sketch.scores.view(-1).tolist(), strict=True)
    return {key: score for key, score in slots if key >= 0}


def step(collection: Any, ids: list[list[list[int]]], gradient: Tensor | None = None, number: int = 1) -> None:
    """One backward with this gradient of the output (ones where None), and the end of the step."""
    output = collection(bags(KEYS, ids)).values()
    output.backward(torch.ones_like(output) if gradient is None else gradient)
    collection.groups[0].after_step(number)


IDS = [[[5, 7], [5], []], [[17], [4], [2]], [[17, 17, 9], [2], []], [[499], [1], [1]], [[0], [0], [0]]]
FIRST_KEYS = {"ad": 0, "target": 4000, "history": 4000, "site": 10_000}


@pytest.mark.parametrize("score", ["gradient_norm", "frequency"])
def test_scores_are_gradient_norms_that_average_one_in_a_feature(score: str) -> None:
    collection, cafe = build(score=score)
    gradient = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    step(collection, IDS, gradient)
    expected: dict[int, float] = {}
    for feature, key in enumerate(KEYS[:4]):
        norms = []
        for sample, bag in enumerate(IDS[feature]):
            norm = float(gradient[sample, 8 * feature : 8 * feature + 8].norm())
            mean = key in ("target", "history")
            norms += [(value, norm / len(bag) if mean else norm) for value in bag]
        scale = len(norms) / sum(norm for _, norm in norms)
        for value, norm in norms:
            number = FIRST_KEYS[key] + value
            expected[number] = expected.get(number, 0) + (norm * scale if score == "gradient_norm" else 1)
    # The table of one row is full already: its id is not in the sketch.
    assert scores_of(cafe) == pytest.approx(expected, rel=1e-5)


def test_promotion_copies_what_the_id_read_and_then_parts_it_from_the_others() -> None:
    collection, cafe = build(60, threshold=2.0)
    mine, other = 5, next(value for value in range(6, 4000) if bool((slot_of(cafe, value) == slot_of(cafe, 5)).all()))
    model, optimizer = prepare(collection, EmbeddingOptimizer("sgd", 0.5), partial(torch.optim.SGD, lr=0.1))
    model.train()
    one = [[[mine]], [[]], [[]], [[]], [[]]]
    for number in (1, 2):
        assert hot_row(cafe, mine) == -1
        optimizer.zero_grad()
        output = model(bags(KEYS, one)).values()
        output.sum().backward()
        optimizer.step()
        before = vector(model, mine)
        cafe.after_step(number)
        # Whatever the step's backward did to the hashed row has come along.
        assert torch.equal(vector(model, mine), before)
        assert torch.equal(vector(model, other), before)
    assert hot_row(cafe, mine) >= 0 and hot_row(cafe, other) == -1
    model(bags(KEYS, one)).values().sum().backward()
    assert torch.equal(vector(model, other), before)
    torch.testing.assert_close(vector(model, mine), before - 0.5)


def slot_of(cafe: Cafe, value: int) -> Tensor:
    return cafe._rows(torch.tensor([value]), torch.tensor([0]))


def hot_row(cafe: Cafe, value: int) -> int:
    assert cafe.sketch is not None
    return int(cafe.sketch.find(torch.tensor([value])))


def vector(model: Any, value: int) -> Tensor:
    with torch.no_grad():
        return model(bags(KEYS, [[[value]], [[]], [[]], [[]], [[]]]))["ad"][0].clone()


def test_a_demoted_id_reads_its_hashed_row_again() -> None:
    collection, cafe = build(100, threshold=2.0, decay=0.1)
    hashed = vector(collection, 5)
    for number in (1, 2):
        step(collection, [[[5, 5]], [[]], [[]], [[]], [[]]], number=number)
    assert hot_row(cafe, 5) >= 0
    with torch.no_grad():
        weight = cafe.get_parameter("lookups.0.embedding_bags.cafe.weight")
        weight[cafe._first_hot + hot_row(cafe, 5)] = 3.0
    assert torch.equal(vector(collection, 5), torch.full((8,), 3.0))
    cafe.sketch.inserted.fill_(10 * 2.0 * cafe.sketch.num_rows + 1)
    step(collection, [[[900]], [[]], [[]], [[]], [[]]], number=3)
    assert hot_row(cafe, 5) == -1
    assert torch.equal(vector(collection, 5), hashed)
    # Its row is free for another.
    for number in (4, 5):
        step(collection, [[[901, 901]], [[]], [[]], [[]], [[]]], number=number)
    assert hot_row(cafe, 901) == 0


def test_a_key_is_hot_in_its_own_table_only() -> None:
    collection, cafe = build(threshold=1.0)
    for number in (1, 2):
        step(collection, [[[17]], [[]], [[]], [[]], [[]]], number=number)
    assert hot_row(cafe, 17) >= 0
    assert hot_row(cafe, 4000 + 17) == -1
    assert hot_row(cafe, 10_000 + 17) == -1
    output = collection(bags(KEYS, [[[]], [[17]], [[17]], [[]], [[]]]))
    assert torch.equal(output["target"], output["history"])


def test_nothing_moves_in_evaluation_nor_without_a_backward(tmp_path: Path) -> None:
    collection, cafe = build(threshold=1.0)
    before = {name: tensor.clone() for name, tensor in collection.state_dict().items()}
    collection.eval()
    for number in (1, 2):
        step(collection, IDS, number=number)
    collection.train()
    collection(bags(KEYS, IDS))
    cafe.after_step(3)
    with torch.no_grad():
        collection(bags(KEYS, IDS))
    cafe.after_step(4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in collection.state_dict().items())


def test_a_state_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first, _ = build(300, threshold=1.5)
    generator = torch.Generator().manual_seed(0)

    def ids() -> list[list[list[int]]]:
        return [[torch.randint(min(n, 40), (3,), generator=generator).tolist()] * 2 for n in (4000, 6000, 6000, 500, 1)]

    for number in range(1, 6):
        step(first, ids(), number=number)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second, _ = build(300, seed=9, threshold=1.5)
    # A sketch that has promoted already forgets which rows were taken.
    step(second, ids())
    step(second, ids())
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for number in range(6, 12):
        batch = ids()
        step(first, batch, number=number)
        step(second, batch, number=number)
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    hot = first.groups[0].sketch.hot_rows
    assert torch.equal(hot[hot >= 0].unique(), hot[hot >= 0].sort().values), "no two ids share a hot row"


def test_fused_training_equals_autograd_and_torch_sgd() -> None:
    plain, cafe = build(300, threshold=2.0)
    model, optimizer = prepare(
        copy.deepcopy(plain).train(), EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1)
    )
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number in range(1, 7):
        for module, stepped in ((model, optimizer), (plain, reference)):
            stepped.zero_grad()
            ((module(bags(KEYS, IDS)).values() - 1) ** 2).sum().backward()
            stepped.step()
            module.groups[0].after_step(number)  # type: ignore[index, union-attr, operator]
    assert int((cafe.sketch.hot_rows >= 0).sum()) > 5
    expected = plain.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_sequences_move_the_sketch_too() -> None:
    collection = CompressedEmbeddingCollection(TABLES, partial(Cafe, num_embeddings=300, threshold=1.0))
    cafe: Any = next(group for group in collection.groups if "ad" in group.feature_names)
    for number in (1, 2):
        output = collection(bags(KEYS, IDS))
        torch.cat([part.values() for part in output.values()]).sum().backward()
        cafe.after_step(number)
    assert hot_row(cafe, 5) >= 0


def test_empty_batches_pass() -> None:
    collection, cafe = build()
    step(collection, [[[]] * 2] * 5)
    assert scores_of(cafe) == {}
    cafe.after_step(2)


def test_gradients_of_zero_count_nothing() -> None:
    collection, cafe = build()
    step(collection, IDS, torch.zeros(3, 40))
    assert set(scores_of(cafe).values()) == {0.0}


@pytest.mark.parametrize("size", [2**26, 2**40, UNBOUNDED])
def test_ids_above_float32_integers_stay_apart(size: int) -> None:
    method = partial(Cafe, num_embeddings=500, threshold=1.0)
    collection = CompressedEmbeddingBagCollection([table("a", size), table("b", size)], method)
    cafe: Any = collection.groups[0]
    assert cafe.sketch.keys.dtype == (torch.int32 if size == 2**26 else torch.int64)
    for number in (1, 2):
        output = collection(bags(["a", "b"], [[[BIG, BIG]], [[]]])).values()
        output.sum().backward()
        cafe.after_step(number)
    with torch.no_grad():
        cafe.get_parameter("lookups.0.embedding_bags.cafe.weight")[cafe._first_hot :] = 3.0
        output = collection(bags(["a", "b"], [[[BIG], [BIG + 1], [BIG - 1]], [[BIG], [], []]]))
    assert (output["a"] == 3).all(dim=1).tolist() == [True, False, False]
    assert not (output["b"] == 3).any()


def test_the_sketch_counts_48_bytes_a_hot_row() -> None:
    tables = [table("a", 1_000_000, dim=16)]
    for options in ({}, {"hash_fraction": 0.7}):
        method = partial(Cafe, num_embeddings=100_000, **options)
        report = estimate_memory(tables, method)
        collection = CompressedEmbeddingBagCollection(tables, method)
        cafe: Any = collection.groups[0]
        assert report == measure_memory(collection)
        hot = cafe.sketch.num_rows
        assert report.index_bytes + report.dense_bytes - 48 * hot < 100
        assert 0.999 < report.serving_bytes / (100_000 * 64) <= 1.001
        assert hot == int(100_000 * (1 - options.get("hash_fraction", 0.5)) * 64 / (64 + 48))


def test_full_tables_have_no_sketch() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 1)], partial(Cafe, num_embeddings=1))
    assert collection.groups[0].sketch is None
    assert sum(parameter.numel() for parameter in collection.parameters()) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_embeddings": 0}, "num_embeddings must be at least 1 row, got 0"),
        ({"num_embeddings": 9, "hash_fraction": 1.0}, r"hash_fraction must be in \(0, 1\), got 1.0"),
        ({"num_embeddings": 9, "threshold": 0.0}, "threshold must be above 0, got 0.0"),
        ({"num_embeddings": 9, "decay": 1.5}, r"decay must be in \(0, 1\], got 1.5"),
        ({"num_embeddings": 9, "score": "age"}, r"score must be one of \('gradient_norm', 'frequency'\), got 'age'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cafe(small_tables(), **options)


def test_small_tables_stay_full_and_out_of_the_sketch() -> None:
    collection, cafe = build(full_below_rows=501, threshold=0.1)
    shares = [int(count) for count in cafe._rows.own]
    # Tables of 500 rows and of one; those of 4000 and 6000 hash theirs, the latter serving two features.
    assert shares == [0, 0, 0, 500, 1]
    vectors = collection(bags(KEYS, [[[i] for i in range(500)]] * 4 + [[[0]] * 500]))["site"]
    assert len(torch.unique(vectors, dim=0)) == 500
    step(collection, [[[1]], [[2]], [[2]], [[3]], [[0]]])
    assert set(scores_of(cafe)) == {1, 4002}
