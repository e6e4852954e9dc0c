from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import event_store, histories, movielens
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import Manifest
from tests.data_pipelines.histories_truth import as_set, check_vocabularies, decoded, masked, shared_data

Row = dict[str, Any]
GENRES = ("Action", "Children's", "Film-Noir", "War")
BY_TIME = SplitRule("time", (6, 2, 2))


def log(
    seed: int = 0, *, users: int = 12, ratings: int = 300
) -> tuple[list[Row], dict[int, list[str]], dict[int, Row]]:
    """Ratings with many equal times, their movies (one without genres), their users."""
    random = np.random.default_rng(seed)
    movies = {3 * number + 1: [genre for genre in GENRES if random.random() < 0.5] for number in range(25)}
    movies[1] = []
    people = {
        7 * number + 2: {
            "gender": "FM"[number % 2],
            "age": str(18 + number % 3),
            "occupation": str(number % 4),
            "zip": f"0{number}",
        }
        for number in range(users)
    }
    rows = [
        {
            "user": int(random.choice(list(people))),
            "movie": int(random.choice(list(movies))),
            "rating": int(random.integers(1, 6)),
            "time": 978_300_000 + int(random.integers(60)),
        }
        for _ in range(ratings)
    ]
    return rows, movies, people


def write_1m(folder: Path, rows: list[Row], movies: dict[int, list[str]], people: dict[int, Row]) -> Path:
    folder.mkdir()
    ratings = [f"{row['user']}::{row['movie']}::{row['rating']}::{row['time']}" for row in rows]
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n")
    titles = [f"{movie}::Café: {movie} (1999)::{'|'.join(genres)}" for movie, genres in movies.items()]
    (folder / "movies.dat").write_bytes(("\n".join(titles) + "\n").encode("latin-1"))
    users = [f"{user}::{p['gender']}::{p['age']}::{p['occupation']}::{p['zip']}" for user, p in people.items()]
    (folder / "users.dat").write_text("\n".join(users) + "\n")
    return folder


def write_100k(folder: Path, rows: list[Row], movies: dict[int, list[str]], people: dict[int, Row]) -> Path:
    names = (
        *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
        *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
    )
    folder.mkdir()
    ratings = [f"{row['user']}\t{row['movie']}\t{row['rating']}\t{row['time']}" for row in rows]
    (folder / "u.data").write_text("\n".join(ratings) + "\n")
    items = [
        f"{movie}|Amélie {movie}|01-Jan-1995||http://x|" + "|".join(str(int(name in genres)) for name in names)
        for movie, genres in movies.items()
    ]
    (folder / "u.item").write_bytes(("\n".join(items) + "\n").encode("latin-1"))
    users = [f"{user}|{p['age']}|{p['gender']}|{p['occupation']}|{p['zip']}" for user, p in people.items()]
    (folder / "u.user").write_text("\n".join(users) + "\n")
    return folder


def write_latest(folder: Path, rows: list[Row], movies: dict[int, list[str]], people: dict[int, Row]) -> Path:
    folder.mkdir()
    ratings = [f"{row['user']},{row['movie']},{row['rating']}.0,{row['time']}" for row in rows]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]) + "\n")
    titles = [
        f'{movie},"Movie, The ({movie})",{"|".join(genres) or "(no genres listed)"}' for movie, genres in movies.items()
    ]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *titles]) + "\n")
    return folder


def write_parquet(folder: Path, rows: list[Row], movies: dict[int, list[str]], people: dict[int, Row]) -> Path:
    folder.mkdir()
    names = {"user": "user_id", "movie": "item_id", "rating": "rating", "time": "timestamp"}
    pq.write_table(
        pa.table({new: [row[old] for row in rows] for old, new in names.items()}), folder / "x_ratings.parquet"
    )
    genres = pa.table({"item_id": list(movies), "genres": ["|".join(genres) for genres in movies.values()]})
    pq.write_table(genres, folder / "x_movies.parquet")
    users = {name: [person[name] for person in people.values()] for name in ("gender", "age", "occupation", "zip")}
    pq.write_table(pa.table({"user_id": [str(user) for user in people], **users}), folder / "x_users.parquet")
    return folder / "x_ratings.parquet"


def sequence_rows(
    rows: list[Row], movies: dict[int, list[str]], people: dict[int, Row] | None, max_history: int
) -> list[Row]:
    """The rows that the protocol asks for, one rating at a time."""
    expected = []
    for row in rows:
        earlier = [
            other
            for other in sorted(rows, key=lambda other: other["time"])
            if other["user"] == row["user"] and other["time"] < row["time"] and other["rating"] >= 4
        ][-max_history:]
        categories = {movie: "|".join(genres) or None for movie, genres in movies.items()}
        expected.append(
            {
                "label": int(row["rating"] >= 4),
                "movie": row["movie"],
                "category": categories[row["movie"]],
                **(people[row["user"]] if people else {}),
                "movie_history": [other["movie"] for other in earlier],
                "category_history": [categories[other["movie"]] for other in earlier],
                "user": row["user"],
                "time": row["time"],
                "rating": float(row["rating"]),
            }
        )
    return expected


