"""Session logs of hotel searches with real impressions (RecSys Challenge 2019, trivago) -> encoded data set.

    python -m data_pipelines.trivago train.csv --out DIR
    python -m data_pipelines.trivago train.csv --out DIR --history-of session --max-history 20 --group user

Raw: ``train.csv`` as published (plain or .gz; its twelve columns are COLUMNS) or the same columns in Parquet.

One row an impression of a click-out, ``clicked`` = 1 for the item that was clicked. (A click-out of an item that its
list does not hold leaves rows of zeros; their number is in the manifest.) Features: ``item``, ``position`` in the list
from 1, ``price_rank`` (1 + number of cheaper ones in the list), ``platform``, ``city``, ``device``, ``filters`` (a
bag), ``action`` (always the click-out that is asked for), ``price`` (number). ``item_history`` and ``action_history``:
the items that the user, or with ``--history-of session`` the session, had to do with before, and how.

Before: by (timestamp, step). Events of one second are in the order of their steps; those of equal second and step, the
click-out itself among them, know nothing of each other.

Half of the items of a later day are new. With a vocabulary they share id 0, so that an item looked at before cannot be
told from any other; ``--item-encoding hash`` gives each its own 63-bit id, for tables whose method hashes, and with
``--item-rows N`` one of N ids, for any table.

``clickout`` (a hash of user, session and step) is the group for GAUC, unless ``--group`` says session or user; all
three are carried along. Split by time, by last day, or by users; a click-out is never divided.

Memory: one bucket of 250,000 events and the impressions of its click-outs, about 400 MB.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

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
from data_pipelines.hashing import hash_values
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
from data_pipelines.schema import CategoricalColumn, Encoding, LogSchema, NumericColumn, Requirement
from data_pipelines.sources import ParquetFile, RowError, Source, is_parquet
from data_pipelines.splitting import SplitRule
from data_pipelines.workspace import staged
from recemb.data.manifest import Manifest

HistoryOf = Literal["user", "session"]
Group = Literal["clickout", "session", "user"]

COLUMNS: dict[str, Requirement] = {
    **dict.fromkeys(("user_id", "session_id"), "category"),
    **dict.fromkeys(("timestamp", "step"), "time"),
    **dict.fromkeys(("action_type", "reference", "platform", "city", "device", "current_filters"), "category"),
    **dict.fromkeys(("impressions", "prices"), "category"),
}
CLICKOUT = "clickout item"
# Actions whose reference is an item (others refer to filters, cities and points of interest).
ITEM_ACTIONS = (
    CLICKOUT,
    *(f"interaction item {what}" for what in ("deals", "image", "info", "rating")),
    "search for item",
)
LABEL = "clicked"
_GROUPS: dict[Group, str] = {"clickout": "clickout", "session": "session_id", "user": "user_id"}
_CONTEXT = ("platform", "city", "device")
# Every tenth event is a click-out with 25 impressions.
_ROWS_PER_EVENT = 4
_BYTES_PER_EVENT = 120
_LARGEST_STEP = 2**20
_LARGEST_TIME = 2**43


def prepare(
    raw: str | Path,
    out: str | Path,
    *,
    split: SplitRule | None = None,
    history_of: HistoryOf = "user",
    group: Group = "clickout",
    max_history: int = DEFAULT_MAX_HISTORY,
    min_count: int = DEFAULT_MIN_COUNT,
    item_encoding: Literal["vocabulary", "hash"] = "vocabulary",
    item_rows: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Encode a session log; see the module.

    Args:
        raw: the file of events.
        out: directory to make.
        split: None: by time 8:1:1.
        history_of: whose past events a history holds.
        group: what GAUC groups impressions by.
        max_history: events of a history, the latest.
        min_count: train occurrences (impressions and histories) a value needs for an id of its own.
        item_encoding, item_rows: see the module; a few times as many rows as items keep most of them apart.
        overwrite: replace a data set that lies at ``out``.
        workers: threads; None: one a core.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: as ``pipeline.prepare_log``; ValueError with line or
            row for an event that is not as published.
    """
    check_max_history(max_history)
    split = split or SplitRule("time")
    if split.kind not in ("time", "last-day", "users"):
        raise ValueError(f"split: one of ['time', 'last-day', 'users'] keeps the future out, got {split.kind!r}")
    if history_of not in get_args(HistoryOf) or group not in _GROUPS:
        raise ValueError(
            f"history_of must be one of {list(get_args(HistoryOf))} and group one of {list(_GROUPS)}, "
            f"got {history_of!r} and {group!r}"
        )
    path = Path(raw)
    log = _Log(path, history_of, max_history)
    with staged(Path(out), overwrite=overwrite) as (scratch, folder):
        store = log.fill(scratch / "events")
        source = HistorySource(
            path, store.num_buckets, partial(log.rows, store), rows_per_batch=rows_per_batch(max_history)
        )
        manifest = prepare_log(
            [source],
            _schema(max_history, min_count, group, item_encoding, item_rows),
            folder,
            source_name="trivago",
            split=split,
            workers=workers,
            options={
                "history_of": history_of,
                "group": group,
                "max_history": max_history,
                "min_count": min_count,
                "item_encoding": item_encoding,
                "item_rows": item_rows,
                "events": dict(log.counts),
            },
        )
    return dataclasses.replace(manifest, root=Path(out))


