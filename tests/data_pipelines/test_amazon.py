from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import amazon, event_store
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import Manifest
from tests.data_pipelines.histories_truth import UNKNOWN, check_vocabularies, decoded, shared_data

Row = dict[str, Any]
ITEMS = [f"B{number:03}" for number in range(40)]
CATEGORIES = {
    item: [["Electronics", "Toys"], ["Electronics", f"leaf {number % 6}"]] for number, item in enumerate(ITEMS)
}
LEAVES = {item: listed[-1][-1] for item, listed in CATEGORIES.items()}


def log(seed: int = 0) -> list[Row]:
    """Reviews on few days, in no order: users with 1 to 12 of them, the same item twice now and then."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(60):
        for _ in range(random.integers(1, 13)):
            item = ITEMS[int(len(ITEMS) * random.random() ** 2)]
            rows.append({"user": f"A{user:02}", "item": item, "time": 86_400 * int(random.integers(9))})
    random.shuffle(rows)  # type: ignore[arg-type]
    return rows


def review(row: Row) -> Row:
    """A line of the published reviews."""
    return {
        "reviewerID": row["user"],
        "asin": row["item"],
        "reviewerName": 'J. "Jo" Doe',
        "helpful": [0, 1],
        "reviewText": "it's {ok}: \u00e9",
        "overall": 5.0,
        "unixReviewTime": row["time"],
        "reviewTime": "07 13, 2014",
    }


def write_lines(path: Path, lines: list[str]) -> Path:
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_2014(folder: Path, rows: list[Row]) -> tuple[Path, Path | None]:
    meta = [repr({"asin": item, "title": "it's", "categories": listed}) for item, listed in CATEGORIES.items()]
    write_lines(folder / "meta.json.gz", [*meta, repr({"asin": "never reviewed"})])
    reviews = write_lines(folder / "reviews_5.json.gz", [json.dumps(review(row)) for row in rows])
    return reviews, folder / "meta.json.gz"


def write_loose(folder: Path, rows: list[Row]) -> tuple[Path, Path | None]:
    reviews = write_lines(folder / "reviews.json", [repr(review(row)) for row in rows])
    return reviews, write_2014(folder, rows)[1]


def write_2023(folder: Path, rows: list[Row]) -> tuple[Path, Path | None]:
    reviews = [
        {"user_id": row["user"], "asin": "variant", "parent_asin": row["item"], "timestamp": row["time"]}
        for row in rows
    ]
    meta = [{"parent_asin": item, "categories": listed[-1]} for item, listed in CATEGORIES.items()]
    return (
        write_lines(folder / "reviews.jsonl", [json.dumps(row) for row in reviews]),
        write_lines(folder / "meta.jsonl", [json.dumps(row) for row in meta]),
    )


def write_csv(folder: Path, rows: list[Row]) -> tuple[Path, Path | None]:
    lines = [f'{row["user"]},{row["item"]},{row["time"]},"{LEAVES[row["item"]]}"' for row in rows]
    return write_lines(folder / "reviews.csv", ["user_id,item_id,timestamp,category", *lines]), None


def write_headerless(folder: Path, rows: list[Row]) -> tuple[Path, Path | None]:
    lines = [f"{row['user']},{row['item']},5.0,{row['time']}" for row in rows]
    return write_lines(folder / "ratings.csv.gz", lines), write_2014(folder, rows)[1]


def write_parquet(folder: Path, rows: list[Row]) -> tuple[Path, Path | None]:
    columns = {"user_id": "user", "item_id": "item", "timestamp": "time"}
    pq.write_table(pa.table({new: [row[old] for row in rows] for new, old in columns.items()}), folder / "r.parquet")
    pq.write_table(pa.table({"item_id": list(LEAVES), "category": list(LEAVES.values())}), folder / "items.parquet")
    return folder / "r.parquet", folder / "items.parquet"


def lists(rows: list[Row]) -> dict[str, list[Row]]:
    """Every user's reviews, by time, then as in the file."""
    users: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        users.setdefault(row["user"], []).append(row)
    return users


