from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import event_store, taobao
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import Manifest
from tests.data_pipelines.histories_truth import as_set, check_vocabularies, decoded, masked

Row = dict[str, Any]
FIRST_DAY = 1_494_028_800
PROFILE = (
    *("cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation"),
    "new_user_class_level",
)
BTAGS = ("pv", "cart", "fav", "buy")


class Log:
    """The four files, as rows: users 1 to 9 (9 without a profile), ads 100 to 111 (111 not described)."""

    def __init__(self, seed: int = 0, impressions: int = 300, events: int = 600) -> None:
        random = np.random.default_rng(seed)

        def seconds() -> int:
            # Three days of few seconds, so that impressions and events often share one.
            return FIRST_DAY + 86_400 * int(random.integers(3)) + int(random.integers(12))

        self.impressions = [
            {
                "user": int(random.integers(1, 10)),
                "time_stamp": seconds(),
                "adgroup_id": int(random.integers(100, 112)),
                "pid": f"430548_100{random.integers(2)}",
                "clk": int(random.random() < 0.3),
            }
            for _ in range(impressions)
        ]
        self.ads = {
            ad: {
                "cate_id": str(ad % 5),
                "campaign_id": str(ad % 7),
                "customer": str(ad % 3),
                "brand": "NULL" if ad % 4 == 0 else str(ad % 4),
                "price": float(ad) / 8,
            }
            for ad in range(100, 111)
        }
        self.users = {
            user: {
                name: "" if (user + place) % 5 == 0 else str(user % (place + 2)) for place, name in enumerate(PROFILE)
            }
            for user in range(1, 9)
        }
        self.behaviour = [
            {
                # User 2 never does anything, users 10 and 11 are never shown anything.
                "user": int(random.choice([1, 3, 4, 5, 6, 7, 8, 9, 10, 11])),
                "time_stamp": seconds(),
                "btag": BTAGS[random.integers(4)],
                "cate": str(random.integers(6)),
                "brand": str(random.integers(5)),
            }
            for _ in range(events)
        ]

    def write(self, folder: Path, suffix: str = ".csv") -> Path:
        folder.mkdir()
        sample = [
            f"{row['user']},{row['time_stamp']},{row['adgroup_id']},{row['pid']},{1 - row['clk']},{row['clk']}"
            for row in self.impressions
        ]
        write_lines(folder, "raw_sample" + suffix, ["user,time_stamp,adgroup_id,pid,nonclk,clk", *sample])
        ads = [",".join([str(ad), *map(str, fields.values())]) for ad, fields in self.ads.items()]
        header = "adgroup_id,cate_id,campaign_id,customer,brand,price"
        write_lines(folder, "ad_feature" + suffix, [header, *ads])
        users = [",".join([str(user), *fields.values()]) for user, fields in self.users.items()]
        write_lines(folder, "user_profile" + suffix, [",".join(["userid", *PROFILE]) + " ", *users])
        events = [",".join(map(str, row.values())) for row in self.behaviour]
        write_lines(folder, "behavior_log" + suffix, ["user,time_stamp,btag,cate,brand", *events])
        return folder

    def expected(self, max_history: int) -> list[Row]:
        """The rows that the module promises, one impression at a time."""
        rows = []
        nothing = dict.fromkeys(("cate_id", "campaign_id", "customer", "brand"))
        for shown in self.impressions:
            earlier = [
                event
                for event in sorted(self.behaviour, key=lambda event: event["time_stamp"])
                if event["user"] == shown["user"] and event["time_stamp"] < shown["time_stamp"]
            ][-max_history:]
            ad = self.ads.get(shown["adgroup_id"], {**nothing, "price": None})
            rows.append(
                {
                    "clk": shown["clk"],
                    "price": np.float32(np.log1p(ad["price"] or 0)),
                    "userid": shown["user"],
                    **{name: self.users.get(shown["user"], {}).get(name) or None for name in PROFILE},
                    **{name: shown[name] for name in ("pid", "adgroup_id")},
                    **{name: None if ad[name] == "NULL" else ad[name] for name in nothing},
                    "btag": "pv",
                    "cate_history": [event["cate"] for event in earlier],
                    "brand_history": [event["brand"] for event in earlier],
                    "btag_history": [event["btag"] for event in earlier],
                    "user": shown["user"],
                    "time_stamp": shown["time_stamp"],
                }
            )
        return rows


def write_lines(folder: Path, name: str, lines: list[str]) -> None:
    content = ("\n".join(lines) + "\n").encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize("kind", ["last-day", "users"])
