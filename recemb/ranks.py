"""The processes that torchrun started, as one: who they are, what they agree on, and how they end together.

Torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) tell a process that it is one
of several. Without them, or with a WORLD_SIZE of 1, there is one process and nothing here communicates.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Key under which ranks that fail count themselves.
_FAILURES = "failures"
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_SPEAK = 1.5


@dataclass(frozen=True)
class Ranks:
    """This process among all of one run.

    Args:
        rank: 0 is the first; it alone writes files.
        world_size: processes of all machines.
        local_rank: number of this process on its machine, which is that of its GPU.
        store: torchrun's key-value store, None for a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store: Store | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, key: str, value: T) -> T:
        """The first rank's ``value`` on every rank; it must be fit for JSON. Needs no process group.

        Args:
            key: of this message; once a run.
            value: what the first rank says; that of the others is ignored.
        """
        if self.store is None:
            return value
        if self.is_first:
            self.store.set(key, json.dumps(value))
            return value
        # Not store.wait, which would not see that the first rank has failed.
        while not self.store.check([key]):
            if self.store.check([_FAILURES]):
                raise RuntimeError("another rank failed")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        content: T = json.loads(self.store.get(key))
        return content

    def first_then_others(self, key: str, task: Callable[[], T]) -> T:
        """``task()`` on the first rank, and when that is done on the others: for what the first makes and all read."""
        if not self.is_first:
            self.share(key, None)
            return task()
        result = task()
        self.share(key, None)
        return result

    def device(self, device: torch.device) -> torch.device:
        """``device``, or for CUDA the GPU of this rank.

        Raises:
            ValueError: one GPU named for several ranks, or fewer GPUs on this machine than ranks.
        """
        if self.world_size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(f"trainer.device={device}: with {self.world_size} ranks give cuda, each takes its own GPU")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {self.rank} is number {self.local_rank} on its machine, which has {torch.cuda.device_count()} "
                "GPUs: start as many ranks as there are GPUs (--nproc-per-node), or give trainer.device=cpu"
            )
        return torch.device("cuda", self.local_rank)

    @contextmanager
    def process_group(self, device: torch.device) -> Iterator[None]:
        """NCCL between the ranks of CUDA devices, gloo between those of CPUs; nothing for a single process."""
        if self.store is None:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("process_group", self.store),
            rank=self.rank,
            world_size=self.world_size,
        )
        with warnings.catch_warnings():
            # Torch tells TorchRec, at every checkpoint, to give up what it is built on.
            warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
            yield
        # Models that are done hold the group, some in cycles, and gloo aborts about one exit in ten of a process whose
        # interpreter ends its threads.
        gc.collect()
        # Not after an error: NCCL would wait for ranks that wait for this one.
        dist.destroy_process_group()


ALONE = Ranks()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks of this run. An error of one ends all: that rank's message is the only one.

    The others notice when a collective fails, or are ended by torchrun; they exit with status 1 and say nothing.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield ALONE
        return
    store, rank, world_size = next(rendezvous("env://"))
    ranks = Ranks(rank, world_size, int(os.environ.get("LOCAL_RANK", rank)), store)
    try:
        yield ranks
    except Exception as error:
        if not _is_first_failure(store):
            # Torchrun ends all ranks as soon as one has: the first to fail may be writing its message yet.
            time.sleep(_SECONDS_TO_SPEAK)
            raise SystemExit(1) from error
        error.add_note(f"(on rank {rank} of {world_size}, which ends the others)")
        raise


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over the ranks of the process group, in float64, the same on every rank.

    Args:
        values: as many on every rank.
        device: the one the process group communicates from.
    """
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        total = sums.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def differentiable_sum(sums: Tensor) -> Tensor:
    """``sums`` of all ranks, added up; its gradient is that of every rank's use of the sum. For batch statistics."""
    if not dist.is_initialized():
        return sums
    total: Tensor = _SumOverRanks.apply(sums)
    return total


def is_first_rank() -> bool:
    """Whether this process writes files: it is alone, or the first of the process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _is_first_failure(store: Any) -> bool:
    try:
        return bool(store.add(_FAILURES, 1) == 1)
    except RuntimeError:
        # The process that kept the store is gone, so it failed first.
        return False
