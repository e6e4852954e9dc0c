"""The supernet of OptEmbed against a plain loop, its gradients by hand, and the plan it derives."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.budget import BudgetOutOfReach
from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.methods.optembed import OptEmbed, Thresholds
from recemb.optimizers import EmbeddingOptimizer
from recemb.plan import TablePlan
from recemb.preparation import prepare
from tests.embedding_cases import KEYS, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.gloo import WORLD_SIZE, run_ranks
from tests.methods.plain import check_batch, group_of, rows_of

OWNER = {"ad": 0, "target": 1, "history": 1, "site": 2, "one": 3}
STARTS = [0, 4000, 10_000, 10_500]
DENSE = partial(torch.optim.SGD, lr=0.1)


def supernet(
    *, per: str = "table", norm: int = 1, widths: bool = True, alpha: float = 1e-5, learning_rate: float = 0.1
) -> tuple[CompressedEmbeddingBagCollection, OptEmbed]:
    """Small tables whose thresholds lie in the middle of the norms of their rows."""
    torch.manual_seed(0)
    thresholds = Thresholds(per=per, norm=norm, alpha=alpha, learning_rate=learning_rate)  # type: ignore[arg-type]
    collection = CompressedEmbeddingBagCollection(
        small_tables(), partial(OptEmbed, thresholds=thresholds, widths=widths)
    )
    group = group_of(collection)
    assert isinstance(group, OptEmbed)
    middle = rows_of(group).norm(p=norm, dim=1).median()
    with torch.no_grad():
        if group.thresholds is not None:
            group.thresholds.copy_(middle * torch.tensor([0.9, 1.0, 1.1, 0.0]))
        else:
            rows_of(group, 1).copy_(middle * (0.8 + 0.4 * torch.rand(rows_of(group, 1).shape)))
    return collection, group


def threshold_of(group: OptEmbed, table: int, value: int) -> float:
    if group.thresholds is not None:
        return group.thresholds[table].item()
    return float(rows_of(group, 1).view(-1)[STARTS[table] + value])


def masked_row(group: OptEmbed, table: int, value: int, width: int, norm: int) -> Tensor:
    """The definition, for one id."""
    row = rows_of(group)[STARTS[table] + value]
    length = float(row.abs().sum()) if norm == 1 else math.sqrt(float((row * row).sum()))
    if not length > threshold_of(group, table, value):
        return torch.zeros_like(row)
    return torch.cat([row[:width], torch.zeros(len(row) - width)])


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("per", ["table", "value"])
def test_evaluation_masks_rows_and_reads_all_columns_or_those_that_were_set(
    per: str, norm: int, ids: list[list[list[int]]]
) -> None:
    collection, group = supernet(per=per, norm=norm)
    collection.eval()
    names = [config.name for config in small_tables()]

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        return masked_row(group, names.index(config.name), value, width[config.name], norm)

    width = dict.fromkeys(names, 8)
    check_batch(collection, vector, ids)
    width = dict(zip(names, [3, 1, 8, 5], strict=True))
    group.set_widths(width)
    check_batch(collection, vector, ids)


def test_evaluation_drops_the_rows_that_a_plan_drops_too() -> None:
    collection, group = supernet(per="table")
    collection.eval()
    names = [config.name for config in small_tables()]
    plan = group.derive_plan(None)
    for name, table_plan in plan.tables.items():
        # Of those above their threshold every other one.
        rows = table_plan.mask().any(1) & (torch.arange(table_plan.num_embeddings) % 2 == 0)
        plan.tables[name] = TablePlan(table_plan.num_embeddings, 8, kept_rows=rows)  # type: ignore[index]
    group.set_kept_rows(plan)

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        return masked_row(group, names.index(config.name), value, 8, 1) * float(value % 2 == 0)

    for ids in (MULTI_HOT, SINGLE):
        check_batch(collection, vector, ids)
    group.set_kept_rows(None)
    check_batch(collection, lambda config, value: masked_row(group, names.index(config.name), value, 8, 1), SINGLE)


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("per", ["table", "value"])
def test_training_equals_a_plain_loop_with_the_widths_drawn(
    per: str, ids: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    collection, group = supernet(per=per)
    drawn = group.sample_widths(3)
    monkeypatch.setattr(group, "sample_widths", lambda batch_size: drawn[:batch_size])
    assert torch.equal(drawn[:, 1], drawn[:, 2]), "target and history are of one table"
    output = collection(bags(KEYS, ids))
    for f, key in enumerate(KEYS):
        for b, bag in enumerate(ids[f]):
            rows = [masked_row(group, OWNER[key], value, int(drawn[b, f]), 1) for value in bag]
            expected = torch.stack(rows).sum(0) if rows else torch.zeros(8)
            if OWNER[key] == 1 and rows:
                expected = expected / len(rows)
            torch.testing.assert_close(output[key][b], expected, rtol=1e-5, atol=1e-6)


def test_sequences_of_a_table_share_their_samples_width() -> None:
    torch.manual_seed(0)
    tables = [table("item", 50, features=["target", "history"])]
    collection = CompressedEmbeddingCollection(tables, partial(OptEmbed, thresholds=None))  # type: ignore[arg-type]
    ids = [[[i] for i in range(20)], [[i, 49, i] for i in range(20)]]
    output = collection(bags(["target", "history"], ids))
    target, history = output["target"].values(), output["history"].values().view(20, 3, 8)
    assert torch.equal(target, history[:, 0]) and torch.equal(target, history[:, 2])
    widths = (target != 0).sum(1)
    assert torch.equal(widths, (history[:, 1] != 0).sum(1))
    assert len(set(widths.tolist())) > 3


def test_widths_are_uniform_and_independent_between_samples_and_tables() -> None:
    _, group = supernet()
    torch.manual_seed(1)
    widths = group.sample_widths(40_000)
    assert widths.shape == (40_000, 5)
    for column in (0, 1, 3, 4):
        counts = torch.bincount(widths[:, column], minlength=9)[1:]
        assert int(counts.sum()) == 40_000, "widths are 1..8"
        chi_square = float(((counts - 5000.0) ** 2 / 5000).sum())
        # The 99.9% quantile of chi-square with 7 degrees of freedom.
        assert chi_square < 24.3
    pairs = torch.bincount((widths[:, 0] - 1) * 8 + widths[:, 1] - 1, minlength=64)
    # 63 degrees of freedom.
    assert float(((pairs - 625.0) ** 2 / 625).sum()) < 103.4
    neighbours = torch.bincount((widths[:-1, 0] - 1) * 8 + widths[1:, 0] - 1, minlength=64)
    assert float(((neighbours - 39_999 / 64) ** 2 / 625).sum()) < 103.4


def one_row(norm_minus_threshold: float, *, norm: int = 1) -> tuple[OptEmbed, Tensor, Tensor]:
    """A table of one row behind one threshold: group, row weight, and the threshold's parameter."""
    group = OptEmbed([table("a", 1, dim=4)], thresholds=Thresholds(norm=norm), widths=False)
    weight = group.get_parameter("lookups.0.embedding_bags.optembed_rows.weight")
    assert group.thresholds is not None
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.5, -0.25, 0.0, 0.25]]))
        group.thresholds.copy_(weight.norm(p=norm) - norm_minus_threshold)
    return group, weight, group.thresholds


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("margin", [-1.5, -0.7, -0.1, 0.1, 0.3, 0.7, 1.5])
def test_gradients_of_row_and_threshold_by_hand(margin: float, norm: int) -> None:
    group, weight, threshold = one_row(margin, norm=norm)
    outer = torch.tensor([1.0, -2.0, 3.0, 0.5])
    (group(bags(["a"], [[[0]]])) * outer).sum().backward()
    row = weight.detach()[0]
    slope = 2 - 4 * abs(margin) if abs(margin) <= 0.4 else 0.4 if abs(margin) <= 1 else 0.0
    through_mask = float(row @ outer) * slope
    assert threshold.grad is not None and weight.grad is not None
    torch.testing.assert_close(threshold.grad, torch.tensor([-through_mask]), rtol=1e-4, atol=1e-6)
    of_norm = row.sign() if norm == 1 else row / row.norm()
    # A pruned row hears of the loss through its mask alone.
    direct = outer if margin > 0 else torch.zeros(4)
    torch.testing.assert_close(weight.grad[0], direct + through_mask * of_norm, rtol=1e-4, atol=1e-6)


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    for norm in (1, 2):
        group, weight, threshold = one_row(0.1, norm=norm)
        with torch.no_grad():
            weight.zero_()
            threshold.fill_(0.0)
        group(bags(["a"], [[[0]]])).sum().backward()
        assert weight.grad is not None and torch.isfinite(weight.grad).all()


