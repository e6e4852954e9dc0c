"""What a raw click log's columns are and what becomes of each: the input of every preparation.

The public pipelines (``criteo``, ``avazu``) build a LogSchema in code; ``parquet`` reads one from YAML.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Transform = Literal["none", "log1p", "bucket", "both"]
Encoding = Literal["vocabulary", "hash", "ids"]
Kind = Literal["single", "list", "sequence"]
TimeUnit = Literal["s", "ms", "us", "ns"]
# What a raw column must look like; sources check it before the first row is read.
Requirement = Literal["label", "numeric", "category", "ids", "list", "id list", "times", "time", "day", "any"]

BUCKET_SUFFIX = "_bucket"


@dataclass(frozen=True)
class NumericColumn:
    """One raw column of numbers.

    Args:
        name: its name in the log.
        transform: ``"none"``: float32 as it is, missing 0; ``"log1p"``: log(1 + max(v, 0)), missing 0, as DLRM does;
            ``"bucket"``: the category ``floor(ln(v)^2)`` for v > 2, else ``int(v)``, missing a category of its own, as
            the public Criteo benchmarks do (no numeric column is left); ``"both"``: log1p and, as feature
            ``<name>_bucket``, the category. ``"both"`` costs memory for a few hundred ids and helps small models.
    """

    name: str
    transform: Transform = "log1p"

    def __post_init__(self) -> None:
        _check_choice(self.name, "transform", self.transform, get_args(Transform))

    @property
    def keeps_number(self) -> bool:
        """Whether a float32 column comes out."""
        return self.transform != "bucket"

    @property
    def bucket_name(self) -> str | None:
        """Name of the category that comes out, None when there is none."""
        return {"bucket": self.name, "both": self.name + BUCKET_SUFFIX}.get(self.transform)


@dataclass(frozen=True)
class CategoricalColumn:
    """One raw column of values (strings or integers), or of lists of them.

    Args:
        name: its name in the log.
        kind: ``"single"``, ``"list"`` (a bag) or ``"sequence"`` (oldest to newest).
        table: name of the id space; columns of one table share values' ids (target item and history).
        encoding: ``"vocabulary"``: ids by descending train count, memory grows with distinct values; ``"hash"``: a
            portable 64-bit hash of the value, for unbounded ids (needs a method that hashes); ``"ids"``: the integers
            are ids already.
        min_count: train rows (entries, for lists) a value needs for an id of its own; rarer ones share id 0. 2 to 10
            is usual: a value seen once teaches its vector nothing that generalises.
        max_length: longest list kept, its latest entries; None keeps all.
        num_embeddings: for ``"ids"``: every id must be in [0, num_embeddings). For ``"hash"``: ids are the hash modulo
            this, so that tables of any method can hold them and values share rows by chance; None keeps 63 bits.
        events: for sequences: the list of events they describe (``"history"`` unless told). Sequences of one list are
            parallel, entry i of each belongs to event i; the preparation checks that they are equally long in every
            row.
        times: for sequences: raw list column with the time of every entry. It is checked and not kept: as long as the
            sequence, ascending, and before the row's own time (which the schema must name).
    """

    name: str
    kind: Kind = "single"
    table: str = ""
    encoding: Encoding = "vocabulary"
    min_count: int = 1
    max_length: int | None = None
    num_embeddings: int | None = None
    events: str = ""
    times: str | None = None

    def __post_init__(self) -> None:
        _check_choice(self.name, "kind", self.kind, get_args(Kind))
        _check_choice(self.name, "encoding", self.encoding, get_args(Encoding))
        if not self.table:
            object.__setattr__(self, "table", self.name)
        if "/" in self.table:
            raise ValueError(f"column {self.name!r}: the table names a file and must not hold '/', got {self.table!r}")
        if self.min_count < 1:
            raise ValueError(
                f"column {self.name!r}: min_count must be at least 1 (rows of train), got {self.min_count}"
            )
        if self.encoding != "vocabulary" and self.min_count > 1:
            raise ValueError(f"column {self.name!r}: min_count needs encoding 'vocabulary', got {self.encoding!r}")
        if self.max_length is not None and (self.kind == "single" or self.max_length < 1):
            raise ValueError(
                f"column {self.name!r}: max_length must be at least 1 and belongs to kind 'list' or 'sequence', "
                f"got {self.max_length} for kind {self.kind!r}"
            )
        if self.encoding == "ids" and self.num_embeddings is None:
            raise ValueError(f"column {self.name!r}: num_embeddings must be given for encoding 'ids'")
        if self.encoding == "vocabulary" and self.num_embeddings is not None:
            raise ValueError(
                f"column {self.name!r}: num_embeddings is for encodings 'ids' and 'hash', got 'vocabulary'"
            )
        if self.num_embeddings is not None and self.num_embeddings < 1:
            raise ValueError(f"column {self.name!r}: num_embeddings must be at least 1, got {self.num_embeddings}")
        if self.kind != "sequence" and (self.events or self.times is not None):
            raise ValueError(f"column {self.name!r}: events and times belong to kind 'sequence', got {self.kind!r}")
        if self.kind == "sequence" and not self.events:
            object.__setattr__(self, "events", "history")

    @property
    def requirement(self) -> Requirement:
        """What the raw column must hold."""
        if self.encoding == "ids":
            return "ids" if self.kind == "single" else "id list"
        return "category" if self.kind == "single" else "list"


@dataclass(frozen=True)
class LogSchema:
    """A click log.

    Args:
        label: column of 0/1 (integer, boolean or float).
        numeric, categorical: the columns to learn from, in the order models see them.
        user: column that groups impressions for GAUC (string or integer), carried as given.
        time: column that orders impressions (integer, date or timestamp), carried as given.
        time_unit: of an integer ``time`` column; days for ``last-day`` splits are UTC days.
        day: integer column whose largest value is the last day; carried as given. None: days come from ``time``.
        extra: further columns carried as given (slices, known probabilities).
        split: column that the split goes by: for kind ``"given"`` every row's split (0 train, 1 validation, 2 test);
            for ``"users"`` what makes a user, where that is not ``user``.
    """

    label: str
    numeric: tuple[NumericColumn, ...] = ()
    categorical: tuple[CategoricalColumn, ...] = ()
    user: str | None = None
    time: str | None = None
    time_unit: TimeUnit = "s"
    day: str | None = None
    extra: tuple[str, ...] = ()
    split: str | None = None

    def __post_init__(self) -> None:
        _check_choice(self.label, "time_unit", self.time_unit, get_args(TimeUnit))
        if not self.numeric and not self.categorical:
            raise ValueError("the schema names no feature: numeric or categorical columns are needed")
        names = self.output_names
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"columns {repeated} are named more than once; each column has one role")
        self._check_tables()
        self._check_sequences()

    def _check_tables(self) -> None:
        by_table: dict[str, CategoricalColumn] = {}
        for column in self.categorical:
            first = by_table.setdefault(column.table, column)
            for setting in ("encoding", "min_count", "num_embeddings"):
                if getattr(first, setting) != getattr(column, setting):
                    raise ValueError(
                        f"table {column.table!r}: {setting} must be the same for all its columns, got "
                        f"{getattr(first, setting)!r} for {first.name!r} and {getattr(column, setting)!r} "
                        f"for {column.name!r}"
                    )

    def _check_sequences(self) -> None:
        first: dict[str, CategoricalColumn] = {}
        for column in self.sequences:
            other = first.setdefault(column.events, column)
            if column.max_length != other.max_length:
                raise ValueError(
                    f"sequences {other.name!r} and {column.name!r} describe the same events {column.events!r}, so "
                    f"max_length must be the same, got {other.max_length} and {column.max_length}; name other events "
                    "where they are not parallel"
                )
            if column.times is not None and self.time is None:
                raise ValueError(f"sequence {column.name!r}: times {column.times!r} need the log's own time column")

    @property
    def sequences(self) -> tuple[CategoricalColumn, ...]:
        """The histories."""
        return tuple(column for column in self.categorical if column.kind == "sequence")

    @property
    def bucket_features(self) -> tuple[CategoricalColumn, ...]:
        """The categories made of numeric columns. Exempt from min_count: they are a few hundred."""
        names = [column.bucket_name for column in self.numeric]
        return tuple(CategoricalColumn(name) for name in names if name is not None)

    @property
    def features(self) -> tuple[CategoricalColumn, ...]:
        """All categorical features that come out, in manifest order: single and lists, buckets, then sequences."""
        plain = tuple(column for column in self.categorical if column.kind != "sequence")
        return plain + self.bucket_features + self.sequences

    @property
    def carried(self) -> tuple[str, ...]:
        """Columns that come out as they went in."""
        optional = tuple(name for name in (self.user, self.time, self.day) if name is not None)
        return tuple(dict.fromkeys(optional + self.extra))

    @property
    def output_names(self) -> list[str]:
        """Every column of the encoded data set."""
        numbers = [column.name for column in self.numeric if column.keeps_number]
        return [self.label, *numbers, *(feature.name for feature in self.features), *self.carried]

    @property
    def requirements(self) -> dict[str, Requirement]:
        """Raw columns to read, and what each must look like."""
        needed: dict[str, Requirement] = dict.fromkeys(self.extra, "any")
        if self.user is not None:
            needed[self.user] = "category"
        if self.time is not None:
            needed[self.time] = "time"
        if self.day is not None:
            needed[self.day] = "day"
        if self.split is not None:
            needed.setdefault(self.split, "any")
        needed |= {column.times: "times" for column in self.sequences if column.times is not None}
        needed |= {column.name: "numeric" for column in self.numeric}
        needed |= {column.name: column.requirement for column in self.categorical}
        return {self.label: "label", **needed}


def _check_choice(owner: str, setting: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"column {owner!r}: {setting} must be one of {list(choices)}, got {value!r}")