def _schema(
    max_history: int, min_count: int, group: Group, item_encoding: Encoding, item_rows: int | None
) -> LogSchema:
    plain = partial(CategoricalColumn, min_count=min_count)
    item_count = min_count if item_encoding == "vocabulary" else 1
    item = partial(
        CategoricalColumn, table="item", min_count=item_count, encoding=item_encoding, num_embeddings=item_rows
    )
    return LogSchema(
        label=LABEL,
        numeric=(NumericColumn("price"),),
        categorical=(
            item("item"),
            *(plain(name) for name in ("position", "price_rank", *_CONTEXT, "action")),
            plain("filters", kind="list"),
            item("item_history", kind="sequence", max_length=max_history),
            plain("action_history", kind="sequence", table="action", max_length=max_history),
        ),
        user=_GROUPS[group],
        time="timestamp",
        extra=tuple(name for name in _GROUPS.values() if name != _GROUPS[group]),
        split="user_id",
    )


@dataclass(frozen=True)
class _Log:
    path: Path
    history_of: HistoryOf
    max_history: int
    counts: Counter[str] = field(default_factory=Counter)

    def source(self) -> Source:
        """The raw file."""
        if is_parquet(self.path):
            return ParquetFile(self.path, COLUMNS, {})
        return DelimitedFile(self.path, (), COLUMNS, ",", header=True, quoted=True)

    def fill(self, folder: Path) -> EventStore:
        """Read the events once, check them, and put them into buckets of users."""
        num_events = estimated_rows(self.path, _BYTES_PER_EVENT)
        store = EventStore(folder, "user_id", buckets_for(_ROWS_PER_EVENT * num_events))
        for events in read_checked(self.source(), self._checked):
            store.add(events)
        store.close()
        if not self.counts["click-outs"]:
            raise ValueError(
                f"{self.path}: no event of action_type {CLICKOUT!r}, so there is no impression to learn from"
            )
        return store

    def _checked(self, raw: pa.Table) -> pa.Table:
        """Raw events with impressions and prices as lists (null but for click-outs).

        Raises:
            RowError: a value missing, lists that do not match.
        """
        no_nulls(raw, ["user_id", "session_id", "timestamp", "step", "action_type"])
        for name, bound in (("timestamp", _LARGEST_TIME), ("step", _LARGEST_STEP)):
            _check_range(raw, name, bound)
        is_clickout = pc.equal(raw["action_type"], CLICKOUT).combine_chunks()
        for name in ("reference", "impressions", "prices"):
            missing = pc.and_(is_clickout, raw[name].combine_chunks().is_null())
            if (row := missing.index(True).as_py()) >= 0:
                raise RowError(row, f"column {name!r}: a value is required in a {CLICKOUT!r}, got null")
        items, prices = (_lists(raw[name], is_clickout) for name in ("impressions", "prices"))
        lengths = [pc.list_value_length(lists).fill_null(0).to_numpy() for lists in (items, prices)]
        if (wrong := lengths[0] != lengths[1]).any():
            row = int(wrong.argmax())
            raise RowError(
                row,
                f"column 'prices': a price for each of the {lengths[0][row]} impressions is required, "
                f"got {lengths[1][row]}",
            )
        columns = {name: raw[name].cast(pa.string()) for name, kind in COLUMNS.items() if kind == "category"}
        columns |= {"impressions": items, "prices": _as_numbers(prices)}
        columns |= {name: raw[name].cast(pa.int64()) for name in ("timestamp", "step")}
        self.counts["all"] += len(raw)
        self.counts["click-outs"] += is_clickout.true_count
        of = np.repeat(np.arange(len(raw)), lengths[0])
        clicks = pc.equal(items.flatten(), columns["reference"].combine_chunks().take(pa.array(of)))
        clicked = np.unique(of[clicks.fill_null(False).to_numpy(zero_copy_only=False)])
        self.counts["click-outs of items that their lists do not hold"] += is_clickout.true_count - len(clicked)
        return pa.table(columns)

    def rows(self, store: EventStore, bucket: int) -> BucketRows | None:
        """One row an impression, click-outs by user, then time and step."""
        events = store.read(bucket)
        if events is None:
            return None
        moments = events["timestamp"].to_numpy() * _LARGEST_STEP + events["step"].to_numpy()
        (users,) = user_numbers(events["user_id"])
        order = np.lexsort((moments, users))
        events, users, moments = events.take(pa.array(order)), users[order], moments[order]
        clickouts = np.flatnonzero(pc.equal(events["action_type"], CLICKOUT).to_numpy())
        if not len(clickouts):
            return None
        known = np.flatnonzero(_is_item(events))
        if self.history_of == "session":
            # Of this user: another user's session may have the same name.
            (sessions,) = user_numbers(events["session_id"])
            users = users * (sessions.max() + 1) + sessions
            known = known[np.argsort(users[known], kind="stable")]
        starts, ends = past(users[known], moments[known], users[clickouts], moments[clickouts], self.max_history)
        table, clickout_of = self._impressions(events.take(pa.array(clickouts)))
        known_events = events.select(["reference", "action_type"]).take(pa.array(known))
        columns = {
            "item_history": encoded(known_events["reference"]),
            "action_history": encoded(known_events["action_type"]),
        }
        return BucketRows(table, History(starts[clickout_of], ends[clickout_of], columns))

    def _impressions(self, clickouts: pa.Table) -> tuple[pa.Table, np.ndarray]:
        """C click-outs -> a row an impression, and (N,) the click-out of each."""
        lists, prices = (clickouts[name].combine_chunks() for name in ("impressions", "prices"))
        lengths = pc.list_value_length(lists).to_numpy().astype(np.int64)
        of = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(of)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        items, amounts = lists.flatten(), prices.flatten()
        repeated = clickouts.take(pa.array(of))
        labels = pc.equal(items, repeated["reference"].combine_chunks()).cast(pa.int8())
        texts = pc.binary_join_element_wise(
            clickouts["user_id"].combine_chunks(),
            clickouts["session_id"].combine_chunks(),
            clickouts["step"].combine_chunks().cast(pa.string()),
            " ",
        )
        filters = pc.split_pattern(clickouts["current_filters"].combine_chunks().fill_null(""), "|")
        has_filters = pc.is_valid(clickouts["current_filters"].combine_chunks())
        filters = pc.if_else(has_filters, filters, pa.scalar([], pa.list_(pa.string())))
        columns = {
            LABEL: labels,
            "price": amounts,
            "item": items.dictionary_encode(),
            "position": pa.array(position + 1),
            "price_rank": pa.array(_ranks(of, amounts.to_numpy())),
            **{name: encoded(clickouts[name]).take(pa.array(of)) for name in _CONTEXT},
            "action": pa.array(np.full(len(of), CLICKOUT)).dictionary_encode(),
            "filters": filters.take(pa.array(of)),
            "clickout": pa.array(hash_values(texts)[of]),
            "session_id": repeated["session_id"],
            "user_id": repeated["user_id"],
            "timestamp": repeated["timestamp"],
        }
        return pa.table(columns), of


