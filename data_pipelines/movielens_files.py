"""MovieLens as published (1M, 100K, latest, 10M to 32M) and in Parquet: ratings, movies and users in one form.

- 1M, 10M: ``ratings.dat`` (user::movie::rating::time), ``movies.dat``, ``users.dat`` (1M only);
- 100K: ``u.data`` (tab-separated), ``u.item``, ``u.user``;
- latest, 20M and later: ``ratings.csv`` (with a header), ``movies.csv``;
- Parquet, ``*ratings.parquet`` (user_id, item_id, rating, timestamp or pos: its place in the user's history),
  ``*movies.parquet`` or ``*items.parquet`` (item_id, genres or class), ``*users.parquet`` (user_id and USER_FEATURES).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.delimited import DelimitedFile
from data_pipelines.event_store import no_nulls
from data_pipelines.schema import Requirement
from data_pipelines.sources import ParquetFile, Renamed, RowError, Source, check_exists, is_parquet, open_parquet

RATING_COLUMNS = ("user", "movie", "rating", "moment")
USER_FEATURES = ("gender", "age", "occupation", "zip")
NO_GENRES = "(no genres listed)"
_GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_RATINGS_NAMES = ("ratings.dat", "u.data", "ratings.csv", "ratings.parquet")


@dataclass(frozen=True)
class Files:
    """The files of one MovieLens data set; ``users`` is None where it has none."""

    ratings: Path
    movies: Path
    users: Path | None

    @property
    def all(self) -> list[Path]:
        return [self.ratings, self.movies, *([] if self.users is None else [self.users])]


def find_files(raw: Path, movies: Path | None, users: Path | None) -> Files:
    """The files of a folder as published, or those beside a ratings file (``ml-1m_ratings.parquet``).

    Args:
        raw: the folder, or the file of ratings.
        movies, users: where they are not found by name.

    Raises:
        FileNotFoundError: no ratings or no movies, with the names looked for.
    """
    if raw.is_dir():
        found = [raw / name for name in _RATINGS_NAMES if (raw / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{raw}: one of {list(_RATINGS_NAMES)} is required, the folder has none")
        raw = found[0]
    check_exists(raw)
    candidates = _companions(raw)
    if movies is None:
        movies = next((path for path in candidates[0] if path.is_file()), None)
        if movies is None:
            raise FileNotFoundError(
                f"{raw}: its movies are required, beside it as {[path.name for path in candidates[0]]}, or by --movies"
            )
    if users is None:
        users = next((path for path in candidates[1] if path.is_file()), None)
    return Files(raw, movies, users)


def _companions(ratings: Path) -> tuple[list[Path], list[Path]]:
    if ratings.name == "u.data":
        return [ratings.with_name("u.item")], [ratings.with_name("u.user")]
    names = [ratings.name.replace("ratings", word) for word in ("movies", "items", "users")]
    return [ratings.with_name(name) for name in names[:2]], [ratings.with_name(names[2])]


@dataclass(frozen=True)
class Ratings:
    """A file of ratings.

    Args:
        source: its raw columns under their names in RATING_COLUMNS.
        has_times: whether ``moment`` is seconds since 1970; else it is a rank within the user.
    """

    source: Source
    has_times: bool

    def table(self, raw: pa.Table) -> pa.Table:
        """Raw rows -> RATING_COLUMNS: user, movie and moment int64, rating float64.

        Raises:
            RowError: a value missing, a rating that is no number in (0, 5].
        """
        no_nulls(raw, list(RATING_COLUMNS))
        ratings = raw["rating"].combine_chunks()
        if pa.types.is_string(ratings.type):
            ratings = _numbers(ratings)
        ratings = ratings.cast(pa.float64())
        values = ratings.to_numpy(zero_copy_only=False)
        wrong = ~((values > 0) & (values <= 5))
        if wrong.any():
            row = int(wrong.argmax())
            raise RowError(row, f"column 'rating': a number in (0, 5] is required, got {raw['rating'][row].as_py()!r}")
        integers = {name: raw[name].cast(pa.int64()) for name in ("user", "movie", "moment")}
        return pa.table({**integers, "rating": ratings}).select(list(RATING_COLUMNS))


def _numbers(texts: pa.Array) -> pa.Array:
    """Texts -> numbers, NaN for what is none."""

    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return float("nan")

    # Ten distinct ratings: parsed once each.
    distinct = texts.dictionary_encode()
    values = pa.array([number(text) for text in distinct.dictionary.to_pylist()], pa.float64())
    return values.take(distinct.indices)


def open_ratings(path: Path) -> Ratings:
    """Recognise a file of ratings by its content and name.

    Raises:
        FileNotFoundError, ValueError: no such file; a format that is none of the module's.
    """
    kinds: dict[str, Requirement] = {"user": "ids", "movie": "ids", "rating": "numeric", "moment": "time"}
    if is_parquet(path):
        names = set(open_parquet(path).schema_arrow.names)
        has_times = "timestamp" in names
        renamed = {
            "user": "user_id",
            "movie": "item_id" if "item_id" in names else "movie_id",
            "moment": "timestamp" if has_times else "pos",
        }
        return Ratings(ParquetFile(path, kinds, renamed), has_times)
    # Ratings of halves: parsed here, since the reader of text knows integers and texts.
    kinds["rating"] = "category"
    if path.suffix == ".csv":
        stored = {"user": "userId", "movie": "movieId", "rating": "rating", "moment": "timestamp"}
        file = DelimitedFile(path, (), {stored[name]: kind for name, kind in kinds.items()}, ",", header=True)
        return Ratings(Renamed(file, stored), True)
    if path.name == "u.data":
        return Ratings(DelimitedFile(path, RATING_COLUMNS, kinds), True)
    # "::" is two separators with nothing between them.
    columns = ("user", "_1", "movie", "_2", "rating", "_3", "moment")
    return Ratings(DelimitedFile(path, columns, kinds, ":"), True)


def read_movies(path: Path) -> pa.Table:
    """A file of movies -> ``movie`` int64, ``genres`` list<string> in the file's order (empty: none listed).

    Raises:
        FileNotFoundError, ValueError: with the line or row, what is required and what came.
    """
    if is_parquet(path):
        return _movies_of_parquet(path)
    movies, genres = [], []
    if path.name == "u.item":
        for line, cells in _cells(path, "|", 5 + len(_GENRES_100K)):
            movies.append(_integer(path, line, cells[0]))
            flags = zip(_GENRES_100K, cells[5:], strict=True)
            genres.append([genre for genre, flag in flags if flag == "1" and genre != "unknown"])
    else:
        rows = _csv(path, ("movieId", "title", "genres")) if path.suffix == ".csv" else _cells(path, "::", 3)
        for line, cells in rows:
            movies.append(_integer(path, line, cells[0]))
            genres.append([] if cells[2] == NO_GENRES else [genre for genre in cells[2].split("|") if genre])
    return _distinct(path, pa.table({"movie": pa.array(movies, pa.int64()), "genres": _texts(genres)}), "movie")


def _movies_of_parquet(path: Path) -> pa.Table:
    table = open_parquet(path).read()
    names = set(table.column_names)
    identifier = "item_id" if "item_id" in names else "movie_id"
    column = "genres" if "genres" in names else "class"
    if not {identifier, column} <= names:
        raise ValueError(f"{path}: columns item_id and genres (or class) are required, the file has {sorted(names)}")
    texts = table[column].fill_null("").to_pylist()
    separator = "|" if column == "genres" else " "
    genres = [[] if text == NO_GENRES else [genre for genre in text.split(separator) if genre] for text in texts]
    return _distinct(
        path, pa.table({"movie": _as_integers(path, table[identifier]), "genres": _texts(genres)}), "movie"
    )


def read_users(path: Path) -> pa.Table:
    """A file of users -> ``user`` int64 and USER_FEATURES as texts.

    Raises:
        FileNotFoundError, ValueError: as read_movies.
    """
    if is_parquet(path):
        table = open_parquet(path).read()
        renamed = table.rename_columns([{"zip_code": "zip"}.get(name, name) for name in table.column_names])
        if missing := {"user_id", *USER_FEATURES} - set(renamed.column_names):
            raise ValueError(f"{path}: columns {sorted(missing)} are missing; the file has {table.column_names}")
        columns = {name: renamed[name].cast(pa.string()) for name in USER_FEATURES}
        return _distinct(path, pa.table({"user": _as_integers(path, renamed["user_id"]), **columns}), "user")
    # 1M: user::gender::age::occupation::zip; 100K: user|age|gender|occupation|zip.
    separator, order = ("|", (2, 1, 3, 4)) if path.name == "u.user" else ("::", (1, 2, 3, 4))
    rows = list(_cells(path, separator, 5))
    users = pa.array([_integer(path, line, cells[0]) for line, cells in rows], pa.int64())
    features = {
        name: pa.array([cells[place] for _, cells in rows], pa.string())
        for name, place in zip(USER_FEATURES, order, strict=True)
    }
    return _distinct(path, pa.table({"user": users, **features}), "user")


def _texts(lists: Sequence[Sequence[str]]) -> pa.Array:
    return pa.array(lists, pa.list_(pa.string()))


def _cells(path: Path, separator: str, width: int) -> Iterator[tuple[int, list[str]]]:
    check_exists(path)
    # The published files are Latin-1; every byte is a character of it.
    with path.open(encoding="latin-1", newline="\n") as stream:
        for line, text in enumerate(stream, 1):
            cells = text.rstrip("\r\n").split(separator)
            if len(cells) != width:
                raise ValueError(
                    f"{path}: line {line}: {width} columns separated by {separator!r} are required, got {len(cells)}"
                )
            yield line, cells


def _csv(path: Path, header: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    check_exists(path)
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.reader(stream)
        if (first := next(rows, [])) != list(header):
            raise ValueError(f"{path}: line 1: the header {list(header)} is required, got {first}")
        for cells in rows:
            if len(cells) != len(header):
                raise ValueError(f"{path}: line {rows.line_num}: {len(header)} columns are required, got {len(cells)}")
            yield rows.line_num, cells


def _integer(path: Path, line: int, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{path}: line {line}: column 1: an integer is required, got {text!r}") from None


def _as_integers(path: Path, column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: integers are required as ids: {error}") from error


def _distinct(path: Path, table: pa.Table, key: str) -> pa.Table:
    counts = pc.value_counts(table[key])
    if len(counts) != len(table):
        places = np.flatnonzero(counts.field("counts").to_numpy() > 1)
        raise ValueError(f"{path}: {key} {counts.field('values')[int(places[0])].as_py()} is listed more than once")
    return table
