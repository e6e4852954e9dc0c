"""Train step of embedding tables alone: lookup, backward and update, without a head.

    python experiments/speed/kernels.py

26 tables with Criteo's cardinalities capped at ``--cap`` rows, Zipf ids scattered over the rows, row-wise Adagrad, one
thread. Contenders take turns on the same batches; a row's ratio is its median over that of one raw fbgemm kernel in
the same run. CPU time is counted, so that neighbours on the machine disturb less. Writes ``results/kernels.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import capped_cardinalities, zipf_ids
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    OptimType,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from run_benchmark import git_state, machine
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.allocator import tune_allocators
from recemb.budget import fit_to_budget, parse_budget
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.data.batch import keyed_one_id
from recemb.memory import full_table_bytes
from recemb.method import Method
from recemb.methods.full import Full
from recemb.methods.unified import Unified
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare

logger = logging.getLogger("kernels")

FOLDER = Path(__file__).resolve().parent

LEARNING_RATE = 0.05
EPS = 1e-8
NUM_BATCHES = 4
# A contender, given the batches it will see: its steps, each of which is one train step on the next batch.
Steps = Iterator[None]


def raw_kernel(tables: list[EmbeddingBagConfig], batches: list[Tensor], gradient: Tensor) -> Steps:
    """All tables in one fbgemm kernel, row-wise Adagrad inside backward()."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(t.num_embeddings, t.embedding_dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for t in tables],
        optimizer=OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        eps=EPS,
    )
    for weights in kernel.split_embedding_weights():
        weights.uniform_(-0.01, 0.01)
    offsets = torch.arange(batches[0].numel() + 1)
    while True:
        for ids in batches:
            kernel(ids.view(-1), offsets).backward(gradient)
            yield


def recemb_collection(
    tables: list[EmbeddingBagConfig], batches: list[Tensor], gradient: Tensor, *, method: Method, check_ids: bool
) -> Steps:
    """recemb's collection after ``prepare``, as a model calls it."""
    collection, _ = prepare(
        CompressedEmbeddingBagCollection(tables, method, check_ids=check_ids),
        EmbeddingOptimizer("rowwise_adagrad", learning_rate=LEARNING_RATE, eps=EPS),
        torch.optim.SGD,
    )
    keys = [name for table in tables for name in table.feature_names]
    while True:
        for ids in batches:
            collection(keyed_one_id(keys, ids)).values().backward(gradient)
            yield


def unified(tables: list[EmbeddingBagConfig], num_lookups: int) -> Method:
    """A tenth of the bytes of the full tables."""
    budget = parse_budget("10x", sum(full_table_bytes(tables).values()))
    return fit_to_budget(tables, partial(Unified, num_lookups=num_lookups), budget)


def embedding_bags(
    tables: list[EmbeddingBagConfig], batches: list[Tensor], gradient: Tensor, *, optimizer_class: Any
) -> Steps:
    """torch.nn.EmbeddingBag per table with sparse gradients, and a torch optimizer."""
    bags = nn.ModuleList(nn.EmbeddingBag(t.num_embeddings, t.embedding_dim, mode="sum", sparse=True) for t in tables)
    optimizer = optimizer_class(bags.parameters(), lr=LEARNING_RATE)
    while True:
        for ids in batches:
            optimizer.zero_grad()
            torch.cat([bag(row.unsqueeze(1)) for bag, row in zip(bags, ids, strict=True)], dim=1).backward(gradient)
            optimizer.step()
            yield


def torchrec_unsharded(tables: list[EmbeddingBagConfig], batches: list[Tensor], gradient: Tensor) -> Steps:
    """TorchRec's EmbeddingBagCollection as it is without sharding: dense gradients, torch's Adagrad."""
    collection = EmbeddingBagCollection(tables=tables)
    optimizer = torch.optim.Adagrad(collection.parameters(), lr=LEARNING_RATE)
    keys = [name for table in tables for name in table.feature_names]
    while True:
        for ids in batches:
            optimizer.zero_grad()
            features = KeyedJaggedTensor(keys, ids.view(-1), lengths=torch.ones(ids.numel(), dtype=torch.int32))
            collection(features).values().backward(gradient)
            optimizer.step()
            yield


