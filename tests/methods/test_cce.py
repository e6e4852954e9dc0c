"""Clustered compositional embeddings against plain loops, before, at and after a clustering."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.compression import compress_
from recemb.hashing import salt
from recemb.k_means import k_means
from recemb.memory import estimate_memory, full_table_bytes, measure_memory
from recemb.methods.cce import ClusteredCompositional
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import BIG, KEYS, MULTI_HOT, SINGLE, bags, pool_plainly, small_tables, table
from tests.test_hashing import plain_slot


def build(num_clusters: int, seed: int = 0, **options: Any) -> tuple[CompressedEmbeddingBagCollection, Any]:
    torch.manual_seed(seed)
    method = partial(ClusteredCompositional, num_clusters=num_clusters, **options)
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    return collection, collection.groups[0]


def rows_of(cce: ClusteredCompositional, index: int) -> Tensor:
    [config] = cce.physical_tables[index]
    return cce.get_parameter(f"lookups.{index}.embedding_bags.{config.name}.weight").detach()


def plain_vector(cce: ClusteredCompositional, name: str, value: int, chunk: int, salts: list[int]) -> Tensor:
    """Layout by hand: chunks of a table one after the other, tables one after the other, in both stacks."""
    clusters, chunks, row, second_row, code_row = cce.num_clusters, cce._chunks, 0, 0, 0
    for config, small in zip(cce.tables, cce._shrinks, strict=True):
        if config.name == name:
            break
        row += chunks * (clusters if small else config.num_embeddings)
        second_row += chunks * clusters if small else 0
        code_row += config.num_embeddings if small else 0
    if not small:
        return rows_of(cce, 0)[row + value * chunks + chunk]
    code = int(cce.codes[code_row + value, chunk])
    code += (1 << (8 * cce.codes.element_size())) if code < 0 else 0
    first = rows_of(cce, 0)[row + chunk * clusters + code]
    return first + rows_of(cce, 1)[second_row + chunk * clusters + plain_slot(value, salts[chunk], clusters)]


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("num_clusters", [3, 200, 300])
@pytest.mark.parametrize("clustered", [False, True], ids=["before", "after"])
def test_vectors_equal_a_plain_loop_over_chunks(ids: list[list[list[int]]], num_clusters: int, clustered: bool) -> None:
    """With 3 clusters only the table of one row stays full, with 300 that of 500 as well, and codes take two bytes."""
    collection, cce = build(num_clusters)
    if clustered:
        cce.cluster_()
    vectors: dict[str, dict[int, Tensor]] = {}
    feature = 0
    for config in cce.tables:
        for key in config.feature_names:
            wanted = {value for bag in ids[KEYS.index(key)] for value in bag} | {0}
            salts = cce.salts[feature].tolist()
            vectors[key] = {
                v: torch.cat([plain_vector(cce, config.name, v, chunk, salts) for chunk in range(2)]) for v in wanted
            }
            feature += 1
    expected = pool_plainly(vectors, ids, [False, True, True, False, False])
    torch.testing.assert_close(collection(bags(KEYS, ids)).values(), expected)


def test_a_new_model_hashes_by_its_codes() -> None:
    _, cce = build(200)
    assert cce.codes.dtype == torch.uint8
    for value in (0, 17, 3999):
        expected = [plain_slot(value, salt("t_ad", chunk), 200) for chunk in range(2)]
        assert cce.codes[value].tolist() == expected


def vectors_of(collection: CompressedEmbeddingBagCollection, key: str, size: int) -> Tensor:
    ids = [[[value] if name == key else [] for value in range(size)] for name in KEYS]
    return collection(bags(KEYS, ids))[key].detach()


def test_clustering_equals_a_plain_loop_over_ids() -> None:
    collection, cce = build(6)
    before = vectors_of(collection, "site", 500)
    cce.cluster_()
    starts = [int(cce.first_rows[3, chunk]) for chunk in range(2)]
    for chunk in range(2):
        old = before[:, 4 * chunk : 4 * chunk + 4]
        generator = torch.Generator().manual_seed(int(cce.salts[3, chunk]) & (2**63 - 1))
        centroids = k_means(old, 6, generator)
        torch.testing.assert_close(rows_of(cce, 0)[starts[chunk] : starts[chunk] + 6], centroids, rtol=1e-4, atol=1e-6)
        residuals: dict[int, list[Tensor]] = {}
        for value in range(500):
            distances = [float((old[value] - centroid).square().sum()) for centroid in centroids]
            code = int(cce.codes[10_000 + value, chunk])
            assert distances[code] == pytest.approx(min(distances), rel=1e-4, abs=1e-7)
            slot = plain_slot(value, int(cce.salts[3, chunk]), 6)
            residuals.setdefault(slot, []).append(old[value] - centroids[code])
        for slot, members in residuals.items():
            row = rows_of(cce, 1)[int(cce.second_rows[3, chunk]) + slot]
            torch.testing.assert_close(row, torch.stack(members).mean(0), rtol=1e-4, atol=1e-6)


def test_clustering_keeps_what_ids_have_learnt() -> None:
    """Ids in ten groups, each with a vector of its own: ten clusters hold them all."""
    truth = torch.randn(10, 8, generator=torch.Generator().manual_seed(3))
    old = EmbeddingBagCollection(tables=[table("a", 2000)])
    with torch.no_grad():
        old.embedding_bags["t_a"].weight.copy_(truth[torch.arange(2000) * 7919 % 2000 % 10])
    expected = old.embedding_bags["t_a"].weight.detach().clone()
    new = compress_(old, partial(ClusteredCompositional, num_clusters=40), seed_from_weights=True)
    ids = bags(["a"], [[[value] for value in range(2000)]])
    torch.testing.assert_close(new(ids)["a"], expected, rtol=1e-3, atol=1e-3)
    new.groups[0].cluster_()
    torch.testing.assert_close(new(ids)["a"], expected, rtol=1e-3, atol=1e-3)


def test_rows_without_ids_stay_finite() -> None:
    """Few ids and many rows of the second table: most of them are nobody's."""
    collection = CompressedEmbeddingBagCollection([table("a", 60)], partial(ClusteredCompositional, num_clusters=20))
    cce: Any = collection.groups[0]
    for _ in range(3):
        cce.cluster_()
    assert all(torch.isfinite(rows_of(cce, index)).all() for index in range(2))


