"""Anybody's click log in Parquet -> encoded data set, told by a schema.yaml what its columns are.

    python -m data_pipelines.parquet log-1.parquet log-2.parquet --schema schema.yaml --out DIR

A schema, with everything that may stand in it:

    label: clicked                # 0/1: integer, boolean or float; the only key that must be there, beside a feature
    numeric:                      # a name, or a mapping with a name
      - price                     # transform: the default below
      - {name: age, transform: bucket}
    categorical:                  # strings or integers; null is a value like any other
      - site
      - {name: item, min_count: 5}
      - {name: tags, kind: list, max_length: 20}            # a list column: a bag of values
      - {name: campaign, encoding: hash}                    # num_embeddings: 100_000 takes the hash modulo that
      - {name: hour, encoding: ids, num_embeddings: 24}     # integers that are ids already, checked
    sequences:                    # list columns, oldest entry first; max_length keeps the latest
      - {name: history, table: item, max_length: 50}        # shares the ids, and the settings, of `item`
      - {name: past_sites, table: site, max_length: 50, times: past_times}     # times: checked to lie before `time`
    user: user_id                 # groups impressions for GAUC; string or integer, carried as given
    time: {column: shown_at, unit: s}   # integer with unit s, ms, us or ns; or `time: shown_at` for a date or timestamp
    day: shown_on                 # integer days for last-day splits, where `time` is not there
    extra: [country]              # carried as given, e.g. for metrics by slice
    defaults: {transform: log1p, min_count: 1, encoding: vocabulary}     # of columns that do not say
    split: {kind: time, fractions: [8, 1, 1]}      # or random (with seed; 8:1:1 when not told), last-day, users

What the settings mean and how to choose them: ``schema.NumericColumn``, ``schema.CategoricalColumn``,
``splitting.SplitRule``. Features of one ``table`` share one vocabulary, whose counts are over all of them. Columns that
the schema does not name are ignored.

A history holds what was known when its row was shown, never the row's own event. Divided at random, histories of train
rows would hold what test rows ask for: with sequences the split is by time unless told, by users where there is neither
time nor day, and random is refused. Sequences are parallel (entry i of
each belongs to event i) unless their ``events`` differ; they must be equally long in every row, and an empty history is
an empty list, not null. With ``times``, the name of a list column with the entries' times, each row is checked: times
ascend and lie before the row's time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data_pipelines.command import as_paths, base_parser, run_command
from data_pipelines.pipeline import prepare_log
from data_pipelines.schema import CategoricalColumn, LogSchema, NumericColumn
from data_pipelines.sources import ParquetFile, check_days_ascend
from data_pipelines.splitting import SplitKind, SplitRule
from recemb.data.manifest import Manifest

_KEYS = ("label", "numeric", "categorical", "sequences", "user", "time", "day", "extra", "defaults", "split")
_NUMERIC_KEYS = ("name", "transform")
_CATEGORICAL_KEYS = ("name", "kind", "table", "encoding", "min_count", "max_length", "num_embeddings")
_SEQUENCE_KEYS = (*(key for key in _CATEGORICAL_KEYS if key != "kind"), "events", "times")
_DEFAULT_KEYS = ("transform", "min_count", "encoding")


def prepare(
    raw_paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    schema: str | Path | LogSchema,
    split: SplitRule | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Encode a click log; see ``pipeline`` for memory.

    Args:
        raw_paths: Parquet files, for splits by the order of rows oldest first.
        out: directory to make.
        schema: a schema.yaml, or the schema itself.
        split: None: the schema's, or 8:1:1: random; for histories by time, or users where rows have no time.
        overwrite: replace a data set that lies at ``out``.
        workers: threads; None: one a core.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: as ``pipeline.prepare_log``; ValueError for a schema
            that is not as the module says.
    """
    options: dict[str, Any] = {}
    if not isinstance(schema, LogSchema):
        options["schema"] = str(schema)
        schema, schema_split = read_schema(schema)
        split = split or schema_split
    split = split or SplitRule(_default_split(schema))
    paths = as_paths(raw_paths)
    if split.kind in ("time", "last-day") and schema.time is None and schema.day is None:
        check_days_ascend(paths)
    return prepare_log(
        [ParquetFile(path, schema.requirements, {}) for path in paths],
        schema,
        out,
        source_name="parquet",
        split=split,
        overwrite=overwrite,
        workers=workers,
        options=options,
    )


