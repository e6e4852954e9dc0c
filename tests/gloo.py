"""Two processes that train together on gloo, for tests of sharding."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

WORLD_SIZE = 2


def run_ranks(function: Callable[[int, Path], None], folder: Path) -> None:
    """``function(rank, folder)`` in two processes of one process group; a failing rank fails the caller."""
    torch.multiprocessing.spawn(_run_rank, (function, folder), nprocs=WORLD_SIZE)


def _run_rank(rank: int, function: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    # A file as meeting place: no port that another process might take first.
    store = f"file://{folder / 'meeting-place'}"
    # A rank that waits for one which does not come is a failure, after two minutes and not after half an hour.
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(minutes=2))
    function(rank, folder)
    # As recemb.ranks: models hold the group.
    gc.collect()
    dist.destroy_process_group()
