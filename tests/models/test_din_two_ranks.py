"""DIN on two gloo ranks against one process: target and history share rows under every method and placement."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.collection import CompressedEmbeddingCollection
from recemb.models.din import DIN
from recemb.models.histories import History
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import bags, embedding_configs, quarter_sized, small_tables, without_draws
from tests.gloo import WORLD_SIZE, run_ranks
from tests.models.tables import normal

KEYS = ["ad", "target", "history", "site", "one"]
PLACEMENTS = ("table_wise", "row_wise")


def din(name: str) -> DIN:
    torch.manual_seed(0)
    tables = [
        EmbeddingConfig(
            name=t.name, num_embeddings=t.num_embeddings, embedding_dim=t.embedding_dim, feature_names=t.feature_names
        )
        for t in small_tables()
    ]
    # PReLU: the statistics of Dice are those of one rank's rows.
    return DIN(
        CompressedEmbeddingCollection(tables, quarter_sized(name)),
        num_dense=2,
        histories=[History("history", ("history",), ("target",))],
        layers=[8, 1],
        activation="prelu",
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
    if empty and rank == 1:
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
                din(name),
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
                logits = model(dense_of(rank), batch_of(rank, empty=step == 1))
                # Gradients are averaged over ranks: the sum over both, as a mean over 9 samples.
                (logits.square().sum() * WORLD_SIZE / 9).backward()
                optimizer.step()
            torch.save(model(dense_of(rank), batch_of(rank)).detach(), folder / f"{name}-{placement}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, path)
    return path


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", embedding_configs())
def test_two_ranks_train_as_one_process_does(folder: Path, name: str, placement: str) -> None:
    model, optimizer = prepare(din(name), EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1))
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
