"""DIN on two gloo ranks against one process: target and history share rows under every method and placement."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.collection import CompressedEmbeddingCollection
from recemb.method import Method
from recemb.methods.full import Full
from recemb.models.activations import Activation
from recemb.models.dice import Dice
from recemb.models.din import DIN
from recemb.models.histories import History
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import bags, embedding_configs, quarter_sized, small_tables, without_draws
from tests.gloo import WORLD_SIZE, run_ranks
from tests.models.tables import normal

KEYS = ["ad", "target", "history", "site", "one"]
PLACEMENTS = ("table_wise", "row_wise")
# Ranks without any event in each step of the model with Dice.
RANKS_WITHOUT_EVENTS = ((), (1,), (0, 1), (0,))


def din(method: Method, activation: Activation) -> DIN:
    torch.manual_seed(0)
    tables = [
        EmbeddingConfig(
            name=t.name, num_embeddings=t.num_embeddings, embedding_dim=t.embedding_dim, feature_names=t.feature_names
        )
        for t in small_tables()
    ]
    return DIN(
        CompressedEmbeddingCollection(tables, method),
        num_dense=2,
        histories=[History("history", ("history",), ("target",))],
        layers=[8, 1],
        activation=activation,
    )


def ids_of(rank: int) -> list[list[list[int]]]:
    """Four and five samples; on the second rank no history at all in the last step's batch."""
    generator = torch.Generator().manual_seed(rank)

    def bag(size: int, length: int) -> list[int]:
        return torch.randint(0, size, (length,), generator=generator).tolist()

    samples = 4 + rank
    lengths = [int(length) for length in torch.randint(0, 5, (samples,), generator=generator)]
    history = [bag(6000, length) for length in lengths]
    target = [[events[0]] if events else bag(6000, 1) for events in history]
    return [
        [bag(4000, 1) for _ in range(samples)],
        target,
        history,
        [bag(500, 1) for _ in range(samples)],
        [[0]] * samples,
    ]


def batch_of(rank: int, *, empty: bool = False) -> KeyedJaggedTensor:
    ids = ids_of(rank)
    if empty:
        ids[2] = [[] for _ in ids[2]]
    return bags(KEYS, ids)


def joined(*, empty: bool) -> KeyedJaggedTensor:
    parts = [ids_of(rank) for rank in range(WORLD_SIZE)]
    if empty:
        parts[1][2] = [[] for _ in parts[1][2]]
    return bags(KEYS, [[*a, *b] for a, b in zip(*parts, strict=True)])


def dense_of(rank: int) -> torch.Tensor:
    return normal(4 + rank, 2, seed=rank)


def run_rank(rank: int, folder: Path) -> None:
    for name in embedding_configs():
        for placement in PLACEMENTS:
            model, optimizer = prepare(
                # PReLU: in training each rank activates by the statistics of its own rows with Dice.
                din(quarter_sized(name), "prelu"),
                EmbeddingOptimizer("sgd", 0.1),
                partial(torch.optim.SGD, lr=0.1),
                placement={"*": [placement]},
            )
            model.eval()
            without_draws(model)
            vectors = model.module.embeddings(batch_of(rank))
            starts = vectors["history"].offsets() - vectors["history"].offsets()[0]
            for row, events in enumerate(ids_of(rank)[2]):
                if events:
                    assert torch.equal(vectors["target"].values()[row], vectors["history"].values()[int(starts[row])])
            for step in range(2):
                optimizer.zero_grad()
                logits = model(dense_of(rank), batch_of(rank, empty=(step, rank) == (1, 1)))
                # Gradients are averaged over ranks: the sum over both, as a mean over 9 samples.
                (logits.square().sum() * WORLD_SIZE / 9).backward()
                optimizer.step()
            torch.save(model(dense_of(rank), batch_of(rank)).detach(), folder / f"{name}-{placement}-{rank}.pt")
    train_with_dice(rank, folder)


def train_with_dice(rank: int, folder: Path) -> None:
    """Saves what every Dice got in every step, and the running statistics that it ended with."""
    model, optimizer = prepare(
        din(Full, "dice"), EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1), placement={"*": PLACEMENTS}
    )
    inputs: dict[str, list[torch.Tensor]] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda module, arguments: inputs.setdefault(name, []).append(arguments[0].detach().double())

    dices = {name: module for name, module in model.named_modules() if isinstance(module, Dice)}
    for name, module in dices.items():
        module.register_forward_pre_hook(remember(name))
    for without in RANKS_WITHOUT_EVENTS:
        optimizer.zero_grad()
        model(dense_of(rank), batch_of(rank, empty=rank in without)).square().mean().backward()
        optimizer.step()
    running = {name: dict(module.named_buffers()) for name, module in dices.items()}
    torch.save((inputs, running), folder / f"dice-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, path)
    return path


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", embedding_configs())
def test_two_ranks_train_as_one_process_does(folder: Path, name: str, placement: str) -> None:
    embedding_optimizer, dense_optimizer = EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1)
    model, optimizer = prepare(din(quarter_sized(name), "prelu"), embedding_optimizer, dense_optimizer)
    model.eval()
    without_draws(model)
    dense = torch.cat([dense_of(0), dense_of(1)])
    for step in range(2):
        optimizer.zero_grad()
        (model(dense, joined(empty=step == 1)).square().sum() / 9).backward()
        optimizer.step()
    expected = copy.deepcopy(model)(dense, joined(empty=False)).detach()
    found = torch.cat([torch.load(folder / f"{name}-{placement}-{rank}.pt") for rank in range(WORLD_SIZE)])
    # PEP decays its thresholds by the mean over a rank's samples, which are not equally many here.
    rtol = 5e-3 if name == "pep" else 1e-4
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-6)


def test_running_statistics_of_dice_are_those_of_the_rows_of_all_ranks(folder: Path) -> None:
    (inputs, running), (other_inputs, other_running) = (torch.load(folder / f"dice-{rank}.pt") for rank in range(2))
    assert [len(rows) for steps in inputs.values() for rows in steps].count(0) == 2
    for name, steps in inputs.items():
        rows, weights = np.zeros((0, steps[0].shape[1])), np.zeros(0)
        for batch in map(torch.cat, zip(steps, other_inputs[name], strict=True)):
            if len(batch):
                weights = np.concatenate([weights * 0.99, np.full(len(batch), 0.01)])
                rows = np.concatenate([rows, batch.numpy()])
        mean = np.average(rows, axis=0, weights=weights)
        expected = {
            "running_mean": mean,
            "running_variance": np.average((rows - mean) ** 2, axis=0, weights=weights),
            "running_rows": weights.sum(),
        }
        assert set(running[name]) == set(expected)
        for key, values in running[name].items():
            assert torch.equal(values, other_running[name][key]), (name, key)
            np.testing.assert_allclose(values, expected[key], rtol=1e-5, atol=1e-7, err_msg=f"{name} {key}")
