"""PEP: the soft threshold against a plain loop, thresholds whose gradient lives, and what their decay does."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.methods.full import Full
from recemb.methods.pep import Pep, soft_threshold
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.pruned_bytes import plan_bytes
from tests.embedding_cases import KEYS, MULTI_HOT, SINGLE, bags, small_tables
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of

Granularity = Literal["model", "column", "row", "value"]
ALL: list[Granularity] = ["model", "column", "row", "value"]
SGD = partial(torch.optim.SGD, lr=0.1)
SIZES = {"t_ad": 4000, "t_item": 6000, "t_site": 500, "t_one": 1}


def build(
    per: Granularity, *, start_fraction: float = 0.01, decay: float = 1e-5, learning_rate: float = 0.05
) -> tuple[CompressedEmbeddingBagCollection, Pep]:
    torch.manual_seed(0)
    method = partial(Pep, per=per, start_fraction=start_fraction, decay=decay, learning_rate=learning_rate)
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    group = group_of(collection)
    assert isinstance(group, Pep)
    return collection, group


def stored_thresholds(group: Pep, per: Granularity) -> Tensor:
    if group.thresholds is not None:
        return group.thresholds.data
    return rows_of(group, 1)


def plain_threshold(thresholds: Tensor, per: Granularity, row: int, column: int) -> float:
    position = {"model": 0, "column": column, "row": row, "value": row * 8 + column}[per]
    return float(thresholds.reshape(-1)[position])


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("per", ALL)
def test_vectors_equal_the_formula_value_by_value(per: Granularity, ids: list[list[list[int]]]) -> None:
    collection, group = build(per)
    thresholds = stored_thresholds(group, per)
    thresholds.normal_(-4.0, 1.5)
    rows = rows_of(group)

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        row = sum(size for name, size in SIZES.items() if list(SIZES).index(name) < list(SIZES).index(config.name))
        row += value
        result = []
        for column in range(8):
            entry = float(rows[row, column])
            cut = 1 / (1 + math.exp(-plain_threshold(thresholds, per, row, column)))
            result.append(math.copysign(abs(entry) - cut, entry) if abs(entry) > cut else 0.0)
        return torch.tensor(result)

    check_batch(collection, vector, ids)


@pytest.mark.parametrize("per", ALL)
def test_thresholds_start_at_a_share_of_the_rows_spread(per: Granularity) -> None:
    _, group = build(per, start_fraction=0.02)
    start = torch.sigmoid(stored_thresholds(group, per).reshape(-1))
    if per in ("row", "value"):
        each = 8 if per == "value" else 1
        parts = start[: 10_501 * each].split([size * each for size in SIZES.values()])
        for part, size in zip(parts, SIZES.values(), strict=True):
            torch.testing.assert_close(part, torch.full_like(part, 0.02 / math.sqrt(3 * size)), rtol=1e-4, atol=0)
    else:
        torch.testing.assert_close(start, torch.full_like(start, 0.02 * math.sqrt(4 / (3 * 10_501))))
    folded = torch.cat(list(group.folded_tables().values()))
    assert float((folded == 0).float().mean()) < 0.03


@pytest.mark.parametrize("per", ALL)
def test_gradients_of_fresh_thresholds_are_those_of_finite_differences_and_alive(per: Granularity) -> None:
    _, group = build(per)
    rows, starts = rows_of(group)[:50].double(), stored_thresholds(group, per)
    start = float(starts.reshape(-1)[0])
    thresholds = torch.full((50, 8), start, dtype=torch.float64, requires_grad=True)
    target = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(values: Tensor) -> Tensor:
        return (soft_threshold(rows, values) * target).sum(dim=1).tanh().sum()

    loss(thresholds).backward()
    assert thresholds.grad is not None
    for row, column in ((0, 0), (7, 3), (49, 7)):
        step = torch.zeros(50, 8, dtype=torch.float64)
        step[row, column] = 1e-4
        with torch.no_grad():
            difference = (loss(thresholds + step) - loss(thresholds - step)) / 2e-4
        torch.testing.assert_close(thresholds.grad[row, column], difference, rtol=1e-4, atol=1e-12)
    alive = rows.abs() > torch.sigmoid(thresholds.detach())
    assert bool((thresholds.grad[alive].abs() > 1e-8).all())
    # In the float32 of training too, where the released start of -150 is dead.
    for value, lives in ((start, True), (-150.0, False)):
        single = torch.full((1,), value, requires_grad=True)
        soft_threshold(torch.tensor([0.5]), single).sum().backward()
        assert single.grad is not None and bool(single.grad.abs() > 0) is lives


@pytest.mark.parametrize("per", ALL)
def test_training_moves_fresh_thresholds(per: Granularity) -> None:
    """At gradients as small as those of a wide model: Adagrad's usual eps would stop them."""
    collection, group = build(per, decay=0.0, learning_rate=0.05)
    model, optimizer = prepare(torch.nn.Sequential(collection), EmbeddingOptimizer("sgd", 0.0), SGD)
    before = stored_thresholds(group, per).clone()
    optimizer.zero_grad()
    (model(bags(KEYS, SINGLE)).values() * torch.randn(3, 40)).sum().mul(1e-5).backward()
    optimizer.step()
    moved = (stored_thresholds(group, per) - before).abs()
    assert float(moved.max()) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("per", ALL)
