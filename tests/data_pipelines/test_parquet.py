"""Any click log by a schema.yaml, against a plain loop."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from data_pipelines import parquet, sources
from data_pipelines.schema import CategoricalColumn, LogSchema, NumericColumn
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import Manifest
from tests.data_pipelines import truth

SCHEMA = """
label: clicked
numeric:
  - price
  - {name: age, transform: bucket}
  - {name: visits, transform: both}
categorical:
  - site
  - {name: item, min_count: 2}
  - {name: tags, kind: list, max_length: 3}
  - {name: campaign, encoding: hash}
  - {name: hour, encoding: ids, num_embeddings: 24}
sequences:
  - {name: history, table: item, max_length: 4}
user: user_id
time: {column: shown_at, unit: s}
extra: [country]
defaults: {transform: none}
split: {kind: time, fractions: [6, 2, 2]}
"""


def rows_of(count: int, seed: int = 0) -> list[truth.Row]:
    random = np.random.default_rng(seed)

    def items(longest: int) -> list[int | None]:
        return [None if random.random() < 0.05 else int(random.integers(20)) for _ in range(random.integers(longest))]

    return [
        {
            "clicked": bool(random.random() < 0.3),
            "price": None if random.random() < 0.1 else float(random.normal()),
            "age": None if random.random() < 0.1 else int(random.integers(18, 99)),
            "visits": int(random.integers(-1, 1000)),
            "site": None if random.random() < 0.1 else f"site-{random.integers(5)}",
            "item": int(random.integers(20)),
            "tags": [f"t{random.integers(9)}" for _ in range(random.integers(6))],
            "campaign": int(random.integers(-(2**40), 2**40)),
            "hour": number % 24,
            "history": items(9),
            "user_id": f"u{random.integers(30)}",
            "shown_at": 1_600_000_000 + 3600 * number,
            "country": ["de", "fr"][number % 2],
            "ignored": "x",
        }
        for number in range(count)
    ]


def prepare(tmp_path: Path, rows: list[truth.Row], schema: str = SCHEMA, **settings: Any) -> Manifest:
    (tmp_path / "schema.yaml").write_text(schema)
    raw = truth.write_parquet(tmp_path / "log.parquet", rows, row_group_size=50)
    return parquet.prepare(raw, tmp_path / "out", schema=tmp_path / "schema.yaml", **settings)


def latest(values: list[Any], max_length: int) -> list[Any]:
    return values[-max_length:]


def test_every_kind_of_column_is_what_a_plain_loop_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BATCH_ROWS", 23)
    rows = rows_of(150)
    manifest = prepare(tmp_path, rows)
    splits = truth.read_all(manifest)
    found = {name: [value for split in splits.values() for value in split[name]] for name in splits["train"]}
    train = rows[:90]
    sites = truth.vocabulary([row["site"] for row in train], 1)
    ages = truth.vocabulary([truth.bucket(row["age"]) for row in train], 1)
    visits = truth.vocabulary([truth.bucket(row["visits"]) for row in train], 1)
    tags = truth.vocabulary([tag for row in train for tag in latest(row["tags"], 3)], 1)
    shared = [row["item"] for row in train] + [item for row in train for item in latest(row["history"], 4)]
    items = truth.vocabulary(shared, 2)
    expected = {
        "clicked": [int(row["clicked"]) for row in rows],
        "price": [np.float32(row["price"] or 0) for row in rows],
        "age": [ages.get(truth.bucket(row["age"]), 0) for row in rows],
        "visits": [truth.log1p(row["visits"]) for row in rows],
        "visits_bucket": [visits.get(truth.bucket(row["visits"]), 0) for row in rows],
        "site": [sites.get(row["site"], 0) for row in rows],
        "item": [items.get(row["item"], 0) for row in rows],
        "tags": [[tags.get(tag, 0) for tag in latest(row["tags"], 3)] for row in rows],
        "campaign": [xxhash.xxh64_intdigest(row["campaign"].to_bytes(8, "little", signed=True)) >> 1 for row in rows],
        "hour": [row["hour"] for row in rows],
        "history": [[items.get(item, 0) for item in latest(row["history"], 4)] for row in rows],
        "user_id": [row["user_id"] for row in rows],
        "shown_at": [row["shown_at"] for row in rows],
        "country": [row["country"] for row in rows],
    }
    assert found == expected


def test_manifest_describes_the_features(tmp_path: Path) -> None:
    manifest = prepare(tmp_path, rows_of(150))
    manifest.verify(checksums=True)
    features = {feature.name: feature for feature in manifest.categorical}
    assert manifest.numeric_names == ["price", "visits"]
    assert [feature.transform for feature in manifest.numeric] == ["none", "log1p"]
    assert manifest.feature_names == ["site", "item", "tags", "campaign", "hour", "age", "visits_bucket", "history"]
    assert (manifest.user, manifest.time, manifest.source) == ("user_id", "shown_at", "parquet")
    assert features["history"].vocabulary == features["item"].vocabulary
    assert features["history"].num_embeddings == features["item"].num_embeddings
    assert (features["history"].kind, features["history"].table, features["history"].max_length) == (
        "sequence",
        "item",
        4,
    )
    assert (features["hour"].num_embeddings, features["hour"].out_of_vocabulary) == (24, None)
    assert features["campaign"].num_embeddings is None
    schema = pq.read_schema(manifest.files("train")[0])
    assert schema.field("tags").type.value_type == pa.int32()
    assert schema.field("campaign").type == pa.int64()
    assert schema.field("hour").type == pa.int32()
    assert pq.read_schema(manifest.root / "vocabulary" / "item.parquet").field("value").type == pa.int64()


@pytest.mark.parametrize(
    "moments",
    [
        [datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=6 * number) for number in range(40)],
        [datetime.date(2024, 1, 1) + datetime.timedelta(days=number // 4) for number in range(40)],
        [1_704_067_200_000 + 21_600_000 * number for number in range(40)],
    ],
    ids=["timestamp", "date", "milliseconds"],
)
def test_last_day_of_any_type_of_time_is_held_out(moments: list[Any], tmp_path: Path) -> None:
    rows = [{"y": number % 2, "c": number, "t": moment} for number, moment in enumerate(moments)]
    raw = truth.write_parquet(tmp_path / "log.parquet", rows[::-1])
    unit = ", unit: ms" if isinstance(moments[0], int) else ""
    (tmp_path / "s.yaml").write_text(
        f"label: y\ncategorical: [c]\ntime: {{column: t{unit}}}\nsplit: {{kind: last-day}}"
    )
    if isinstance(moments[0], datetime.date) and not isinstance(moments[0], datetime.datetime):
        # All rows of the last day have one moment, so they cannot be halved.
        with pytest.raises(ValueError, match=r"\['validation'\] would be empty"):
            parquet.prepare(raw, tmp_path / "out", schema=tmp_path / "s.yaml")
        return
    manifest = parquet.prepare(raw, tmp_path / "out", schema=tmp_path / "s.yaml")
    assert sorted(truth.read(manifest, "validation")["t"]) == moments[36:38]
    assert sorted(truth.read(manifest, "test")["t"]) == moments[38:]


def test_schema_may_be_given_as_an_object(tmp_path: Path) -> None:
    raw = truth.write_parquet(tmp_path / "log.parquet", rows_of(60))
    schema = LogSchema("clicked", (NumericColumn("price", "none"),), (CategoricalColumn("site"),), user="user_id")
    manifest = parquet.prepare(raw, tmp_path / "out", schema=schema, split=SplitRule("time"))
    assert [split.rows for split in manifest.splits.values()] == [48, 6, 6]


def test_the_example_in_the_documentation_is_a_schema(tmp_path: Path) -> None:
    text = parquet.__doc__ or ""
    example = text[text.index("    label: clicked") : text.index("What the settings mean")]
    (tmp_path / "schema.yaml").write_text(example)
    schema, split = parquet.read_schema(tmp_path / "schema.yaml")
    assert [column.name for column in schema.features] == [
        *("site", "item", "tags", "campaign", "hour", "age", "history", "past_sites")
    ]
    assert split == SplitRule("time", (8.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label: [", "not YAML"),
        ("- label", "the schema must be a mapping"),
        ("categorical: [a]", "key 'label' is required"),
        ("label: y", "names no feature"),
        ("label: y\nfeatures: [a]", r"unknown keys \['features'\]"),
        ("label: y\ncategorical: a", "categorical must be a list"),
        ("label: y\ncategorical: [{table: a}]", "categorical: name must be the name of a column"),
        ("label: y\ncategorical: [{name: a, size: 3}]", r"unknown keys \['size'\]"),
        ("label: y\ncategorical: [{name: a, min_count: few}]", "min_count must be of type int, got 'few'"),
        ("label: y\ncategorical: [{name: a, min_count: 0}]", "min_count must be at least 1"),
        ("label: y\ncategorical: [{name: a, kind: bag}]", "kind must be one of"),
        ("label: y\ncategorical: [{name: a, max_length: 3}]", "belongs to kind 'list' or 'sequence'"),
        ("label: y\ncategorical: [{name: a, encoding: ids}]", "num_embeddings must be given"),
        ("label: y\ncategorical: [{name: a, encoding: hash, min_count: 2}]", "min_count needs encoding 'vocabulary'"),
        ("label: y\ncategorical: [a, a]", r"columns \['a'\] are named more than once"),
        ("label: y\nnumeric: [{name: a, transform: log}]", "transform must be one of"),
        ("label: y\ncategorical: [a, {name: b, table: a, min_count: 3}]", "table 'a': min_count must be the same"),
        ("label: y\ncategorical: [a]\ntime: {column: t, unit: h}", "time_unit must be one of"),
        ("label: y\ncategorical: [a]\nsplit: {fractions: [8, 2]}", "three numbers"),
        ("label: y\ncategorical: [a]\nsplit: {kind: hourly}", "split: must be one of"),
        ("label: y\ncategorical: [a]\nsplit: {seed: x}", "seed must be an integer"),
        ("label: y\ncategorical: [a]\nsplit: {kind: last-day, fractions: [8, 1, 1]}", "takes no fractions"),
        ("label: y\ncategorical: [a]\nsplit: {kind: time, seed: 1}", "takes no seed"),
        ("label: y\ncategorical: [a/b]", "must not hold '/'"),
        ("label: y\ncategorical: [a]\ndefaults: {min_count: '5'}", "defaults: min_count must be of type int"),
    ],
)
def test_a_wrong_schema_is_refused_with_its_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"schema.yaml: .*{message}"):
        parquet.read_schema(tmp_path / "schema.yaml")


def test_command_line(tmp_path: Path) -> None:
    raw = truth.write_parquet(tmp_path / "log.parquet", rows_of(60))
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    parquet.main([str(raw), "--schema", str(tmp_path / "schema.yaml"), "--out", str(tmp_path / "out")])
    assert Manifest.load(tmp_path / "out").split("train").rows == 36