def test_the_norm_is_of_the_whole_row_whatever_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    group = OptEmbed([table("a", 1, dim=4)], thresholds=Thresholds())
    weight = group.get_parameter("lookups.0.embedding_bags.optembed_rows.weight")
    assert group.thresholds is not None
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.1, 1.0, 1.0, 1.0]]))
        group.thresholds.fill_(3.0)
    monkeypatch.setattr(group, "sample_widths", lambda batch_size: torch.ones(batch_size, 1, dtype=torch.int64))
    assert group(bags(["a"], [[[0]]])).tolist() == [[weight[0, 0].item(), 0, 0, 0]]


def test_penalty_of_tables_and_its_gradient() -> None:
    _, group = supernet(alpha=0.3)
    penalty = group.penalty()
    assert penalty is not None and group.thresholds is not None
    values = group.thresholds.tolist()
    assert float(penalty) == pytest.approx(0.3 * sum(math.exp(-value) for value in values))
    penalty.backward()
    assert group.thresholds.grad is not None
    expected = [-0.3 * math.exp(-value) for value in values]
    assert group.thresholds.grad.tolist() == pytest.approx(expected)
    # So a step of plain SGD raises every threshold by learning_rate * alpha * exp(-t).
    optimizer = group.architecture_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    optimizer.step()
    moved = [value + 0.1 * 0.3 * math.exp(-value) for value in values]
    assert group.thresholds.tolist() == pytest.approx(moved)


