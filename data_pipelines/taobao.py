"""Taobao display ads with their users' behaviour log (Ali_Display_Ad_Click) -> encoded data set.

    python -m data_pipelines.taobao FOLDER --out DIR
    python -m data_pipelines.taobao FOLDER --out DIR --split time --fractions 7:0.5:0.5 --max-history 50 --min-count 10

FOLDER holds the four files as published, each ``.csv`` or ``.csv.gz``: ``raw_sample`` (impressions), ``ad_feature``,
``user_profile`` and ``behavior_log``; an empty cell or ``NULL`` is a missing value.

One row an impression, label ``clk``. Features: ``userid``, the profile's columns, ``pid``, ``adgroup_id``, ``cate_id``,
``campaign_id``, ``customer``, ``brand``, ``btag`` and ``price`` (number). Three parallel histories: ``cate_history``
and ``brand_history`` share the tables of the ad's ``cate_id`` and ``brand``, ``btag_history`` (pv, cart, fav, buy) that
of ``btag``, which is ``pv`` in every impression: what a history's last event would be if it were the impression.

A history holds the user's latest events of the behaviour log at a time strictly before the impression's; events of its
second are left out. Users without a profile and ads without features have missing values (counted in the manifest).

Split: by last day (UTC), as the public benchmarks: seven days train, the eighth validates and tests in halves; by time;
or by users. TaobaoAd_x1 of the benchmarks: ``--min-count 10 --max-history 50``, tested on the whole last day.

Memory: ads (about 100 bytes each) and users' profiles (60 bytes), and one bucket of two million events, about 500 MB;
the behaviour log lies beside the result in buckets of users, 32 bytes an event (23 GB for its 723 million).
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.command import (
    DEFAULT_MIN_COUNT,
    add_min_count_option,
    add_split_options,
    base_parser,
    run_command,
    split_rule,
)
from data_pipelines.delimited import DelimitedFile
from data_pipelines.event_store import EventStore, buckets_for, estimated_rows, no_nulls, read_checked
from data_pipelines.histories import (
    DEFAULT_MAX_HISTORY,
    BucketRows,
    History,
    HistorySource,
    check_max_history,
    encoded,
    past,
    rows_per_batch,
    user_numbers,
)
from data_pipelines.pipeline import prepare_log
from data_pipelines.schema import CategoricalColumn, LogSchema, NumericColumn, Requirement
from data_pipelines.sources import RowError
from data_pipelines.splitting import SplitRule
from data_pipelines.workspace import staged
from recemb.data.manifest import Manifest

logger = logging.getLogger(__name__)

LABEL = "clk"
PROFILE = (
    *("cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation"),
    # The published header has a space after this name.
    "new_user_class_level",
)
AD = ("cate_id", "campaign_id", "customer", "brand")
HISTORIES = {"cate_history": "cate_id", "brand_history": "brand", "btag_history": "btag"}
BEHAVIOURS = ("pv", "cart", "fav", "buy")
_IMPRESSIONS: dict[str, Requirement] = {
    **{"user": "ids", "time_stamp": "time", "adgroup_id": "ids"},
    **{"pid": "category", "nonclk": "label", "clk": "label"},
}
_EVENTS: dict[str, Requirement] = {
    **{"user": "ids", "time_stamp": "time", "btag": "category", "cate": "category", "brand": "category"}
}
_BYTES_PER_EVENT = 32
_NULL = "NULL"


@dataclass(frozen=True)
class Files:
    """The four files of the data set."""

    impressions: Path
    ads: Path
    users: Path
    behaviour: Path

    @classmethod
    def of(cls, folder: Path) -> Files:
        """FileNotFoundError with the names that are required when one is missing."""

        def find(name: str) -> Path:
            for suffix in (".csv", ".csv.gz"):
                if (folder / (name + suffix)).is_file():
                    return folder / (name + suffix)
            raise FileNotFoundError(f"{folder}: {name}.csv or {name}.csv.gz is required")

        return cls(*(find(name) for name in ("raw_sample", "ad_feature", "user_profile", "behavior_log")))


def prepare(
    folder: str | Path,
    out: str | Path,
    *,
    split: SplitRule | None = None,
    max_history: int = DEFAULT_MAX_HISTORY,
    min_count: int = DEFAULT_MIN_COUNT,
    overwrite: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Encode the data set; see the module.

    Args:
        folder: with the four files.
        out: directory to make.
        split: None: last day.
        max_history: events of a history, the latest.
        min_count: train occurrences (impressions and histories) a value needs for an id of its own.
        overwrite: replace a data set that lies at ``out``.
        workers: threads; None: one a core.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: as ``pipeline.prepare_log``; ValueError with the line
            of a file that is not as published.
    """
    check_max_history(max_history)
    split = split or SplitRule("last-day")
    if split.kind not in ("last-day", "time", "users"):
        raise ValueError(f"split: one of ['last-day', 'time', 'users'] keeps the future out, got {split.kind!r}")
    files = Files.of(Path(folder))
    log = _Log(files, max_history, _read_side(files.ads, "adgroup_id", AD), _read_side(files.users, "userid", PROFILE))
    with staged(Path(out), overwrite=overwrite) as (scratch, encoded_folder):
        stores = log.fill(scratch)
        source = HistorySource(
            files.impressions,
            stores[0].num_buckets,
            partial(log.rows, *stores),
            rows_per_batch=rows_per_batch(max_history),
        )
        manifest = prepare_log(
            [source],
            _schema(max_history, min_count),
            encoded_folder,
            source_name="taobao",
            split=split,
            workers=workers,
            options={
                "max_history": max_history,
                "min_count": min_count,
                "files": [str(path) for path in dataclasses.astuple(files)],
                "counts": dict(log.counts),
            },
        )
    return dataclasses.replace(manifest, root=Path(out))


