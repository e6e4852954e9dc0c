"""Ready-made histories that hold the future, the row's own event or nothing at all are refused with their place."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import parquet
from data_pipelines.schema import CategoricalColumn, LogSchema
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import Manifest
from tests.data_pipelines import truth
from tests.data_pipelines.histories_truth import decoded

Row = dict[str, Any]
SCHEMA = """
label: clicked
categorical: [item, shop]
sequences:
  - {name: items, table: item, max_length: 3, times: times}
  - {name: shops, table: shop, max_length: 3}
  - {name: bought, table: item, max_length: 2, events: purchases}
user: user
time: {column: shown_at, unit: s}
split: {kind: users, fractions: [2, 1, 1], seed: 1}
"""


def rows() -> list[Row]:
    return [
        {
            "clicked": number % 2,
            "item": number % 7,
            "shop": f"s{number % 3}",
            "items": [(number + step) % 7 for step in range(number % 5)],
            "shops": [None if step == 1 else f"s{step}" for step in range(number % 5)],
            "bought": [number % 7] * (number % 2),
            "times": [100 * number + 10 * step for step in range(number % 5)],
            "user": f"u{number % 12}",
            "shown_at": 100 * number + 50,
        }
        for number in range(40)
    ]


def prepare(folder: Path, log: list[Row], schema: str = SCHEMA) -> Manifest:
    (folder / "schema.yaml").write_text(schema)
    raw = truth.write_parquet(folder / "log.parquet", log, row_group_size=16)
    return parquet.prepare(raw, folder / "out", schema=folder / "schema.yaml")


def test_times_are_checked_and_not_kept_and_lists_of_events_reach_the_manifest(tmp_path: Path) -> None:
    manifest = prepare(tmp_path, rows())
    events = {feature.name: feature.events for feature in manifest.categorical if feature.kind == "sequence"}
    assert events == {"items": "history", "shops": "history", "bought": "purchases"}
    assert "times" not in pq.read_schema(manifest.files("train")[0]).names
    # The latest three are kept, of parallel lists the same three; a missing value of an event is a value.
    for row in [row for part in decoded(manifest).values() for row in part]:
        assert len(row["items"]) == len(row["shops"]) <= 3


def test_users_are_never_divided(tmp_path: Path) -> None:
    splits = decoded(prepare(tmp_path, rows()))
    users = [{row["user"] for row in part} for part in splits.values()]
    assert sum(map(len, users)) == len(set.union(*users)) == 12


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("items", None, r"column 'items': a list is required \(an empty history is an empty list\), got null"),
        ("bought", None, r"column 'bought': a list is required \(an empty history is an empty list\), got null"),
        ("times", None, "column 'times': a list is required"),
        ("shops", ["s1"] * 3, r"column 'shops': as many entries as in 'items' are required, .* \(4\), got 3"),
        ("times", [1900, 1910], r"column 'times': a time for each entry of 'items' \(4\), got 2"),
        ("times", [1900, 1920, 1910, 1930], "column 'times': oldest to newest is required, got .*, not sorted"),
        ("times", [1900, None, 1910, 1930], "column 'times': no null times, got"),
        (
            "times",
            [1900, 1910, 1920, 1950],
            r"before the row's own \('shown_at': 1950\), got 1950: the row's own event",
        ),
        (
            "times",
            [1900, 1910, 1920, 9999],
            r"before the row's own \('shown_at': 1950\), got 9999: the row's own event",
        ),
    ],
)
def test_a_wrong_history_is_named(column: str, value: Any, message: str, tmp_path: Path) -> None:
    log = rows()
    log[19] = {**log[19], column: value}
    with pytest.raises(ValueError, match=rf"log.parquet: row group 1, row 19: .*{message}"):
        prepare(tmp_path, log)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("entry", [-1, 7, None])
def test_a_target_or_history_id_outside_of_its_table_is_named(entry: int | None, tmp_path: Path) -> None:
    table = "encoding: ids, num_embeddings: 7"
    schema = SCHEMA.replace("[item, shop]", f"[{{name: item, {table}}}, shop]")
    for column, value in (("item", entry), ("items", [0, 1, 2, entry])):
        log = rows()
        log[19] = {**log[19], column: value}
        with pytest.raises(ValueError, match=rf"row 19: column '{column}': ids must be in \[0, 7\) .*, got {entry}"):
            prepare(tmp_path, log, schema)


def test_times_may_be_timestamps_of_the_kind_of_the_rows_own(tmp_path: Path) -> None:
    first = datetime.datetime(2020, 1, 1)
    log = [
        {
            **row,
            "times": [first + datetime.timedelta(seconds=second) for second in row["times"]],
            "shown_at": first + datetime.timedelta(seconds=row["shown_at"]),
        }
        for row in rows()
    ]
    schema = SCHEMA.replace("time: {column: shown_at, unit: s}", "time: shown_at")
    assert prepare(tmp_path, log, schema).time == "shown_at"
    log[19]["times"][-1] = log[19]["shown_at"]
    with pytest.raises(ValueError, match=r"row 19: column 'times': every event of a history must be before"):
        parquet.prepare(truth.write_parquet(tmp_path / "b", log), tmp_path / "o", schema=tmp_path / "schema.yaml")
    mixed = [{**row, "times": new["times"]} for row, new in zip(rows(), log, strict=True)]
    with pytest.raises(ValueError, match=r"column 'times': times of the kind of 'shown_at' \(int64\), got timestamp"):
        (tmp_path / "mixed").mkdir()
        prepare(tmp_path / "mixed", mixed)


# Each of 30 users comes for four items, one a step, and a history is what came before.
COUNTED = """
label: clicked
categorical: [{name: item, encoding: ids, num_embeddings: 120}]
sequences: [{name: items, table: item}]
"""


def prepare_counted(folder: Path, schema: str) -> Manifest:
    log = [
        {
            "clicked": (user + step) % 2,
            "item": 4 * user + step,
            "items": list(range(4 * user, 4 * user + step)),
            "user": user,
            "step": step,
            "shown_at": 100 * step + user,
        }
        for user in range(30)
        for step in range(4)
    ]
    return prepare(folder, log, schema)


@pytest.mark.parametrize(
    ("columns", "kind", "fractions"),
    [
        ("time: shown_at\nuser: user", "time", [0.8, 0.1, 0.1]),
        ("time: shown_at\nsplit: {fractions: [2, 1, 1]}", "time", [2, 1, 1]),
        ("day: step", "time", [0.8, 0.1, 0.1]),
        ("user: user", "users", [0.8, 0.1, 0.1]),
        ("user: user\nsplit: {seed: 3}", "users", [0.8, 0.1, 0.1]),
    ],
)
def test_unless_told_no_history_of_a_train_row_holds_what_a_test_row_asks_for(
    columns: str, kind: str, fractions: list[float], tmp_path: Path
) -> None:
    manifest = prepare_counted(tmp_path, COUNTED + columns)
    assert (manifest.preparation["split"]["kind"], manifest.preparation["split"]["fractions"]) == (kind, fractions)
    splits = truth.read_all(manifest)
    asked = set(splits["test"]["item"])
    assert asked and not asked & {item for items in splits["train"]["items"] for item in items}


def test_histories_are_not_divided_at_random_and_bags_are(tmp_path: Path) -> None:
    message = r"log\.parquet: split random is not for histories, sequences \['items'\]: .* Use split users .* or time"
    for columns in ("", "split: {fractions: [2, 1, 1]}", "time: shown_at\nuser: user\nsplit: {kind: random}"):
        with pytest.raises(ValueError, match=message):
            prepare_counted(tmp_path, COUNTED + columns)
    assert not (tmp_path / "out").exists()
    bag = "}, {name: items, kind: list, encoding: ids, num_embeddings: 120"
    bags = COUNTED.replace("}]\nsequences: [{name: items", bag)
    assert prepare_counted(tmp_path, bags + "time: shown_at").preparation["split"]["kind"] == "random"


def test_the_order_of_files_matters_to_splits_by_time_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"y": [0, 1] * 50, "a": range(100), "u": range(100)}), tmp_path / "part-2.parquet")
    pq.write_table(pa.table({"y": [1, 0] * 50, "a": range(100), "u": range(100)}), tmp_path / "part-10.parquet")
    schema = LogSchema(label="y", categorical=(CategoricalColumn("a"),), user="u")
    files = [tmp_path / "part-10.parquet", tmp_path / "part-2.parquet"]
    parquet.prepare(files, tmp_path / "out", schema=schema, split=SplitRule("users"))
    with pytest.raises(ValueError, match="is alphabetic"):
        parquet.prepare(files, tmp_path / "other", schema=schema, split=SplitRule("time"))


def test_schemas_that_make_no_sense() -> None:
    history = CategoricalColumn("items", "sequence", table="item", max_length=3)
    with pytest.raises(ValueError, match=r"describe the same events 'history', so max_length must be the same"):
        LogSchema(label="y", categorical=(history, CategoricalColumn("shops", "sequence", max_length=4)))
    with pytest.raises(ValueError, match=r"times 'when' need the log's own time column"):
        LogSchema(label="y", categorical=(CategoricalColumn("items", "sequence", times="when"),))
    with pytest.raises(ValueError, match="events and times belong to kind 'sequence', got 'list'"):
        CategoricalColumn("tags", "list", events="history")


def test_a_split_by_users_needs_users(tmp_path: Path) -> None:
    pq.write_table(pa.table({"y": [0, 1, 0], "a": ["x", "y", "z"]}), tmp_path / "log.parquet")
    schema = LogSchema(label="y", categorical=(CategoricalColumn("a"),))
    with pytest.raises(ValueError, match="split users needs a user column"):
        parquet.prepare(tmp_path / "log.parquet", tmp_path / "out", schema=schema, split=SplitRule("users"))
    with pytest.raises(ValueError, match="split given needs a column"):
        parquet.prepare(tmp_path / "log.parquet", tmp_path / "out", schema=schema, split=SplitRule("given"))
    with pytest.raises(ValueError, match="split given: takes no fractions"):
        SplitRule.of("given", (1, 1, 1))