def test_penalty_of_values_counts_each_of_the_batch_once_and_moves_it_by_sgd() -> None:
    collection, _ = supernet(per="value", alpha=0.3, learning_rate=0.5)
    model, optimizer = prepare(collection, EmbeddingOptimizer("rowwise_adagrad", 0.0), DENSE)
    group = group_of(model)  # type: ignore[arg-type]
    assert isinstance(group, OptEmbed)
    before = rows_of(group, 1).clone().view(-1)
    model.train()
    model(bags(KEYS, MULTI_HOT))
    touched = {
        STARTS[OWNER[key]] + i for key, feature in zip(KEYS, MULTI_HOT, strict=True) for bag in feature for i in bag
    }
    penalty = group.penalty()
    assert penalty is not None
    assert float(penalty) == pytest.approx(0.3 * sum(math.exp(-before[row]) for row in touched))
    penalty.backward()
    optimizer.step()
    expected = before.clone()
    for row in touched:
        expected[row] += 0.5 * 0.3 * torch.exp(-before[row])
    torch.testing.assert_close(rows_of(group, 1).view(-1), expected)


def test_ablations_have_no_penalty_or_no_draws() -> None:
    tables = [table("a", 30)]
    widths_only = OptEmbed(tables, thresholds=None)
    assert widths_only.penalty() is None and widths_only.architecture_optimizer() is None
    assert widths_only.architecture_parameters() == []
    rows_only = OptEmbed(tables, thresholds=Thresholds(), widths=False)
    features = bags(["a"], [[[i] for i in range(30)]])
    assert torch.equal(rows_only(features), rows_only.eval()(features))
    assert (widths_only(features) == 0).any() and not (widths_only.eval()(features) == 0).any()


