"""The speed study still runs against the library as it is, and its data and AUC are what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

SPEED = Path(__file__).resolve().parents[2] / "experiments" / "speed"


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(SPEED))
    from dataset import make_dataset

    make_dataset(tmp_path / "data", train_rows=3000, validation_rows=1000, cap=500)
    return tmp_path / "data"


def test_data_is_deterministic_and_labels_follow_the_planted_probability(dataset: Path, tmp_path: Path) -> None:
    from dataset import make_dataset

    table = pq.read_table(dataset / "train" / "part-00000.parquet")
    again = make_dataset(tmp_path / "again", train_rows=3000, validation_rows=1000, cap=500)
    assert table.equals(pq.read_table(again.files("train")[0]))
    assert roc_auc_score(table["label"], table["true_probability"]) > 0.8


def test_recemb_contender_reports_speed_memory_and_auc(dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SPEED / "contenders" / "recemb_dlrm.py"), "--data", str(dataset), "--epochs", "2"]
    command += ["--scratch", str(tmp_path), "--batch-size", "512", "--variant", "unified-bf16"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert [epoch["samples"] for epoch in result["epochs"]] == [3000, 3000]
    assert result["epochs"][1]["samples_per_cpu_second"] > 0
    assert 0.4 < result["auc"] <= 1.0
    assert result["peak_rss_bytes"] > 2**20


def test_auc_of_the_study_equals_scikit_learn_with_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SPEED / "contenders"))
    from protocol import area_under_curve

    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 500), generator.integers(0, 50, 500) / 50
    assert area_under_curve(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
