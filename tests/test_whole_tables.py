"""Dense Adam on two gloo ranks, which hold the tables whole, against one process."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardedTensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.checkpoint import Checkpoints, load_model_tensors, load_optimizer_tensors
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.method import frozen_tables
from recemb.methods.optembed import OptEmbed, Thresholds
from recemb.optimizers import EmbeddingOptimizer, TrainingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import bags, table
from tests.gloo import WORLD_SIZE, run_ranks

KEYS = ["a", "b"]
OPTIMIZER = EmbeddingOptimizer("dense_adam", 0.05, weight_decay=0.1)
DENSE = partial(torch.optim.SGD, lr=0.1)


class Model(nn.Module):
    """Thresholds of values have an optimizer of their own (SGD), so that their table is spread over the ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        method = partial(OptEmbed, thresholds=Thresholds(per="value", learning_rate=0.1), widths=False)
        self.tables = CompressedEmbeddingBagCollection([table("a", 30), table("b", 50)], method)
        self.head = nn.Linear(16, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.head(self.tables(features).values()).squeeze(1)


def ids(rank: int, step: int) -> list[list[list[int]]]:
    """4 samples of rank 0, 5 of rank 1, of up to 2 ids; the second ten rows of a table never come."""
    generator = torch.Generator().manual_seed(10 * step + rank)

    def bag(size: int) -> list[int]:
        drawn = torch.randint(size - 10, (int(torch.randint(3, (1,), generator=generator)),), generator=generator)
        return (drawn + 10 * (drawn >= 10)).tolist()

    return [[bag(size) for _ in range(4 + rank)] for size in (30, 50)]


def step(model: nn.Module, optimizer: TrainingOptimizer, samples: list[list[list[int]]], ranks: int) -> None:
    optimizer.zero_grad()
    # Gradients are averaged over ranks: the sum over all, as a mean over 9 samples.
    (model(bags(KEYS, samples)).square().sum() * ranks / 9).backward()
    optimizer.step()


def run_rank(rank: int, folder: Path) -> None:
    model, optimizer = prepare(Model(), OPTIMIZER, DENSE)
    for number in range(3):
        step(model, optimizer, ids(rank, number), WORLD_SIZE)
        # As the steps of an architecture: no row gets a gradient, and none moves.
        before = copy.deepcopy(optimizer.optimizers["all_rows"].param_groups[0]["params"])
        optimizer.zero_grad()
        with frozen_tables(model):
            model(bags(KEYS, ids(rank, number))).sum().backward()
        optimizer.step_architecture()
        assert all(map(torch.equal, before, optimizer.optimizers["all_rows"].param_groups[0]["params"]))
    state = model.state_dict()
    spread = [name for name, tensor in state.items() if isinstance(tensor, ShardedTensor)]
    assert spread == ["tables.groups.0.lookups.1.embedding_bags.optembed_thresholds.weight"]
    tensors = {"model": state, "optimizer": optimizer.state_dict()}
    Checkpoints(folder / "checkpoints").save(3, tensors, {}, best_step=None)


def test_two_ranks_step_all_rows_as_one_process_does_which_goes_on_from_their_checkpoint(tmp_path: Path) -> None:
    run_ranks(run_rank, tmp_path)
    model, optimizer = prepare(Model(), OPTIMIZER, DENSE)
    start = copy.deepcopy(model.state_dict())

    def both(number: int) -> list[list[list[int]]]:
        return [[*first, *second] for first, second in zip(ids(0, number), ids(1, number), strict=True)]

    for number in range(3):
        step(model, optimizer, both(number), 1)
    taken_over, its_optimizer = prepare(Model(), OPTIMIZER, DENSE)
    checkpoint = Checkpoints(tmp_path / "checkpoints").last
    assert checkpoint is not None
    load_model_tensors(checkpoint, taken_over)
    load_optimizer_tensors(checkpoint, its_optimizer)
    for number in (3, 4):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(taken_over.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        step(model, optimizer, both(number), 1)
        step(taken_over, its_optimizer, both(number), 1)
    rows = "tables.groups.0.lookups.0.embedding_bags.optembed_rows.weight"
    assert (model.state_dict()[rows] != start[rows]).any(dim=1).all()