def test_rows_start_xavier_uniform_over_all_tables_or_as_full_ones() -> None:
    torch.manual_seed(0)
    bound = math.sqrt(6 / (10_501 + 8))
    rows = rows_of(OptEmbed(small_tables(), thresholds=None))
    assert 0.99 * bound < float(rows.abs().max()) <= bound
    assert float(rows[10_000:10_500].std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    rows = rows_of(OptEmbed(small_tables(), thresholds=None, init="full"))
    assert float(rows[10_000:10_500].std()) == pytest.approx(math.sqrt(1 / 500 / 3), rel=0.05)


@pytest.mark.parametrize("per", ["table", "value"])
def test_the_plan_keeps_rows_above_their_threshold_and_the_widths_set(per: str) -> None:
    _, group = supernet(per=per)
    names = [config.name for config in small_tables()]
    widths = dict(zip(names, [3, 1, 8, 5], strict=True))
    group.set_widths(widths)
    plan = group.derive_plan(None)
    count = 0
    for index, (config, width) in enumerate(zip(small_tables(), widths.values(), strict=True)):
        mask = plan.tables[config.name].mask()
        for value in range(0, config.num_embeddings, 97):
            expected = masked_row(group, index, value, width, 1) != 0
            assert torch.equal(mask[value], expected), (config.name, value)
        kept = sum(
            float(rows_of(group)[STARTS[index] + value].abs().sum()) > threshold_of(group, index, value)
            for value in range(config.num_embeddings)
        )
        count += kept * width
    # Sparsity as the paper has it: 1 - sum of kept_t * d_t / (N * D).
    assert plan.num_values() == count
    assert plan.kept_fraction() == pytest.approx(count / (10_501 * 8))
    assert 0.1 < plan.kept_fraction() < 0.5


def test_a_budget_below_one_column_is_refused_before_training_where_rows_stay() -> None:
    group = OptEmbed([table("a", 1000)], thresholds=None)
    for refuse in (partial(group.begin_training, 10), group.derive_plan):
        with pytest.raises(
            BudgetOutOfReach, match=r"budget of 3,999 bytes: the smallest plan of OptEmbed takes 4,0\d\d b"
        ):
            refuse(3_999)
    group.begin_training(10, 4_100)
    group.begin_training(10, None)
    assert group.derive_plan(4_100).num_values() == 1000
    # Rows go as well: how many is found while training.
    OptEmbed([table("a", 1000)], thresholds=Thresholds()).begin_training(10, 3_999)


def test_search_options_are_checked() -> None:
    tables = [table("a", 10)]
    with pytest.raises(ValueError, match="got neither"):
        OptEmbed(tables, thresholds=None, widths=False)
    with pytest.raises(ValueError, match="init must be"):
        OptEmbed(tables, thresholds=None, init="normal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dropped must be one of"):
        OptEmbed(tables, thresholds=None, dropped="mean")  # type: ignore[arg-type]
    for wrong, message in (({"per": "row"}, "per must be"), ({"norm": 3}, "norm must be"), ({"alpha": -1.0}, "alpha")):
        with pytest.raises(ValueError, match=message):
            Thresholds(**wrong)  # type: ignore[arg-type]
    group = OptEmbed(tables, thresholds=None)
    with pytest.raises(ValueError, match=r"width must be in \[1, 8\]"):
        group.set_widths({"t_a": 9})
    with pytest.raises(ValueError, match="widths must be of tables"):
        group.set_widths({"t_b": 3})


class Model(nn.Module):
    def __init__(self, per: str) -> None:
        super().__init__()
        self.tables, _ = supernet(per=per, alpha=1e-2)
        self.head = nn.Linear(40, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.head(self.tables(features).values()).squeeze(1)


# Of the samples of both ranks, one after the other.
WIDTHS = torch.randint(1, 9, (6, 4), generator=torch.Generator().manual_seed(5))[:, [0, 1, 1, 2, 3]]


def one_step(per: str, ids: list[list[list[int]]], first: int, placement: str | None, scale: float) -> Tensor:
    """Train one step on samples whose widths are given; the vectors of all samples afterwards."""
    model, optimizer = prepare(
        Model(per), EmbeddingOptimizer("sgd", 0.5), DENSE, placement=None if placement is None else {"*": [placement]}
    )
    [group] = [module for module in model.modules() if isinstance(module, OptEmbed)]
    group.sample_widths = lambda batch_size: WIDTHS[first : first + batch_size]  # type: ignore[method-assign]
    optimizer.zero_grad()
    loss = model(bags(KEYS, ids)).square().sum() * scale
    if per == "table":
        # Penalties of single values are of each rank's own.
        loss = loss + group.penalty()
    loss.backward()
    optimizer.step()
    margins = torch.cat(list(group.margins().values()))
    return torch.cat([margins, model.eval()(bags(KEYS, MULTI_HOT))]).detach()


def run_rank(rank: int, folder: Path) -> None:
    for per in ("table", "value"):
        for placement in ("table_wise", "row_wise"):
            ids = MULTI_HOT if rank == 0 else SINGLE
            output = one_step(per, ids, 3 * rank, placement, WORLD_SIZE / 6)
            torch.save(output, folder / f"{per}-{placement}-{rank}.pt")


def test_two_ranks_step_as_one_process_does(tmp_path: Path) -> None:
    run_ranks(run_rank, tmp_path)
    both = [[*a, *b] for a, b in zip(MULTI_HOT, SINGLE, strict=True)]
    for per in ("table", "value"):
        expected = one_step(per, both, 0, None, 1 / 6)
        for placement in ("table_wise", "row_wise"):
            for rank in range(WORLD_SIZE):
                output = torch.load(tmp_path / f"{per}-{placement}-{rank}.pt")
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)