@pytest.mark.parametrize("write", [write_1m, write_100k, write_latest, write_parquet])
@pytest.mark.parametrize("split", [BY_TIME, SplitRule("users", (5, 3, 3))], ids=["time", "users"])
def test_histories_in_every_published_format_are_what_a_plain_loop_gives(
    write: Callable[..., Path], split: SplitRule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_store, "EVENTS_PER_BUCKET", 40)
    monkeypatch.setattr(histories, "_ENTRIES_PER_BATCH", 4 * 1024)
    rows, movies, people = log()
    manifest = movielens.prepare(
        write(tmp_path / "raw", rows, movies, people), tmp_path / "out", split=split, max_history=4
    )
    manifest.verify(checksums=True)
    splits = decoded(manifest)
    check_vocabularies(manifest, splits)
    expected = sequence_rows(rows, movies, None if write is write_latest else people, 4)
    found = [row for part in splits.values() for row in part]
    assert as_set(found) == as_set(masked(expected, manifest))
    assert max(len(row["movie_history"]) for row in found) == 4
    assert manifest.user == "user"
    if split.kind == "users":
        users = [{row["user"] for row in part} for part in splits.values()]
        assert sum(map(len, users)) == len(set.union(*users))
    else:
        times = [[row["time"] for row in splits[name]] for name in ("train", "validation", "test")]
        assert max(times[0]) < min(times[1]) and max(times[1]) < min(times[2])


def test_target_and_history_share_a_table_and_sequences_are_parallel(tmp_path: Path) -> None:
    manifest = movielens.prepare(write_1m(tmp_path / "raw", *log()), tmp_path / "out", split=BY_TIME, max_history=4)
    features = {feature.name: feature for feature in manifest.categorical}
    for name in ("movie", "category"):
        history = features[f"{name}_history"]
        assert (history.table, history.vocabulary) == (name, features[name].vocabulary)
        assert (history.kind, history.events, history.max_length) == ("sequence", "history", 4)
    assert manifest.feature_names[-2:] == ["movie_history", "category_history"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("manifest.json", "test", "train", "validation", "vocabulary")
    ]


def test_a_rank_within_the_user_replaces_timestamps(tmp_path: Path) -> None:
    rows, movies, people = log(users=9, ratings=40)
    for user in people:
        for place, row in enumerate(row for row in rows if row["user"] == user):
            row["time"] = place
    raw = write_parquet(tmp_path / "raw", rows, movies, people)
    table = pq.read_table(raw)
    pq.write_table(table.rename_columns(["user_id", "item_id", "rating", "pos"]), raw)
    manifest = movielens.prepare(raw, tmp_path / "out", split=SplitRule("users", (1, 1, 1), seed=1))
    found = [row for part in decoded(manifest).values() for row in part]
    expected = [{**row} for row in sequence_rows(rows, movies, people, 50)]
    for row in expected:
        del row["time"]
    assert as_set(found) == as_set(masked(expected, manifest))
    assert manifest.time is None
    with pytest.raises(ValueError, match=r"no timestamps .* so no split by time"):
        movielens.prepare(raw, tmp_path / "other", split=SplitRule("time"))


def test_pooled_protocol(tmp_path: Path) -> None:
    rows, movies, people = log()
    raw = write_1m(tmp_path / "raw", rows, movies, people)
    manifest = movielens.prepare(raw, tmp_path / "out", protocol="pooled", positive_rating=5)
    expected = [
        {
            "label": int(row["rating"] >= 5),
            "user_id": row["user"],
            "movie": row["movie"],
            **people[row["user"]],
            "genres": movies[row["movie"]],
            "user": row["user"],
            "time": row["time"],
            "rating": float(row["rating"]),
        }
        for row in rows
    ]
    splits = decoded(manifest)
    check_vocabularies(manifest, splits)
    assert as_set([row for part in splits.values() for row in part]) == as_set(masked(expected, manifest))
    assert "sequence" not in {feature.kind for feature in manifest.categorical}


def test_unified_embedding_protocol(tmp_path: Path) -> None:
    rows, movies, people = log()
    manifest = movielens.prepare(write_1m(tmp_path / "raw", rows, movies, people), tmp_path / "out", protocol="unified")
    splits = decoded(manifest)
    found = [row for part in splits.values() for row in part]
    assert sorted((row["user"], row["time"], row["rating"], row["label"]) for row in found) == sorted(
        (row["user"], row["time"], row["rating"], int(row["rating"] >= 4)) for row in rows if row["rating"] != 3
    )
    assert manifest.feature_names == ["user_id", "movie", "gender", "age", "occupation", "zip", "category"]
    assert manifest.preparation["split"]["kind"] == "random"


