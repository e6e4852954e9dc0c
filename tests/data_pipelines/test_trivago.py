from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from data_pipelines import event_store, trivago
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import Manifest
from tests.data_pipelines.histories_truth import as_set, check_vocabularies, decoded, masked, shared_data

Row = dict[str, Any]
NAMES = (
    *("user_id", "session_id", "timestamp", "step", "action_type", "reference", "platform", "city", "device"),
    *("current_filters", "impressions", "prices"),
)
ACTIONS = ("clickout item", "interaction item image", "search for item", "filter selection", "search for poi")


def log(seed: int = 0, events: int = 300) -> list[Row]:
    """Events of a few users in a few sessions, with equal seconds, filters that look like items, and unknown items."""
    random = np.random.default_rng(seed)
    rows: list[Row] = []
    steps: dict[tuple[str, str], int] = {}
    for number in range(events):
        user, session = f"U{random.integers(8)}", f"s{random.integers(3)}"
        steps[user, session] = steps.get((user, session), 0) + 1
        action = ACTIONS[random.integers(len(ACTIONS))]
        shown = random.permutation(30)[: random.integers(1, 9)].tolist()
        reference = str(random.choice(shown) if random.random() < 0.9 else 99)
        if action == "filter selection":
            reference = "5"
        elif action == "search for item" and random.random() < 0.5:
            reference = "unknown"
        clickout = action == "clickout item"
        rows.append(
            {
                "user_id": user,
                "session_id": session,
                "timestamp": 1_541_000_000 + number // 4,
                "step": steps[user, session],
                "action_type": action,
                "reference": reference,
                "platform": ["FR", "BR"][random.integers(2)],
                "city": ["Marseille, France", "Rio", 'Sydney "CBD"'][random.integers(3)],
                "device": "mobile",
                "current_filters": "Sort by Price|Hotel" if random.random() < 0.3 else None,
                "impressions": "|".join(map(str, shown)) if clickout else None,
                "prices": "|".join(str(random.integers(40, 44)) for _ in shown) if clickout else None,
            }
        )
    return rows


def write_csv(path: Path, rows: list[Row]) -> Path:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as stream:
        writer = csv.DictWriter(stream, NAMES, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[Row]) -> Path:
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in NAMES}), path)
    return path


def expected_rows(rows: list[Row], history_of: str, max_history: int) -> list[Row]:
    """The rows that the module promises, one click-out at a time."""
    expected = []
    for clickout in (row for row in rows if row["action_type"] == "clickout item"):
        moment = (clickout["timestamp"], clickout["step"])
        earlier = [
            row
            for row in sorted(rows, key=lambda row: (row["timestamp"], row["step"]))
            if row["user_id"] == clickout["user_id"]
            and (history_of == "user" or row["session_id"] == clickout["session_id"])
            and (row["timestamp"], row["step"]) < moment
            and ("item" in row["action_type"])
            and row["reference"].isdecimal()
        ][-max_history:]
        items = clickout["impressions"].split("|")
        prices = [int(price) for price in clickout["prices"].split("|")]
        name = f"{clickout['user_id']} {clickout['session_id']} {clickout['step']}"
        for position, (item, price) in enumerate(zip(items, prices, strict=True), 1):
            expected.append(
                {
                    "clicked": int(item == clickout["reference"]),
                    "price": np.float32(np.log1p(price)),
                    "item": item,
                    "position": position,
                    "price_rank": 1 + sum(other < price for other in prices),
                    **{column: clickout[column] for column in ("platform", "city", "device")},
                    "action": "clickout item",
                    "filters": (clickout["current_filters"] or "").split("|") if clickout["current_filters"] else [],
                    "item_history": [row["reference"] for row in earlier],
                    "action_history": [row["action_type"] for row in earlier],
                    "clickout": xxhash.xxh64_intdigest(name.encode()) >> 1,
                    "session_id": clickout["session_id"],
                    "user_id": clickout["user_id"],
                    "timestamp": clickout["timestamp"],
                }
            )
    return expected


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz", "train.parquet"])
@pytest.mark.parametrize("history_of", ["user", "session"])
def test_impressions_and_histories_are_what_a_plain_loop_gives(
    name: str, history_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_store, "EVENTS_PER_BUCKET", 100)
    rows = log()
    raw = (write_parquet if name.endswith("parquet") else write_csv)(tmp_path / name, rows)
    manifest = trivago.prepare(raw, tmp_path / "out", history_of=history_of, max_history=5, min_count=1)
    manifest.verify(checksums=True)
    splits = decoded(manifest)
    check_vocabularies(manifest, splits)
    expected = expected_rows(rows, history_of, 5)
    for row in expected:
        row["price"] = np.float32(row["price"])
    found = [{**row, "price": np.float32(row["price"])} for part in splits.values() for row in part]
    assert as_set(found) == as_set(masked(expected, manifest))
    assert max(len(row["item_history"]) for row in found) == 5
    times = [[row["timestamp"] for row in splits[name]] for name in ("train", "validation", "test")]
    assert max(times[0]) < min(times[1]) and max(times[1]) < min(times[2])


