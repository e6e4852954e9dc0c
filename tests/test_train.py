"""From an encoded log to results, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from recemb.comparison.cells import composed
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluation import metrics
from recemb.run_folder import RunFolder, load_model
from recemb.training.metrics_log import read_metrics
from recemb.training.resume import config_to_train
from recemb.training.run import train as run_training
from tests.data.encoded import rewrite_column, write_encoded

CHECKOUT = Path(__file__).resolve().parents[1]
OVERRIDES = (
    "data=parquet",
    "trainer.threads=1",
    "trainer.batch_size=64",
    "trainer.log_every_steps=10",
    "trainer.validate_every_steps=50",
    "trainer.checkpoint_every_steps=15",
    "trainer.schedule.warmup_steps=20",
    "trainer.schedule.decay=linear",
    "trainer.epochs=2",
    "model.bottom_layers=[16,16]",
    "model.over_layers=[16,1]",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("log") / "encoded"
    write_encoded(root, rows=12_000, num_users=100)
    return root


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """`python -m recemb.train` from a working directory that is not the checkout."""
    return subprocess.Popen(
        [sys.executable, "-m", "recemb.train", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(arguments: list[str], folder: Path) -> str:
    process = start(arguments, folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    return output


def without_clock(content: dict) -> dict:
    """Results but for what a clock or a folder's name says."""
    kept = {key: value for key, value in content.items() if key not in ("run", "git")}
    kept["train"] = {key: value for key, value in content["train"].items() if "second" not in key}
    return kept


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, str]:
    """A run that nobody disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    output = train([*OVERRIDES, f"data.path={data}", "hydra.run.dir=run"], folder)
    return folder / "run", output


def test_results_have_what_programs_read(finished, data):
    run, _ = finished
    results = json.loads((run / "results.json").read_text())
    assert 0.65 < results["test"]["auc"] < 0.9
    assert 0.3 < results["test"]["logloss"] < 0.69
    assert 0.7 < results["test"]["normalised_entropy"] < 1.0
    assert 0.8 < results["test"]["calibration"] < 1.2
    assert results["test"]["users"]["num_users"] == 100
    assert results["embedding"]["method"] == "unified"
    assert results["embedding"]["full_bytes"] == (20 + 100 + 1000) * 16 * 4
    rows = results["embedding"]["table_bytes"] // 32
    assert results["embedding"]["training_bytes"] == results["embedding"]["bytes"] + rows * 4
    assert 0.98 < 10 * results["embedding"]["bytes"] / results["embedding"]["full_bytes"] <= 1
    assert results["train"]["samples"] == 2 * 9600
    assert results["train"]["samples_per_second"] > 0
    assert results["seed"] == 0
    manifest = Manifest.load(data)
    assert results["data"]["source"] == manifest.source
    assert results["data"].get("optimum") == manifest.optimum
    assert json.loads((run / "memory.json").read_text())["serving_bytes"] == results["embedding"]["bytes"]


def test_it_ends_with_a_short_table(finished):
    run, output = finished
    results = json.loads((run / "results.json").read_text())
    table = dict(re.split(r"  +", line, maxsplit=1) for line in output.split("\n\n")[-1].splitlines())
    assert table["test AUC"] == f"{results['test']['auc']:.5f}"
    assert table["test log loss"] == f"{results['test']['logloss']:.5f}"
    assert table["embedding bytes"].split()[0] == f"{results['embedding']['bytes']:,}"
    assert table["bytes of full tables"] == f"{results['embedding']['full_bytes']:,}"
    assert table["ratio"] == f"{results['embedding']['ratio']:.2f}x"
    assert table["run"] == str(run)
    assert "samples/s" in table


def test_the_folder_holds_config_environment_plots_and_a_report(finished):
    run, _ = finished
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["batch_size"] == 64
    environment = json.loads((run / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"].split("+")[0])
    assert "recemb.train" in environment["command"]
    for name in ("loss", "table_bytes", "reliability"):
        assert (run / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    report = (run / "report.md").read_text()
    assert "test AUC" in report and "best" in report and "unified__0" in report
    assert "validation auc" in (run / "train.log").read_text()
    assert list((run / "tensorboard").iterdir())
    assert not list(run.rglob("*.partial-*"))


def test_the_test_metrics_are_those_of_the_best_checkpoint_loaded_anew(finished, data):
    run, _ = finished
    model, config = load_model(run)
    assert config.data.path == str(data)
    loader = ParquetLoader(Manifest.load(data), "test", batch_size=300)
    with torch.no_grad():
        pairs = [(batch.labels, model(batch.dense, batch.sparse)) for batch in loader]
    labels, logits = (torch.cat(tensors).numpy() for tensors in zip(*pairs, strict=True))
    results = json.loads((run / "results.json").read_text())
    assert metrics.auc(labels, logits) == pytest.approx(results["test"]["auc"], abs=1e-12)
    best = [line["auc"] for line in read_metrics(run) if line["split"] == "validation"]
    assert results["validation"]["auc"] == max(best)
    last, _ = load_model(run / "checkpoints" / "last")
    assert sum(parameter.numel() for parameter in last.parameters()) == sum(p.numel() for p in model.parameters())


def test_killed_with_signal_9_and_resumed_it_ends_with_exactly_the_same_metrics(finished, data, tmp_path):
    run, _ = finished
    process = start([*OVERRIDES, f"data.path={data}", "hydra.run.dir=run"], tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    # Step 120 lies between the checkpoints of steps 105 and 135, in the second epoch at batch 150 not yet.
    while not (log.exists() and '"step": 120,' in log.read_text()):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "results.json").exists()
    # From another working directory than the one it began in.
    (tmp_path / "elsewhere").mkdir()
    train([f"resume={tmp_path / 'run'}"], tmp_path / "elsewhere")

    whole, resumed = (json.loads((path / "results.json").read_text()) for path in (run, tmp_path / "run"))
    assert without_clock(resumed) == without_clock(whole)
    lines = [
        [{key: value for key, value in line.items() if key != "samples_per_second"} for line in read_metrics(path)]
        for path in (run, tmp_path / "run")
    ]
    assert lines[0] == lines[1]
    assert "resumed from" in (tmp_path / "run" / "train.log").read_text()


def test_resuming_a_finished_run_changes_nothing(finished):
    run, _ = finished
    before = (run / "results.json").read_bytes()
    content = config_to_train(
        {
            "resume": str(run),
            "data": {"path": None, "allow_synthetic": False, "synthetic": {"path": "log"}},
            "paths": {},
        },
        [f"resume={run}"],
    )
    assert run_training(content, continues=True) == json.loads(before)
    assert (run / "results.json").read_bytes() == before


def test_a_run_is_never_written_over(finished):
    run, _ = finished
    with pytest.raises(FileExistsError, match=f"{run} already holds a run: continue it with resume={run}"):
        run_training(RunFolder(run).config())


def test_an_error_is_the_last_line_and_the_exit_status_1(tmp_path):
    process = start(["data.path=nothing", "data.allow_synthetic=false"], tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(
        r"FileNotFoundError: data.path=.*nothing: no such folder, and data.allow_synthetic is false", output
    )
    assert not list(tmp_path.rglob("results.json"))


def test_a_bad_id_in_the_test_split_ends_the_run_before_its_first_step(tmp_path):
    manifest = write_encoded(tmp_path / "encoded", rows=1000, row_group_rows=50)
    ids = pq.read_table(manifest.files("test")[0])["C1"].to_pylist()
    ids[70] = 20
    rewrite_column(manifest, "test", "C1", pa.array(ids, pa.int32()))
    process = start([*OVERRIDES, f"data.path={manifest.root}", "hydra.run.dir=run"], tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"test/part-00000.parquet: row group 1, column 'C1', row 20 .*in \[0, 20\).*got 20", output)
    assert not read_metrics(tmp_path / "run")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_with_labels_of_one_class_ends_the_run_before_its_first_step(split, tmp_path):
    manifest = write_encoded(tmp_path / "encoded", rows=1000)
    rewrite_column(manifest, split, "label", pa.array([0] * 100, pa.int8()))
    message = rf"encoded: split '{split}': labels of both classes .* got 0 rows with label 1 and 100 with label 0"
    with pytest.raises(ValueError, match=message):
        run_training(composed([*OVERRIDES, f"data.path={manifest.root}", f"paths.run={tmp_path / 'run'}"]))
    assert not read_metrics(tmp_path / "run")


def test_a_run_ends_where_no_test_user_has_labels_of_both_classes(tmp_path):
    manifest = write_encoded(tmp_path / "encoded", rows=1000, num_users=20)
    labels = pq.read_table(manifest.files("test")[0])["label"].to_pylist()
    rewrite_column(manifest, "test", "user", pa.array(labels, pa.int64()))
    results = run_training(composed([*OVERRIDES, f"data.path={manifest.root}", f"paths.run={tmp_path / 'run'}"]))
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["users"] == {
        **{"gauc": None, "gauc_users": None},
        **{"num_users": 2, "num_users_left_out": 2, "rows_left_out": 100},
    }
    assert 0 < results["test"]["auc"] < 1
    assert "test GAUC" not in (tmp_path / "run" / "report.md").read_text()
