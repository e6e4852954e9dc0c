"""A run goes on with another number of ranks: the same tables and optimizer state, and the rows that were left."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.checkpoint import Checkpoints, load_model_tensors
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.data.batch import Batch
from recemb.method import Method
from recemb.methods.cafe import Cafe
from recemb.methods.full import Full
from recemb.methods.unified import Unified
from recemb.models.dlrm import DLRM
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.training.loop import LoopSettings, TrainingLoop
from recemb.training.metrics_log import NoLog
from recemb.training.progress import Progress
from recemb.training.schedule import LearningRateSchedule
from recemb.training.stopping import EarlyStopping
from tests.data.numbered import data_set, make, row_numbers
from tests.gloo import WORLD_SIZE, run_ranks

ROWS = 500
STEP_ROWS = 24
# Of 21 of an epoch; with two ranks the last batch of one of them is longer.
STEPS_BEFORE = 8

CASES: dict[str, tuple[Method, str, str | None]] = {
    "full, row-wise Adagrad, rows cut": (Full, "rowwise_adagrad", "row_wise"),
    "full, Adagrad, whole tables": (Full, "adagrad", "table_wise"),
    "CAFE, row-wise Adagrad, planned": (partial(Cafe, num_embeddings=60, threshold=2.0), "rowwise_adagrad", None),
    "one table on one rank": (partial(Unified, num_embeddings=100), "rowwise_adagrad", "table_wise"),
    "full, SGD, planned": (Full, "sgd", None),
}


def plain_model(method: Method) -> DLRM:
    manifest = data_set(ROWS)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature.name}",
            num_embeddings=feature.num_embeddings,
            embedding_dim=8,
            feature_names=[feature.name],
        )
        for feature in manifest.categorical
    ]
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(tables, method)
    return DLRM(collection, num_dense=len(manifest.numeric), bottom_layers=[8, 8], over_layers=[8, 1])


class Recorder:
    """A loader that remembers which rows it handed out."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._loader = make(
            data_set(ROWS),
            batch_size=STEP_ROWS // world_size,
            shuffle=True,
            shuffle_buffer_rows=128,
            rank=rank,
            world_size=world_size,
        )
        self.seen: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self.seen.append(row_numbers([batch]))
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def make_loop(folder: Path, case: str, total_steps: int) -> TrainingLoop:
    method, optimizer, placement = CASES[case]
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, training_optimizer = prepare(
        plain_model(method),
        EmbeddingOptimizer(optimizer, 0.1),
        partial(torch.optim.Adam, lr=1e-2),
        placement=None if placement is None else {"*": [placement]},
    )
    return TrainingLoop(
        model,
        training_optimizer,
        Recorder(rank, world_size),
        settings=LoopSettings(total_steps=total_steps, batch_size=STEP_ROWS // world_size),
        schedule=LearningRateSchedule(total_steps=total_steps),
        stopping=EarlyStopping(),
        validate=lambda: {"auc": 0.5, "logloss": 0.7},
        checkpoints=Checkpoints(folder / case),
        device=torch.device("cpu"),
        description={},
    )


def run(loop: TrainingLoop) -> None:
    with Progress(1, terminal=False) as progress:
        loop.run(NoLog(), progress)


def tensors_of(loop: TrainingLoop) -> dict[str, Any]:
    """Name -> tensor of everything that is trained, or remembered for it; text for what is no tensor."""
    optimizer = loop.optimizer.state_dict()
    flat: dict[str, Any] = dict(loop.model.state_dict())
    for path, tables in optimizer["fused"].items():
        for table, states in tables.items():
            flat |= {f"optimizer of {path}/{table} {index}": state for index, state in enumerate(states)}
    for number, state in optimizer["dense"]["state"].items():
        flat |= {f"optimizer of dense {number} {name}": value for name, value in state.items()}
    return flat


def pieces(loop: TrainingLoop) -> dict[str, list[tuple[list[int], Tensor]]]:
    """Name -> what this rank holds of a tensor: first row (and column), values."""
    return {
        name: (
            [(shard.metadata.shard_offsets, shard.tensor.clone()) for shard in value.local_shards()]
            if isinstance(value, ShardedTensor)
            else [([0] * value.dim(), value.clone())]
        )
        for name, value in tensors_of(loop).items()
    }


def assert_same(held: Mapping[str, list[tuple[list[int], Tensor]]], whole: Mapping[str, Tensor]) -> None:
    # A rank knows nothing of the optimizer state of tables that others hold.
    missing = whole.keys() - held.keys()
    assert held.keys() <= whole.keys() and all(name.startswith("optimizer of") for name in missing)
    for name, parts in held.items():
        for offsets, part in parts:
            place = tuple(slice(first, first + size) for first, size in zip(offsets, part.shape, strict=True))
            assert torch.equal(whole[name][place], part), name


def train_on_two(rank: int, folder: Path) -> None:
    for case in CASES:
        loop = make_loop(folder, case, STEPS_BEFORE)
        run(loop)
        torch.save(pieces(loop), folder / f"{case} {rank}.pt")
        (folder / f"{case} {rank}.json").write_text(json.dumps(loop.loader.seen))


def go_on_with_two(rank: int, folder: Path) -> None:
    for case in CASES:
        loop = make_loop(folder, case, 99)
        loop.resume()
        assert_same(pieces(loop), torch.load(folder / f"{case}.pt"))
        loop.settings = LoopSettings(total_steps=STEPS_BEFORE + loop.loader.batches_left, batch_size=STEP_ROWS // 2)
        run(loop)
        assert loop.epochs == 1
        (folder / f"{case} {rank}.json").write_text(json.dumps(loop.loader.seen))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(train_on_two, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_one_process_holds_bit_for_bit_what_two_ranks_held_and_reads_the_rows_they_left(two: Path, case: str) -> None:
    loop = make_loop(two, case, 99)
    loop.resume()
    held = [torch.load(two / f"{case} {rank}.pt") for rank in range(WORLD_SIZE)]
    assert held[0].keys() | held[1].keys() == tensors_of(loop).keys()
    for of_rank in held:
        assert_same(of_rank, tensors_of(loop))
    loop.settings = LoopSettings(total_steps=STEPS_BEFORE + loop.loader.batches_left, batch_size=STEP_ROWS)
    run(loop)
    assert (loop.epochs, loop.samples) == (1, ROWS)
    before = [json.loads((two / f"{case} {rank}.json").read_text()) for rank in range(WORLD_SIZE)]
    assert sorted(itertools.chain(*before[0], *before[1], *loop.loader.seen)) == list(range(ROWS))


@pytest.mark.parametrize("case", CASES)
def test_a_plain_module_holds_bit_for_bit_what_two_ranks_held(two: Path, case: str) -> None:
    model = plain_model(CASES[case][0])
    path = two / case / f"step-{STEPS_BEFORE:08d}"
    load_model_tensors(path, model)
    for rank in range(WORLD_SIZE):
        held = torch.load(two / f"{case} {rank}.pt")
        assert_same({name: held[name] for name in model.state_dict()}, model.state_dict())


def test_two_ranks_hold_bit_for_bit_what_one_process_held_and_read_the_rows_it_left(tmp_path: Path) -> None:
    before = {}
    for case in CASES:
        loop = make_loop(tmp_path, case, STEPS_BEFORE)
        run(loop)
        torch.save(tensors_of(loop), tmp_path / f"{case}.pt")
        before[case] = loop.loader.seen
    # Compares what each rank holds.
    run_ranks(go_on_with_two, tmp_path)
    for case, first in before.items():
        after = [json.loads((tmp_path / f"{case} {rank}.json").read_text()) for rank in range(WORLD_SIZE)]
        assert sorted(itertools.chain(*first, *after[0], *after[1])) == list(range(ROWS))
