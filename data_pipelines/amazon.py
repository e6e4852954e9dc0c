"""Amazon product reviews -> encoded data set, by the protocol of DIN (arXiv:1706.06978).

    python -m data_pipelines.amazon reviews_Electronics_5.json.gz --meta meta_Electronics.json.gz --out DIR
    python -m data_pipelines.amazon ratings.csv --out DIR --columns item,user,rating,timestamp --split time
    python -m data_pipelines.amazon s3rec_beauty.parquet --meta s3rec_beauty_items.parquet --out DIR

Formats: see ``amazon_files``. A user's reviews b_1 .. b_n, by time, ask for b_k+1 given b_1 .. b_k: a row of label 1
with the item b_k+1, and one of label 0 with an item drawn uniformly from those of the whole log that the user never
reviewed (``--sampling-seed``). Features: ``item``, ``category``; ``item_history``, ``category_history``; no user id.
Reviews of one time (Amazon's are days) are in the order of the file, as in DIN's code; a history holds what is before
in that order.

Split, unless told otherwise: train asks for b_2 .. b_n-1; b_n of nine users in ten is the test (``--validation-users``:
of the others, validation). The paper has no validation split and tests on b_n of all users. Or by users, or by time.

GAUC grouped by ``user`` is then, as in DIN's code, the share of users whose own item scores above the drawn one.

Memory: every item with its category (about 300 bytes each), and one bucket of a million reviews.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.amazon_files import open_reviews, read_categories
from data_pipelines.command import add_split_options, base_parser, run_command, split_rule
from data_pipelines.event_store import EventStore, buckets_for, estimated_rows, read_checked
from data_pipelines.hashing import hash_values
from data_pipelines.histories import (
    DEFAULT_MAX_HISTORY,
    BucketRows,
    History,
    HistorySource,
    Int64,
    check_max_history,
    past,
    recoded,
    rows_per_batch,
    user_numbers,
)
from data_pipelines.pipeline import prepare_log
from data_pipelines.schema import CategoricalColumn, LogSchema
from data_pipelines.sources import RowError
from data_pipelines.splitting import SplitRule, mix
from data_pipelines.workspace import staged
from recemb.data.manifest import Manifest

logger = logging.getLogger(__name__)

# The last item of every user: train, validation and test are given row by row.
LAST = SplitRule("given")
_SPLIT = "split"
# Reviews with their text are ten times as long; more buckets than needed do no harm.
_BYTES_PER_REVIEW = 40


def prepare(
    raw: str | Path,
    out: str | Path,
    *,
    meta: str | Path | None = None,
    columns: tuple[str, ...] | None = None,
    split: SplitRule = LAST,
    validation_users: float = 0.1,
    max_history: int = DEFAULT_MAX_HISTORY,
    min_count: int = 1,
    sampling_seed: int = 0,
    overwrite: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Encode Amazon reviews; see the module.

    Args:
        raw: the file of reviews.
        out: directory to make.
        meta: the items' metadata, for categories; None: those in the reviews, if any.
        columns: names of the columns of a CSV without a header.
        split: LAST, by users, or by time.
        validation_users: share of users (by a hash) whose last item validates rather than tests, for LAST.
        max_history: items of a history, the latest.
        min_count: train occurrences (targets of both labels, and histories) a value needs for an id of its own.
        sampling_seed: of the items of label 0.
        overwrite: replace a data set that lies at ``out``.
        workers: threads; None: one a core.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: as ``pipeline.prepare_log``; ValueError with line or
            row for a review that is not as published, and for a user who reviewed every item there is.
    """
    check_max_history(max_history)
    if split.kind not in ("given", "users", "time"):
        raise ValueError(f"split: by the last item, users or time, which keep the future out; got {split.kind!r}")
    if not 0 < validation_users < 1:
        raise ValueError(f"validation_users must be in (0, 1), got {validation_users}")
    path = Path(raw)
    log = _Log(path, columns, max_history, validation_users, sampling_seed)
    if split.kind == "time" and not log.reviews.has_times:
        raise ValueError(f"{path}: no timestamps (pos orders one user's items), so no split by time")
    with staged(Path(out), overwrite=overwrite) as (scratch, folder):
        store = log.fill(scratch / "reviews")
        items = log.items(None if meta is None else Path(meta))
        source = HistorySource(
            path, store.num_buckets, partial(log.rows, store, items), rows_per_batch=rows_per_batch(max_history)
        )
        manifest = prepare_log(
            [source],
            dataclasses.replace(
                _schema(max_history, min_count, items.categories is not None, log.reviews.has_times),
                split=_SPLIT if split.kind == "given" else None,
            ),
            folder,
            source_name="amazon",
            split=split,
            workers=workers,
            options={
                "meta": None if meta is None else str(meta),
                "split": "last item" if split.kind == "given" else split.kind,
                "validation_users": validation_users if split.kind == "given" else None,
                "max_history": max_history,
                "min_count": min_count,
                "sampling_seed": sampling_seed,
                "items": len(items.values),
                "items_without_category": None if items.categories is None else items.categories.null_count,
            },
        )
    return dataclasses.replace(manifest, root=Path(out))


