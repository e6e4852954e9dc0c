"""Searches of several stages, from an encoded log to the converted model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import recemb
from recemb.comparison.cells import composed
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluation import metrics
from recemb.plan import CompressionPlan
from recemb.run_folder import load_model
from recemb.training.bilevel import ByTurns
from recemb.training.metrics_log import read_metrics
from recemb.training.resume import config_to_train
from recemb.training.run import train
from tests.data.encoded import write_encoded
from tests.histories import write_behaviour_log

CHECKOUT = Path(__file__).resolve().parents[2]
OVERRIDES = [
    "data=parquet",
    "embedding=magnitude",
    "embedding.embedding_dim=8",
    "trainer.batch_size=64",
    "trainer.log_every_steps=10",
    "trainer.validate_every_steps=25",
    "trainer.checkpoint_every_steps=10",
    "trainer.epochs=1",
    "model.bottom_layers=[8,8]",
    "model.over_layers=[8,1]",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "encoded"
    write_encoded(root, rows=6000)
    return root


def config_of(data: Path, run: Path, *overrides: str) -> dict[str, Any]:
    return composed([*OVERRIDES, f"data.path={data}", f"paths.run={run}", *overrides])


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(config_of(data, run))
    return run


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def without_clock(content: Any) -> Any:
    """Results but for what a clock or a folder's name says."""
    if isinstance(content, list):
        return [without_clock(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {
        key: without_clock(value)
        for key, value in content.items()
        if "second" not in key and key not in ("run", "git", "search")
    }


def test_all_stages_run_to_the_test_split_within_the_budget(finished: Path) -> None:
    results = results_of(finished)
    assert 0.6 < results["test"]["auc"] < 0.9
    assert [stage["name"] for stage in results["stages"]] == ["train", "prune", "retrain"]
    full = (20 + 100 + 1000) * 8 * 4
    assert results["embedding"]["full_bytes"] == full
    assert 0.95 * full / 10 < results["embedding"]["bytes"] <= full / 10
    assert all(stage["seconds"] > 0 and stage["cpu_seconds"] > 0 for stage in results["stages"])
    # Full tables in the first stage, with row-wise Adagrad's number a row; the mask comes with the last one.
    assert results["stages"][0]["training_bytes"] == full + (20 + 100 + 1000) * 4 + 3 * 8
    assert results["embedding"]["training_bytes"] == results["stages"][2]["training_bytes"]
    assert results["stages"][2]["training_bytes"] - results["stages"][0]["training_bytes"] == 20 + 100 + 1000
    stages = results["stages"]
    assert results["search"]["seconds"] == pytest.approx(stages[0]["seconds"] + stages[1]["seconds"])
    assert results["search"]["trainings"] == pytest.approx(results["search"]["seconds"] / stages[2]["seconds"])
    for name in ("search", "fields", "loss", "table_bytes", "reliability"):
        assert (finished / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    report = (finished / "report.md").read_text()
    assert "## Stages" in report and "| prune |" in report


def test_dropped_values_stay_zero_and_the_others_start_from_the_weights_before_all_training(finished: Path) -> None:
    plan = CompressionPlan.load(finished / "stages" / "1-prune" / "plan")
    trained, _ = load_model(finished / "stages" / "0-train" / "checkpoints" / "best")
    [group] = trained.embeddings.groups
    values = torch.cat([part.abs() for part in group.stored_tables().values()])
    kept = torch.cat([table.mask() for table in plan.tables.values()])
    # One threshold over all tables.
    assert values[kept].min() > values[~kept].max()
    first = next(line for line in read_metrics(finished / "stages" / "2-retrain") if line["split"] == "train")
    assert first["loss"] > 0.6, "rewound weights know nothing yet"


def test_the_saved_model_is_the_converted_one_and_gives_the_test_metrics(finished: Path, data: Path) -> None:
    results = results_of(finished)
    served = recemb.load(finished / "model")
    masked, _ = load_model(finished)
    pairs = []
    with torch.no_grad():
        for batch in ParquetLoader(Manifest.load(data), "test", batch_size=300):
            logits = served(batch.dense, batch.sparse)
            assert torch.equal(logits, masked(batch.dense, batch.sparse))
            pairs.append((batch.labels, logits))
    labels, logits = (torch.cat(tensors).numpy() for tensors in zip(*pairs, strict=True))
    assert metrics.auc(labels, logits) == pytest.approx(results["test"]["auc"], abs=1e-12)
    size = (finished / "model" / "model.safetensors").stat().st_size
    assert size > results["embedding"]["bytes"]


def test_the_halves_of_the_validation_rows_are_disjoint_and_complete(finished: Path, data: Path) -> None:
    import pyarrow.parquet as pq

    root = finished / "stages" / "validation"
    halves = [pq.read_table(root / f"{name}.parquet") for name in ("architecture", "validation")]
    whole = pq.read_table(Manifest.load(data).files("validation")[0])
    assert 0.4 < halves[0].num_rows / whole.num_rows < 0.6
    rows = [str(row) for half in halves for row in half.to_pylist()]
    assert sorted(rows) == sorted(str(row) for row in whole.to_pylist())


def test_killed_with_signal_9_in_a_stage_and_resumed_it_ends_exactly_the_same(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "recemb.train", *OVERRIDES, f"data.path={data}", "hydra.run.dir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = tmp_path / "run"
    log = run / "stages" / "2-retrain" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    # Between two checkpoints of the last stage.
    while not (log.exists() and '"step": 40,' in log.read_text()):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "stages" / "2-retrain" / "stage.json").exists()
    before = (run / "stages" / "0-train" / "stage.json").stat().st_mtime_ns
    arguments = {
        "resume": str(run),
        "data": {"path": None, "allow_synthetic": False, "synthetic": {"path": "log"}},
        "paths": {},
    }
    train(config_to_train(arguments, [f"resume={run}"]), continues=True)
    assert (run / "stages" / "0-train" / "stage.json").stat().st_mtime_ns == before
    assert without_clock(results_of(run)) == without_clock(results_of(finished))


def test_one_stage_is_run_again_on_what_the_others_left(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run, symlinks=True)
    arguments = {
        "resume": str(run),
        "stage": "prune",
        "data": {"path": None, "allow_synthetic": False, "synthetic": {"path": "log"}},
    }
    content = config_to_train({**arguments, "paths": {}}, [f"resume={run}", "+stage=prune"])
    results = train(content, continues=True)
    assert [stage["name"] for stage in results["stages"]] == ["train", "prune"]
    # Nothing is left that the stages before it did not make: no model, no report, no link to weights that are gone.
    assert {path.name for path in run.iterdir()} <= {"stages", "config.yaml", "environment.json", "train.log", ".lock"}
    assert not (run / "stages" / "2-retrain").exists()
    train({**content, "stage": None}, continues=True)
    assert without_clock(results_of(run)) == without_clock(results_of(finished))


def test_a_stage_needs_the_outcomes_of_those_before_it(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage=retrain builds on stage 'train', which has not ended"):
        train(config_of(data, tmp_path / "run", "+stage=retrain"))
    with pytest.raises(ValueError, match=r"stage must be one of embedding\.stages"):
        train(config_of(data, tmp_path / "other", "+stage=evolution"))


def test_without_stages_a_search_method_trains_as_any_other(data: Path, tmp_path: Path) -> None:
    results = train(config_of(data, tmp_path / "run", "embedding.stages=[]"))
    assert "stages" not in results
    assert results["embedding"]["bytes"] > results["embedding"]["full_bytes"]


def test_the_first_stage_begins_as_a_plain_training_of_the_seed_does(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    """So magnitude pruning starts from what full tables start from, and costs can be told from its first training."""
    train(config_of(data, tmp_path / "run", "embedding.stages=[]", "trainer.max_steps=10"))
    plain, staged = read_metrics(tmp_path / "run"), read_metrics(finished / "stages" / "0-train")
    assert plain[0]["loss"] == staged[0]["loss"]
    initial, _ = load_model(finished / "stages" / "initial" / "step-00000000")
    [group] = initial.embeddings.groups
    values = torch.cat(list(group.stored_tables().values()))
    assert values[:20].abs().max() <= 20**-0.5 and values[120:].abs().max() <= 1000**-0.5


def test_what_a_search_had_learnt_may_be_the_best_of_a_retraining_that_goes_on_from_it(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    train(config_of(data, tmp_path / "run", "embedding.stages.2.reset=none"))
    stages = results_of(tmp_path / "run")["stages"]
    found = validated(tmp_path / "run")
    assert found[0] == pytest.approx(stages[1]["validation"]["auc"], abs=1e-12)
    assert stages[2]["validation"]["auc"] == max(found.values())
    # Rewound weights have learnt nothing.
    assert min(validated(finished)) > 0


@pytest.mark.parametrize("metric", ["auc", "logloss"])
def test_tables_as_they_were_pruned_stay_where_training_again_ends_below_them(
    data: Path, tmp_path: Path, metric: str
) -> None:
    run = tmp_path / "run"
    train(config_of(data, run, "+embedding.stages.2.max_steps=2", f"trainer.stopping.metric={metric}"))
    results = results_of(run)
    _, prune, retrain = results["stages"]
    assert retrain["keeps"] == "prune" and retrain["best_step"] == 0
    assert retrain["validation"] == prune["validation"]
    assert retrain["retrained_validation"]["auc"] < prune["validation"]["auc"]
    assert results["validation"][metric] == prune["validation"][metric]
    assert f"validation AUC of {retrain['retrained_validation']['auc']:.5f}" in (run / "report.md").read_text()
    pruned, _ = load_model(run / "stages" / "1-prune" / "checkpoints" / "best")
    served = recemb.load(run / "model")
    labels, logits = [], []
    with torch.no_grad():
        for batch in ParquetLoader(Manifest.load(data), "test", batch_size=300):
            logits.append(served(batch.dense, batch.sparse))
            assert torch.equal(logits[-1], pruned(batch.dense, batch.sparse))
            labels.append(batch.labels)
    auc = metrics.auc(torch.cat(labels).numpy(), torch.cat(logits).numpy())
    assert auc == pytest.approx(results["test"]["auc"], abs=1e-12)


def test_tables_trained_again_stay_where_they_validate_better(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config_of(data, run, "embedding.budget=60x", "+embedding.stages.2.epochs=3"))
    results = results_of(run)
    _, prune, retrain = results["stages"]
    assert retrain["keeps"] == "retrain" and "retrained_validation" not in retrain
    assert retrain["validation"]["auc"] == max(validated(run).values()) > prune["validation"]["auc"]
    assert retrain["best_step"] == max(validated(run), key=lambda step: validated(run)[step])
    assert results["validation"]["auc"] == retrain["validation"]["auc"]


def validated(run: Path) -> dict[int, float]:
    """Step -> validation AUC of the retraining."""
    lines = read_metrics(run / "stages" / "2-retrain")
    return {line["step"]: line["auc"] for line in lines if line["split"] == "validation"}


def test_a_sequence_model_searches_as_well(tmp_path: Path) -> None:
    write_behaviour_log(tmp_path / "log", rows=1500)
    changes = ["model=din", "trainer.batch_size=64", "embedding.budget=3x", "+embedding.mini_batch_aware_decay=0.001"]
    kept = [item for item in OVERRIDES if not item.startswith("model.")]
    content = composed([*kept, *changes, f"data.path={tmp_path / 'log'}", f"paths.run={tmp_path / 'run'}"])
    results = train(content)
    assert 0.9 < 3 * results["embedding"]["bytes"] / results["embedding"]["full_bytes"] <= 1
    assert 0 < results["validation"]["gauc"] < 1 and results["test"]["rows"] == 150
    assert recemb.load(tmp_path / "run" / "model") is not None


def test_a_bilevel_search_that_was_ended_in_a_stage_goes_on_exactly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["embedding=dnis", "trainer.max_steps=60"]
    train(config_of(data, tmp_path / "whole", *settings))
    after_step = ByTurns.after_step

    def fails_once(self: ByTurns, step: int, *others: Any) -> None:
        if step == 37:
            raise KeyboardInterrupt
        after_step(self, step, *others)

    monkeypatch.setattr(ByTurns, "after_step", fails_once)
    content = config_of(data, tmp_path / "ended", *settings)
    with pytest.raises(KeyboardInterrupt):
        train(content)
    monkeypatch.undo()
    torch.manual_seed(123)
    train(content, continues=True)
    assert without_clock(results_of(tmp_path / "ended")) == without_clock(results_of(tmp_path / "whole"))
    lines = [
        [{key: value for key, value in line.items() if key != "samples_per_second"} for line in read_metrics(folder)]
        for folder in (tmp_path / "whole" / "stages" / "1-search", tmp_path / "ended" / "stages" / "1-search")
    ]
    assert lines[0] == lines[1]