def test_decay_raises_the_thresholds_of_the_ids_of_the_batch(per: Granularity) -> None:
    collection, group = build(per, decay=1.0)
    model, optimizer = prepare(torch.nn.Sequential(collection), EmbeddingOptimizer("sgd", 0.0), SGD)
    before = stored_thresholds(group, per).clone()
    optimizer.zero_grad()
    loss = model(bags(KEYS, SINGLE)).values().sum() * 0
    penalty = group.penalty()
    (loss if penalty is None else loss + penalty).backward()
    optimizer.step()
    moved = (stored_thresholds(group, per) - before).reshape(-1)
    if per in ("model", "column"):
        assert bool((moved > 0.04).all())
        return
    # Of tables ad, item, site and one.
    looked_up = {3999, 0, 12, *(4000 + i for i in (17, 5999, 0, 4)), *(10_000 + i for i in (499, 0, 250)), 10_500}
    rows = moved[: 10_501 * (8 if per == "value" else 1)].view(10_501, -1)
    assert {int(row) for row in (rows > 0.04).all(dim=1).nonzero()} == looked_up
    assert not rows[[row for row in range(10_501) if row not in looked_up]].any()


def test_evaluation_decays_nothing() -> None:
    collection, group = build("value", decay=1.0)
    collection.eval()
    output = collection(bags(KEYS, SINGLE)).values()
    (output.sum() * 0).backward()
    gradient = group.get_parameter("lookups.1.embedding_bags.pep_thresholds.weight").grad
    assert gradient is not None and not gradient.any()


@pytest.mark.parametrize("per", ALL)
def test_folded_tables_serve_the_same_vectors(per: Granularity) -> None:
    collection, group = build(per)
    stored_thresholds(group, per).normal_(-4.0, 1.5)
    full = CompressedEmbeddingBagCollection(small_tables(), Full)
    group_of(full).seed_from(group.folded_tables())
    for feature, count in (("ad", 4000), ("target", 6000), ("site", 500)):
        # The last digit of a sigmoid depends on where in a tensor it lies.
        soft, folded = all_vectors(collection, feature, count), all_vectors(full, feature, count)
        torch.testing.assert_close(soft, folded, rtol=1e-5, atol=1e-7)


def test_plan_keeps_what_is_above_its_threshold_or_most_so() -> None:
    _, group = build("value")
    stored_thresholds(group, "value").normal_(-5.0, 1.5)
    folded = group.folded_tables()
    plan = group.derive_plan(None)
    for name, part in folded.items():
        assert torch.equal(plan.tables[name].mask(), part != 0)
    budget = 10_501 * 32 // 8
    assert 0.95 * budget < plan_bytes(group.derive_plan(budget)) <= budget


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "field"}, "per must be one of"),
        ({"start_fraction": 1.0}, "start_fraction must be in"),
        ({"decay": -1.0}, "decay must be at least 0"),
        ({"learning_rate": math.nan}, "learning_rate must be at least 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pep(small_tables(), **options)  # type: ignore[arg-type]