def test_rows_are_what_a_plain_loop_gives(
    suffix: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_store, "EVENTS_PER_BUCKET", 40)
    log = Log()
    split = SplitRule(kind, (2, 1, 1))
    manifest = taobao.prepare(
        log.write(tmp_path / "raw", suffix), tmp_path / "out", max_history=6, min_count=1, split=split
    )
    manifest.verify(checksums=True)
    splits = decoded(manifest)
    check_vocabularies(manifest, splits)
    found = [{**row, "price": np.float32(row["price"])} for part in splits.values() for row in part]
    expected = [{**row, "price": np.float32(row["price"])} for row in masked(log.expected(6), manifest)]
    assert as_set(found) == as_set(expected)
    assert max(len(row["cate_history"]) for row in found) == 6
    if kind == "last-day":
        assert all(row["time_stamp"] < FIRST_DAY + 2 * 86_400 for row in splits["train"])
        assert all(row["time_stamp"] >= FIRST_DAY + 2 * 86_400 for row in splits["validation"] + splits["test"])
    else:
        users = [{row["user"] for row in part} for part in splits.values()]
        assert sum(map(len, users)) == len(set.union(*users))


def test_manifest_tells_tables_and_what_was_not_described(tmp_path: Path) -> None:
    log = Log()
    manifest = taobao.prepare(log.write(tmp_path / "raw"), tmp_path / "out")
    tables = {feature.name: feature.table for feature in manifest.categorical if feature.kind == "sequence"}
    assert tables == {"cate_history": "cate_id", "brand_history": "brand", "btag_history": "btag"}
    assert (manifest.user, manifest.time) == ("user", "time_stamp")
    assert manifest.preparation["options"]["counts"] == {
        "impressions whose ads are not described": sum(row["adgroup_id"] == 111 for row in log.impressions),
        "impressions whose users are not described": sum(row["user"] == 9 for row in log.impressions),
        "events of behaviour": 600,
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("raw_sample.csv", lambda line: line + ",1", "line 7: 6 columns separated by ',' are required, got 7"),
        ("raw_sample.csv", lambda line: line[:-3] + "1,1", "line 7: columns 'clk' and 'nonclk': .* got 1 and 1"),
        ("raw_sample.csv", lambda line: "x" + line, "line 7: column 'user': an integer or nothing is required"),
        ("raw_sample.csv", lambda line: line[line.index(",") :], "line 7: column 'user': a value is required"),
        ("behavior_log.csv", lambda line: "3,1494028805,click,1,1", "line 7: column 'btag': one of .* got 'click'"),
        ("behavior_log.csv", lambda line: "3,,pv,1,1", "line 7: column 'time_stamp': a value is required in every row"),
        (
            "ad_feature.csv",
            lambda line: "200,1,2,3,4,dear",
            "line 7: column 'price': a number or nothing .* got 'dear'",
        ),
        ("ad_feature.csv", lambda line: "100,1,2,3,4,5", "column 'adgroup_id': 100 is listed more than once"),
        ("user_profile.csv", lambda line: "1" + line[1:], "column 'userid': 1 is listed more than once"),
    ],
)
def test_a_wrong_line_is_named(name: str, change: Callable[[str], str], message: str, tmp_path: Path) -> None:
    folder = Log().write(tmp_path / "raw")
    lines = (folder / name).read_text().split("\n")
    lines[6] = change(lines[6])
    (folder / name).write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        taobao.prepare(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_missing_files_columns_and_splits_that_would_show_the_future(tmp_path: Path) -> None:
    folder = Log().write(tmp_path / "raw")
    with pytest.raises(ValueError, match="keeps the future out, got 'random'"):
        taobao.prepare(folder, tmp_path / "out", split=SplitRule())
    profile = folder / "user_profile.csv"
    profile.write_text(profile.read_text().replace("age_level", "age"))
    with pytest.raises(ValueError, match=r"user_profile.csv: line 1: columns \['age_level'\] are required once"):
        taobao.prepare(folder, tmp_path / "out")
    (folder / "behavior_log.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"raw: behavior_log.csv or behavior_log.csv.gz is required"):
        taobao.prepare(folder, tmp_path / "out")


def test_command_line(tmp_path: Path) -> None:
    folder = Log().write(tmp_path / "raw")
    options = ["--split", "time", "--fractions", "7:2:1", "--max-history", "3", "--min-count", "1"]
    taobao.main([str(folder), "--out", str(tmp_path / "out"), *options])
    assert Manifest.load(tmp_path / "out").preparation["options"]["max_history"] == 3
