"""Run the cells of a study that have no result yet, then write the table of its README from the results.

    python experiments/run_study.py experiments/synthetic --jobs 2
    python experiments/run_study.py experiments/criteo_head80k data.path=FOLDER
    python experiments/run_study.py experiments/synthetic --table    only the table, from the committed results

A study is a folder with ``runs.yaml``:

    common: [overrides of python -m recemb.train, for every cell]
    tune: {optimizer.embedding.learning_rate: [0.02, 0.05]}   grid tried for every run alike, on the validation split
    tune_seed: 0
    seeds: [1, 2, 3]
    runs: {full: [embedding=full], unified-10x: [embedding=unified, embedding.budget=10x]}

Every (run, seed) is one training and one JSON in ``results/``, written once; a study that was killed goes on where it
was. The grid is tried with ``tune_seed`` and its test figures are never looked at: the setting with the best
validation AUC is kept in ``results/tuning.json`` with all trials. The README's table stands between two marker lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recemb.command_line import config_folder

BEGIN, END = "<!-- table: written by experiments/run_study.py -->", "<!-- end of table -->"
PACKAGES = ("torch", "torchrec", "numpy", "pyarrow")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("overrides", nargs="*", help="more overrides, for this machine (data.path=...)")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--only", default="", help="only runs whose name matches this regular expression")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_intermixed_args()
    study = Study(arguments.study, arguments.overrides)
    if not arguments.table:
        study.run(arguments.jobs, arguments.only)
    study.write_table()


class Study:
    """One study folder."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        plan: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(folder / "runs.yaml"))  # type: ignore[assignment]
        self.folder = folder
        self.results = folder / "results"
        self.results.mkdir(exist_ok=True)
        self.common = [*plan.get("common", []), "trainer.threads=1"]
        self.machine_overrides = list(overrides)
        self.grid = {key: list(values) for key, values in plan.get("tune", {}).items()}
        self.tune_seed = int(plan.get("tune_seed", 0))
        self.seeds = [int(seed) for seed in plan["seeds"]]
        self.runs = {name: list(values or []) for name, values in plan["runs"].items()}

    def run(self, jobs: int, only: str) -> None:
        """Tune, then train every cell that has no result."""
        names = [name for name in self.runs if re.search(only, name)]
        # One process a job for all its cells: imports would take longer than a small cell.
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            trials = {
                pool.submit(train_once, self._overrides(name, setting, self.tune_seed)): (name, setting)
                for name in names
                for setting in self._untried(name)
            }
            for future in as_completed(trials):
                self._keep_trial(*trials[future], future.result())
            cells = {
                pool.submit(train_once, self._overrides(name, self._best(name), seed)): (name, seed)
                for name in names
                for seed in self.seeds
                if not self._path(name, seed).exists()
            }
            for future in as_completed(cells):
                self._keep_cell(*cells[future], future.result())

    def _overrides(self, name: str, setting: list[str], seed: int) -> list[str]:
        return [*self.common, *self.runs[name], *setting, f"seed={seed}", *self.machine_overrides]

    def _settings(self) -> list[list[str]]:
        return [
            [f"{key}={value}" for key, value in zip(self.grid, values, strict=True)]
            for values in itertools.product(*self.grid.values())
        ]

    def _tuning(self) -> dict[str, list[dict[str, Any]]]:
        path = self.results / "tuning.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _untried(self, name: str) -> list[list[str]]:
        tried = [trial["setting"] for trial in self._tuning().get(name, [])]
        return [setting for setting in self._settings() if setting and setting not in tried]

    def _keep_trial(self, name: str, setting: list[str], result: dict[str, Any]) -> None:
        if "refused" in result:
            return
        print(f"{name} {' '.join(setting)}: validation AUC {result['validation']['auc']:.4f}", flush=True)
        trial = {"setting": setting, "seed": self.tune_seed, "validation_auc": result["validation"]["auc"]}
        tuning = self._tuning()
        tuning[name] = sorted([*tuning.get(name, []), trial], key=lambda kept: kept["setting"])
        _write(self.results / "tuning.json", tuning)

    def _best(self, name: str) -> list[str]:
        trials = self._tuning().get(name, [])
        return max(trials, key=lambda trial: trial["validation_auc"])["setting"] if trials else []

    def _keep_cell(self, name: str, seed: int, result: dict[str, Any]) -> None:
        if "refused" in result:
            print(f"{name}: {result['refused']}", flush=True)
        else:
            print(f"{name} seed {seed}: test AUC {result['test']['auc']:.4f}", flush=True)
            result.pop("run")
            result["data"].pop("path")
        cell = {
            "study": self.folder.name,
            "name": name,
            "overrides": [*self.common, *self.runs[name], *self._best(name)],
            "tuning_trials": len(self._tuning().get(name, [])),
            "versions": {package: version(package) for package in PACKAGES},
            **result,
        }
        _write(self._path(name, seed), cell)

    def _path(self, name: str, seed: int) -> Path:
        return self.results / f"{name}-seed{seed}.json"

    def write_table(self) -> None:
        """Replace what stands between the markers of README.md by the table of ``results/``."""
        readme = self.folder / "README.md"
        text = readme.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        readme.write_text(f"{before}{BEGIN}\n{self._table()}\n{END}{after}")

    def _table(self) -> str:
        # Samples a second of CPU time: cells share the machine, so those by the clock compare nothing.
        columns = ["run", "test AUC", "test log loss", "best possible AUC", "bytes", "ratio", "samples/CPU s", "seeds"]
        if self.grid:
            columns.insert(1, "setting chosen on validation")
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        for name in self.runs:
            cells = [
                json.loads(self._path(name, seed).read_text()) for seed in self.seeds if self._path(name, seed).exists()
            ]
            if cells:
                lines.append(self._row(name, cells, len(columns)))
        return "\n".join(lines)

    def _row(self, name: str, cells: list[dict[str, Any]], width: int) -> str:
        if "refused" in cells[0]:
            return f"| {name} | {cells[0]['refused']} {'| ' * (width - 2)}|"
        optima = [cell["data"]["optimum"]["auc"] for cell in cells if cell["data"].get("optimum")]
        embedding = cells[0]["embedding"]
        columns = [
            name,
            _spread([cell["test"]["auc"] for cell in cells]),
            _spread([cell["test"]["logloss"] for cell in cells]),
            f"{optima[0]:.4f}" if optima else "-",
            f"{embedding['bytes']:,}",
            f"{embedding['ratio']:.1f}x",
            f"{statistics.median(cell['train']['samples_per_cpu_second'] for cell in cells):,.0f}",
            str(len(cells)),
        ]
        if self.grid:
            chosen = (text.split("=") for text in self._best(name))
            columns.insert(1, ", ".join(f"{key.split('.')[-1]} {value}" for key, value in chosen) or "-")
        return f"| {' | '.join(columns)} |"


def train_once(overrides: list[str]) -> dict[str, Any]:
    """results.json of ``python -m recemb.train OVERRIDES``, in a folder that is thrown away."""
    from recemb.training.run import train

    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [*overrides, f"paths.run={folder}/run"])
        content: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
        try:
            return train(content)
        except ValueError as error:
            # A budget below what a method can reach is a finding of the study, not a failure of it.
            if "budget" not in str(error):
                raise
            return {"refused": str(error)}


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _write(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
