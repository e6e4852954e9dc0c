"""Train steps of the same tables on one rank and on two, which share this machine's cores and talk by gloo.

Every rank is a forked process; all ranks together take the same rows a step.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import (
    OPTIMIZER,
    SEED,
    Case,
    batches,
    byte_figures,
    fixed_gradient,
    forget_peak,
    resident,
    sgd,
    spread,
    steps,
)

from recemb.allocator import tune_allocators
from recemb.preparation import prepare

WARM_UP_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Place:
    """How many ranks, and where rows may lie.

    Args:
        world_size: ranks; 0 for one process without a process group.
        placement: see ``recemb.prepare``.
    """

    world_size: int
    placement: Mapping[str, Sequence[str]] | None = None


PLACES = {
    "1 rank, no process group": Place(0),
    "1 rank": Place(1),
    "2 ranks": Place(2),
    "2 ranks, row-wise": Place(2, {"*": ["row_wise"]}),
}


def run_place(case: Case, place: Place, counted: int) -> list[dict[str, Any]]:
    """The figures of every rank.

    Args:
        case: its batch is that of all ranks together.
        place: where it runs.
        counted: steps.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(max(1, place.world_size)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(case, place, rank, folder, counted, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return [pipe.recv() for pipe in pipes]
        except EOFError:
            raise RuntimeError(f"{case} on {place}: a rank died") from None
        finally:
            for process in processes:
                process.join()


def figures(name: str, case: Case, runs: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """One row: steps of all runs of a place, memory of its largest rank."""
    ranks = [rank for run in runs for rank in run]
    return {
        **dataclasses.asdict(case),
        "name": case.name,
        "place": name,
        **byte_figures(case.estimate()),
        # Ranks wait for each other, so one clock tells the time of a step; CPU time is of all ranks together.
        "wall_ms": spread([value for run in runs for value in run[0]["wall_ms"]]),
        "cpu_ms": spread([sum(values) for run in runs for values in zip(*(r["cpu_ms"] for r in run), strict=True)]),
        "table_bytes_of_ranks": [rank["table_bytes"] for rank in runs[0]],
        "build_peak_bytes": max(rank["build_peak_bytes"] for rank in ranks),
        "training_peak_bytes": max(rank["training_peak_bytes"] for rank in ranks),
    }


def _rank(case: Case, place: Place, rank: int, folder: str, counted: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    # TorchRec calls torch.distributed by names that a later release of torch drops.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if place.world_size:
        store = f"file://{Path(folder) / 'meeting-place'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=place.world_size)
    warm_up = dataclasses.replace(case, total_ids=100_000, batch_size=64 * max(1, place.world_size))
    _train(warm_up, place, rank, 2)
    pipe.send(_train(case, place, rank, counted))
    if place.world_size:
        dist.destroy_process_group()


def _train(case: Case, place: Place, rank: int, counted: int) -> dict[str, Any]:
    own_rows = case.batch_size // max(1, place.world_size)
    inputs = batches(case, own_rows, seed=SEED + rank)
    gradient = fixed_gradient(case, own_rows)
    gc.collect()
    tune_allocators()
    before = resident("VmRSS")
    forget_peak()
    model, optimizer = prepare(case.collection(), OPTIMIZER, sgd(), placement=place.placement)
    build_peak = resident("VmHWM") - before
    gc.collect()
    tune_allocators()
    forget_peak()
    running = steps(model, optimizer, inputs, gradient)
    wall_ms, cpu_ms = [], []
    for number in range(WARM_UP_STEPS + counted):
        started, spent = time.perf_counter(), time.process_time()
        next(running)
        if number >= WARM_UP_STEPS:
            wall_ms.append(1e3 * (time.perf_counter() - started))
            cpu_ms.append(1e3 * (time.process_time() - spent))
    return {
        "wall_ms": wall_ms,
        "cpu_ms": cpu_ms,
        "table_bytes": _own_table_bytes(model),
        "build_peak_bytes": build_peak,
        "training_peak_bytes": resident("VmHWM") - before,
    }


def _own_table_bytes(model: torch.nn.Module) -> int:
    """Of the rows that lie in this process."""
    total = 0
    for key, tensor in model.state_dict().items():
        if not key.endswith(".weight"):
            continue
        shards = tensor.local_shards() if hasattr(tensor, "local_shards") else None
        total += tensor.nbytes if shards is None else sum(shard.tensor.nbytes for shard in shards)
    return total
