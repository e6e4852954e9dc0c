"""A study: the same training for several runs and seeds, one JSON a cell, each trained once.

FOLDER/study.json               what is compared, with which settings, and on which data
FOLDER/results/tuning.json      every trial, on the validation split
FOLDER/results/<run>-seed<k>.json   one cell, written once; a study that was killed goes on where it was

One process at a time trains a study.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from recemb.comparison.cells import composed, end_with_parent, train_cell, try_setting
from recemb.comparison.data_set import describe, in_words
from recemb.config import TrainConfig
from recemb.data_source import open_data_set
from recemb.files import locked, write_json
from recemb.training.stopping import SIGNS

logger = logging.getLogger(__name__)

SPEC_FILE = "study.json"
_Key = TypeVar("_Key")
_Task = TypeVar("_Task")
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
        ValueError: nothing to train, ``tune_seed`` among ``seeds``, or a grid over the metric that chooses.
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
        if wrong := [key for key in self.grid if key.lstrip("+") == "trainer.stopping.metric"]:
            raise ValueError(f"a grid must not be over {wrong[0]}: values of other metrics cannot be compared")

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
        # An error now, not after the data was made.
        self._joined()

    def claim(self, data: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write what this study is into its folder; runs, seeds and data sets may be added to what is there.

        Args:
            data: the data sets of its runs, each as ``describe`` has it, and as ``"overrides"`` what chooses it in
                the runs that train on it.

        Raises:
            ValueError: the folder holds a study of other settings or of other data.
        """
        content = self._joined(data)
        if content != self._earlier():
            self.results.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SPEC_FILE, content)

    def _earlier(self) -> dict[str, Any] | None:
        """What the folder's study is; None for one without a result, which binds nobody."""
        path = self.folder / SPEC_FILE
        if not path.is_file() or not any(self.results.glob("*.json")):
            return None
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    def _joined(self, data: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """The folder's study and this one as one."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self.spec)))
        before = self._earlier()
        if before is None:
            return {**content, "data": list(data)}
        for key in ("common", "grid", "tune_seed"):
            if before[key] != content[key]:
                raise ValueError(
                    f"{self.folder}: its cells were trained with {key}={before[key]}, got {content[key]}; "
                    "give another folder"
                )
        for name, overrides in before["runs"].items():
            if content["runs"].setdefault(name, overrides) != overrides:
                raise ValueError(
                    f"{self.folder}: its run {name!r} is {overrides}, got {content['runs'][name]}; give another folder"
                )
        content["seeds"] = sorted({*before["seeds"], *content["seeds"]})
        content["data"] = list(before.get("data", []))
        for found in data:
            known = next((other for other in content["data"] if other["overrides"] == found["overrides"]), None)
            if known is None:
                content["data"].append(found)
                known = self._data_of_cells(before, found)
            if differing := [key for key in known if known[key] != found[key]]:
                raise ValueError(
                    f"{self.folder}: its cells were trained on {in_words(known)}, got {in_words(found)}, and "
                    f"{differing[0]} is {known[differing[0]]}, got {found[differing[0]]}; give another folder"
                )
        return content

    def _data_of_cells(self, before: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """What a cell says of the data that ``found`` stands for, for studies from before study.json did."""
        for name, overrides in before["runs"].items():
            if _of_data(overrides) == found["overrides"]:
                for seed in before["seeds"]:
                    path = self._path(name, seed)
                    if path.exists() and (data := json.loads(path.read_text()).get("data")) is not None:
                        return {key: value for key, value in data.items() if key in found}
        return {}

    @staticmethod
    def open(folder: Path) -> Study:
        """The study in ``folder``, to read.

        Raises:
            FileNotFoundError: none there.
        """
        path = folder / SPEC_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: not the folder of a study (no {SPEC_FILE})")
        content = json.loads(path.read_text())
        # Not part of what is compared: runs say it, and the machine.
        content.pop("data", None)
        return Study(folder, StudySpec(**content))

    def run(self, jobs: int, only: str = "") -> None:
        """Tune, then train every cell that has no result.

        Args:
            jobs: cells at a time, a process and a thread each.
            only: regular expression that the names of the runs to train must match.

        Raises:
            ValueError, FileNotFoundError: a run whose overrides make no config, no data, or other data than the cells
                that are there were trained on; before anything is trained or written.
            RuntimeError: another process is at work on this study; or a process was killed: those that it may have
                trained are named.
            Exception: of the first training that failed, after those that were under way have ended and are kept.
        """
        names = [name for name in self.spec.runs if re.search(only, name)]
        with locked(self.folder, "study"):
            self.claim(self._checked(names))
            # One process a job for all its cells: imports would take longer than a small cell.
            context = get_context("spawn")
            with ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with_parent) as pool:
                self._tune(pool, names, jobs)
                self._train(pool, names, jobs)

    def _checked(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Make every config and open every data set, which is an error now or not at all; the data sets."""
        data: list[dict[str, Any]] = []
        settings = self.spec.settings() or [[]]
        for name in names:
            for setting in settings:
                config = TrainConfig.parse(composed([*self._overrides(name, setting, 0), "paths.run=nowhere"]))
            # They mean the same for the others.
            settings = settings[:1]
            overrides = _of_data(self.spec.runs[name])
            if all(found["overrides"] != overrides for found in data):
                data.append({"overrides": overrides, **describe(open_data_set(config.data))})
        return data

    def _tune(self, pool: Executor, names: Sequence[str], jobs: int) -> None:
        trials = [
            ((name, setting), self._overrides(name, setting, self.spec.tune_seed))
            for name in names
            for setting in self._untried(name)
        ]
        for (name, setting), result in _results(pool, try_setting, trials, jobs):
            self._keep_trial(name, setting, result)

    def _train(self, pool: Executor, names: Sequence[str], jobs: int) -> None:
        cells = [
            ((name, seed), self._overrides(name, self.best_setting(name), seed)) for name, seed in self.missing(names)
        ]
        for (name, seed), result in _results(pool, train_cell, cells, jobs):
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
        """The setting of the grid that was best on the validation split; empty without a grid or before any trial."""
        scored = [(score, trial) for trial in self.tuning().get(name, []) if (score := _score(trial)) is not None]
        return max(scored, key=lambda pair: pair[0])[1]["setting"] if scored else []

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
        outcome = f"test AUC {result['test']['auc']:.4f}" if "test" in result else result
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


def _of_data(overrides: Sequence[str]) -> list[str]:
    """Those that choose the data set of a run, of its own overrides."""
    return [text for text in overrides if text.lstrip("+").startswith(("data=", "data.", "experiment="))]


def _score(trial: Mapping[str, Any]) -> float | None:
    """The validation metric of a trial, turned so that more is better; None where there is none."""
    scores = (sign * trial[f"validation_{name}"] for name, sign in SIGNS.items() if f"validation_{name}" in trial)
    return next(scores, None)


def _results(
    pool: Executor, train: Callable[[_Task], dict[str, Any]], tasks: Iterable[tuple[_Key, _Task]], jobs: int
) -> Iterator[tuple[_Key, dict[str, Any]]]:
    """What each training is and came to, as they end.

    Args:
        pool: of ``jobs`` processes.
        train: what they do with a task.
        tasks: what each is, and what ``train`` takes for it.
        jobs: trainings at a time.

    Raises:
        RuntimeError: a process was ended from outside; it says which trainings were under way.
        Exception: of the first training that failed, once those under way have ended too; no other is begun.
    """
    left = iter(tasks)
    under_way: dict[Future[dict[str, Any]], _Key] = {}
    failure: Exception | None = None
    try:
        while True:
            if failure is None:
                # No more than there are processes: the pool begins what it was given, whatever fails meanwhile.
                for key, task in itertools.islice(left, jobs - len(under_way)):
                    under_way[pool.submit(train, task)] = key
            if not under_way:
                break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                try:
                    result = future.result()
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    logger.error("%s failed, no other is begun: %s", under_way[future], error)
                    error.add_note(f"in the training of {under_way[future]}")
                    failure = failure or error
                else:
                    yield under_way[future], result
                del under_way[future]
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a process of the study ended without a word (out of memory, killed?) while {list(under_way.values())} "
            "trained; cells that have a result are kept"
        ) from error
    if failure is not None:
        raise failure


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found