def read_schema(path: str | Path) -> tuple[LogSchema, SplitRule | None]:
    """Read a schema.yaml: the log's columns, and its split where it names one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a key that is unknown or has the wrong type, or a setting that makes no sense; with the
            file and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such schema file")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    try:
        schema = _schema(content)
        return schema, _split(content.get("split"), _default_split(schema))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _schema(content: Any) -> LogSchema:
    fields = _mapping(content, "the schema", _KEYS)
    if "label" not in fields:
        raise ValueError("key 'label' is required: the name of the 0/1 column")
    defaults = _mapping(fields.get("defaults") or {}, "defaults", _DEFAULT_KEYS)
    _check_types(defaults, "defaults")
    transform = {"transform": defaults.pop("transform")} if "transform" in defaults else {}
    time = fields.get("time")
    time = _mapping(time, "time", ("column", "unit")) if isinstance(time, Mapping) else {"column": time}
    return LogSchema(
        label=_text(fields["label"], "label"),
        numeric=tuple(
            NumericColumn(**{**transform, **_column(item, "numeric", _NUMERIC_KEYS)})
            for item in _sequence(fields.get("numeric"), "numeric")
        ),
        categorical=_categorical(fields, defaults),
        user=_optional_text(fields.get("user"), "user"),
        time=_optional_text(time.get("column"), "time"),
        time_unit=time.get("unit", "s"),
        day=_optional_text(fields.get("day"), "day"),
        extra=tuple(_text(item, "extra") for item in _sequence(fields.get("extra"), "extra")),
    )


def _categorical(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[CategoricalColumn, ...]:
    """Categorical and sequence columns; what one does not say it takes from its table's column, then the defaults."""
    columns = [
        _column(item, "categorical", _CATEGORICAL_KEYS) for item in _sequence(fields.get("categorical"), "categorical")
    ] + [
        {**_column(item, "sequences", _SEQUENCE_KEYS), "kind": "sequence"}
        for item in _sequence(fields.get("sequences"), "sequences")
    ]
    by_name = {settings["name"]: settings for settings in columns}
    merged = []
    for settings in columns:
        owner: dict[str, Any] = by_name.get(settings.get("table", ""), {})
        own = {
            key: value for key, value in owner.items() if key in ("encoding", "min_count", "num_embeddings")
        } | settings
        general: dict[str, Any] = dict(defaults)
        if own.get("encoding", general.get("encoding", "vocabulary")) != "vocabulary":
            # The default is meant for vocabularies; only one given to this column is an error.
            general.pop("min_count", None)
        merged.append(CategoricalColumn(**{**general, **own}))
    return tuple(merged)


def _default_split(schema: LogSchema) -> SplitKind:
    """Random, unless there are histories, which must not hold what test rows ask for."""
    if not schema.sequences:
        return "random"
    if schema.time is not None or schema.day is not None:
        return "time"
    # Without users either, rows may or may not be in the order of time: random is refused with the choices there are.
    return "random" if schema.user is None else "users"


def _split(content: Any, default: SplitKind) -> SplitRule | None:
    if content is None:
        return None
    fields = _mapping(content, "split", ("kind", "fractions", "seed"))
    shares = fields.get("fractions")
    if shares is not None:
        shares = _sequence(shares, "split: fractions")
        if len(shares) != 3 or not all(isinstance(part, int | float) for part in shares):
            raise ValueError(f"split: fractions must be three numbers like [8, 1, 1], got {shares}")
        shares = (float(shares[0]), float(shares[1]), float(shares[2]))
    seed = fields.get("seed")
    if seed is not None and not isinstance(seed, int):
        raise ValueError(f"split: seed must be an integer, got {seed!r}")
    return SplitRule.of(fields.get("kind", default), shares, seed)


def _column(item: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """One entry of a list of columns: a name, or a mapping with one."""
    settings = {"name": item} if isinstance(item, str) else _mapping(item, where, keys)
    name = _text(settings.get("name"), f"{where}: name")
    _check_types(settings, f"{where}: column {name!r}")
    return settings


def _check_types(settings: Mapping[str, Any], where: str) -> None:
    for key, value in settings.items():
        wanted = int if key in ("min_count", "max_length", "num_embeddings") else str
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be of type {wanted.__name__}, got {value!r}")


def _mapping(content: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping with keys of {list(keys)}, got {content!r}")
    if unknown := [key for key in content if key not in keys]:
        raise ValueError(f"{where}: unknown keys {unknown}; known are {list(keys)}")
    return dict(content)


def _sequence(content: Any, where: str) -> list[Any]:
    if content is None:
        return []
    if not isinstance(content, list):
        raise ValueError(f"{where} must be a list, got {content!r}")
    return content


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be the name of a column, got {value!r}")
    return value


def _optional_text(value: Any, where: str) -> str | None:
    return None if value is None else _text(value, where)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m data_pipelines.parquet``."""
    parser = base_parser("data_pipelines.parquet", __doc__ or "", "Parquet files, oldest first")
    parser.add_argument("--schema", required=True, type=Path, metavar="YAML", help="what the columns are; see above")
    options = parser.parse_args(arguments)
    run_command(
        parser,
        lambda: prepare(
            options.raw,
            options.out,
            schema=options.schema,
            overwrite=options.overwrite,
            workers=options.workers,
        ),
    )


if __name__ == "__main__":
    main()
