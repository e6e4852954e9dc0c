"""``python -m recemb.compare`` as people run it, on a log of a few thousand rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from recemb.comparison.cells import composed
from recemb.comparison.study import Study, StudySpec, _results
from recemb.training import run as run_module
from tests.data.encoded import write_encoded

CHECKOUT = Path(__file__).resolve().parents[2]
SMALL = [
    "trainer.batch_size=64",
    "trainer.max_steps=10",
    "trainer.threads=1",
    "model.bottom_layers=[16]",
    "model.over_layers=[16,1]",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "log"
    write_encoded(folder, rows=3000, num_users=50)
    return folder


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "recemb.compare", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_study_is_trained_reported_and_taken_up_where_it_was(data: Path, tmp_path: Path) -> None:
    arguments = [
        *("+experiment=criteo", f"data.path={data}", *SMALL[:2], "model.bottom_layers=[16,16]"),
        *("methods=[hashing]", "budgets=[4x,100000x]", "seeds=2", "jobs=1", "output=study"),
        "tune=['optimizer.embedding.learning_rate=0.01,0.1']",
    ]
    first = compare(tmp_path, *arguments)
    assert first.returncode == 0, first.stderr[-3000:]
    study = tmp_path / "study"
    names = sorted(path.name for path in (study / "results").glob("*-seed*.json"))
    assert names == [f"{run}-seed{seed}.json" for run in ("full", "hashing-100000x", "hashing-4x") for seed in (1, 2)]
    for picture in ("auc", "auc_training", "throughput", "components"):
        assert (study / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
    tuning = json.loads((study / "results" / "tuning.json").read_text())
    assert [len(tuning[name]) for name in ("full", "hashing-4x")] == [2, 2]
    assert "cannot be met" in json.loads((study / "results" / "hashing-100000x-seed1.json").read_text())["refused"]
    cell = json.loads((study / "results" / "hashing-4x-seed2.json").read_text())
    assert cell["seed"] == 2 and cell["tuning_trials"] == 2 and cell["test"]["rows"] == 300
    best = max(tuning["hashing-4x"], key=lambda trial: trial["validation_auc"])["setting"]
    assert set(best) < set(cell["overrides"])
    assert f"{cell['embedding']['bytes']:,}" in first.stdout and "report.md" in first.stdout

    # Killed before this cell was written.
    before = {path.name: path.stat().st_mtime_ns for path in (study / "results").iterdir()}
    content = (study / "results" / "hashing-4x-seed2.json").read_text()
    (study / "results" / "hashing-4x-seed2.json").unlink()
    again = compare(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    after = {path.name: path.stat().st_mtime_ns for path in (study / "results").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"hashing-4x-seed2.json"}
    retrained = json.loads((study / "results" / "hashing-4x-seed2.json").read_text())
    assert retrained["test"] == json.loads(content)["test"]

    other = compare(tmp_path, *[text.replace("max_steps=10", "max_steps=11") for text in arguments])
    assert other.returncode == 1 and "give another folder" in other.stderr
    advice = compare(tmp_path, "recommend=2x", "output=study")
    assert advice.returncode == 0 and "take hashing" in advice.stdout


def test_a_trial_never_reads_the_test_split(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    predict = run_module.collect

    def watched(model: Any, loader: Any, **options: Any) -> Any:
        read.append(loader._split)
        return predict(model, loader, **options)

    monkeypatch.setattr(run_module, "collect", watched)
    overrides = ["+experiment=criteo", f"data.path={data}", *SMALL[:3], "model.bottom_layers=[16,16]"]
    results = run_module.train(composed([*overrides, f"paths.run={tmp_path}/trial"]), test=False)
    assert "test" not in results and 0.3 < results["validation"]["auc"] <= 1
    assert set(read) == {"validation"}
    run_module.train(composed([*overrides, f"paths.run={tmp_path}/cell"]))
    assert read.count("test") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods=[magic]"], r"methods: \['magic'\] are none of"),
        (["seeds=0"], "seeds and jobs must be at least 1, got 0"),
        (["tune=[lr]"], "every entry must read key=value,value, got 'lr'"),
        (["recommend=10x", "output=nowhere"], "not the folder of a study"),
    ],
)
def test_what_cannot_be_is_refused_before_any_training(tmp_path: Path, arguments: list[str], message: str) -> None:
    from recemb.comparison.job import compare as job

    config = {"methods": ["hashing"], "budgets": ["10x"], "seeds": 1, "tune": [], "jobs": 1, "recommend": None}
    config["output"] = str(tmp_path / "study")
    for text in arguments:
        key, _, value = text.partition("=")
        config[key] = json.loads(value.replace("[", '["').replace("]", '"]')) if "[" in value else value
    config["seeds"] = int(config["seeds"])  # type: ignore[call-overload]
    config["output"] = str(tmp_path / str(config["output"]))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        job(config, [])
    assert not list(tmp_path.rglob("results"))


def test_a_tuning_seed_must_not_be_a_cells() -> None:
    with pytest.raises(ValueError, match="tune_seed must be none of the seeds"):
        StudySpec({"full": []}, [0, 1], grid={"a": [1]})


def test_runs_and_seeds_may_be_added_to_a_study(tmp_path: Path) -> None:
    Study(tmp_path, StudySpec({"full": ["embedding=full"]}, [1]))
    wider = Study(tmp_path, StudySpec({"hashing": ["embedding=hashing"]}, [2]))
    assert wider.missing(["full", "hashing"]) == [("full", 2), ("hashing", 2)]
    assert Study.open(tmp_path).missing(["full"]) == [("full", 1), ("full", 2)]
    with pytest.raises(ValueError, match="its run 'full' is"):
        Study(tmp_path, StudySpec({"full": ["embedding=unified"]}, [1]))


def test_a_run_that_makes_no_config_is_found_before_any_training(data: Path, tmp_path: Path) -> None:
    runs = {"full": ["embedding=full"], "wrong": ["embedding=full", "embedding.widht=3"]}
    study = Study(tmp_path, StudySpec(runs, [1]), [f"data.path={data}"])
    with pytest.raises(Exception, match="widht"):
        study.run(jobs=1)
    assert list(study.cells()) == []


def _ended_by(code: int) -> dict[str, Any]:
    if code:
        os._exit(code)
    return {"test": 1}


def test_a_process_that_is_killed_names_what_it_trained() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        futures = {pool.submit(_ended_by, code): name for name, code in [("good", 0), ("fatal", 9), ("later", 0)]}
        results = _results(futures, 1)
        assert next(results) == ("good", {"test": 1})
        with pytest.raises(RuntimeError, match=r"ended without a word .* while \['fatal'\] trained"):
            next(results)
