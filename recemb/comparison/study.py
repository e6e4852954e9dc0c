"""A study: the same training for several runs and seeds, one JSON a cell, each trained once.

FOLDER/study.json               what is compared, and with which settings
FOLDER/results/tuning.json      every trial, on the validation split
FOLDER/results/<run>-seed<k>.json   one cell, written once; a study that was killed goes on where it was
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from recemb.comparison.cells import composed, train_cell, try_setting
from recemb.config import TrainConfig
from recemb.files import write_json

logger = logging.getLogger(__name__)

SPEC_FILE = "study.json"
_Key = TypeVar("_Key")
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pyarrow")


@dataclass(frozen=True)
class StudySpec:
    """What a study trains.

    Args:
        runs: name -> overrides of ``configs/train.yaml`` that make this run what it is.
        seeds: of the cells of every run.
        common: overrides for every cell.
        grid: key -> values; every combination is tried for every run alike, on the validation split, and the best is
            taken. Empty: no tuning.
        tune_seed: of the trials; none of ``seeds``, so that no cell repeats a trial.

    Raises:
        ValueError: nothing to train, or ``tune_seed`` among ``seeds``.
    """

    runs: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    common: Sequence[str] = ()
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tune_seed: int = 0

    def __post_init__(self) -> None:
        if not self.runs or not self.seeds:
            raise ValueError(f"a study needs runs and seeds, got {len(self.runs)} runs and {len(self.seeds)} seeds")
        if self.grid and self.tune_seed in self.seeds:
            raise ValueError(f"tune_seed must be none of the seeds {list(self.seeds)}, got {self.tune_seed}")

    def settings(self) -> list[list[str]]:
        """Every combination of the grid, as overrides; one empty setting without a grid."""
        return [
            [f"{key}={value}" for key, value in zip(self.grid, values, strict=True)]
            for values in itertools.product(*self.grid.values())
        ]


class Study:
    """One study in its folder.

    Args:
        folder: made where it is missing.
        spec: what is compared.
        machine: overrides for this machine (``data.path=...``), which are not part of the study.

    Raises:
        ValueError: the folder holds a study of other settings, whose cells could not be compared with these.
    """

    def __init__(self, folder: Path, spec: StudySpec, machine: Sequence[str] = ()) -> None:
        self.folder = folder
        self.spec = spec
        self.machine = list(machine)
        self.results = folder / "results"
        self.results.mkdir(parents=True, exist_ok=True)
        self._claim()

    def _claim(self) -> None:
        """Write what this study is, or check that the folder's is the same; runs and seeds may be added."""
        path = self.folder / SPEC_FILE
        content = json.loads(json.dumps(asdict(self.spec)))
        before = json.loads(path.read_text()) if path.is_file() else None
        if before is not None:
            for key in ("common", "grid", "tune_seed"):
                if before[key] != content[key]:
                    raise ValueError(
                        f"{self.folder}: its cells were trained with {key}={before[key]}, got {content[key]}; "
                        "give another folder"
                    )
            for name, overrides in before["runs"].items():
                if content["runs"].setdefault(name, overrides) != overrides:
                    raise ValueError(
                        f"{self.folder}: its run {name!r} is {overrides}, got {content['runs'][name]}; give another "
                        "folder"
                    )
            content["seeds"] = sorted({*before["seeds"], *content["seeds"]})
        if content != before:
            write_json(path, content)

    @staticmethod
    def open(folder: Path) -> Study:
        """The study in ``folder``, to read.

        Raises:
            FileNotFoundError: none there.
        """
        path = folder / SPEC_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: not the folder of a study (no {SPEC_FILE})")
        return Study(folder, StudySpec(**json.loads(path.read_text())))

    def run(self, jobs: int, only: str = "") -> None:
        """Tune, then train every cell that has no result.

        Args:
            jobs: cells at a time, a process and a thread each.
            only: regular expression that the names of the runs to train must match.

        Raises:
            ValueError: a run whose overrides make no config; before anything is trained.
            RuntimeError: a process was killed; those that it may have trained are named.
        """
        names = [name for name in self.spec.runs if re.search(only, name)]
        for name in names:
            # A misspelt key of the last run is an error now, not after hours of the others.
            TrainConfig.parse(composed([*self._overrides(name, [], 0), "paths.run=nowhere"]))
        # One process a job for all its cells: imports would take longer than a small cell.
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            try:
                self._tune(pool, names, jobs)
                self._train(pool, names, jobs)
            except BaseException:
                # Else the cells that wait would be trained before the error is seen, and lost.
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _tune(self, pool: Executor, names: Sequence[str], jobs: int) -> None:
        trials = {
            pool.submit(try_setting, self._overrides(name, setting, self.spec.tune_seed)): (name, setting)
            for name in names
            for setting in self._untried(name)
        }
        for (name, setting), result in _results(trials, jobs):
            self._keep_trial(name, setting, result)

    def _train(self, pool: Executor, names: Sequence[str], jobs: int) -> None:
        cells = {
            pool.submit(train_cell, self._overrides(name, self.best_setting(name), seed)): (name, seed)
            for name, seed in self.missing(names)
        }
        for (name, seed), result in _results(cells, jobs):
            self._keep_cell(name, seed, result)

    def missing(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """(run, seed) of the cells that were not trained yet, all runs' first seeds first."""
        return [(name, seed) for seed in self.spec.seeds for name in names if not self._path(name, seed).exists()]

    def cells(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Every run that has results, with one dict a seed."""
        for name in self.spec.runs:
            paths = [self._path(name, seed) for seed in self.spec.seeds]
            if found := [json.loads(path.read_text()) for path in paths if path.exists()]:
                yield name, found

    def best_setting(self, name: str) -> list[str]:
        """The setting of the grid with the best validation AUC; empty without a grid or before any trial."""
        trials = [trial for trial in self.tuning().get(name, []) if "validation_auc" in trial]
        return max(trials, key=lambda trial: trial["validation_auc"])["setting"] if trials else []

    def tuning(self) -> dict[str, list[dict[str, Any]]]:
        """Run -> its trials."""
        path = self.results / "tuning.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _overrides(self, name: str, setting: Sequence[str], seed: int) -> list[str]:
        return [*self.spec.common, *self.spec.runs[name], *setting, f"seed={seed}", *self.machine]

    def _untried(self, name: str) -> list[list[str]]:
        tried = [trial["setting"] for trial in self.tuning().get(name, [])]
        return [setting for setting in self.spec.settings() if setting and setting not in tried]

    def _keep_trial(self, name: str, setting: list[str], result: dict[str, Any]) -> None:
        trial = {"setting": setting, "seed": self.spec.tune_seed, **result}
        logger.info("%s %s: %s", name, " ".join(setting), result)
        tuning = self.tuning()
        tuning[name] = sorted([*tuning.get(name, []), trial], key=lambda kept: kept["setting"])
        write_json(self.results / "tuning.json", tuning)

    def _keep_cell(self, name: str, seed: int, result: dict[str, Any]) -> None:
        outcome = result["refused"] if "refused" in result else f"test AUC {result['test']['auc']:.4f}"
        logger.info("%s seed %d: %s", name, seed, outcome)
        cell = {
            "study": self.folder.name,
            "name": name,
            "overrides": [*self.spec.common, *self.spec.runs[name], *self.best_setting(name)],
            "tuning_trials": len(self.tuning().get(name, [])),
            "versions": _versions(),
            **result,
        }
        write_json(self._path(name, seed), cell)

    def _path(self, name: str, seed: int) -> Path:
        return self.results / f"{name}-seed{seed}.json"


def _results(futures: Mapping[Future[dict[str, Any]], _Key], jobs: int) -> Iterator[tuple[_Key, dict[str, Any]]]:
    """What each training is and came to, as they end.

    Args:
        futures: in the order in which they were submitted.
        jobs: processes.

    Raises:
        RuntimeError: a process was ended from outside; it says which trainings were under way.
    """
    waiting = dict(futures)
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
            del waiting[future]
    except BrokenProcessPool as error:
        # Trainings begin in order; those of a broken pool all fail at once.
        under_way = list(waiting.values())[:jobs]
        raise RuntimeError(
            f"a process of the study ended without a word (out of memory, killed?) while {under_way} trained; cells "
            "that have a result are kept"
        ) from error


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found
