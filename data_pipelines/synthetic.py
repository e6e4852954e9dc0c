"""A Criteo-shaped click log of any size whose best possible model is known.

    python -m data_pipelines.synthetic --rows 1000000 --out data/synthetic      encoded, ready for training
    python -m data_pipelines.synthetic --rows 5000000 --out log.tsv --tsv       raw, as Criteo ships it
    python -m data_pipelines.synthetic --rows 5000000 --out log.parquet --raw-only

The model of row r, at time t = (r + 1/2) / rows
-------------------------------------------------
*Categories.* C1..C26 have Criteo's cardinalities: a column of more than ``floor = min(20,000, total_ids / 50)`` values
gets Criteo's number times one common scale (at least ``floor``), so that all sum to ``total_ids``; smaller ones keep
theirs. In column f, slot k (popularity rank, from 0) has a probability proportional to the integral of ``x^-s`` over
``[k + q, k + q + 1)``: Zipf-Mandelbrot, with s = 1.1 and q = 1 to 3 in the largest columns, s = 2 and q = 1 (half of
all rows have one value) in C1. A slot of rank 20 or more, in a column of 1,000 or more, is taken over by a *new id*
with probability 0.25, at a uniform moment of the log. The raw value is a bijective 32-bit scramble of both,
written as 8 hexadecimal digits, so neither rank nor age shows. Nulls come in Criteo's shares and groups (C3, C4, C12,
C16, C21, C24 together in 3.9% of rows, ...) and count as one more value.

*Numbers.* ``min + floor(exp(m_j + s_j * logistic))``: heavy-tailed counts up to Criteo's maximum, with nulls.

*Click.* label ~ Bernoulli(p), logit(p) = c + B * bias + G * interaction + H * numeric, where

    bias        = sum over columns f of     w_f * v_f[0]
    interaction = sum over pairs (f, g) of  v_f[0] * v_g[0] + 0.49 * v_f[1] * v_g[1]
    numeric     = sum over columns j of     a_j * sin(0.7 * (log(1 + max(x_j, 0)) - m_j) / s_j + phase_j)
    v_f(id)     = u_f(id) / sqrt(1 + k / 300)

The pairs are C3 x C2, C12 x C14, C7 x C10 and C4 x C1. u_f(id) has 2 dimensions, each uniform of mean 0 and variance 1,
and is a hash of (seed, f, id). A null number contributes a constant of its column. B, G and H give the three parts
standard deviations of 1.2, 0.9 and 0.7 over rows and c gives a click rate of 25%; all four are found on 65,536 pilot
rows. One latent coordinate serves as bias and in the products: effects that interact are mostly strong ones. Weights
w_f, a_j and all popularities are in ``synthetic_shape``, the formulas as code in ``synthetic_model``.

The ceiling
-----------
``true_probability`` holds p, and the manifest's ``optimum`` its AUC and log loss on the test split: the Bayes optimum,
about 0.84 and 0.41. It knows the parameters of every id, *also of those that training never saw*, so no model reaches
it from finite data. How close full and compressed tables come is measured in ``experiments/synthetic``: .8072 and, at a
tenth and a hundredth of the bytes, .8046 and .7895 of .8376.

Unlike a real log, columns are independent given the null pattern: there is no redundancy between tables to exploit.
Judge methods that live on such redundancy on real data.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines import criteo
from data_pipelines.command import run_command
from data_pipelines.made_once import make_once
from data_pipelines.splitting import SplitRule
from data_pipelines.synthetic_log import default_total_ids, generate
from recemb.data.manifest import Manifest

__all__ = ["generate", "main", "prepare_synthetic"]

logger = logging.getLogger(__name__)

SOURCE = "synthetic"
# Raised with every change of the click model, so that an older log is never taken for one of today's.
MODEL_VERSION = 1
BY_TIME = SplitRule(kind="time")


def prepare_synthetic(
    out: str | Path,
    *,
    rows: int = 1_000_000,
    seed: int = 0,
    total_ids: int | None = None,
    days: int = 7,
    split: SplitRule = BY_TIME,
    min_count: int = 2,
) -> Manifest:
    """Make the encoded data set ``out`` from a synthetic log, or reuse the one there if made with equal options.

    Args:
        out: directory of the data set. The raw log lies inside the unfinished directory while it is encoded: 55 bytes a
            row.
        rows, seed, total_ids, days: see ``synthetic_log.generate``.
        split: unless told otherwise the oldest 80% train, the next 10% validate and the newest 10% test, so that models
            meet ids that are new since training, as in production.
        min_count: train rows a value needs to get an id of its own.

    Raises:
        ValueError: ``out`` holds another data set, or one made with other options (each is named).
        FileExistsError: ``out`` is no data set.
    """
    options: dict[str, Any] = {
        "version": MODEL_VERSION,
        "rows": rows,
        "seed": seed,
        "total_ids": default_total_ids(rows) if total_ids is None else total_ids,
        "days": days,
        "split": {**dataclasses.asdict(split), "fractions": list(split.fractions)},
        "min_count": min_count,
    }

    def make(scratch: Path, encoded: Path) -> Manifest:
        raw = generate(scratch / "raw.parquet", rows=rows, seed=seed, total_ids=options["total_ids"], days=days)
        logger.info("made a synthetic log of %d rows; encoding it", rows)
        return criteo.prepare([raw], encoded, split=split, min_count=min_count, source_name=SOURCE)

    return make_once(out, SOURCE, options, make)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m data_pipelines.synthetic``."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.synthetic",
        description="A Criteo-shaped click log whose best possible AUC and log loss are known.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory; file with --raw-only or --tsv")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of all splits together")
    parser.add_argument("--seed", type=int, default=0, help="of every value of the log")
    parser.add_argument("--total-ids", type=int, help="ids alive at one moment; as many as rows when not given")
    parser.add_argument("--days", type=int, default=7, help="days the rows are spread over")
    parser.add_argument("--min-count", type=int, default=2, help="train rows a value needs for an id of its own")
    raw = parser.add_mutually_exclusive_group()
    raw.add_argument("--raw-only", action="store_true", help="write the raw log as one Parquet file")
    raw.add_argument("--tsv", action="store_true", help="write the raw log as Criteo's 40-column TSV")
    options = parser.parse_args(arguments)
    log = {"rows": options.rows, "seed": options.seed, "total_ids": options.total_ids, "days": options.days}
    if options.raw_only or options.tsv:
        run_command(parser, lambda: generate(options.out, **log, format="tsv" if options.tsv else "parquet"))
    else:
        run_command(parser, lambda: prepare_synthetic(options.out, **log, min_count=options.min_count))


if __name__ == "__main__":
    main()
