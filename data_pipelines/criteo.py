"""Criteo Display logs -> encoded data set.

    python -m data_pipelines.criteo train.txt --out DIR
    python -m data_pipelines.criteo day_0.gz day_1.gz ... --out DIR --split last-day --encoding hash
    python -m data_pipelines.criteo log.parquet --out DIR --split time --fractions 8:1:1 --min-count 2 --numeric both

Raw files are tab-separated text (label, 13 integers, 26 strings, no header), plain or ``.gz``, one file or one a day,
or Parquet with columns ``label,I1..I13,C1..C26`` or ``label,int_0..int_12,cat_0..cat_25`` (TorchRec's names). Whatever
the input's names, features are called I1..I13 and C1..C26. Other Parquet columns are ignored, but ``day`` (integer)
gives the days of a log in one file, and ``true_probability`` (synthetic logs) is carried along; its AUC and log loss on
the test split become the manifest's ``optimum``.

Presets of the literature (all with ids by descending train count and one out-of-vocabulary id a feature):

- DLRM (arXiv:1906.00091): ``--split last-day --min-count 1 --numeric log1p``, days as files. Differs from the paper:
  its released code tests on the last day's first half and validates on the second; here validation comes first.
- Criteo_x4 of the public benchmarks: ``--split random --fractions 8:1:1 --min-count 10 --numeric bucket`` (or 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from data_pipelines.schema import CategoricalColumn, Encoding, LogSchema, NumericColumn, Transform
from data_pipelines.sources import ParquetFile, Source, check_days_ascend, is_parquet
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import TRUE_PROBABILITY, Manifest

LABEL = "label"
DAY = "day"
NUMERIC = tuple(f"I{number}" for number in range(1, 14))
CATEGORICAL = tuple(f"C{number}" for number in range(1, 27))
COLUMNS = (LABEL, *NUMERIC, *CATEGORICAL)
TORCHREC_NAMES = {
    **{name: f"int_{number}" for number, name in enumerate(NUMERIC)},
    **{name: f"cat_{number}" for number, name in enumerate(CATEGORICAL)},
}


def prepare(
    raw_paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    split: SplitRule | None = None,
    min_count: int | None = None,
    numeric: Transform = "log1p",
    encoding: Encoding = "vocabulary",
    overwrite: bool = False,
    workers: int | None = None,
    source_name: str = "criteo",
) -> Manifest:
    """Encode Criteo logs; see the module for what they may be and ``pipeline`` for memory.

    Args:
        raw_paths: files, for splits by time oldest first.
        out: directory to make.
        split: None: random 8:1:1.
        min_count: train rows a categorical value needs for an id of its own; None: 2. Buckets are exempt, hashed ids
            have no count.
        numeric: ``"log1p"``, ``"bucket"``, ``"both"`` or ``"none"`` for all of I1..I13.
        encoding: ``"vocabulary"`` or ``"hash"`` for all of C1..C26.
        overwrite: replace a data set that lies at ``out``.
        workers: threads; None: one a core.
        source_name: kind of log, for the manifest; synthetic logs of this shape say so.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: as ``pipeline.prepare_log``.
    """
    split = split or SplitRule()
    if min_count is None:
        min_count = DEFAULT_MIN_COUNT if encoding == "vocabulary" else 1
    paths = as_paths(raw_paths)
    if split.kind != "random":
        check_days_ascend(paths)
    present = _optional_columns(paths)
    schema = LogSchema(
        label=LABEL,
        numeric=tuple(NumericColumn(name, numeric) for name in NUMERIC),
        categorical=tuple(CategoricalColumn(name, encoding=encoding, min_count=min_count) for name in CATEGORICAL),
        day=DAY if DAY in present else None,
        extra=(TRUE_PROBABILITY,) if TRUE_PROBABILITY in present else (),
    )
    return prepare_log(
        [_source(path, schema) for path in paths],
        schema,
        out,
        source_name=source_name,
        split=split,
        overwrite=overwrite,
        workers=workers,
        options={"min_count": min_count, "numeric": numeric, "encoding": encoding},
    )


def _optional_columns(paths: Sequence[Path]) -> set[str]:
    """Which of ``day`` and ``true_probability`` the files have; all must have the same."""
    known = {DAY, TRUE_PROBABILITY}
    found = [ParquetFile(path, {}, {}).column_names & known if is_parquet(path) else set() for path in paths]
    for path, columns in zip(paths, found, strict=True):
        if columns != found[0]:
            raise ValueError(
                f"{path}: of {sorted(known)} it has {sorted(columns)}, but {paths[0]} has {sorted(found[0])}; "
                "all files of a log must have the same"
            )
    return found[0] if found else set()


def _source(path: Path, schema: LogSchema) -> Source:
    if not is_parquet(path):
        return DelimitedFile(path, COLUMNS, schema.requirements)
    names = ParquetFile(path, {}, {}).column_names
    renamed = TORCHREC_NAMES if "int_0" in names and NUMERIC[0] not in names else {}
    return ParquetFile(path, schema.requirements, renamed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m data_pipelines.criteo``."""
    parser = base_parser("data_pipelines.criteo", __doc__ or "", "raw files (.txt/.tsv, .gz or Parquet), oldest first")
    add_split_options(parser, "random")
    add_min_count_option(parser)
    parser.add_argument(
        "--numeric",
        choices=("log1p", "bucket", "both", "none"),
        default="log1p",
        help="log1p: log(1 + max(v, 0)); bucket: category floor(ln(v)^2); both; none: as it is (default: log1p)",
    )
    parser.add_argument(
        "--encoding",
        choices=("vocabulary", "hash"),
        default="vocabulary",
        help="vocabulary: ids by train frequency; hash: 64-bit hash of the value, no vocabulary (default: vocabulary)",
    )
    options = parser.parse_args(arguments)

    run_command(
        parser,
        lambda: prepare(
            options.raw,
            options.out,
            split=split_rule(options),
            min_count=options.min_count,
            numeric=options.numeric,
            encoding=options.encoding,
            overwrite=options.overwrite,
            workers=options.workers,
        ),
    )


if __name__ == "__main__":
    main()