def broken(tmp_path: Path, name: str, line: int, text: str, write: Callable[..., Path] = write_1m) -> Path:
    raw = write(tmp_path / "raw", *log())
    lines = (raw / name).read_text(encoding="latin-1").split("\n")
    lines[line - 1] = text
    (raw / name).write_text("\n".join(lines), encoding="latin-1")
    return raw


@pytest.mark.parametrize(
    ("write", "name", "text", "message"),
    [
        (write_1m, "ratings.dat", "2::1::5", "ratings.dat: line 9: 7 columns separated by ':' are required, got 5"),
        (write_1m, "ratings.dat", "2::x::5::9", "ratings.dat: line 9: column 'movie': an integer or nothing .* 'x'"),
        (write_1m, "ratings.dat", "2::1::6::9", r"line 9: column 'rating': a number in \(0, 5\] is required, got '6'"),
        (write_1m, "ratings.dat", "2::1::good::9", r"line 9: column 'rating': a number .* got 'good'"),
        (write_1m, "ratings.dat", "2::1::5::", "line 9: column 'moment': a value is required in every row, got null"),
        (
            write_1m,
            "ratings.dat",
            "2::999::5::9",
            "ratings.dat: line 9: column 'movie': 999 is not listed in .*movies.dat",
        ),
        (
            write_1m,
            "ratings.dat",
            "999::1::5::9",
            "ratings.dat: line 9: column 'user': 999 is not listed in .*users.dat",
        ),
        (write_1m, "movies.dat", "7::Title", "movies.dat: line 9: 3 columns separated by '::' are required, got 2"),
        (write_1m, "movies.dat", "1::Title::War", "movies.dat: movie 1 is listed more than once"),
        (write_1m, "users.dat", "x::F::1::1::1", "users.dat: line 9: column 1: an integer is required, got 'x'"),
        (write_100k, "u.data", "2\t1\t0\t9", r"u.data: line 9: column 'rating': a number in \(0, 5\] .* got '0'"),
        (write_latest, "ratings.csv", "2,1,nan,9", "ratings.csv: line 9: column 'rating': a number .* got 'nan'"),
        (write_latest, "movies.csv", "1,Title", "movies.csv: line 9: 3 columns are required, got 2"),
    ],
)
def test_a_wrong_line_is_named(write: Callable[..., Path], name: str, text: str, message: str, tmp_path: Path) -> None:
    raw = broken(tmp_path, name, 9, text, write)
    with pytest.raises(ValueError, match=message):
        movielens.prepare(raw, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [raw]


def test_missing_files_columns_and_options_that_do_not_go_together(tmp_path: Path) -> None:
    rows, movies, people = log()
    with pytest.raises(FileNotFoundError, match=r"one of \['ratings.dat'.* is required, the folder has none"):
        movielens.prepare(tmp_path, tmp_path / "out")
    raw = write_latest(tmp_path / "latest", rows, movies, people)
    with pytest.raises(FileNotFoundError, match="protocol unified needs its users"):
        movielens.prepare(raw, tmp_path / "out", protocol="unified")
    with pytest.raises(ValueError, match=r"protocol sequence is split by one of \['users', 'time'\], got 'random'"):
        movielens.prepare(raw, tmp_path / "out", split=SplitRule())
    with pytest.raises(ValueError, match="max_history must be at least 1"):
        movielens.prepare(raw, tmp_path / "out", max_history=0)
    (raw / "movies.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"its movies are required, beside it as \['movies.csv', 'items.csv'\]"):
        movielens.prepare(raw, tmp_path / "out")
    parquet = write_parquet(tmp_path / "parquet", rows, movies, people)
    pq.write_table(pq.read_table(parquet).drop_columns("rating"), parquet)
    with pytest.raises(ValueError, match=r"x_ratings.parquet: column 'rating' is missing; the file has"):
        movielens.prepare(parquet, tmp_path / "out")


def test_command_line(tmp_path: Path) -> None:
    raw = write_1m(tmp_path / "raw", *log())
    movielens.main([str(raw), "--out", str(tmp_path / "out"), "--split", "time", "--max-history", "3"])
    assert Manifest.load(tmp_path / "out").preparation["options"]["max_history"] == 3
    with pytest.raises(SystemExit):
        movielens.main([str(raw), "--out", str(tmp_path / "other"), "--protocol", "unified", "--split", "users"])


@pytest.mark.parametrize(("name", "rows"), [("ml-100k", 100_000), ("ml-latest-small", 100_004)])
def test_real_ratings(name: str, rows: int, tmp_path: Path) -> None:
    manifest = movielens.prepare(shared_data(f"{name}_ratings.parquet"), tmp_path / "out")
    assert sum(split.rows for split in manifest.splits.values()) == rows
    manifest.verify(checksums=True)