def _schema(max_history: int, min_count: int, has_categories: bool, has_times: bool) -> LogSchema:
    plain = partial(CategoricalColumn, min_count=min_count)
    history = partial(plain, kind="sequence", max_length=max_history)
    names = ("item", "category") if has_categories else ("item",)
    return LogSchema(
        label="label",
        categorical=(*(plain(name) for name in names), *(history(f"{name}_history", table=name) for name in names)),
        user="user",
        time="time" if has_times else None,
    )


@dataclass(frozen=True)
class _Items:
    """All items of the log.

    Args:
        values: sorted, distinct.
        categories: of each, null where none is known; None where nobody says.
    """

    values: pa.Array
    categories: pa.Array | None


@dataclass
class _Log:
    path: Path
    columns: tuple[str, ...] | None
    max_history: int
    validation_users: float
    sampling_seed: int
    found: dict[Any, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reviews = open_reviews(self.path, self.columns)

    def fill(self, folder: Path) -> EventStore:
        """Read the reviews once, check them, and put them into buckets of users."""
        store = EventStore(folder, "user", buckets_for(estimated_rows(self.path, _BYTES_PER_REVIEW)))
        for reviews in read_checked(self.reviews.source, self._checked):
            store.add(reviews)
        store.close()
        return store

    def _checked(self, raw: pa.Table) -> pa.Table:
        reviews = self.reviews.table(raw)
        if not self.reviews.has_category:
            self.found.update(dict.fromkeys(pc.unique(reviews["item"]).to_pylist()))
            return reviews
        pairs = zip(reviews["item"].to_pylist(), reviews["category"].to_pylist(), strict=True)
        for row, (item, category) in enumerate(pairs):
            if self.found.setdefault(item, category) != category:
                raise RowError(
                    row,
                    f"column 'category': one category an item, got {category!r} and {self.found[item]!r} of {item!r}",
                )
        return reviews.drop_columns(["category"])

    def items(self, meta: Path | None) -> _Items:
        """All items with their categories; what was gathered while reading is freed."""
        values = sorted(self.found)
        if meta is None:
            texts = [self.found[value] for value in values] if self.reviews.has_category else None
        else:
            known = read_categories(meta, self.found.__contains__)
            texts = [known.get(value) for value in values]
            if without := sum(text is None for text in texts):
                logger.warning("%s: no category for %d of %d items", meta, without, len(values))
            if without == len(values):
                raise ValueError(f"{meta}: categories of the items in {self.path} are required, it has none of them")
        self.found.clear()
        return _Items(pa.array(values), None if texts is None else pa.array(texts))

    def rows(self, store: EventStore, items: _Items, bucket: int) -> BucketRows | None:
        """Two rows for every review but each user's first: what was reviewed, and what was drawn."""
        reviews = store.read(bucket)
        if reviews is None:
            return None
        (users,) = user_numbers(reviews["user"])
        order = np.lexsort((reviews["moment"].to_numpy(), users))
        reviews, users = reviews.take(pa.array(order)), users[order]
        codes = pc.index_in(reviews["item"].combine_chunks(), items.values).to_numpy().astype(np.int64)
        starts_of_users = np.searchsorted(users, users, side="left")
        place = np.arange(len(users)) - starts_of_users
        length = np.searchsorted(users, users, side="right") - starts_of_users
        targets = np.flatnonzero(place > 0)
        if not len(targets):
            return None
        hashes = hash_values(reviews["user"].combine_chunks()).view(np.uint64)
        drawn = self._draw(reviews, users, codes, hashes, targets, len(items.values))

        of = np.repeat(targets, 2)
        asked = np.stack([codes[targets], drawn], axis=1).reshape(-1)
        target_items, past_items = _encoded(items, asked, codes)
        # A review's place in the sorted bucket is its moment: no two are equal.
        moments = np.arange(len(users))
        starts, ends = past(users, moments, users[of], of, self.max_history)
        table = {
            "label": pa.array(np.tile(np.array([1, 0], np.int8), len(targets))),
            "item": target_items,
            "user": reviews["user"].take(pa.array(of)),
            "time": reviews["moment"].take(pa.array(of)),
            _SPLIT: pa.array(self._splits(place[of] == length[of] - 1, hashes[of])),
        }
        history = {"item_history": past_items}
        if items.categories is not None:
            of_item = items.categories.take(pc.index_in(target_items.dictionary, items.values))
            table["category"] = recoded(target_items, of_item)
            history["category_history"] = recoded(past_items, of_item)
        return BucketRows(pa.table(table), History(starts, ends, history))

    def _splits(self, is_last: npt.NDArray[np.bool_], hashes: npt.NDArray[np.uint64]) -> Int64:
        """(N,) 0, or for last items 1 or 2 by a hash of the user."""
        draws = (mix(hashes ^ np.uint64(0x5851F42D4C957F2D)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.where(is_last, np.where(draws < self.validation_users, 1, 2), 0)

    def _draw(
        self,
        reviews: pa.Table,
        users: Int64,
        codes: Int64,
        hashes: npt.NDArray[np.uint64],
        targets: Int64,
        num_items: int,
    ) -> Int64:
        """(T,) targets -> (T,) an item that the target's user never reviewed, uniform over all such items.

        A draw is a hash of seed, user, place and attempt, so it depends neither on buckets nor on other users.
        """
        owned = np.unique(users * num_items + codes)
        counts = np.bincount(owned // num_items)
        if (counts == num_items).any():
            user = reviews["user"][int(np.searchsorted(users, counts.argmax()))].as_py()
            raise ValueError(
                f"{self.path}: user {user!r} reviewed all {num_items} items, so no item of label 0 is left"
            )
        place = (np.arange(len(users)) - np.searchsorted(users, users, side="left")).astype(np.uint64)
        streams = mix(hashes[targets] + mix(place[targets] + mix(np.array([self.sampling_seed], np.uint64))))
        drawn = np.zeros(len(targets), np.int64)
        pending = np.arange(len(targets))
        attempt = 0
        while len(pending):
            numbers = mix(streams[pending] + np.uint64(attempt))
            drawn[pending] = (numbers % np.uint64(num_items)).astype(np.int64)
            keys = users[targets[pending]] * num_items + drawn[pending]
            nearest = np.minimum(np.searchsorted(owned, keys), len(owned) - 1)
            pending = pending[owned[nearest] == keys]
            attempt += 1
        return drawn


def _encoded(items: _Items, *columns: Int64) -> list[pa.DictionaryArray]:
    """Columns of item numbers as dictionaries of the items that occur in them, one for all."""
    present, places = np.unique(np.concatenate(columns), return_inverse=True)
    dictionary = items.values.take(pa.array(present))
    parts = np.split(places.astype(np.int32), np.cumsum([len(column) for column in columns])[:-1])
    return [pa.DictionaryArray.from_arrays(pa.array(part), dictionary) for part in parts]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m data_pipelines.amazon``."""
    parser = base_parser("data_pipelines.amazon", __doc__ or "", "file of reviews (.json, .csv, .gz or Parquet)", 1)
    parser.add_argument("--meta", type=Path, help="metadata of the items: their categories")
    parser.add_argument("--columns", type=_names, metavar="A,B,...", help="columns of a CSV without a header")
    parser.add_argument("--validation-users", type=float, default=0.1, help="share whose last item validates (0.1)")
    parser.add_argument("--max-history", type=int, default=DEFAULT_MAX_HISTORY, help="latest items (default: 50)")
    parser.add_argument("--min-count", type=int, default=1, help="train occurrences for an own id (default: 1)")
    parser.add_argument("--sampling-seed", type=int, default=0, help="of the items of label 0 (default: 0)")
    add_split_options(parser, None, ("users", "time"))
    options = parser.parse_args(arguments)
    run_command(
        parser,
        lambda: prepare(
            options.raw[0],
            options.out,
            meta=options.meta,
            columns=options.columns,
            split=split_rule(options, LAST.kind),
            validation_users=options.validation_users,
            max_history=options.max_history,
            min_count=options.min_count,
            sampling_seed=options.sampling_seed,
            overwrite=options.overwrite,
            workers=options.workers,
        ),
    )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"different names are required, got {text!r}")
    return names


if __name__ == "__main__":
    main()
