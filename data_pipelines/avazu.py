"""Avazu click logs -> encoded data set.

    python -m data_pipelines.avazu train.csv.gz --out DIR
    python -m data_pipelines.avazu train.csv --out DIR --split last-day --min-count 2

Raw files are the competition's 24 columns (``id,click,hour,C1,banner_pos,site_id,...,C14..C21``) as comma-separated
text with a header, plain or ``.gz``, or Parquet. As in the public benchmarks, ``id`` (one a row) is dropped and
``hour`` (YYMMDDHH) becomes three categories: ``hour`` (0..23), ``weekday`` (0 Monday..6) and ``is_weekend``; the other
21 columns are categories as they are. ``timestamp`` (seconds, UTC) is carried along and orders the log for splits by
time.

Avazu_x4 of the public benchmarks: ``--split random --fractions 8:1:1 --min-count 2`` (or 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipelines.command import (
    DEFAULT_MIN_COUNT,
    add_min_count_option,
    add_split_options,
    as_paths,
    base_parser,
    run_command,
    split_rule,
)
from data_pipelines.delimited import DelimitedFile
from data_pipelines.pipeline import prepare_log
from data_pipelines.schema import CategoricalColumn, LogSchema, Requirement
from data_pipelines.sources import LazyBatch, ParquetFile, RowError, Source, is_parquet
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import Manifest

LABEL = "click"
RAW_HOUR = "hour"
TIMESTAMP = "timestamp"
CATEGORICAL = (
    *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{number}" for number in range(14, 22)),
)
COLUMNS = ("id", LABEL, RAW_HOUR, *CATEGORICAL)
TIME_FEATURES = ("hour", "weekday", "is_weekend")
_SECONDS_PER_HOUR = 3600


def prepare(
    raw_paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    split: SplitRule | None = None,
    min_count: int = DEFAULT_MIN_COUNT,
    overwrite: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Encode Avazu logs; see the module for what they may be and ``pipeline`` for memory.

    Args:
        raw_paths: files.
        out: directory to make.
        split: None: random 8:1:1.
        min_count: train rows a value needs for an id of its own.
        overwrite: replace a data set that lies at ``out``.
        workers: threads; None: one a core.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: as ``pipeline.prepare_log``.
    """
    required: dict[str, Requirement] = {LABEL: "label", RAW_HOUR: "category"}
    required |= dict.fromkeys(CATEGORICAL, "category")
    names = (TIME_FEATURES[0], *CATEGORICAL, *TIME_FEATURES[1:])
    schema = LogSchema(
        label=LABEL,
        categorical=tuple(CategoricalColumn(name, min_count=min_count) for name in names),
        time=TIMESTAMP,
    )
    sources = [
        HourSplit(ParquetFile(path, required, {}) if is_parquet(path) else DelimitedFile(path, (), required, ",", True))
        for path in as_paths(raw_paths)
    ]
    return prepare_log(
        sources,
        schema,
        out,
        source_name="avazu",
        split=split or SplitRule(),
        overwrite=overwrite,
        workers=workers,
        options={"min_count": min_count},
    )


@dataclass(frozen=True)
class HourSplit:
    """A source of raw Avazu rows with ``hour`` (YYMMDDHH) replaced by TIME_FEATURES and ``timestamp``."""

    source: Source

    @property
    def path(self) -> Path:
        """The file."""
        return self.source.path

    def check(self) -> None:
        """As the raw source's."""
        self.source.check()

    def place(self, row: int) -> str:
        """As the raw source's."""
        return self.source.place(row)

    def batches(self) -> Iterator[LazyBatch]:
        """Its rows in order."""
        return (partial(split_hours, load) for load in self.source.batches())


def split_hours(load: LazyBatch) -> pa.Table:
    """Raw rows -> the same with RAW_HOUR replaced by TIME_FEATURES and TIMESTAMP.

    Raises:
        RowError: an hour that is not YYMMDDHH.
    """
    table = load()
    columns = dict(zip(table.column_names, table.columns, strict=True))
    encoded = columns.pop(RAW_HOUR).combine_chunks()
    encoded = encoded if pa.types.is_dictionary(encoded.type) else encoded.dictionary_encode()
    indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    hours, wrong = parse_hours([str(value) for value in encoded.dictionary.to_pylist()])
    # A missing hour's index is -1, which picks the last entry.
    faulty = np.append(wrong, True)[indices]
    if faulty.any():
        first = int(faulty.argmax())
        raise RowError(first, f"column {RAW_HOUR!r}: YYMMDDHH is required, got {encoded[first].as_py()!r}")
    since_epoch = hours[indices]
    weekday = (since_epoch // 24 + 3) % 7  # 1970-01-01 was a Thursday.
    columns |= {
        "hour": pa.array(since_epoch % 24),
        "weekday": pa.array(weekday),
        "is_weekend": pa.array((weekday >= 5).astype(np.int64)),
        TIMESTAMP: pa.array(since_epoch * _SECONDS_PER_HOUR),
    }
    return pa.table(columns)


def parse_hours(texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(N,) YYMMDDHH -> (N,) int64 hours since 1970-01-01T00Z, and (N,) bool where a text is none (hours there 0)."""
    hours = np.zeros(len(texts), np.int64)
    wrong = np.zeros(len(texts), bool)
    for index, text in enumerate(texts):
        try:
            if len(text) != 8 or not text.isdecimal():
                raise ValueError(text)
            moment = np.datetime64(f"20{text[:2]}-{text[2:4]}-{text[4:6]}T{text[6:]}", "h")
            hours[index] = moment.astype(np.int64)
        except ValueError:
            wrong[index] = True
    return hours, wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m data_pipelines.avazu``."""
    parser = base_parser("data_pipelines.avazu", __doc__ or "", "raw files (.csv, .gz or Parquet)")
    add_split_options(parser, "random")
    add_min_count_option(parser)
    options = parser.parse_args(arguments)
    run_command(
        parser,
        lambda: prepare(
            options.raw,
            options.out,
            split=split_rule(options),
            min_count=DEFAULT_MIN_COUNT if options.min_count is None else options.min_count,
            overwrite=options.overwrite,
            workers=options.workers,
        ),
    )


if __name__ == "__main__":
    main()
