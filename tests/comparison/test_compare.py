"""``python -m recemb.compare`` as people run it, on a log of a few thousand rows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest

from recemb.command_line import quoted
from recemb.comparison.cells import composed, names_of, train_cell, try_setting
from recemb.comparison.job import compare as job
from recemb.comparison.study import Study, StudySpec, _results
from recemb.data.manifest import Manifest
from recemb.files import locked
from recemb.training import run as run_module
from recemb.training.metrics_log import read_metrics
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


def settings_of(output: Path) -> dict[str, Any]:
    own = {"methods": ["hashing"], "budgets": ["10x"], "seeds": 1, "tune": [], "jobs": 1, "recommend": None}
    return {**own, "output": str(output)}


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
        (["budgets=[2x,10xx]"], "budget must be a ratio .* got '10xx'"),
        (["tune=[embedding.budget=2x,4x]"], r"embedding\.budget: .* give budgets="),
        (["tune=[trainer.stopping.metric=auc,logloss]"], r"must not be over trainer\.stopping\.metric"),
    ],
)
def test_what_cannot_be_is_refused_before_any_training(tmp_path: Path, arguments: list[str], message: str) -> None:
    config = settings_of(tmp_path / "study")
    for text in arguments:
        key, _, value = text.partition("=")
        whole = key == "tune" or "," not in value
        config[key] = value if "[" not in value else [value[1:-1]] if whole else value[1:-1].split(",")
    config["seeds"] = int(config["seeds"])  # type: ignore[call-overload]
    config["output"] = str(tmp_path / str(config["output"]))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        job(config, [])
    assert not list(tmp_path.rglob("results"))


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("seed=3", "seeds="),
        ("embedding=hashing", "methods="),
        ("++embedding.budget=2x", "budgets="),
        ("+stage=prune", "methods="),
        ("resume=runs/1", "output="),
        ("paths.run=here", "output="),
    ],
)
def test_what_a_study_sets_itself_is_refused_with_the_key_to_give(tmp_path: Path, override: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"every training of a study has its own; give {instead}"):
        job(settings_of(tmp_path / "study"), ["trainer.epochs=2", override])
    assert not (tmp_path / "study").exists()


def test_a_tuning_seed_must_not_be_a_cells() -> None:
    with pytest.raises(ValueError, match="tune_seed must be none of the seeds"):
        StudySpec({"full": []}, [0, 1], grid={"a": [1]})


def test_runs_and_seeds_may_be_added_to_a_study(tmp_path: Path) -> None:
    Study(tmp_path, StudySpec({"full": ["embedding=full"]}, [1])).claim()
    # Without a trial or a cell nothing binds those who come later.
    (tmp_path / "results" / "tuning.json").write_text("{}")
    wider = Study(tmp_path, StudySpec({"hashing": ["embedding=hashing"]}, [2]))
    wider.claim()
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


def test_a_command_that_fails_before_any_training_leaves_the_folder_free(data: Path, tmp_path: Path) -> None:
    wrong = StudySpec({"full": ["embedding=full"]}, [1], ["data.allow_synthetic=false"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Study(tmp_path, wrong, ["data.path=nowhere"]).run(jobs=1)
    assert not (tmp_path / "study.json").exists()
    # Claimed, but its first training failed.
    Study(tmp_path, wrong).claim()
    Study(tmp_path, StudySpec({"full": ["embedding=full"]}, [1], ["trainer.epochs=2"])).claim()
    assert Study.open(tmp_path).spec.common == ["trainer.epochs=2"]


def _trained_on(folder: Path, manifest: Manifest) -> None:
    """A study of before study.json named the data, with its one cell."""
    (folder / "results").mkdir(parents=True)
    spec = {"runs": {"full": ["embedding=full"]}, "seeds": [1], "common": [], "grid": {}, "tune_seed": 0}
    (folder / "study.json").write_text(json.dumps(spec))
    rows = {name: split.rows for name, split in manifest.splits.items()}
    cell = {"data": {"source": manifest.source, "rows": rows, "categorical_features": 3, "optimum": {"auc": 0.9}}}
    (folder / "results" / "full-seed1.json").write_text(json.dumps(cell))


def test_cells_of_another_data_set_are_never_added_to_a_study(data: Path, tmp_path: Path) -> None:
    _trained_on(tmp_path / "study", Manifest.load(data))
    write_encoded(tmp_path / "longer", rows=4000, num_users=50)
    write_encoded(tmp_path / "other", rows=3000, num_users=50, seed=1)

    def go_on(path: Path) -> None:
        # Nothing to train: it checks and claims.
        Study(tmp_path / "study", StudySpec({"full": ["embedding=full"]}, [1]), [f"data.path={path}"]).run(jobs=1)

    with pytest.raises(
        ValueError, match=r"trained on synthetic \(2,400 train.*, got synthetic \(3,200 train.*another f"
    ):
        go_on(tmp_path / "longer")
    go_on(data)
    [known] = json.loads((tmp_path / "study" / "study.json").read_text())["data"]
    assert known["rows"] == {"train": 2400, "validation": 300, "test": 300} and str(data) not in json.dumps(known)
    shutil.copytree(data, tmp_path / "moved")
    go_on(tmp_path / "moved")
    # Of the same shape: only its checksums tell.
    with pytest.raises(ValueError, match=f"checksum is {known['checksum']}, got"):
        go_on(tmp_path / "other")
    assert Study.open(tmp_path / "study").spec.runs == {"full": ["embedding=full"]}


def test_runs_of_one_study_may_have_data_sets_of_their_own(data: Path, tmp_path: Path) -> None:
    write_encoded(tmp_path / "other", rows=2000)

    def study(first: Path, second: Path) -> Study:
        runs = {name: [f"data.path={path}"] for name, path in (("a", first), ("b", second))}
        return Study(tmp_path / "study", StudySpec(runs, [1]))

    (tmp_path / "study" / "results").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "study" / "results" / f"{name}-seed1.json").write_text("{}")
    study(data, tmp_path / "other").run(jobs=1)
    found = json.loads((tmp_path / "study" / "study.json").read_text())["data"]
    assert [entry["rows"]["train"] for entry in found] == [2400, 1600]
    shutil.rmtree(tmp_path / "other")
    write_encoded(tmp_path / "other", rows=2000, seed=1)
    with pytest.raises(ValueError, match=r"1,600 train.* checksum is"):
        study(data, tmp_path / "other").run(jobs=1)


def test_the_report_is_of_the_whole_study_and_names_its_data(data: Path, tmp_path: Path) -> None:
    config = settings_of(tmp_path)
    runs = {
        "full": ["embedding=full"],
        **{f"{name}-10x": [f"embedding={name}", "embedding.budget=10x"] for name in ("hashing", "unified")},
    }
    study = Study(tmp_path, StudySpec(runs, [1], ["trainer.threads=1"]))
    study.claim()
    for number, (name, overrides) in enumerate(runs.items()):
        written = {
            "overrides": overrides,
            "tuning_trials": 0,
            "test": {"auc": 0.8 - number / 100, "logloss": 0.4},
            "embedding": {"bytes": 100, "full_bytes": 1000, "optimizer_bytes": 10},
            "train": {"samples_per_cpu_second": 5.0},
            "data": {"source": "synthetic", "rows": {"train": 2400, "validation": 300, "test": 300}},
        }
        (study.results / f"{name}-seed1.json").write_text(json.dumps(written))
    shown = job(config, [f"data.path={data}"])
    report = (tmp_path / "report.md").read_text()
    for text in (shown, report):
        assert "| unified-10x |" in text and "| hashing-10x |" in text
    assert "\n\nData: synthetic (2,400 train, 300 validation, 300 test rows).\n\n" in report


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("auc", [0.7, 0.8, 0.8, 0.6], 1), ("gauc", [0.6, 0.7, 0.8], 2), ("logloss", [0.5, 0.4, 0.6], 1)],
)
def test_the_best_setting_is_that_of_the_metric_that_stops(
    tmp_path: Path, metric: str, values: list[float], best: int
) -> None:
    grid = {"optimizer.embedding.learning_rate": [str(number) for number in range(5)]}
    study = Study(tmp_path, StudySpec({"full": ["embedding=full"]}, [1], grid=grid))
    study.claim()
    for setting, value in zip(study.spec.settings(), values, strict=False):
        study._keep_trial("full", setting, {f"validation_{metric}": value})
    # More would be better than any, were it a number.
    study._keep_trial("full", study.spec.settings()[4], {"diverged": "loss is inf in step 3"})
    assert study.best_setting("full") == study.spec.settings()[best]
    assert json.loads((study.results / "tuning.json").read_text())["full"][-1]["diverged"] == "loss is inf in step 3"


@pytest.mark.parametrize(("metric", "choose"), [("auc", max), ("gauc", max), ("logloss", min)])
def test_a_trial_says_the_metric_that_stops_it(
    data: Path, tmp_path: Path, metric: str, choose: Callable[[list[float]], float]
) -> None:
    overrides = ["+experiment=criteo", f"data.path={data}", *SMALL[:3], "model.bottom_layers=[16,16]"]
    overrides += [f"trainer.stopping.metric={metric}", "trainer.validate_every_steps=3"]
    result = try_setting(overrides)
    run_module.train(composed([*overrides, f"paths.run={tmp_path}/trial"]), test=False)
    lines = [line for line in read_metrics(tmp_path / "trial") if line["split"] == "validation"]
    assert len(lines) == 4
    assert result == {f"validation_{metric}": choose([line[metric] for line in lines])}


def test_only_a_budget_out_of_reach_and_a_model_that_diverges_are_findings(data: Path) -> None:
    overrides = ["+experiment=criteo", f"data.path={data}", *SMALL[:3], "model.bottom_layers=[16,16]"]
    [(key, text)] = train_cell([*overrides, "embedding=hashing", "embedding.budget=100000x"]).items()
    assert key == "refused" and "cannot be met" in text
    with pytest.raises(ValueError, match="budget must be a ratio"):
        train_cell([*overrides, "embedding=hashing", "embedding.budget=10xx"])
    for work in (train_cell, try_setting):
        [(key, text)] = work([*overrides, "embedding=full", "optimizer.embedding.learning_rate=1e30"]).items()
        assert key == "diverged" and "in step" in text


CONFIG = """
embedding_dim: 8
budget: 5x
full_below_rows: 0
method: {_target_: recemb.methods.hashing.Hashing, _partial_: true}
"""


def test_a_method_may_come_from_a_folder_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "it's" / "embedding").mkdir(parents=True)
    (tmp_path / "it's" / "embedding" / "mine.yaml").write_text(CONFIG)
    searchpath = f"hydra.searchpath=[{quoted(f'file://{tmp_path}/it' + chr(39) + 's')}]"
    assert {"mine", "hashing"} <= set(names_of("embedding", [searchpath]))
    assert "mine" not in names_of("embedding", [])
    # What a process of a cell composes.
    embedding = composed(["embedding=mine", searchpath, "paths.run=none"])["embedding"]
    assert embedding["method"]["_target_"] == "recemb.methods.hashing.Hashing"
    arguments = ["--config-dir", "it's", "methods=[mine]", "data.path=nowhere", "data.allow_synthetic=false"]
    assert "data.path=nowhere: no such folder" in compare(tmp_path, *arguments).stderr


def test_two_processes_never_train_one_study(data: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, StudySpec({"full": ["embedding=full"]}, [1]), [f"data.path={data}"])
    with locked(tmp_path, "study"), pytest.raises(RuntimeError, match="another process is writing this study"):
        study.run(jobs=1)
    assert not (tmp_path / "study.json").exists()


POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from recemb.comparison.cells import end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
        time.sleep(600)
"""


