"""Train step of embedding tables alone: lookup, backward and update, without a head.

    python experiments/speed/kernels.py

26 tables with Criteo's cardinalities capped at ``--cap`` rows, Zipf ids scattered over the rows, one thread. Every
static method of ``configs/embedding`` is there, at a tenth of the full tables' bytes where it has a size. A contender
and one raw fbgemm kernel with the same optimizer take turns on the same batches; a ratio is of their medians. CPU
time is counted, so that neighbours on the machine disturb less.

Writes the rows measured into ``results/kernels.json`` and leaves others as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
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
    SplitTableBatchedEmbeddingBagsCodegen,
)
from hydra.utils import instantiate
from omegaconf import OmegaConf
from run_benchmark import git_state, machine
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.allocator import tune_allocators
from recemb.budget import fit_to_budget, parse_budget
from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.data.batch import keyed_one_id
from recemb.memory import full_table_bytes
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare

logger = logging.getLogger("kernels")

FOLDER = Path(__file__).resolve().parent
CONFIGS = FOLDER.parents[1] / "configs" / "embedding"

LEARNING_RATE = 0.05
EPS = 1e-8
NUM_BATCHES = 4
# Beyond it the encodings of a batch take more than 2 GB.
DEEP_HASH_UNMERGED_ROWS = 4096
# A contender, given the batches it will see: its steps, each of which is one train step on the next batch.
Steps = Iterator[None]


def raw_kernel(tables: list[EmbeddingBagConfig], batches: list[Tensor], gradient: Tensor, optimizer: str) -> Steps:
    """All tables in one fbgemm kernel, which updates them inside backward()."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(t.num_embeddings, t.embedding_dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for t in tables],
        optimizer=EmbeddingOptimizer(optimizer).fbgemm_type,
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


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table.

    Args:
        config: name in ``configs/embedding``.
        options: of its method, over the config's.
        goal: largest ratio to the raw kernel that is hoped for; None where the figure is for information.
        check_ids: see the collection.
    """

    config: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    goal: float | None = None
    check_ids: bool = False


# 1.3 for one lookup an id, 1.3 k for k.
GOALS = {
    "full": 1.15,
    **dict.fromkeys(("hashing", "frequency_split", "cafe"), 1.3),
    **dict.fromkeys(("unified", "tiered", "quotient_remainder", "chinese_remainder"), 2.6),
    **dict.fromkeys(("memcom", "hash_embeddings", "double_hash", "cce"), 2.6),
    "generalised_quotient_remainder": 3.9,
    **dict.fromkeys(("mixed_dimension", "robe"), 2.5),
}


def entries(dim: int, batch_size: int) -> dict[str, Entry]:
    """Every config whose method needs no search, and what else an option decides."""
    configs = {path.stem: OmegaConf.load(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    static = [name for name, config in configs.items() if "stages" not in config]
    found = {name: Entry(name, goal=GOALS.get(name)) for name in static}
    found |= {
        "full, ids checked": Entry("full", goal=GOALS["full"], check_ids=True),
        "unified, 1 lookup": Entry("unified", {"num_lookups": 1}, 1.3),
        "chinese_remainder, 3 partitions": Entry("chinese_remainder", {"num_partitions": 3}, 3.9),
        "robe, blocks of half a vector": Entry("robe", {"block_length": dim // 2}, GOALS["robe"]),
        "robe, signs": Entry("robe", {"signs": True}, GOALS["robe"]),
        "tensor_train, ids not merged": Entry("tensor_train", {"merge_ids": False}),
    }
    if batch_size <= DEEP_HASH_UNMERGED_ROWS:
        found["deep_hash, ids not merged"] = Entry("deep_hash", {"merge_ids": False})
    return found


def recemb_collection(
    tables: list[EmbeddingBagConfig], batches: list[Tensor], gradient: Tensor, optimizer: str, *, entry: Entry
) -> Steps:
    """recemb's collection after ``prepare``, as a model calls it and recemb's loop steps it."""
    config = OmegaConf.load(CONFIGS / f"{entry.config}.yaml")
    method = instantiate(config.method, **entry.options)
    if config.budget is not None:
        budget = parse_budget("10x", sum(full_table_bytes(tables).values()))
        method = fit_to_budget(tables, method, budget, full_below_rows=config.full_below_rows)
    collection, table_optimizer = prepare(
        CompressedEmbeddingBagCollection(
            tables, method, full_below_rows=config.get("full_below_rows", 0), check_ids=entry.check_ids
        ),
        EmbeddingOptimizer(optimizer, learning_rate=LEARNING_RATE, eps=EPS),
        partial(torch.optim.SGD, lr=LEARNING_RATE),
    )
    groups = compressed_groups(collection)
    keys = [name for table in tables for name in table.feature_names]
    for step in itertools.count(1):
        table_optimizer.zero_grad()
        collection(keyed_one_id(keys, batches[step % len(batches)])).values().backward(gradient)
        table_optimizer.step()
        for group in groups:
            group.after_step(step)
        yield


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


# Without the optimizer's name: each brings its own.
OTHERS: dict[str, Callable[..., Steps]] = {
    "nn.EmbeddingBag, sparse Adagrad": partial(embedding_bags, optimizer_class=torch.optim.Adagrad),
    "nn.EmbeddingBag, SparseAdam": partial(embedding_bags, optimizer_class=torch.optim.SparseAdam),
    "TorchRec EBC unsharded, Adagrad": torchrec_unsharded,
}
# They take seconds a step at some sizes, and are stepped less often.
SLOW = ("deep_hash", "tensor_train", *OTHERS)


def measure(optimizer: str, dim: int, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of CPU time of a train step and its ratio to the raw kernel's, by contender.

    One contender at a time beside the raw kernel, because some hold several copies of the tables.
    """
    generator = np.random.default_rng(options.seed)
    torch.manual_seed(options.seed)
    sizes = capped_cardinalities(options.cap)
    tables = [
        EmbeddingBagConfig(name=f"t_C{i + 1}", num_embeddings=n, embedding_dim=dim, feature_names=[f"C{i + 1}"])
        for i, n in enumerate(sizes)
    ]
    batches = _batches(generator, sizes, batch_size, options.exponent)
    gradient = torch.randn(batch_size, dim * len(tables), generator=torch.Generator().manual_seed(0)) * 1e-2
    raw = raw_kernel(tables, batches, gradient, optimizer)
    chosen = entries(dim, batch_size)
    makers: dict[str, Callable[[], Steps]] = {
        name: partial(recemb_collection, tables, batches, gradient, optimizer, entry=entry)
        for name, entry in chosen.items()
    }
    if options.others:
        makers |= {name: partial(make, tables, batches, gradient) for name, make in OTHERS.items()}
    rows = {}
    for name, make in makers.items():
        if options.only and name not in options.only:
            continue
        is_slow = name.startswith(SLOW)
        warm_up, counted = (1, options.slow_steps) if is_slow else (NUM_BATCHES, options.steps)
        rows[name] = _row(_alternate(raw, make(), warm_up, counted))
        rows[name]["goal"] = chosen[name].goal if name in chosen else None
        gc.collect()
        logger.info("  %-32s %9.2f ms  %7.2f x raw", name, rows[name]["ms_median"], rows[name]["ratio_to_raw"])
    distinct = [sum(len(torch.unique(row)) for row in ids) for ids in batches]
    return {
        "optimizer": optimizer,
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


def _alternate(raw: Steps, contender: Steps, warm_up: int, counted: int) -> tuple[list[float], list[float]]:
    """CPU seconds of every counted step of both, which take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(warm_up + counted):
        for steps, taken in zip((raw, contender), seconds, strict=True):
            started = time.process_time()
            next(steps)
            if number >= warm_up:
                taken.append(time.process_time() - started)
    return seconds


def _row(seconds: tuple[list[float], list[float]]) -> dict[str, Any]:
    raw, contender = (statistics.median(taken) for taken in seconds)
    return {
        "ms_median": 1e3 * contender,
        "ms_p10": 1e3 * sorted(seconds[1])[len(seconds[1]) // 10],
        "raw_ms_median": 1e3 * raw,
        "ratio_to_raw": contender / raw,
        "steps": len(seconds[1]),
    }


def main() -> None:
    # This logger alone: fbgemm writes pages about every kernel to the root logger.
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="rowwise_adagrad", choices=["rowwise_adagrad", "sgd"])
    parser.add_argument("--dims", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--cap", type=int, default=1_000_000, help="rows of the largest tables")
    parser.add_argument("--exponent", type=float, default=1.05, help="of the Zipf law")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--slow-steps", type=int, default=4)
    parser.add_argument("--others", action=argparse.BooleanOptionalAction, default=True, help="torch and TorchRec")
    parser.add_argument("--only", nargs="*", default=[], help="names of rows; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "kernels.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tune_allocators()
    for dim in options.dims:
        for batch_size in options.batch_sizes:
            logger.info("%s, dim %d, batch %d", options.optimizer, dim, batch_size)
            _save(measure(options.optimizer, dim, batch_size, options), options)


def _save(case: dict[str, Any], options: argparse.Namespace) -> None:
    """Put the rows of a case in the place of those of before; each row says which commit it is of."""
    origin = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "git": git_state(),
        "versions": {name: version(name) for name in ("torch", "fbgemm-gpu-cpu", "torchrec", "numpy")}
        | {"python": sys.version.split()[0]},
        "options": {name: getattr(options, name) for name in ("cap", "exponent", "steps", "slow_steps", "seed")},
    }
    for row in case["rows"].values():
        row["git"] = origin["git"]
    kind = ("optimizer", "dim", "batch_size")
    cases = json.loads(options.output.read_text())["cases"] if options.output.is_file() else []
    for old in cases:
        if [old[key] for key in kind] == [case[key] for key in kind]:
            case["rows"] = {**old["rows"], **case["rows"]}
    others = [old for old in cases if [old[key] for key in kind] != [case[key] for key in kind]]
    cases = sorted([*others, {**case, **origin}], key=lambda entry: [entry[key] for key in kind])
    options.output.write_text(json.dumps({"study": "kernels", "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
