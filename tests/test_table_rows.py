"""Methods that move rows between steps, on two gloo ranks against one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.method import Method
from recemb.methods.cafe import Cafe
from recemb.methods.cce import ClusteredCompositional
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.table_rows import read_rows, write_rows
from tests.embedding_cases import KEYS, bags, small_tables
from tests.gloo import WORLD_SIZE, run_ranks
from tests.test_sharding import Model

STEPS = 6
METHODS: dict[str, Method] = {
    "cce": partial(ClusteredCompositional, num_clusters=200, cluster_at_steps=[2, 4]),
    "cafe": partial(Cafe, num_embeddings=500, threshold=3.0, decay=0.5),
}


def ids_of(rank: int, step: int) -> list[list[list[int]]]:
    """Eight samples of bags of one to three ids, the same few again and again."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [
        [torch.randint(0, min(size, 12), (1 + sample % 3,), generator=generator).tolist() for sample in range(8)]
        for size in (4000, 6000, 6000, 500, 1)
    ]


def train(model: nn.Module, optimizer, ranks: list[int]) -> None:
    """Each rank trains on its own samples, one process on those of all ranks: the same mean loss."""
    for step in range(1, STEPS + 1):
        parts = [ids_of(rank, step) for rank in ranks]
        batch = bags(KEYS, [[bag for part in parts for bag in part[feature]] for feature in range(len(KEYS))])
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        for group in compressed_groups(model):
            group.after_step(step)


def prepared(method: Method, placement: str | None = None):
    torch.manual_seed(0)
    model = Model(method).train()
    allowed = None if placement is None else {"*": [placement]}
    return prepare(
        model, EmbeddingOptimizer("rowwise_adagrad", 0.1), partial(torch.optim.SGD, lr=0.1), placement=allowed
    )


def outputs(model: nn.Module) -> Tensor:
    values = list(range(0, 500, 7))
    ids = [[[value if key != "one" else 0] for value in values] for key in KEYS]
    with torch.no_grad():
        return model.eval()(bags(KEYS, ids))


def maps(model: nn.Module) -> dict[str, Tensor]:
    """Integer buffers: codes, sketches."""
    [group] = compressed_groups(model)
    return {name: tensor for name, tensor in group.named_buffers() if not tensor.is_floating_point()}


def run_rank(rank: int, folder: Path) -> None:
    for name, method in METHODS.items():
        for placement in ("table_wise", "row_wise"):
            model, optimizer = prepared(method, placement)
            train(model, optimizer, [rank])
            torch.save((maps(model), outputs(model)), folder / f"{name}-{placement}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, path)
    return path


@pytest.mark.parametrize("placement", ["table_wise", "row_wise"])
@pytest.mark.parametrize("name", METHODS)
def test_ranks_hold_equal_maps_and_train_as_one_process_does(folder: Path, name: str, placement: str) -> None:
    model, optimizer = prepared(METHODS[name])
    train(model, optimizer, [0, 1])
    first, second = (torch.load(folder / f"{name}-{placement}-{rank}.pt") for rank in range(WORLD_SIZE))
    alone = maps(model)
    if name == "cafe":
        assert int((alone["sketch.hot_rows"] >= 0).sum()) > 10
    assert all(torch.equal(tensor, second[0][key]) for key, tensor in first[0].items())
    assert torch.equal(first[1], second[1])
    # Sums over ranks round otherwise, so that an id between two centroids may fall to the other one.
    for key, tensor in first[0].items():
        assert (tensor != alone[key]).double().mean() < 0.02, key
    torch.testing.assert_close(first[1], outputs(model), rtol=0.05, atol=0.01)


def test_rows_are_read_and_written_where_they_lie() -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), METHODS["cce"])
    model, _ = prepare(collection, EmbeddingOptimizer(), partial(torch.optim.SGD, lr=0.1))
    for module in (CompressedEmbeddingBagCollection(small_tables(), METHODS["cce"]), model):
        [group] = compressed_groups(module)
        rows, values = torch.tensor([5, 0, 77]), torch.randn(3, 4)
        before = read_rows(group, 1, torch.arange(100))
        write_rows(group, 1, rows, values)
        after = read_rows(group, 1, torch.arange(100))
        assert torch.equal(after[rows], values)
        before[rows] = values
        assert torch.equal(after, before)