def _is_item(events: pa.Table) -> np.ndarray:
    """(E,) whether an event is about an item, and says which (a few refer to "unknown")."""
    about = pc.is_in(events["action_type"], pa.array(ITEM_ACTIONS))
    named = pc.match_substring_regex(events["reference"], r"^\d+$").fill_null(False)
    return np.asarray(pc.and_(about, named).to_numpy())


def _ranks(groups: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """(N,) 1 + number of strictly smaller prices in the same group; groups ascend."""
    order = np.lexsort((prices, groups))
    sorted_groups, sorted_prices = groups[order], prices[order]
    new = np.append(True, (np.diff(sorted_groups) != 0) | (np.diff(sorted_prices) != 0))
    first_of_price = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    first_of_group = np.searchsorted(sorted_groups, sorted_groups, side="left")
    ranks = np.empty(len(order), np.int64)
    ranks[order] = 1 + first_of_price - first_of_group
    return ranks


def _check_range(raw: pa.Table, name: str, bound: int) -> None:
    values = raw[name].cast(pa.int64()).to_numpy()
    if (wrong := (values < 0) | (values >= bound)).any():
        row = int(wrong.argmax())
        raise RowError(row, f"column {name!r}: an integer in [0, {bound}) is required, got {values[row]}")


def _lists(column: pa.ChunkedArray, wanted: pa.Array) -> pa.Array:
    """``"a|b|c"`` -> a list of texts, null where not wanted."""
    texts = pc.if_else(wanted, column.combine_chunks().cast(pa.string()), pa.scalar(None, pa.string()))
    return pc.split_pattern(texts, "|")


def _as_numbers(lists: pa.Array) -> pa.Array:
    try:
        numbers = lists.cast(pa.list_(pa.float64()))
        if pc.all(pc.greater_equal(numbers.flatten(), 0)).as_py() is not False:
            return numbers
    except pa.ArrowInvalid:
        pass
    for row, texts in enumerate(lists.to_pylist()):
        for text in texts or ():
            if not text.replace(".", "", 1).isdecimal():
                raise RowError(row, f"column 'prices': numbers of at least 0 are required, got {text!r}")
    raise AssertionError("a price that no number is was not found again")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m data_pipelines.trivago``."""
    parser = base_parser("data_pipelines.trivago", __doc__ or "", "train.csv (or .gz, or Parquet)", 1)
    parser.add_argument("--history-of", choices=get_args(HistoryOf), default="user", help="default: %(default)s")
    parser.add_argument("--group", choices=get_args(Group), default="clickout", help="for GAUC (default: %(default)s)")
    parser.add_argument(
        "--item-encoding", choices=("vocabulary", "hash"), default="vocabulary", help="see above (default: %(default)s)"
    )
    parser.add_argument("--item-rows", type=int, metavar="N", help="ids of hashed items (default: 63 bits)")
    parser.add_argument("--max-history", type=int, default=DEFAULT_MAX_HISTORY, help="latest events (default: 50)")
    add_split_options(parser, "time", ("time", "last-day", "users"))
    add_min_count_option(parser)
    options = parser.parse_args(arguments)
    run_command(
        parser,
        lambda: prepare(
            options.raw[0],
            options.out,
            split=split_rule(options),
            history_of=options.history_of,
            group=options.group,
            max_history=options.max_history,
            min_count=DEFAULT_MIN_COUNT if options.min_count is None else options.min_count,
            item_encoding=options.item_encoding,
            item_rows=options.item_rows,
            overwrite=options.overwrite,
            workers=options.workers,
        ),
    )


if __name__ == "__main__":
    main()