def _schema(max_history: int, min_count: int) -> LogSchema:
    plain = partial(CategoricalColumn, min_count=min_count)
    return LogSchema(
        label=LABEL,
        numeric=(NumericColumn("price"),),
        categorical=(
            *(plain(name) for name in ("userid", *PROFILE, "pid", "adgroup_id", *AD, "btag")),
            *(plain(name, kind="sequence", table=table, max_length=max_history) for name, table in HISTORIES.items()),
        ),
        user="user",
        time="time_stamp",
    )


@dataclass(frozen=True)
class _Log:
    """Impressions and behaviour, with what is known of ads and users."""

    files: Files
    max_history: int
    ads: pa.Table
    users: pa.Table
    counts: Counter[str] = field(default_factory=Counter)

    def fill(self, scratch: Path) -> tuple[EventStore, EventStore]:
        """Read impressions and behaviour once, check them, and put both into buckets of users."""
        files = self.files
        num_events = sum(estimated_rows(path, _BYTES_PER_EVENT) for path in (files.impressions, files.behaviour))
        num_buckets = buckets_for(num_events // 2)
        stores = tuple(EventStore(scratch / name, "user", num_buckets) for name in ("impressions", "behaviour"))
        for store, path, columns, check in (
            (stores[0], files.impressions, _IMPRESSIONS, self._impressions),
            (stores[1], files.behaviour, _EVENTS, self._behaviour),
        ):
            logger.info("reading %s", path)
            for events in read_checked(DelimitedFile(path, (), columns, ",", header=True), check):
                store.add(events)
            store.close()
        return stores[0], stores[1]

    def _impressions(self, raw: pa.Table) -> pa.Table:
        no_nulls(raw, list(_IMPRESSIONS))
        clicks, others = raw["clk"].to_numpy(), raw["nonclk"].to_numpy()
        if (wrong := (clicks + others != 1) | (clicks * others != 0)).any():
            row = int(wrong.argmax())
            raise RowError(
                row, f"columns 'clk' and 'nonclk': one is 1 and the other 0, got {clicks[row]} and {others[row]}"
            )
        for name, key, known in (("ads", "adgroup_id", self.ads), ("users", "user", self.users)):
            unknown = pc.invert(pc.is_in(raw[key], known["key"].combine_chunks()))
            self.counts[f"impressions whose {name} are not described"] += pc.sum(unknown).as_py() or 0
        return raw.select(["user", "time_stamp", "adgroup_id", "pid", "clk"])

    def _behaviour(self, raw: pa.Table) -> pa.Table:
        no_nulls(raw, ["user", "time_stamp", "btag"])
        wrong = pc.invert(pc.is_in(raw["btag"], pa.array(BEHAVIOURS)))
        if (row := wrong.index(True).as_py()) >= 0:
            raise RowError(
                row, f"column 'btag': one of {list(BEHAVIOURS)} is required, got {raw['btag'][row].as_py()!r}"
            )
        self.counts["events of behaviour"] += len(raw)
        # A byte in place of a text: the log has 723 million events.
        kinds = pc.index_in(raw["btag"], pa.array(BEHAVIOURS)).cast(pa.int8())
        columns = {"user": raw["user"], "time_stamp": raw["time_stamp"], "btag": kinds}
        return pa.table(columns | {name: _without_null(raw[name]) for name in ("cate", "brand")})

    def rows(self, impressions: EventStore, behaviour: EventStore, bucket: int) -> BucketRows | None:
        """The impressions of one bucket of users, by user, then time."""
        shown = impressions.read(bucket)
        if shown is None:
            return None
        events = behaviour.read(bucket)
        if events is None:
            names = {"user": pa.int64(), "time_stamp": pa.int64(), "btag": pa.int8()}
            events = pa.schema(names | {"cate": pa.string(), "brand": pa.string()}).empty_table()
        users, event_users = user_numbers(shown["user"], events["user"])
        order = np.lexsort((shown["time_stamp"].to_numpy(), users))
        shown, users = shown.take(pa.array(order)), users[order]
        order = np.lexsort((events["time_stamp"].to_numpy(), event_users))
        events, event_users = events.take(pa.array(order)), event_users[order]
        times = (events["time_stamp"].to_numpy(), shown["time_stamp"].to_numpy())
        starts, ends = past(event_users, times[0], users, times[1], self.max_history)
        kinds = pa.DictionaryArray.from_arrays(events["btag"].combine_chunks(), pa.array(BEHAVIOURS))
        columns = {
            "cate_history": encoded(events["cate"]),
            "brand_history": encoded(events["brand"]),
            "btag_history": kinds,
        }
        return BucketRows(self._table(shown), History(starts, ends, columns))

    def _table(self, shown: pa.Table) -> pa.Table:
        columns = {
            LABEL: shown["clk"],
            "user": shown["user"],
            "time_stamp": shown["time_stamp"],
            "userid": shown["user"],
            "adgroup_id": shown["adgroup_id"],
            "pid": encoded(shown["pid"]),
            "btag": pa.array(np.full(len(shown), "pv")).dictionary_encode(),
        }
        for side, key in ((self.ads, "adgroup_id"), (self.users, "user")):
            places = pc.index_in(shown[key].combine_chunks(), side["key"].combine_chunks())
            for name in side.column_names[1:]:
                columns[name] = side[name].combine_chunks().take(places)
        return pa.table(columns)


def _without_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(column, _NULL), pa.scalar(None, pa.string()), column)


