"""The encoded synthetic data set: its ceiling, its reuse, its command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from data_pipelines import criteo, synthetic
from data_pipelines.splitting import SplitRule
from data_pipelines.synthetic import main, prepare_synthetic
from data_pipelines.synthetic_log import generate
from recemb.data.manifest import Manifest

ROWS = 7000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepare_synthetic(tmp_path_factory.mktemp("data") / "synthetic", rows=ROWS)


def test_the_manifest_says_what_it_is(manifest: Manifest) -> None:
    assert manifest.source == "synthetic"
    assert manifest.numeric_names == [f"I{i}" for i in range(1, 14)]
    assert manifest.feature_names == [f"C{i}" for i in range(1, 27)]
    assert {name: split.rows for name, split in manifest.splits.items()} == {
        "train": 5600,
        "validation": 700,
        "test": 700,
    }
    assert manifest == Manifest.load(manifest.root)
    manifest.verify(checksums=True)
    assert sorted(path.name for path in manifest.root.iterdir()) == [
        "manifest.json",
        "test",
        "train",
        "validation",
        "vocabulary",
    ]


def test_the_stored_ceiling_is_scikit_learns_on_the_test_split(manifest: Manifest) -> None:
    table = pq.read_table(manifest.files("test")[0], columns=["label", "true_probability"])
    labels, probabilities = table["label"].to_numpy(), table["true_probability"].to_numpy().astype(np.float64)
    assert manifest.optimum is not None
    assert manifest.optimum["auc"] == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-12)
    assert manifest.optimum["logloss"] == pytest.approx(log_loss(labels, probabilities), abs=1e-12)


def test_test_rows_are_the_newest(manifest: Manifest) -> None:
    days = {
        name: np.concatenate([pq.read_table(file, columns=["day"])["day"].to_numpy() for file in manifest.files(name)])
        for name in manifest.splits
    }
    assert days["train"].max() <= days["validation"].min() <= days["validation"].max() <= days["test"].min()


def test_a_log_of_equal_options_is_reused_untouched(manifest: Manifest) -> None:
    before = {path: path.stat().st_mtime_ns for path in manifest.root.rglob("*")}
    assert prepare_synthetic(manifest.root, rows=ROWS) == manifest
    assert {path: path.stat().st_mtime_ns for path in manifest.root.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"rows": 8000}, "rows is 7000, asked for 8000"),
        ({"rows": ROWS, "seed": 1}, "seed is 0, asked for 1"),
        ({"rows": ROWS, "total_ids": 9000}, "total_ids is 7000, asked for 9000"),
        ({"rows": ROWS, "days": 8}, "days is 7, asked for 8"),
        ({"rows": ROWS, "min_count": 1}, "min_count is 2, asked for 1"),
        ({"rows": ROWS, "split": SplitRule(kind="last-day")}, "split is .*'time'.*, asked for .*'last-day'"),
    ],
)
def test_a_log_of_other_options_is_never_reused(manifest: Manifest, options: dict[str, int], difference: str) -> None:
    with pytest.raises(ValueError, match=difference):
        prepare_synthetic(manifest.root, **options)  # type: ignore[arg-type]


def test_a_log_of_an_older_model_is_never_reused(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "MODEL_VERSION", synthetic.MODEL_VERSION + 1)
    with pytest.raises(ValueError, match="version is"):
        prepare_synthetic(manifest.root, rows=ROWS)


def test_a_reused_log_whose_files_were_damaged_is_refused(tmp_path: Path) -> None:
    made = prepare_synthetic(tmp_path / "log", rows=2000)
    file = made.files("train")[0]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or replaced"):
        prepare_synthetic(tmp_path / "log", rows=2000)


def test_a_real_log_is_never_taken_for_a_synthetic_one(tmp_path: Path) -> None:
    raw = generate(tmp_path / "log.tsv", rows=2000, format="tsv")
    criteo.prepare([raw], tmp_path / "real")
    with pytest.raises(ValueError, match="source 'criteo'"):
        prepare_synthetic(tmp_path / "real", rows=2000)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists"):
        prepare_synthetic(tmp_path / "mine", rows=2000)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(criteo, "prepare", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_synthetic(tmp_path / "log", rows=2000)
    assert list(tmp_path.iterdir()) == []


def test_a_log_finished_meanwhile_by_another_process_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = criteo.prepare

    def meanwhile(*arguments: object, **options: object) -> Manifest:
        monkeypatch.setattr(criteo, "prepare", original)
        prepare_synthetic(tmp_path / "log", rows=2000)
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(criteo, "prepare", meanwhile)
    # Both run in this process here; a name of its own stands for the other one's process id.
    numbers = iter([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20])
    monkeypatch.setattr("os.getpid", lambda: next(numbers))
    assert prepare_synthetic(tmp_path / "log", rows=2000).source == "synthetic"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_the_command_writes_raw_and_encoded_logs(tmp_path: Path) -> None:
    main(["--rows", "2000", "--out", str(tmp_path / "log.tsv"), "--tsv"])
    main(["--rows", "2000", "--out", str(tmp_path / "log.parquet"), "--raw-only"])
    main(["--rows", "2000", "--seed", "5", "--out", str(tmp_path / "log")])
    assert (tmp_path / "log.tsv").read_text().count("\n") == 2000
    assert pq.read_metadata(tmp_path / "log.parquet").num_rows == 2000
    assert Manifest.load(tmp_path / "log").preparation["synthetic"]["seed"] == 5


def test_the_command_ends_a_mistake_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipelines.synthetic", "--rows", "0", "--out", str(tmp_path / "log")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(criteo.__file__).parents[1])
    assert result.returncode == 1
    assert "error: rows must be at least 1, got 0" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
