"""MovieLens ratings -> encoded data set.

    python -m data_pipelines.movielens ml-1m --out DIR                              # a folder as published
    python -m data_pipelines.movielens ml-1m_ratings.parquet --out DIR              # movies and users lie beside it
    python -m data_pipelines.movielens ml-20m --out DIR --split users --max-history 100
    python -m data_pipelines.movielens ml-1m --out DIR --protocol unified

Formats: see ``movielens_files``. Protocols:

``sequence`` (DIN, arXiv:1706.06978): one row a rating; label: rating >= 4 (``--positive-rating``). ``movie`` and its
``category`` (its genres as one value, ``Action|Crime``: histories take one value an event), ``movie_history`` and
``category_history``: what the user rated >= 4 before, oldest to newest, and gender, age, occupation and zip where there
are users. Ratings of one second know nothing of each other. The split is by users (as the paper's MovieLens-20M) or by
time; data sets without timestamps (``pos``) have users only. No user id is a feature.

``pooled``: one row a rating with ``user_id``, ``movie``, ``genres`` (a bag), and the user's features; label as above;
no history. Split at random, by time or users.

``unified`` (Unified Embedding, arXiv:2305.12102, Table 1, MovieLens-1M): ratings 1 and 2 are 0, 4 and 5 are 1, threes
are left out; every row by chance 8:1:1; every value has an id. Seven single-valued features: user_id, movie, gender,
age, occupation, zip, category. Differs from the paper: its text says ratings >= 3 are positive, which its published AUC
does not fit. These seven features (13,461 ids) fit the table sizes that it gives (13,500 rows at 791 kB for a half).

Memory: movies and users, and one bucket of a million ratings, whatever their number.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.command import add_split_options, base_parser, run_command, split_rule
from data_pipelines.event_store import EventStore, buckets_for, estimated_rows, read_checked
from data_pipelines.histories import (
    DEFAULT_MAX_HISTORY,
    BucketRows,
    History,
    HistorySource,
    check_max_history,
    encoded,
    past,
    recoded,
    rows_per_batch,
    user_numbers,
)
from data_pipelines.movielens_files import USER_FEATURES, Files, find_files, open_ratings, read_movies, read_users
from data_pipelines.pipeline import prepare_log
from data_pipelines.schema import CategoricalColumn, LogSchema
from data_pipelines.sources import RowError
from data_pipelines.splitting import SplitKind, SplitRule
from data_pipelines.workspace import staged
from recemb.data.manifest import Manifest

logger = logging.getLogger(__name__)

Protocol = Literal["sequence", "pooled", "unified"]
POSITIVE_RATING = 4.0
LABEL, USER, TIME = "label", "user", "time"
_SPLITS: dict[Protocol, tuple[SplitKind, ...]] = {
    "sequence": ("users", "time"),
    "pooled": ("random", "time", "users"),
    "unified": ("random",),
}
# Bytes of the shortest published line, "1::1::5::978300760\n".
_BYTES_PER_RATING = 19


def prepare(
    raw: str | Path,
    out: str | Path,
    *,
    protocol: Protocol = "sequence",
    movies: str | Path | None = None,
    users: str | Path | None = None,
    split: SplitRule | None = None,
    positive_rating: float = POSITIVE_RATING,
    max_history: int = DEFAULT_MAX_HISTORY,
    min_count: int = 1,
    overwrite: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Encode MovieLens ratings; see the module for protocols.

    Args:
        raw: folder as published, or the file of ratings.
        out: directory to make.
        protocol: what becomes a row.
        movies, users: files, where they do not lie beside the ratings under their usual names.
        split: None: users (sequence), random 8:1:1 (pooled, unified).
        positive_rating: smallest rating of label 1 (sequence, pooled), and of a history.
        max_history: events of a history, the latest.
        min_count: train occurrences (targets and histories) a value needs for an id of its own. The papers filter
            nothing.
        overwrite: replace a data set that lies at ``out``.
        workers: threads; None: one a core.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: as ``pipeline.prepare_log``; ValueError for a split
            that the protocol does not have.
    """
    check_max_history(max_history)
    split = split or SplitRule(_SPLITS[protocol][0])
    _check_split(protocol, split)
    files = find_files(Path(raw), *(None if path is None else Path(path) for path in (movies, users)))
    log = _Log.open(files, protocol, positive_rating, max_history)
    if split.kind == "time" and not log.has_times:
        raise ValueError(f"{files.ratings}: no timestamps (pos orders one user's ratings), so no split by time")
    with staged(Path(out), overwrite=overwrite) as (scratch, encoded_folder):
        store = log.fill(scratch / "ratings")
        manifest = prepare_log(
            [
                HistorySource(
                    files.ratings,
                    store.num_buckets,
                    partial(log.rows, store),
                    rows_per_batch=rows_per_batch(max_history),
                )
            ],
            log.schema(min_count),
            encoded_folder,
            source_name="movielens",
            split=split,
            workers=workers,
            options={
                "protocol": protocol,
                "positive_rating": positive_rating,
                "max_history": max_history if protocol == "sequence" else None,
                "min_count": min_count,
                "files": [str(path) for path in files.all],
            },
        )
    return dataclasses.replace(manifest, root=Path(out))


