"""Tiered tables against a plain loop, their bytes by hand, who owns rows, and the form that serves."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

import recemb
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.conversion import convert
from recemb.hashing import salt
from recemb.memory import estimate_memory, measure_memory
from recemb.method import UNBOUNDED
from recemb.methods.tiered import PackedTiers, Tiered
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import BIG, KEYS, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of
from tests.test_hashing import plain_slot
from tests.test_quantised_rows import plain_row

SIZES = {"t_ad": 4000, "t_item": 6000, "t_site": 500, "t_one": 1}
# Frequent: few ads, some sites, many items.
COUNTS = {
    "t_ad": (5500 - 50 * torch.arange(4000)).clamp(min=0),
    "t_item": 6000 - torch.arange(6000),
    "t_site": 6000 - 10 * torch.arange(500),
    "t_one": torch.tensor([10_000]),
}


def build(**options: object) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection(small_tables(), partial(Tiered, **options))


def owners(num_ids: int) -> dict[str, int]:
    """How many ids of each table are among the most frequent of all, by sorting them one by one."""
    ranked = sorted((-int(count), list(SIZES).index(name), i) for name in SIZES for i, count in enumerate(COUNTS[name]))
    chosen = [list(SIZES)[index] for _, index, _ in ranked[:num_ids]]
    return {name: chosen.count(name) for name in SIZES}


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize(
    ("num_embeddings", "own_fraction", "num_lookups", "tail_bits"),
    [(1, 0.5, 1, 4), (600, 0.5, 2, 4), (600, 0.0, 2, 8), (5000, 0.9, 1, 8), (30_000, 0.3, 2, 4)],
)
def test_vectors_equal_a_plain_loop(
    ids: list[list[list[int]]], num_embeddings: int, own_fraction: float, num_lookups: int, tail_bits: int
) -> None:
    collection = build(
        num_embeddings=num_embeddings,
        own_fraction=own_fraction,
        num_lookups=num_lookups,
        tail_bits=tail_bits,
        train_counts=COUNTS,
    )
    weight = rows_of(group_of(collection)).tolist()
    own_ids = int(num_embeddings * own_fraction / num_lookups)
    # The largest case has rows for every id.
    own = SIZES if num_embeddings == 30_000 else owners(own_ids)
    num_own_rows = num_lookups * sum(own.values())

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        name = config.name
        if value < own[name]:
            before = sum(list(own.values())[: list(own).index(name)])
            slots, bits = [(before + value) * num_lookups + lookup for lookup in range(num_lookups)], 8
        else:
            slots, bits = (
                [
                    num_own_rows + plain_slot(value, salt(name, lookup), num_embeddings - num_own_rows)
                    for lookup in range(num_lookups)
                ],
                tail_bits,
            )
        # Rounded in evaluation alone.
        rows = [weight[slot] if collection.training else plain_row(weight[slot], bits) for slot in slots]
        return torch.tensor(rows).view(-1)

    for mode in (True, False):
        check_batch(collection.train(mode), vector, ids)


@pytest.mark.parametrize("tail_bits", [8, 4])
def test_bytes_by_hand(tail_bits: int) -> None:
    report = estimate_memory(
        small_tables(), partial(Tiered, num_embeddings=1000, own_fraction=0.4, tail_bits=tail_bits)
    )
    # 200 ids own two rows of 4 values at 8 bits; 600 rows are shared; each has a byte of scale.
    assert [table.bytes for table in report.tables] == [400 * 5, 600 * (5 if tail_bits == 8 else 3)]
    # Two salts, a number of ids and a start, for each of five features.
    assert (report.index_bytes, report.dense_bytes) == (5 * 4 * 8, 0)
    assert report.trained_bytes == 1000 * 4 * 4 + 160
    assert report.optimizer_bytes == 1000 * 4


def test_bytes_grow_with_the_knob_until_every_id_owns_its_rows() -> None:
    low, high = Tiered.budget_range(small_tables())
    reports = [
        estimate_memory(small_tables(), partial(Tiered, num_embeddings=rows)) for rows in [*range(low, high, 301), high]
    ]
    sizes = [report.serving_bytes for report in reports]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 10_501 * 2 * (4 + 1) + 160


def test_ids_that_own_rows_share_nothing_and_those_are_the_most_frequent_of_all_tables() -> None:
    collection = build(num_embeddings=4000, train_counts=COUNTS)
    group = group_of(collection.eval())
    own = owners(1000)
    assert group.tiers.own.tolist() == [own["t_ad"], own["t_item"], own["t_item"], own["t_site"], own["t_one"]]
    assert 0 < own["t_ad"] < own["t_site"] < own["t_item"]
    before = {key: all_vectors(collection, key, SIZES[name]) for key, name in (("ad", "t_ad"), ("site", "t_site"))}
    rows_of(group)[2000:] = 0
    for key, name in (("ad", "t_ad"), ("site", "t_site")):
        after = all_vectors(collection, key, SIZES[name])
        assert torch.equal(after[: own[name]], before[key][: own[name]])
        assert not bool(after[own[name] :].any())


def test_without_counts_tables_own_equally_many() -> None:
    group = group_of(build(num_embeddings=2 * 2 * 1201, own_fraction=0.5))
    # One id of the smallest table, and 400 of each other.
    assert group.tiers.own.tolist() == [400, 400, 400, 400, 1]


@pytest.mark.parametrize("tail_bits", [8, 4])
def test_what_was_trained_with_counts_serves_the_same_vectors_from_a_file(tail_bits: int, tmp_path: Path) -> None:
    collection = build(num_embeddings=3000, tail_bits=tail_bits, train_counts=COUNTS)
    model, optimizer = prepare(collection, EmbeddingOptimizer("adagrad", 0.1), partial(torch.optim.SGD, lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(bags(KEYS, MULTI_HOT)).values().square().sum().backward()
        optimizer.step()
    model.eval()
    everything = bags(KEYS, [[[i % n] for i in range(6000)] for n in (4000, 6000, 6000, 500, 1)])
    expected = [model(features).values() for features in (everything, bags(KEYS, MULTI_HOT))]
    estimate = measure_memory(collection).serving_bytes
    served = convert(model)
    assert isinstance(served.groups[0], PackedTiers)
    loaded = recemb.load(recemb.save(served, tmp_path / "saved"))
    for features, vectors in zip((everything, bags(KEYS, MULTI_HOT)), expected, strict=True):
        assert torch.equal(loaded(features).values(), vectors)
    assert estimate == measure_memory(loaded).serving_bytes == sum(t.nbytes for t in loaded.state_dict().values())


def test_weights_say_who_owns_rows_where_counts_are_not_at_hand() -> None:
    trained = build(num_embeddings=3000, train_counts=COUNTS)
    loaded = build(num_embeddings=3000)
    loaded.load_state_dict(trained.state_dict())
    for features in (bags(KEYS, SINGLE), bags(KEYS, MULTI_HOT)):
        assert torch.equal(loaded(features).values(), trained(features).values())


def test_gradients_in_evaluation_are_those_of_rows_that_are_not_rounded() -> None:
    collection, weights = build(num_embeddings=600), torch.randn(3, 40)
    gradients = []
    for mode in (True, False):
        collection.zero_grad()
        (collection.train(mode)(bags(KEYS, SINGLE)).values() * weights).sum().backward()
        gradients.append(next(collection.parameters()).grad.clone())
    assert torch.equal(*gradients) and bool(gradients[0].any())


def test_ids_above_float32_integers_and_unbounded_ids_share_rows_only_by_hash() -> None:
    tables = [table("huge", BIG), table("hashed", UNBOUNDED)]
    collection = CompressedEmbeddingBagCollection(tables, partial(Tiered, num_embeddings=4000)).eval()
    group = group_of(collection)
    assert group.tiers.own.tolist() == [1000, 0]
    ids = [[[999], [BIG - 1]], [[0], [2**62 + 11]]]
    output = collection(bags(["huge", "hashed"], ids))
    weight = rows_of(group).tolist()
    assert output["huge"][0].tolist() == [x for slot in (1998, 1999) for x in plain_row(weight[slot], 8)]
    for key, value, found in (("huge", BIG - 1, output["huge"][1]), ("hashed", 2**62 + 11, output["hashed"][1])):
        slots = [2000 + plain_slot(value, salt(f"t_{key}", lookup), 2000) for lookup in (0, 1)]
        assert found.tolist() == [x for slot in slots for x in plain_row(weight[slot], 4)]
    served = convert(copy.deepcopy(collection))
    assert torch.equal(served(bags(["huge", "hashed"], ids)).values(), output.values())


def test_full_tables_seed_own_rows_exactly_and_shared_ones_with_means() -> None:
    torch.manual_seed(1)
    full = {name: torch.randn(size, 8) for name, size in SIZES.items()}
    group = group_of(build(num_embeddings=3000, own_fraction=0.5))
    own = group.tiers.own.tolist()
    assert group.seed_from(full) == list(SIZES)
    weight = rows_of(group)
    assert torch.equal(weight[: 2 * own[0]].view(-1, 8), full["t_ad"][: own[0]])
    sums, counts = [0.0] * 1500, [0] * 1500
    for (name, size), first in zip(SIZES.items(), (own[0], own[1], own[3], own[4]), strict=True):
        for value in range(first, size):
            for lookup in (0, 1):
                slot = plain_slot(value, salt(name, lookup), 1500)
                sums[slot] += float(full[name][value, 4 * lookup])
                counts[slot] += 1
    expected = torch.tensor([total / count for total, count in zip(sums, counts, strict=True) if count])
    found = weight[1500:, 0][torch.tensor(counts) > 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_embeddings": 0}, r"num_embeddings must be in \[1, 1099511627776\] rows, got 0"),
        ({"num_embeddings": 9, "own_fraction": 1.0}, r"own_fraction must be in \[0, 1\), got 1.0"),
        ({"num_embeddings": 9, "tail_bits": 2}, r"tail_bits must be one of \(8, 4\), got 2"),
        ({"num_embeddings": 9, "num_lookups": 4}, r"embedding_dim \(8\) / num_lookups .* got num_lookups 4"),
        ({"num_embeddings": 9, "train_counts": {"t_ad": torch.zeros(4000)}}, "'t_item': train_counts are required"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_rows_that_have_no_codes_are_not_converted() -> None:
    collection = build(num_embeddings=600)
    rows_of(group_of(collection))[301, 2] = float("nan")
    with pytest.raises(ValueError, match="row 1: values at 4 bits must be in"):
        convert(collection)