def check(rows: list[Row], splits: dict[str, list[Row]], max_history: int, *, has_categories: bool = True) -> None:
    """Compare all rows with the protocol, one review at a time."""
    found: dict[tuple[str, int], list[Row]] = {}
    by_user = lists(rows)
    all_items = {row["item"] for row in rows}
    positions: Counter[str] = Counter()
    for row in [row for part in splits.values() for row in part]:
        # Two rows a review, the user's reviews in order.
        found.setdefault((row["user"], positions[row["user"]] // 2), []).append(row)
        positions[row["user"]] += 1
    expected_keys = {(user, place) for user, reviews in by_user.items() for place in range(len(reviews) - 1)}
    assert found.keys() == expected_keys
    known = {row["item"] for row in splits["train"]} | {item for row in splits["train"] for item in row["item_history"]}
    for (user, place), (positive, negative) in found.items():
        target, past = by_user[user][place + 1], by_user[user][: place + 1][-max_history:]
        assert (positive["label"], negative["label"]) == (1, 0)
        assert positive["item"] == (target["item"] if target["item"] in known else UNKNOWN)
        assert negative["item"] in all_items - {review["item"] for review in by_user[user]} | {UNKNOWN}
        for row in (positive, negative):
            assert row["item_history"] == [item if item in known else UNKNOWN for item in (r["item"] for r in past)]
            assert row["time"] == target["time"]
            if has_categories:
                assert row["item"] == UNKNOWN or row["category"] == LEAVES[row["item"]]
                pairs = zip(row["item_history"], row["category_history"], strict=True)
                assert all(item == UNKNOWN or category == LEAVES[item] for item, category in pairs)


@pytest.mark.parametrize("write", [write_2014, write_loose, write_2023, write_csv, write_headerless, write_parquet])
def test_rows_in_every_published_format_are_what_a_plain_loop_gives(
    write: Callable[..., tuple[Path, Path | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_store, "EVENTS_PER_BUCKET", 60)
    rows = log()
    raw, meta = write(tmp_path, rows)
    manifest = amazon.prepare(raw, tmp_path / "out", meta=meta, max_history=4, validation_users=0.3)
    manifest.verify(checksums=True)
    splits = decoded(manifest)
    check_vocabularies(manifest, splits)
    check(rows, splits, 4)
    assert manifest.feature_names == ["item", "category", "item_history", "category_history"]


def test_train_asks_for_all_but_the_last_item_and_each_users_last_is_in_one_other_split(tmp_path: Path) -> None:
    rows = log()
    raw, _ = write_csv(tmp_path, rows)
    splits = decoded(amazon.prepare(raw, tmp_path / "out", validation_users=0.3))
    per_user = {name: Counter(row["user"] for row in part) for name, part in splits.items()}
    for user, reviews in lists(rows).items():
        assert per_user["train"][user] == 2 * max(0, len(reviews) - 2)
        held_out = sorted([per_user["validation"][user], per_user["test"][user]])
        assert held_out == ([0, 2] if len(reviews) > 1 else [0, 0])


@pytest.mark.parametrize("split", [SplitRule("users", (2, 1, 1)), SplitRule("time", (2, 1, 1))], ids=["users", "time"])
def test_other_splits(split: SplitRule, tmp_path: Path) -> None:
    rows = log()
    raw, meta = write_2014(tmp_path, rows)
    splits = decoded(amazon.prepare(raw, tmp_path / "out", meta=meta, split=split))
    parts = [splits[name] for name in ("train", "validation", "test")]
    if split.kind == "users":
        check(rows, splits, 50)
        users = [{row["user"] for row in part} for part in parts]
        assert sum(map(len, users)) == len(set.union(*users))
    else:
        times = [[row["time"] for row in part] for part in parts]
        assert max(times[0]) < min(times[1]) and max(times[1]) < min(times[2])


def test_drawn_items_are_uniform_over_what_the_user_never_reviewed_and_do_not_depend_on_buckets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"user": f"u{user}", "item": ITEMS[(user + step) % 8], "time": step}
        for user in range(700)
        for step in (0, 1, 2)
    ]
    raw, _ = write_csv(tmp_path, rows)
    splits = decoded(amazon.prepare(raw, tmp_path / "one"))
    drawn = Counter(row["item"] for part in splits.values() for row in part if not row["label"])
    assert drawn.keys() == set(ITEMS[:8])
    # 1,400 draws, each item equally likely over all users: within five standard deviations of 175.
    assert all(abs(count - 175) < 5 * 12.4 for count in drawn.values())

    def negatives(name: str, **settings: Any) -> list[tuple[Any, ...]]:
        parts = decoded(amazon.prepare(raw, tmp_path / name, **settings)).values()
        return sorted((row["user"], row["time"], row["item"]) for part in parts for row in part if not row["label"])

    before = sorted(
        (row["user"], row["time"], row["item"]) for part in splits.values() for row in part if not row["label"]
    )
    assert negatives("seed", sampling_seed=1) != before
    monkeypatch.setattr(event_store, "EVENTS_PER_BUCKET", 100)
    assert negatives("many") == before


def test_reviews_without_categories_and_items_without_metadata(tmp_path: Path) -> None:
    rows = log()
    raw, _ = write_headerless(tmp_path, rows)
    manifest = amazon.prepare(raw, tmp_path / "out")
    assert manifest.feature_names == ["item", "item_history"]
    check(rows, decoded(manifest), 50, has_categories=False)
    meta = write_lines(tmp_path / "some.json", [json.dumps({"asin": item, "categories": []}) for item in ITEMS[1:]])
    with pytest.raises(ValueError, match=r"some.json: categories of the items .* are required, it has none"):
        amazon.prepare(raw, tmp_path / "other", meta=meta)
    write_lines(meta, [json.dumps({"asin": item, "category": ["a", item]}) for item in ITEMS[1:]])
    manifest = amazon.prepare(raw, tmp_path / "other", meta=meta)
    assert manifest.preparation["options"]["items_without_category"] == 1
    for row in decoded(manifest)["train"]:
        assert row["category"] == (None if row["item"] == ITEMS[0] else row["item"])


def test_named_columns_of_a_csv_without_a_header(tmp_path: Path) -> None:
    rows = log()
    raw = write_lines(tmp_path / "2018.csv", [f"{row['item']},{row['user']},4.0,{row['time']}" for row in rows])
    manifest = amazon.prepare(raw, tmp_path / "out", columns=("item", "user", "rating", "timestamp"))
    check(rows, decoded(manifest), 50, has_categories=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"reviewerID": "A", "asin": "B001"', "line 5: a JSON object is required"),
        ('["A", "B001", 3]', "line 5: a JSON object is required"),
        (
            '{"reviewerID": "A", "unixReviewTime": 3}',
            "line 5: column 'item': a value is required in every row, got null",
        ),
        (
            '{"reviewerID": "A", "asin": "B001", "unixReviewTime": "x"}',
            "line 5: column 'unixReviewTime': int is required",
        ),
        (
            '{"reviewerID": 7, "asin": "B001", "unixReviewTime": 3}',
            "line 5: column 'reviewerID': str is required, got 7",
        ),
        ("", "line 5: a JSON object is required"),
    ],
)
def test_a_wrong_review_is_named(line: str, message: str, tmp_path: Path) -> None:
    lines = [json.dumps(review(row)) for row in log()]
    raw = write_lines(tmp_path / "reviews.json", [*lines[:4], line, *lines[5:]])
    with pytest.raises(ValueError, match=f"reviews.json: {message}"):
        amazon.prepare(raw, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [raw]


def test_wrong_files_are_named(tmp_path: Path) -> None:
    raw, meta = write_2014(tmp_path, log())
    assert meta is not None
    broken = write_lines(tmp_path / "broken.json", ["{'asin': 'B001'}", "{'asin': "])
    with pytest.raises(ValueError, match=r"broken.json: line 2: a JSON object is required"):
        amazon.prepare(raw, tmp_path / "out", meta=broken)
    write_lines(broken, ["{'title': 'x'}"])
    with pytest.raises(ValueError, match=r"line 1: 'asin' or 'parent_asin' is required, got \['title'\]"):
        amazon.prepare(raw, tmp_path / "out", meta=broken)
    meta.write_bytes(meta.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"meta.json.gz: truncated or damaged after line \d+"):
        amazon.prepare(raw, tmp_path / "out", meta=meta)
    with pytest.raises(
        ValueError, match=r"a column of \['timestamp', .* is required, the file has \['reviewerID', 'asin'"
    ):
        amazon.prepare(write_lines(tmp_path / "r.json", ['{"reviewerID": "A", "asin": "B"}']), tmp_path / "out")
    with pytest.raises(ValueError, match=r"line 1: a header, or the columns .* got \['a', 'b', 'c'\]"):
        amazon.prepare(write_lines(tmp_path / "r.csv", ["a,b,c"]), tmp_path / "out")
    csv = write_lines(tmp_path / "r.csv", ["user_id,item_id,timestamp,category", "u,a,1,x", "u,b,2,x", "u,a,3,y"])
    with pytest.raises(
        ValueError, match=r"r.csv: line 4: column 'category': one category an item, got 'y' and 'x' of 'a'"
    ):
        amazon.prepare(csv, tmp_path / "out")
    csv = write_lines(tmp_path / "r.csv", ["user_id,item_id,timestamp", "u,a,1", "u,b,2", "v,a,3"])
    with pytest.raises(ValueError, match=r"r.csv: user 'u' reviewed all 2 items, so no item of label 0 is left"):
        amazon.prepare(csv, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line_and_ranks_in_place_of_times(tmp_path: Path) -> None:
    raw, _ = write_csv(tmp_path, log())
    amazon.main([str(raw), "--out", str(tmp_path / "out"), "--validation-users", "0.3", "--max-history", "3"])
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.preparation["options"]["split"] == "last item"
    ranked, _ = write_parquet(tmp_path, [{**row, "item": number % 9} for number, row in enumerate(log())])
    table = pq.read_table(ranked)
    pq.write_table(table.rename_columns(["user_id", "item_id", "pos"]), ranked)
    assert amazon.prepare(ranked, tmp_path / "ranked").time is None
    with pytest.raises(ValueError, match=r"no timestamps .* so no split by time"):
        amazon.prepare(ranked, tmp_path / "other", split=SplitRule("time"))


def test_real_sequences(tmp_path: Path) -> None:
    raw, meta = shared_data("s3rec_beauty.parquet"), shared_data("s3rec_beauty_items.parquet")
    manifest = amazon.prepare(raw, tmp_path / "out", meta=meta)
    users, reviews = 22_363, 198_502
    assert manifest.splits["train"].rows == 2 * (reviews - 2 * users)
    assert manifest.splits["validation"].rows + manifest.splits["test"].rows == 2 * users
