"""Two ranks with different numbers of rows see the metrics of one process with all of them."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recemb.evaluation.evaluator import evaluate_predictions
from recemb.evaluation.gather import gather_rows, gather_texts
from recemb.evaluation.predictions import collect
from tests.evaluation.test_predictions import Sum, batches

SIZES = [[5, 40, 3], [11]]
SEEDS = [1, 2]


def _join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)


def _evaluate(rank: int, folder: str) -> None:
    _join(rank, folder)
    predictions = collect(Sum(), batches(SIZES[rank], seed=SEEDS[rank]))
    result = evaluate_predictions(predictions, user_column="user", slice_columns=["site"], replicates=10)
    Path(folder, f"result-{rank}").write_text(str(result.to_dict()))

    names = np.array(["a", None, "längere"][: rank + 2], dtype=object)
    assert gather_rows(names).tolist() == ["a", None, "a", None, "längere"]
    assert gather_rows(np.arange(rank, dtype=np.int8)).tolist() == [0]
    assert gather_rows(np.array([f"r{rank}" * (rank + 1)])).tolist() == ["r0", "r1r1"]
    assert gather_texts("" if rank else "only zero") == ["only zero", ""]
    # A rank without a row gathers what the others have.
    alone = collect(Sum(), batches([] if rank == 0 else [4]))
    assert len(alone.labels) == 4 and sorted(alone.columns) == ["site", "user"]
    try:
        gather_rows(np.zeros(2, np.float32 if rank else np.float64))
    except ValueError as error:
        assert "one dtype on all ranks is required" in str(error)
    else:
        raise AssertionError("dtypes differ")

    # One rank diverges: both raise, neither waits.
    parts = batches([4, 4])
    if rank == 1:
        parts[1].dense[3, 0] = float("nan")
    try:
        collect(Sum(), parts)
    except ValueError as error:
        Path(folder, f"error-{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_two_ranks_agree_with_one_process(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_evaluate, args=(str(tmp_path),), nprocs=2)
    parts = [part for sizes, seed in zip(SIZES, SEEDS, strict=True) for part in batches(sizes, seed=seed)]
    expected = evaluate_predictions(
        collect(Sum(), parts), user_column="user", slice_columns=["site"], replicates=10
    ).to_dict()
    for rank in (0, 1):
        assert (tmp_path / f"result-{rank}").read_text() == str(expected)
    assert "batch 1: logit of its row 3 (row 7" in (tmp_path / "error-1").read_text()
    assert (tmp_path / "error-0").read_text().startswith("evaluation failed on rank 1: ValueError: batch 1")


def test_without_a_process_group_nothing_is_gathered():
    values = np.arange(3)
    assert gather_rows(values) is values
    assert gather_texts("here") == ["here"]
