from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from data_pipelines import behaviour_model
from data_pipelines.behaviour import generate, main, prepare_behaviour
from data_pipelines.behaviour_model import BehaviourModel
from recemb.data.manifest import Manifest
from tests.data_pipelines import truth
from tests.data_pipelines.histories_truth import decoded


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepare_behaviour(tmp_path_factory.mktemp("data") / "log", rows=30_000, max_history=20)


def test_probabilities_are_what_the_documented_formula_gives(manifest: Manifest) -> None:
    model = BehaviourModel(seed=0, max_history=20)
    number_of = {int(name): number for number, name in enumerate(model.names)}
    splits = decoded(manifest)
    for row in splits["train"][:500]:
        item, history = number_of[row["item"]], [number_of[name] for name in row["item_history"]]
        in_category = sum(past // 20 == item // 20 for past in history)
        in_style = sum(past // 5 == item // 5 for past in history)
        logit = (
            model.constant
            + 3 * (1 - math.exp(-(in_category + 2 * in_style) / 3))
            + 0.5 * model.quality[item]
            + 0.4 * (-1 + 2 * row["device"] / 3)
        )
        assert row["true_probability"] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)
        assert row["category"] == item // 20
        assert row["category_history"] == [past // 20 for past in history]


def test_labels_are_drawn_from_the_probabilities_and_the_optimum_is_theirs(manifest: Manifest) -> None:
    splits = truth.read_all(manifest)
    labels = np.concatenate([split["label"] for split in splits.values()])
    probabilities = np.concatenate([split["true_probability"] for split in splits.values()])
    spread = math.sqrt((probabilities * (1 - probabilities)).sum())
    assert abs((labels - probabilities).sum()) < 4 * spread
    assert abs(probabilities.mean() - 0.25) < 0.02
    test = splits["test"]
    assert manifest.optimum == {
        "auc": pytest.approx(roc_auc_score(test["label"], test["true_probability"])),
        "logloss": pytest.approx(log_loss(test["label"], test["true_probability"])),
    }


def test_the_match_with_the_target_decides_more_than_the_length_of_the_history(manifest: Manifest) -> None:
    test = truth.read_all(manifest)["test"]
    pairs = zip(test["category_history"], test["category"], strict=True)
    matches = [history.count(category) for history, category in pairs]
    lengths = [len(history) for history in test["category_history"]]
    assert roc_auc_score(test["label"], matches) > 0.75
    assert roc_auc_score(test["label"], lengths) < 0.65


def test_histories_are_strictly_from_the_past_and_the_latest_are_kept(tmp_path: Path) -> None:
    capped = pq.read_table(generate(tmp_path / "capped.parquet", rows=2000, max_history=5)).to_pylist()
    whole = pq.read_table(generate(tmp_path / "whole.parquet", rows=2000, max_history=500)).to_pylist()
    for short, long in zip(capped, whole, strict=True):
        assert long["history_times"] == sorted(long["history_times"])
        assert all(time < long["time"] for time in long["history_times"])
        assert short["item_history"] == long["item_history"][-5:]
    assert max(len(row["item_history"]) for row in whole) > 100


def test_logs_are_equal_by_seed_and_begin_with_the_same_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour_model, "BLOCK_USERS", 20)
    first = generate(tmp_path / "first.parquet", rows=2500)
    assert first.read_bytes() == generate(tmp_path / "again.parquet", rows=2500).read_bytes()
    assert pq.read_table(first).slice(0, 1500) == pq.read_table(generate(tmp_path / "short.parquet", rows=1500))
    assert pq.read_table(first) != pq.read_table(generate(tmp_path / "other.parquet", rows=2500, seed=1))
    users = pq.read_table(first)["user"].to_pylist()
    assert users == [row // 40 for row in range(2500)]


def test_a_log_is_reused_and_never_one_of_other_options(manifest: Manifest) -> None:
    written = {path: path.stat().st_mtime_ns for path in manifest.root.rglob("*")}
    assert prepare_behaviour(manifest.root, rows=30_000, max_history=20) == manifest
    assert {path: path.stat().st_mtime_ns for path in manifest.root.rglob("*")} == written
    with pytest.raises(ValueError, match=r"made with other options: max_history is 20, asked for 50"):
        prepare_behaviour(manifest.root, rows=30_000)


def test_wrong_sizes_and_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        generate(tmp_path / "log.parquet", rows=0)
    main(["--rows", "1000", "--out", str(tmp_path / "log")])
    assert Manifest.load(tmp_path / "log").source == "synthetic behaviour"
    assert Manifest.load(tmp_path / "log").preparation["raw_files"] == []
    assert list(tmp_path.iterdir()) == [tmp_path / "log"]
