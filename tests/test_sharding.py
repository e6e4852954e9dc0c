"""Two gloo ranks against one process: every method, table-wise and row-wise, forward and training."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb import optimizers
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.method import Method
from recemb.methods.hashing import Hashing
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.sharding import plan_shards
from tests.embedding_cases import KEYS, bags, embedding_configs, quarter_sized, small_tables, table, without_draws
from tests.gloo import WORLD_SIZE, run_ranks

OPTIMIZER = EmbeddingOptimizer("rowwise_adagrad", 0.1)
DENSE = partial(torch.optim.SGD, lr=0.1)


class Model(nn.Module):
    def __init__(self, method: Method) -> None:
        super().__init__()
        self.tables = CompressedEmbeddingBagCollection(small_tables(), method)
        self.head = nn.Linear(40, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.head(self.tables(features).values()).squeeze(1)


def methods() -> dict[str, Method]:
    return {name: quarter_sized(name) for name in embedding_configs()}


def ids_of(rank: int, *, single: bool, has_ids: bool = True) -> list[list[list[int]]]:
    """Ranks have unequal batches (4 and 5 samples); bags of 0 to 3 ids, or of one; or no ids on the last rank."""
    generator = torch.Generator().manual_seed(rank)

    def bag(size: int) -> list[int]:
        if not has_ids and rank == WORLD_SIZE - 1:
            return []
        length = 1 if single else int(torch.randint(0, 4, (1,), generator=generator))
        return torch.randint(0, size, (length,), generator=generator).tolist()

    return [[bag(size) for _ in range(4 + rank)] for size in (4000, 6000, 6000, 500, 1)]


def batch_of(rank: int, *, single: bool, has_ids: bool = True) -> KeyedJaggedTensor:
    return bags(KEYS, ids_of(rank, single=single, has_ids=has_ids))


def joined(*, single: bool, has_ids: bool = True) -> KeyedJaggedTensor:
    """The batches of both ranks as one."""
    first, second = (ids_of(rank, single=single, has_ids=has_ids) for rank in range(WORLD_SIZE))
    return bags(KEYS, [[*a, *b] for a, b in zip(first, second, strict=True)])


def run_rank(rank: int, folder: Path) -> None:
    for name, method in methods().items():
        for placement in ("table_wise", "row_wise"):
            torch.manual_seed(0)
            model = Model(method)
            reference = copy.deepcopy(model)
            sharded, optimizer = prepare(model, OPTIMIZER, DENSE, placement={"*": [placement]})
            # In training, batch normalisation ties the ids of all ranks to each other.
            sharded.eval()
            reference.eval()
            for single in (False, True):
                batch = batch_of(rank, single=single)
                ours, expected = sharded.module.tables(batch), reference.tables(batch)
                for key in KEYS:
                    # Bags of one id are bit-equal. Longer ones are summed in another order over ranks, and
                    # TorchRec's row-wise mean divides by the length plus 1e-6.
                    exact = single and key not in ("target", "history")
                    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 2e-6, "atol": 1e-7}
                    torch.testing.assert_close(ours[key], expected[key], **tolerance)
            # A rank without samples neither fails nor keeps the other waiting.
            batch = batch_of(rank, single=False) if rank == 0 else bags(KEYS, [[]] * len(KEYS))
            with torch.no_grad():
                ours, expected = sharded.module.tables(batch), reference.tables(batch)
            torch.testing.assert_close(ours.values(), expected.values(), rtol=2e-6, atol=1e-7)
            without_draws(sharded)
            for step in range(3):
                optimizer.zero_grad()
                logits = sharded(batch_of(rank, single=step == 1, has_ids=step != 2))
                # Gradients are averaged over ranks: the sum over both, as a mean over 9 samples.
                (logits.square().sum() * WORLD_SIZE / 9).backward()
                optimizer.step()
            outputs = sharded.eval()(batch_of(rank, single=False)).detach()
            torch.save(outputs, folder / f"{name}-{placement}-{rank}.pt")
            state = {"model": sharded.state_dict(), "tables": optimizer.state_dict()["fused"]}
            dcp.save(state, checkpoint_id=str(folder / f"{name}-{placement}"))
    count_updates(rank)


def count_updates(rank: int) -> None:
    """Row-wise Adagrad in place of Adam, which has no kernel on CPU: kernels go by the updates, evaluations or not."""
    optimizers._COUNTING = {EmbOptimType.EXACT_ROWWISE_ADAGRAD}
    model, optimizer = prepare(Model(methods()["full"]), OPTIMIZER, DENSE, placement={"*": ["row_wise"]})
    kernels = optimizers._sharded_kernels(optimizer.sharded)
    assert kernels
    batch = batch_of(rank, single=True)
    for number in (1, 2, 8):
        with torch.no_grad():
            model(batch)
        if number == 8:
            optimizer.load_state_dict({**optimizer.state_dict(), "updates": torch.tensor(7)})
        optimizer.zero_grad()
        logits = model(batch)
        assert {int(kernel.iter_cpu) for kernel in kernels} == {number}
        logits.sum().backward()
        optimizer.step()
        assert optimizer.state_dict()["updates"] == number


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    # Asserts equal forwards inside; a failing rank fails the spawn.
    run_ranks(run_rank, path)
    return path


@pytest.mark.parametrize("placement", ["table_wise", "row_wise"])
@pytest.mark.parametrize("name", embedding_configs())
def test_two_ranks_train_as_one_process_does(folder: Path, name: str, placement: str) -> None:
    torch.manual_seed(0)
    model, optimizer = prepare(Model(methods()[name]), OPTIMIZER, DENSE)
    without_draws(model)
    for step in range(3):
        optimizer.zero_grad()
        (model(joined(single=step == 1, has_ids=step != 2)).square().sum() / 9).backward()
        optimizer.step()
    expected = model.eval()(joined(single=False)).detach()
    output = torch.cat([torch.load(folder / f"{name}-{placement}-{rank}.pt") for rank in range(WORLD_SIZE)])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", ["table_wise", "row_wise"])
@pytest.mark.parametrize("name", embedding_configs())
def test_a_checkpoint_of_two_ranks_serves_in_one_process(folder: Path, name: str, placement: str) -> None:
    model = Model(methods()[name])
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=str(folder / f"{name}-{placement}"), no_dist=True)
    model.load_state_dict(state["model"])
    for rank in range(WORLD_SIZE):
        expected = torch.load(folder / f"{name}-{placement}-{rank}.pt")
        torch.testing.assert_close(model.eval()(batch_of(rank, single=False)).detach(), expected, rtol=1e-5, atol=1e-6)


def test_tables_of_one_name_are_placed_each_as_it_must_be() -> None:
    # A group for each width, so two tables of this name; one has too few rows for two ranks.
    tables = [table("small", 1, dim=4), table("large", 2000, dim=8), table("middle", 20, dim=12)]
    with torch.device("meta"):
        model = CompressedEmbeddingBagCollection(tables, partial(Hashing, num_embeddings=202))
    for kind in ("row_wise", "table_wise"):
        plan = plan_shards(model, world_size=2, device_type="cpu", placement={"hashing": [kind]}).plan
        found = [plan[f"groups.{number}.lookups.0"]["hashing"].sharding_type for number in range(3)]
        assert found == ["table_wise", kind, kind]


def test_a_placement_that_does_not_exist_is_refused() -> None:
    with torch.device("meta"):
        model = Model(methods()["full"])
    with pytest.raises(ValueError, match=r"table 't_ad': placement must allow one of .* got \{'t_ad': \['columns'\]\}"):
        plan_shards(model, world_size=2, device_type="cpu", placement={"t_ad": ["columns"]})


def test_tables_that_do_not_fit_are_refused_with_one_message() -> None:
    with torch.device("meta"):
        model = Model(methods()["full"])
    with pytest.raises(ValueError, match="tables cannot be placed on 2 cpu ranks"):
        plan_shards(model, world_size=2, device_type="cpu", device_memory_bytes=10_000)
