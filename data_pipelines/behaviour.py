"""A behaviour log of any size whose best possible model is known: the stand-in for logs with histories.

    python -m data_pipelines.behaviour --rows 300000 --out data/behaviour          encoded, ready for training
    python -m data_pipelines.behaviour --rows 300000 --out log.parquet --raw-only  with ready-made histories

The model
---------
200 categories, each of 4 styles of 5 items. A user has four interests: categories (with shares .4, .25, .2, .15) and in
each a preferred style. Past events, geometric in number with mean 50 and spread evenly over 30 days, are of an interest
(7 in 10 in its preferred style) or, 2 in 10, of anything. Each user is shown 40 targets, half from the interests, half
of anything. The history of a row is the latest ``max_history`` events strictly before it. With c of them in the
target's category and s in its style besides,

    label ~ Bernoulli(p),  logit(p) = constant + 3 * (1 - exp(-(c + 2 s) / 3)) + 0.5 * quality(item) + 0.4 * device

and a click rate of 25%. So the click depends on those few events that match the target: a sum over the history mixes
four interests and strays into one vector, attention by the target keeps them apart. Styles show in no column; items of
one style share histories.

Columns: ``item``, ``category``, ``device``; ``item_history``, ``category_history``; ``user``, ``time``,
``true_probability``. The manifest's ``optimum`` has AUC and log loss of p on the test split, the newest tenth: about
.83 and .46 (the parameters of every item are known to it, not to a model).

Memory: a block of 1,000 users.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import parquet
from data_pipelines.behaviour_model import ROWS_PER_USER, BehaviourModel, Block
from data_pipelines.command import run_command
from data_pipelines.histories import DEFAULT_MAX_HISTORY, check_max_history, entries
from data_pipelines.made_once import make_once
from data_pipelines.schema import CategoricalColumn, LogSchema
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import TRUE_PROBABILITY, Manifest

SOURCE = "synthetic behaviour"
# Raised with every change of the model, so that an older log is never taken for one of today's.
MODEL_VERSION = 2
BY_TIME = SplitRule(kind="time")


def prepare_behaviour(
    out: str | Path,
    *,
    rows: int = 300_000,
    seed: int = 0,
    max_history: int = DEFAULT_MAX_HISTORY,
    split: SplitRule = BY_TIME,
) -> Manifest:
    """Make the encoded data set ``out``, or reuse the one there if made with equal options.

    Args:
        out: its directory.
        rows: of all splits together, 40 a user.
        seed: of every value.
        max_history: events of a history, the latest; the click depends on these alone.
        split: unless told otherwise the oldest 80% train, the newest 10% test.

    Raises:
        ValueError: rows or max_history below 1; ``out`` holds another data set, or one made with other options.
        FileExistsError: ``out`` is no data set.
    """
    options = {
        "version": MODEL_VERSION,
        "rows": rows,
        "seed": seed,
        "max_history": max_history,
        "split": {**dataclasses.asdict(split), "fractions": list(split.fractions)},
    }

    def make(scratch: Path, encoded: Path) -> Manifest:
        raw = generate(scratch / "behaviour.parquet", rows=rows, seed=seed, max_history=max_history)
        manifest = parquet.prepare([raw], encoded, schema=schema_of(max_history), split=split)
        return dataclasses.replace(manifest, source=SOURCE)

    return make_once(out, SOURCE, options, make)


def schema_of(max_history: int) -> LogSchema:
    """The raw log's columns."""
    return LogSchema(
        label="label",
        categorical=(
            *(CategoricalColumn(name) for name in ("item", "category", "device")),
            *(
                CategoricalColumn(
                    f"{name}_history", "sequence", table=name, max_length=max_history, times="history_times"
                )
                for name in ("item", "category")
            ),
        ),
        user="user",
        time="time",
        extra=(TRUE_PROBABILITY,),
    )


def generate(path: str | Path, *, rows: int, seed: int = 0, max_history: int = DEFAULT_MAX_HISTORY) -> Path:
    """Write the raw log as one Parquet file, rows by user; see ``prepare_behaviour``. Deterministic, byte for byte."""
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    check_max_history(max_history)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = BehaviourModel(seed=seed, max_history=max_history)
    temporary = path.with_name(f".{path.name}.unfinished")
    writer: pq.ParquetWriter | None = None
    written = number = 0
    try:
        while written < rows:
            table = _table(model, model.block(number)).slice(0, rows - written)
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd", compression_level=1)
            writer.write_table(table)
            written, number = written + len(table), number + 1
        assert writer is not None
        writer.close()
        temporary.replace(path)
    finally:
        if writer is not None:
            writer.close()
        temporary.unlink(missing_ok=True)
    return path


def _table(model: BehaviourModel, block: Block) -> pa.Table:
    offsets, positions = entries(block.starts, block.ends)
    past = block.event_items[positions]

    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    return pa.table(
        {
            "label": pa.array(block.label.astype(np.int8)),
            "item": model.names[block.item],
            "category": model.category(block.item),
            "device": block.device,
            "item_history": lists(model.names[past]),
            "category_history": lists(model.category(past)),
            "history_times": lists(block.event_times[positions]),
            "user": block.user,
            "time": block.time,
            TRUE_PROBABILITY: block.probability.astype(np.float32),
        }
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m data_pipelines.behaviour``."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.behaviour",
        description="A log of users with interests whose best possible AUC and log loss are known.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory; file with --raw-only")
    parser.add_argument("--rows", type=int, default=300_000, help=f"rows of all splits, {ROWS_PER_USER} a user")
    parser.add_argument("--seed", type=int, default=0, help="of every value of the log")
    parser.add_argument("--max-history", type=int, default=DEFAULT_MAX_HISTORY, help="latest events of a history")
    parser.add_argument("--raw-only", action="store_true", help="write the raw log as one Parquet file")
    options = parser.parse_args(arguments)
    log = {"rows": options.rows, "seed": options.seed, "max_history": options.max_history}
    make = generate if options.raw_only else prepare_behaviour
    run_command(parser, lambda: make(options.out, **log))


if __name__ == "__main__":
    main()