def test_each_clustering_hashes_anew_and_repeats_from_the_state() -> None:
    collection, cce = build(50)
    salts = [cce.salts.clone()]
    for _ in range(2):
        twin = copy.deepcopy(collection)
        cce.cluster_()
        twin.groups[0].cluster_()  # type: ignore[operator]
        state = twin.state_dict()
        for name, tensor in collection.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        salts.append(cce.salts.clone())
    assert len({int(salt_tensor[0, 0]) for salt_tensor in salts}) == 3
    # Target and history share a table, and go on sharing its hash.
    assert torch.equal(cce.salts[1], cce.salts[2])


def test_clustered_ids_train_on_in_fused_tables() -> None:
    collection, _ = build(50)
    plain = copy.deepcopy(collection)
    model, optimizer = prepare(collection, EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1))
    for module in (model, plain):
        module.groups[0].cluster_()  # type: ignore[operator, index, union-attr]
    features = bags(KEYS, MULTI_HOT)
    assert torch.equal(model(features).values(), plain(features).values())
    before = model(features).values().detach()
    before_loss = model(features).values().square().sum()
    before_loss.backward()
    optimizer.step()
    assert float(model(features).values().square().sum()) < float(before_loss)
    assert not torch.equal(model(features).values(), before)


def test_clusters_at_the_chosen_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cce = build(10, cluster_at_steps=[2, 5])
    done: list[int] = []
    for step in range(1, 7):
        monkeypatch.setattr(cce, "cluster_", lambda step=step: done.append(step))
        cce.after_step(step)
    assert done == [2, 5]


@pytest.mark.parametrize(("num_clusters", "dtype"), [(256, torch.uint8), (257, torch.int16), (70_000, torch.int32)])
def test_codes_are_as_small_as_they_can_be_and_count(num_clusters: int, dtype: torch.dtype) -> None:
    tables = [table("a", 1_000_000)]
    method = partial(ClusteredCompositional, num_clusters=num_clusters)
    report = estimate_memory(tables, method)
    assert report.table_bytes == 2 * num_clusters * 8 * 4
    assert report.index_bytes - 1_000_000 * 2 * dtype.itemsize < 100
    assert report == measure_memory(CompressedEmbeddingBagCollection(tables, method))


def test_codes_beyond_the_sign_bit_are_read_as_they_were_written() -> None:
    tables = [table("a", 200_000)]
    collection = CompressedEmbeddingBagCollection(tables, partial(ClusteredCompositional, num_clusters=50_000))
    cce: Any = collection.groups[0]
    assert cce.codes.dtype == torch.int16 and bool((cce.codes < 0).any())
    output = collection(bags(["a"], [[[value] for value in range(0, 200_000, 9973)]]))["a"]
    for value, vector in zip(range(0, 200_000, 9973), output, strict=True):
        slots = [plain_slot(value, salt("t_a", chunk), 50_000) for chunk in range(4)]
        first = [rows_of(cce, 0)[chunk * 50_000 + slots[chunk]] for chunk in range(2)]
        second = [rows_of(cce, 1)[chunk * 50_000 + slots[2 + chunk]] for chunk in range(2)]
        torch.testing.assert_close(vector, torch.cat(first) + torch.cat(second))


def test_ids_above_float32_integers_stay_apart() -> None:
    tables = [table("a", BIG + 3)]
    collection = CompressedEmbeddingBagCollection(tables, partial(ClusteredCompositional, num_clusters=256))
    output = collection(bags(["a"], [[[BIG], [BIG + 1], [BIG + 2]]]))["a"]
    assert torch.unique(output, dim=0).shape[0] == 3


def test_tables_that_would_not_shrink_stay_full() -> None:
    for num_clusters in (1, 10, 249, 250, 3000, 6000):
        _, cce = build(num_clusters)
        assert all(
            small == (2 * num_clusters * 32 + t.num_embeddings * 2 * cce.codes.element_size() < t.num_embeddings * 32)
            for t, small in zip(cce.tables, cce._shrinks, strict=True)
        )
        report = estimate_memory(small_tables(), partial(ClusteredCompositional, num_clusters=num_clusters))
        assert report.table_bytes <= sum(full_table_bytes(small_tables()).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clusters": 0}, "num_clusters and samples_per_cluster must be at least 1, got 0 and 200"),
        ({"num_clusters": 2, "chunk_dim": 6}, r"multiple of 4 that divides embedding_dim \(8\), got 6"),
        ({"num_clusters": 2, "chunk_dim": 16}, r"multiple of 4 that divides embedding_dim \(8\), got 16"),
        ({"num_clusters": 2, "cluster_at_steps": [0, 3]}, r"at least 1 \(the first training step\), got \[0\]"),
    ],
)
def test_options_are_checked(options: dict[str, int | Sequence[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusteredCompositional(small_tables(), **options)  # type: ignore[arg-type]
