"""Who moves when: weights on train batches, the architecture on its own, and neither on the other's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.data.batch import Batch
from recemb.method import CompressedTables, physical_table
from recemb.optimizers import EmbeddingOptimizer, TrainingOptimizer
from recemb.preparation import prepare
from recemb.training.bilevel import ByTurns, Together
from tests.embedding_cases import table


class Scaled(CompressedTables):
    """One scale for all columns of a row, learned by SGD of rate 1, and rows that a second table adds to by Adagrad."""

    def __init__(self, tables: Sequence[EmbeddingBagConfig]) -> None:
        rows = tables[0].num_embeddings
        super().__init__(tables, [[physical_table("rows", rows, 4, 0.5)], [physical_table("shifts", rows, 4, 0.5)]])
        self.lookup_optimizers[1] = EmbeddingOptimizer("adagrad", 0.01)
        self.scale = nn.Parameter(torch.ones(4))

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        return [[bags.ids.view(-1)], [bags.ids.view(-1)]]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        return rows[0][0] * self.scale + rows[1][0]

    def penalty(self) -> Tensor:
        return 0.25 * self.scale.square().sum()

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [self.scale]

    def architecture_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.scale], lr=1.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = CompressedEmbeddingBagCollection([table("a", 6, dim=4)], Scaled)
        self.head = nn.Linear(4, 1)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        return self.head(self.embeddings(sparse).values()).squeeze(1)


class Source:
    """Batches of three rows of single ids, two an epoch."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.taken += 1
            yield batch(self.taken % 2)
            if self.taken % 2 == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def batch(number: int) -> Batch:
    ids = torch.tensor([number, number + 1, number + 2])
    sparse = KeyedJaggedTensor(["a"], ids, lengths=torch.ones(3, dtype=torch.int32))
    return Batch(torch.zeros(3, 0), sparse, torch.tensor([1.0, 0.0, 1.0]), {})


def prepared() -> tuple[nn.Module, TrainingOptimizer]:
    model = Model()
    return prepare(model, EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name.rpartition("groups.0.")[2]: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}


ROWS, SHIFTS = "lookups.0.embedding_bags.rows.weight", "lookups.1.embedding_bags.shifts.weight"
HEAD = {"head.weight", "head.bias"}


def learn(model: nn.Module, number: int) -> None:
    rows = batch(number)
    logits = model(rows.dense, rows.sparse)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, rows.labels).backward()


def test_together_moves_all_and_a_warm_start_all_but_the_architecture() -> None:
    for architecture, expected in ((True, {ROWS, SHIFTS, "scale", *HEAD}), (False, {ROWS, SHIFTS, *HEAD})):
        model, optimizer = prepared()
        before = state(model)
        optimizer.zero_grad()
        learn(model, 0)
        Together(architecture=architecture).step(optimizer)
        assert moved(before, model) == expected


def test_by_turns_weights_move_on_train_batches_and_the_architecture_on_its_own() -> None:
    for train_dense, expected in ((True, {ROWS, SHIFTS, *HEAD}), (False, {ROWS, SHIFTS})):
        model, optimizer = prepared()
        turns = ByTurns(Source(), device=torch.device("cpu"), train_dense=train_dense)
        before = state(model)
        optimizer.zero_grad()
        learn(model, 0)
        turns.step(optimizer)
        assert moved(before, model) == expected
        before = state(model)
        turns.after_step(1, model, optimizer)
        assert moved(before, model) == {"scale"}


def test_an_architecture_step_is_that_of_autograd_with_the_penalty() -> None:
    model, optimizer = prepared()
    reference = Model()
    reference.load_state_dict(model.state_dict())
    turns = ByTurns(Source(), device=torch.device("cpu"))
    turns.after_step(1, model, optimizer)
    rows = batch(1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(reference(rows.dense, rows.sparse), rows.labels)
    [group] = compressed_groups(reference)
    (loss + 0.25 * group.scale.square().sum()).backward()
    expected = group.scale.detach() - group.scale.grad
    torch.testing.assert_close(compressed_groups(model)[0].scale.detach(), expected)


def test_architecture_steps_come_every_so_many_and_begin_again_at_the_end_of_their_rows() -> None:
    model, optimizer = prepared()
    source = Source()
    turns = ByTurns(source, device=torch.device("cpu"), every_steps=2)
    for step in range(1, 11):
        turns.after_step(step, model, optimizer)
    assert source.taken == 5
    again = ByTurns(Source(), device=torch.device("cpu"))
    again.load_state_dict(turns.state_dict())
    assert again.loader.state_dict() == {"taken": 5}


def test_a_lookup_with_an_optimizer_of_its_own_is_trained_by_it() -> None:
    model, optimizer = prepared()
    before = state(model)
    optimizer.zero_grad()
    learn(model, 0)
    optimizer.step()
    after = state(model)
    # Adagrad's first step is the rate, whatever the gradient; that of SGD is far smaller here.
    torch.testing.assert_close((after[SHIFTS] - before[SHIFTS])[:3].abs(), torch.full((3, 4), 0.01), rtol=1e-3, atol=0)
    shapes = {
        name: [part.shape for part in parts]
        for tables in optimizer.state_dict()["fused"].values()
        for name, parts in tables.items()
    }
    assert len(shapes["rows"]) == 0 and len(shapes["shifts"]) == 1


def test_schedules_of_learning_rates_leave_the_architecture_alone() -> None:
    _, optimizer = prepared()
    optimizer.set_learning_rate_factor(0.5)
    rates = {name: part.param_groups[0]["lr"] for name, part in optimizer.optimizers.items()}
    assert rates == {"dense": 0.05, "architecture0": 1.0}


def test_state_of_the_architecture_is_saved_with_the_optimizer() -> None:
    model, optimizer = prepared()
    assert set(optimizer.state_dict()) == {"fused", "dense", "architecture0"}
    assert not any(
        weight is compressed_groups(model)[0].scale
        for weight in optimizer.optimizers["dense"].param_groups[0]["params"]
    )