def _read_side(path: Path, key: str, names: Sequence[str]) -> pa.Table:
    """A file of ads or users: ``key`` int64, its columns as dictionaries of texts, and for ads ``price`` float64."""
    # The header is published with a space after a name.
    spaced = _spaced_names(path, names)
    numbers = ("price",) if key == "adgroup_id" else ()
    required: dict[str, Requirement] = {key: "ids", **dict.fromkeys((*spaced, *numbers), "category")}
    file = DelimitedFile(path, (), required, ",", header=True)
    table = pa.concat_tables(list(read_checked(file, partial(_side, key, numbers)))).combine_chunks()
    table = table.rename_columns(["key", *names, *numbers])
    counts = pc.value_counts(table["key"])
    if len(counts) != len(table):
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        raise ValueError(f"{path}: column {key!r}: {repeated.field('values')[0].as_py()} is listed more than once")
    return pa.table(
        {
            name: encoded(column) if pa.types.is_string(column.type) else column
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
    )


def _spaced_names(path: Path, names: Sequence[str]) -> list[str]:
    header = DelimitedFile(path, (), {}, ",", header=True)
    header.check()
    by_name = {name.strip(): name for name in header.names()}
    return [by_name.get(name, name) for name in names]


def _side(key: str, numbers: Sequence[str], raw: pa.Table) -> pa.Table:
    no_nulls(raw, [key])
    columns = {}
    for name in raw.column_names:
        columns[name] = raw[name] if name == key else _without_null(raw[name])
        if name in numbers:
            columns[name] = _as_number(name, columns[name])
    return pa.table(columns)


def _as_number(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        pass
    for row, text in enumerate(column.to_pylist()):
        try:
            float(text or 0)
        except ValueError:
            raise RowError(row, f"column {name!r}: a number or nothing is required, got {text!r}") from None
    raise AssertionError(f"a text of {name} that is no number was not found again")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m data_pipelines.taobao``."""
    parser = base_parser("data_pipelines.taobao", __doc__ or "", "folder with the four files", 1)
    parser.add_argument("--max-history", type=int, default=DEFAULT_MAX_HISTORY, help="latest events (default: 50)")
    add_split_options(parser, "last-day", ("last-day", "time", "users"))
    add_min_count_option(parser)
    options = parser.parse_args(arguments)
    run_command(
        parser,
        lambda: prepare(
            options.raw[0],
            options.out,
            split=split_rule(options),
            max_history=options.max_history,
            min_count=DEFAULT_MIN_COUNT if options.min_count is None else options.min_count,
            overwrite=options.overwrite,
            workers=options.workers,
        ),
    )


if __name__ == "__main__":
    main()