def _check_split(protocol: Protocol, split: SplitRule) -> None:
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol must be one of {list(get_args(Protocol))}, got {protocol!r}")
    if split.kind not in _SPLITS[protocol]:
        raise ValueError(f"protocol {protocol} is split by one of {list(_SPLITS[protocol])}, got {split.kind!r}")


@dataclass(frozen=True)
class _Log:
    """Ratings with what is known of their movies and users."""

    files: Files
    protocol: Protocol
    positive_rating: float
    max_history: int
    has_times: bool
    movies: pa.Table
    users: pa.Table | None

    @classmethod
    def open(cls, files: Files, protocol: Protocol, positive_rating: float, max_history: int) -> _Log:
        users = None if files.users is None else read_users(files.users)
        if protocol == "unified" and users is None:
            raise FileNotFoundError(f"{files.ratings}: protocol unified needs its users, beside it or by --users")
        movies = read_movies(files.movies)
        categories = pc.binary_join(movies["genres"], "|")
        has_none = pc.equal(pc.list_value_length(movies["genres"]), 0)
        movies = movies.append_column("category", pc.if_else(has_none, pa.scalar(None, pa.string()), categories))
        has_times = open_ratings(files.ratings).has_times
        return cls(files, protocol, positive_rating, max_history, has_times, movies, users)

    def schema(self, min_count: int) -> LogSchema:
        """The columns of the protocol."""
        people = USER_FEATURES if self.users is not None else ()
        plain = partial(CategoricalColumn, min_count=min_count)
        if self.protocol == "sequence":
            history = partial(plain, kind="sequence", max_length=self.max_history)
            features = [
                *(plain(name) for name in ("movie", "category", *people)),
                history("movie_history", table="movie"),
                history("category_history", table="category"),
            ]
        elif self.protocol == "pooled":
            features = [*(plain(name) for name in ("user_id", "movie", *people)), plain("genres", kind="list")]
        else:
            features = [plain(name) for name in ("user_id", "movie", *people, "category")]
        return LogSchema(
            label=LABEL,
            categorical=tuple(features),
            user=USER,
            time=TIME if self.has_times else None,
            extra=("rating",),
        )

    def fill(self, folder: Path) -> EventStore:
        """Read the ratings once, check them, and put them into buckets of users."""
        path = self.files.ratings
        store = EventStore(folder, "user", buckets_for(estimated_rows(path, _BYTES_PER_RATING)))
        for ratings in read_checked(open_ratings(path).source, self._checked):
            store.add(ratings)
        store.close()
        return store

    def _checked(self, raw: pa.Table) -> pa.Table:
        ratings = open_ratings(self.files.ratings).table(raw)
        self._check_known(ratings, "movie", self.movies, self.files.movies)
        if self.users is not None and self.files.users is not None:
            self._check_known(ratings, "user", self.users, self.files.users)
        return ratings

    def _check_known(self, ratings: pa.Table, name: str, known: pa.Table, path: Path) -> None:
        absent = pc.invert(pc.is_in(ratings[name], known[name].combine_chunks()))
        if (row := absent.index(True).as_py()) >= 0:
            raise RowError(row, f"column {name!r}: {ratings[name][row].as_py()} is not listed in {path}")

    def rows(self, store: EventStore, bucket: int) -> BucketRows | None:
        """The rows of one bucket of users: by user, then moment, then as in the file."""
        ratings = store.read(bucket)
        if ratings is None:
            return None
        (users,) = user_numbers(ratings["user"])
        order = np.lexsort((ratings["moment"].to_numpy(), users))
        ratings, users = ratings.take(pa.array(order)), users[order]
        moments, values = ratings["moment"].to_numpy(), ratings["rating"].to_numpy()
        positive = values >= self.positive_rating
        if self.protocol == "unified":
            # Half stars (later data sets) between 2 and 4 are as undecided as threes.
            kept = (values <= 2) | (values >= 4)
            if not kept.any():
                return None
            return BucketRows(self._table(ratings.filter(pa.array(kept)), values[kept] >= 4))
        table = self._table(ratings, positive)
        if self.protocol == "pooled":
            return BucketRows(table)
        events = np.flatnonzero(positive)
        starts, ends = past(users[events], moments[events], users, moments, self.max_history)
        movies = encoded(ratings["movie"].take(pa.array(events)))
        categories = recoded(movies, self._of_movies(movies.dictionary, "category"))
        return BucketRows(table, History(starts, ends, {"movie_history": movies, "category_history": categories}))

    def _of_movies(self, movies: pa.Array, column: str) -> pa.Array:
        places = pc.index_in(movies, self.movies["movie"].combine_chunks())
        return self.movies[column].combine_chunks().take(places)

    def _table(self, ratings: pa.Table, labels: np.ndarray) -> pa.Table:
        movies = ratings["movie"].combine_chunks()
        columns = {
            LABEL: pa.array(labels.astype(np.int8)),
            "movie": movies,
            "rating": ratings["rating"].cast(pa.float32()),
            USER: ratings["user"],
            TIME: ratings["moment"],
        }
        if self.protocol == "pooled":
            columns["genres"] = self._of_movies(movies, "genres")
        else:
            columns["category"] = self._of_movies(movies, "category")
        if self.protocol != "sequence":
            columns["user_id"] = ratings["user"]
        if self.users is not None:
            places = pc.index_in(ratings["user"].combine_chunks(), self.users["user"].combine_chunks())
            columns |= {name: self.users[name].combine_chunks().take(places) for name in USER_FEATURES}
        return pa.table(columns)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m data_pipelines.movielens``."""
    parser = base_parser("data_pipelines.movielens", __doc__ or "", "a folder as published, or the file of ratings", 1)
    parser.add_argument("--protocol", choices=get_args(Protocol), default="sequence", help="see above")
    parser.add_argument("--movies", type=Path, help="file of movies, where it is not beside the ratings")
    parser.add_argument("--users", type=Path, help="file of users, where it is not beside the ratings")
    parser.add_argument("--positive-rating", type=float, default=POSITIVE_RATING, help="default: %(default)s")
    parser.add_argument("--max-history", type=int, default=DEFAULT_MAX_HISTORY, help="latest events (default: 50)")
    parser.add_argument("--min-count", type=int, default=1, help="train occurrences for an own id (default: 1)")
    add_split_options(parser, None, ("users", "time", "random"))
    options = parser.parse_args(arguments)
    run_command(
        parser,
        lambda: prepare(
            options.raw[0],
            options.out,
            protocol=options.protocol,
            movies=options.movies,
            users=options.users,
            split=split_rule(options, _SPLITS[options.protocol][0]),
            positive_rating=options.positive_rating,
            max_history=options.max_history,
            min_count=options.min_count,
            overwrite=options.overwrite,
            workers=options.workers,
        ),
    )


if __name__ == "__main__":
    main()