def test_processes_of_a_study_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = subprocess.Popen([sys.executable, tmp_path / "pool.py"], env=environment, stdout=subprocess.PIPE)
    assert command.stdout is not None
    worker = psutil.Process(int(command.stdout.readline()))
    assert worker.is_running()
    command.kill()
    command.wait()
    assert psutil.wait_procs([worker], timeout=60) == ([worker], [])


def _ended_by(code: int) -> dict[str, Any]:
    if code:
        os._exit(code)
    return {"test": 1}


def test_a_process_that_is_killed_names_what_it_trained() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        results = _results(pool, _ended_by, [("good", 0), ("fatal", 9), ("later", 0)], 1)
        assert next(results) == ("good", {"test": 1})
        with pytest.raises(RuntimeError, match=r"ended without a word .* while \['fatal'\] trained"):
            next(results)


def test_a_training_that_fails_ends_the_study_but_not_those_under_way() -> None:
    begun = []

    def train(name: str) -> dict[str, Any]:
        begun.append(name)
        if name == "bad":
            raise ValueError("a bad id")
        time.sleep(1)
        return {"test": 1}

    found = []
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="a bad id") as caught:
        for result in _results(pool, train, [(name.upper(), name) for name in ("long", "bad", "later")], 2):
            found.append(result)
    assert found == [("LONG", {"test": 1})]
    assert begun == ["long", "bad"]
    assert caught.value.__notes__ == ["in the training of BAD"]