def test_groups_and_what_the_manifest_tells(tmp_path: Path) -> None:
    rows = log()
    raw = write_csv(tmp_path / "train.csv", rows)
    manifest = trivago.prepare(raw, tmp_path / "out")
    assert (manifest.user, manifest.time) == ("clickout", "timestamp")
    clickouts = [row for row in rows if row["action_type"] == "clickout item"]
    assert manifest.preparation["options"]["events"] == {
        "all": 300,
        "click-outs": len(clickouts),
        "click-outs of items that their lists do not hold": sum(
            row["reference"] not in row["impressions"].split("|") for row in clickouts
        ),
    }
    by_session = trivago.prepare(raw, tmp_path / "sessions", group="session")
    assert by_session.user == "session_id"
    assert {"clickout", "user_id"} <= set(pq.read_schema(by_session.files("test")[0]).names)


def test_a_split_by_users_keeps_each_user_whole_whatever_the_group(tmp_path: Path) -> None:
    raw = write_csv(tmp_path / "train.csv", log())
    splits = decoded(trivago.prepare(raw, tmp_path / "out", split=SplitRule("users", (2, 1, 1))))
    users = [{row["user_id"] for row in part} for part in splits.values()]
    assert sum(map(len, users)) == len(set.union(*users))


def test_hashed_items_are_equal_in_target_and_history(tmp_path: Path) -> None:
    rows = log()
    raw = write_csv(tmp_path / "train.csv", rows)
    manifest = trivago.prepare(raw, tmp_path / "out", item_encoding="hash", max_history=5)
    features = {feature.name: feature for feature in manifest.categorical}
    assert features["item"].num_embeddings is None and features["item_history"].table == "item"
    hashed = {xxhash.xxh64_intdigest(str(item).encode()) >> 1 for item in [*range(30), 99]}
    table = pq.read_table(manifest.files("train")[0]).to_pydict()
    assert set(table["item"]) <= hashed
    assert {item for history in table["item_history"] for item in history} <= hashed
    bounded = trivago.prepare(raw, tmp_path / "bounded", item_encoding="hash", item_rows=13, max_history=5)
    assert {feature.num_embeddings for feature in bounded.categorical if feature.table == "item"} == {13}
    rows_of = pq.read_table(bounded.files("train")[0]).to_pydict()
    assert rows_of["item"] == [item % 13 for item in table["item"]]
    assert rows_of["item_history"] == [[item % 13 for item in history] for history in table["item_history"]]
    assert pq.read_schema(bounded.files("train")[0]).field("item").type == pa.int32()
    with pytest.raises(ValueError, match="num_embeddings is for encodings 'ids' and 'hash', got 'vocabulary'"):
        trivago.prepare(raw, tmp_path / "other", item_rows=13)


def changed(column: str, value: Any) -> Callable[[Row], Row]:
    return lambda row: {**row, column: value}


