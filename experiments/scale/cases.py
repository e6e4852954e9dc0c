"""One case: a collection of some method over tables of some size, its bytes, and its train steps.

A case that is measured runs in a forked process of its own, so that its memory is its own, and steps when told to, so
that cases can take turns.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import shape
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from recemb.allocator import tune_allocators
from recemb.budget import fit_to_budget, parse_budget
from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.data.batch import keyed_one_id
from recemb.memory import MemoryReport, estimate_memory, full_table_bytes
from recemb.method import Method
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "embedding"
SEED = 1
OPTIMIZER = EmbeddingOptimizer("rowwise_adagrad", learning_rate=0.05)
# Rows that batches are made of beforehand: so many that their ids' rows do not all stay in the processor's caches.
PREPARED_ROWS = 1 << 17
FEWEST_BATCHES, MOST_BATCHES = 4, 128


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        method: name in ``configs/embedding``.
        budget: as there; None for full tables.
        total_ids: of all 26 tables.
        batch_size: rows of a step.
        dim: width of the vectors.
    """

    method: str
    budget: str | None
    total_ids: int
    batch_size: int
    dim: int = 16

    @property
    def name(self) -> str:
        return self.method if self.budget is None else f"{self.method} {self.budget}"

    def realise(self) -> Method:
        """The method of its config, sized.

        Raises:
            ValueError: a budget that it cannot meet.
        """
        config = OmegaConf.load(CONFIGS / f"{self.method}.yaml")
        method: Method = instantiate(config.method)
        if self.budget is None:
            return method
        return fit_to_budget(
            shape.tables(self.total_ids, self.dim), method, parse_budget(self.budget, full_bytes(self))
        )

    def estimate(self) -> MemoryReport:
        """Its bytes, from tensors without memory."""
        return estimate_memory(shape.tables(self.total_ids, self.dim), self.realise(), optimizer=OPTIMIZER)

    def collection(self) -> CompressedEmbeddingBagCollection:
        """As ``prepare`` takes it; full tables get their rows only there."""
        tables, method = shape.tables(self.total_ids, self.dim), self.realise()
        with torch.device("meta" if self.method == "full" else "cpu"):
            return CompressedEmbeddingBagCollection(tables, method)


def full_bytes(case: Case) -> int:
    """Of full tables for its ids."""
    return sum(full_table_bytes(shape.tables(case.total_ids, case.dim)).values())


def batches(case: Case, batch_size: int, *, seed: int = SEED) -> list[Tensor]:
    """(F, B) ids in order of frequency, batch by batch."""
    generator = np.random.default_rng(seed)
    number = min(max(FEWEST_BATCHES, PREPARED_ROWS // batch_size), MOST_BATCHES)
    return [shape.draw(generator, case.total_ids, batch_size) for _ in range(number)]


def steps(model: nn.Module, optimizer: Any, inputs: Sequence[Tensor], gradient: Tensor) -> Iterator[None]:
    """Train steps of the tables: lookup, backward with the update inside, and what the method does after a step."""
    keys = [column.name for column in shape.CATEGORICAL]
    groups = compressed_groups(model)
    number = 0
    while True:
        for ids_FB in inputs:
            number += 1
            optimizer.zero_grad()
            model(keyed_one_id(keys, ids_FB)).values().backward(gradient)
            optimizer.step()
            for group in groups:
                group.after_step(number)
            yield


def fixed_gradient(case: Case, batch_size: int) -> Tensor:
    """(B, F * D), the same at every step."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(batch_size, case.dim * len(shape.CATEGORICAL), generator=generator) * 1e-2


def sgd() -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Of what a method has beside tables."""
    return partial(torch.optim.SGD, lr=0.05)


def resident(kind: str) -> int:
    """Bytes of this process: ``"VmRSS"`` now, ``"VmHWM"`` at most since ``forget_peak``."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def forget_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class Measured:
    """A case in a process of its own.

    Args:
        case: what to run.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(case, other), daemon=True)
        self._process.start()
        other.close()
        self.built: dict[str, Any] = self._receive()
        self.milliseconds: dict[str, list[float]] = {"by frequency": [], "scattered": []}

    def turn(self, number: int, *, scattered_first: bool) -> None:
        """Two steps that do not count and ``number`` that do, in both orders of the ids."""
        for order in sorted(self.milliseconds, reverse=scattered_first):
            self._pipe.send((order, number))
            self.milliseconds[order].extend(self._receive())

    def finish(self) -> dict[str, Any]:
        """End the process: all figures of the case."""
        self._pipe.send(None)
        peak = self._receive()
        self._process.join()
        return {
            **dataclasses.asdict(self.case),
            "name": self.case.name,
            "measured": True,
            **self.built,
            **peak,
            "cpu_ms": {order: spread(taken) for order, taken in self.milliseconds.items()},
        }

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.case}: its process died") from None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the middle four fifths."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return {
        "median": statistics.median(ordered),
        "p10": ordered[tenth],
        "p90": ordered[-1 - tenth],
        "steps": len(ordered),
    }


def _serve(case: Case, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    # Whatever a first step loads of the libraries is no memory of the case.
    warm_up = dataclasses.replace(case, budget=None if case.budget is None else "0.5", total_ids=2_000, batch_size=8)
    _run_some(warm_up)
    by_frequency = batches(case, case.batch_size)
    inputs = {
        "by frequency": by_frequency,
        "scattered": [shape.scatter(ids_FB, case.total_ids) for ids_FB in by_frequency],
    }
    gradient = fixed_gradient(case, case.batch_size)
    gc.collect()
    tune_allocators()
    before = resident("VmRSS")
    forget_peak()
    model, optimizer = prepare(case.collection(), OPTIMIZER, sgd())
    build_peak = resident("VmHWM") - before
    gc.collect()
    tune_allocators()
    forget_peak()
    pipe.send({**byte_figures(case.estimate()), "build_peak_bytes": build_peak})
    running = {order: steps(model, optimizer, given, gradient) for order, given in inputs.items()}
    while (command := pipe.recv()) is not None:
        order, number = command
        pipe.send(_timed(running[order], number))
    pipe.send({"training_peak_bytes": resident("VmHWM") - before})


def _timed(running: Iterator[None], number: int) -> list[float]:
    """CPU milliseconds of ``number`` steps after two that bring back the caches that others had."""
    for _ in range(2):
        next(running)
    taken = []
    for _ in range(number):
        started = time.process_time()
        next(running)
        taken.append(1e3 * (time.process_time() - started))
    return taken


def _run_some(case: Case) -> None:
    model, optimizer = prepare(case.collection(), OPTIMIZER, sgd())
    running = steps(model, optimizer, batches(case, case.batch_size)[:2], fixed_gradient(case, case.batch_size))
    for _ in range(2):
        next(running)


def byte_figures(report: MemoryReport) -> dict[str, float]:
    """What the estimator says."""
    return {
        "serving_bytes": report.serving_bytes,
        "optimizer_bytes": report.optimizer_bytes,
        "full_bytes": report.full_bytes,
        "ratio": report.ratio,
    }