def contenders(tables: list[EmbeddingBagConfig]) -> dict[str, Callable[[list[Tensor], Tensor], Steps]]:
    """Name -> what makes its steps. The last three take seconds a step at full size and are stepped less often."""
    return {
        "one raw fbgemm kernel": partial(raw_kernel, tables),
        "recemb full": partial(recemb_collection, tables, method=Full, check_ids=False),
        "recemb full, ids checked": partial(recemb_collection, tables, method=Full, check_ids=True),
        "recemb unified 10x, 1 lookup": partial(recemb_collection, tables, method=unified(tables, 1), check_ids=False),
        "recemb unified 10x, 2 lookups": partial(recemb_collection, tables, method=unified(tables, 2), check_ids=False),
        "nn.EmbeddingBag, sparse Adagrad": partial(embedding_bags, tables, optimizer_class=torch.optim.Adagrad),
        "nn.EmbeddingBag, SparseAdam": partial(embedding_bags, tables, optimizer_class=torch.optim.SparseAdam),
        "TorchRec EBC unsharded, Adagrad": partial(torchrec_unsharded, tables),
    }


SLOW = ("nn.EmbeddingBag, sparse Adagrad", "nn.EmbeddingBag, SparseAdam", "TorchRec EBC unsharded, Adagrad")


def measure(dim: int, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of CPU time of a train step: median and tenth percentile by contender.

    Fast contenders alternate step by step; the slow ones run one after another behind them, against a fresh measure
    of the raw kernel, because each holds several copies of the tables.
    """
    generator = np.random.default_rng(options.seed)
    sizes = capped_cardinalities(options.cap)
    tables = [
        EmbeddingBagConfig(name=f"t_C{i + 1}", num_embeddings=n, embedding_dim=dim, feature_names=[f"C{i + 1}"])
        for i, n in enumerate(sizes)
    ]
    batches = _batches(generator, sizes, batch_size, options.exponent)
    gradient = torch.randn(batch_size, dim * len(tables), generator=torch.Generator().manual_seed(0)) * 1e-2
    everything = contenders(tables)
    fast = {name: make for name, make in everything.items() if name not in SLOW}
    rows = _rows(_alternate(fast, batches, gradient, options.steps))
    for name in SLOW if options.slow else ():
        pair = {"one raw fbgemm kernel": fast["one raw fbgemm kernel"], name: everything[name]}
        rows[name] = _rows(_alternate(pair, batches, gradient, options.slow_steps))[name]
    distinct = [sum(len(torch.unique(row)) for row in ids) for ids in batches]
    return {
        "dim": dim,
        "batch_size": batch_size,
        "distinct_fraction": statistics.mean(distinct) / batches[0].numel(),
        "rows": rows,
    }


def _batches(generator: np.random.Generator, sizes: list[int], batch_size: int, exponent: float) -> list[Tensor]:
    """(26, B) int64 each; frequent ids lie anywhere in a table, not at its start."""
    scatter = [generator.permutation(size) for size in sizes]
    return [
        torch.from_numpy(
            np.stack(
                [place[zipf_ids(generator, batch_size, n, exponent)] for place, n in zip(scatter, sizes, strict=True)]
            )
        )
        for _ in range(NUM_BATCHES)
    ]


def _alternate(
    chosen: dict[str, Callable[[list[Tensor], Tensor], Steps]], batches: list[Tensor], gradient: Tensor, num_steps: int
) -> dict[str, list[float]]:
    """CPU seconds of every counted step; each contender sees every batch once before counting."""
    steps = {name: make(batches, gradient) for name, make in chosen.items()}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(NUM_BATCHES + num_steps):
        for name, step in steps.items():
            started = time.process_time()
            next(step)
            if number >= NUM_BATCHES:
                seconds[name].append(time.process_time() - started)
    return seconds


def _rows(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    base = statistics.median(seconds["one raw fbgemm kernel"])
    return {
        name: {
            "ms_median": 1e3 * statistics.median(values),
            "ms_p10": 1e3 * sorted(values)[len(values) // 10],
            "ratio_to_raw": statistics.median(values) / base,
        }
        for name, values in seconds.items()
    }


def main() -> None:
    # This logger alone: fbgemm writes pages about every kernel to the root logger.
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--cap", type=int, default=1_000_000, help="rows of the largest tables")
    parser.add_argument("--exponent", type=float, default=1.05, help="of the Zipf law")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--slow-steps", type=int, default=4)
    parser.add_argument("--slow", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "kernels.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tune_allocators()
    cases = []
    for dim in options.dims:
        for batch_size in options.batch_sizes:
            case = measure(dim, batch_size, options)
            cases.append(case)
            logger.info("dim %d, batch %d, %.0f%% distinct", dim, batch_size, 100 * case["distinct_fraction"])
            for name, row in case["rows"].items():
                logger.info("  %-32s %9.2f ms  %7.2f x raw", name, row["ms_median"], row["ratio_to_raw"])
    document = {
        "study": "kernels",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "git": git_state(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "cases": cases,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