@pytest.mark.parametrize("write", [write_csv, write_parquet])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("prices", "40"), r"column 'prices': a price for each of the \d impressions is required, got 1"),
        (changed("prices", "40|-1|x"), r"column 'prices': (a price for each|numbers of at least 0)"),
        (changed("reference", None), "column 'reference': a value is required in a 'clickout item', got null"),
        (changed("impressions", None), "column 'impressions': a value is required in a 'clickout item', got null"),
        (changed("user_id", None), "column 'user_id': a value is required in every row, got null"),
        (changed("timestamp", -5), r"column 'timestamp': an integer in \[0, 8796093022208\) is required, got -5"),
        (changed("step", 2**20), r"column 'step': an integer in \[0, 1048576\) is required, got 1048576"),
    ],
)
def test_a_wrong_event_is_named(
    write: Callable[[Path, list[Row]], Path], change: Callable[[Row], Row], message: str, tmp_path: Path
) -> None:
    rows = log()
    place = next(
        number
        for number, row in enumerate(rows)
        if number > 50 and row["impressions"] and row["impressions"].count("|") > 2
    )
    rows[place] = change(rows[place])
    where = f"line {place + 2}" if write is write_csv else f"row group 0, row {place}"
    raw = write(tmp_path / ("train.csv" if write is write_csv else "train.parquet"), rows)
    with pytest.raises(ValueError, match=f"{raw.name}: {where}: {message}"):
        trivago.prepare(raw, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [raw]


def test_prices_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    rows = [row for row in log() if row["prices"]]
    rows[3]["prices"] = "x" + rows[3]["prices"][2:]
    with pytest.raises(ValueError, match=r"train.csv: line 5: column 'prices': numbers of at least 0 .* got 'x'"):
        trivago.prepare(write_csv(tmp_path / "train.csv", rows), tmp_path / "out")


def test_missing_columns_broken_lines_and_logs_without_clickouts(tmp_path: Path) -> None:
    raw = write_csv(tmp_path / "train.csv", log())
    lines = raw.read_text().split("\n")
    raw.write_text("\n".join([lines[0].replace("step,", "steps,"), *lines[1:]]))
    with pytest.raises(ValueError, match=r"train.csv: line 1: columns \['step'\] are required once, the header has"):
        trivago.prepare(raw, tmp_path / "out")
    raw.write_text("\n".join([*lines[:7], lines[7] + ",x", *lines[8:]]))
    with pytest.raises(ValueError, match=r"train.csv: line 8: 12 columns separated by ',' are required, got 13"):
        trivago.prepare(raw, tmp_path / "out")
    raw.write_text("\n".join([*lines[:7], lines[7].replace(",15410", ",x5410", 1), *lines[8:]]))
    with pytest.raises(ValueError, match=r"train.csv: line 8: column 'timestamp': an integer or nothing is required"):
        trivago.prepare(raw, tmp_path / "out")
    write_csv(raw, [row for row in log() if not row["impressions"]])
    with pytest.raises(ValueError, match="no event of action_type 'clickout item'"):
        trivago.prepare(raw, tmp_path / "out")


def test_command_line_and_splits_that_would_show_the_future(tmp_path: Path) -> None:
    raw = write_csv(tmp_path / "train.csv", log())
    trivago.main([str(raw), "--out", str(tmp_path / "out"), "--history-of", "session", "--max-history", "3"])
    assert Manifest.load(tmp_path / "out").preparation["options"]["history_of"] == "session"
    with pytest.raises(ValueError, match="keeps the future out, got 'random'"):
        trivago.prepare(raw, tmp_path / "other", split=SplitRule())


def test_real_sessions(tmp_path: Path) -> None:
    manifest = trivago.prepare(shared_data("trivago_100k.parquet"), tmp_path / "out")
    assert sum(split.rows for split in manifest.splits.values()) == 312_539
    assert manifest.preparation["options"]["events"]["click-outs"] == 13_597
