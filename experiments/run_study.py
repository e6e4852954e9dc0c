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

Every (run, seed) is one process and one JSON in ``results/``, written once; a study that was killed goes on where it
was. The grid is tried with ``tune_seed`` and its test figures are never looked at: the setting with the best
validation AUC is kept in ``results/tuning.json`` with all trials. The README's table stands between two marker lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

BEGIN, END = "<!-- table: written by experiments/run_study.py -->", "<!-- end of table -->"
PACKAGES = ("torch", "torchrec", "numpy", "pyarrow")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("overrides", nargs="*", help="more overrides, for this machine (data.path=...)")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--only", default="", help="only runs whose name starts so")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
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
        names = [name for name in self.runs if name.startswith(only)]
        with ThreadPoolExecutor(jobs) as pool:
            trials = [(name, setting) for name in names for setting in self._untried(name)]
            for name, setting, outcome in pool.map(lambda trial: self._trial(*trial), trials):
                self._keep_trial(name, setting, outcome)
            cells = [(name, seed) for name in names for seed in self.seeds if not self._path(name, seed).exists()]
            list(pool.map(lambda cell: self._cell(*cell), cells))

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

    def _trial(self, name: str, setting: list[str]) -> tuple[str, list[str], float]:
        result = self._train([*self.runs[name], *setting], self.tune_seed, f"{name} {' '.join(setting)}")
        return name, setting, float(result["validation"]["auc"])

    def _keep_trial(self, name: str, setting: list[str], outcome: float) -> None:
        tuning = self._tuning()
        tuning.setdefault(name, []).append({"setting": setting, "seed": self.tune_seed, "validation_auc": outcome})
        _write(self.results / "tuning.json", tuning)

    def _best(self, name: str) -> list[str]:
        trials = self._tuning().get(name, [])
        return max(trials, key=lambda trial: trial["validation_auc"])["setting"] if trials else []

    def _cell(self, name: str, seed: int) -> None:
        overrides = [*self.runs[name], *self._best(name)]
        result = self._train(overrides, seed, f"{name} seed {seed}")
        result.pop("run")
        result["data"].pop("path")
        cell = {
            "study": self.folder.name,
            "name": name,
            "overrides": [*self.common, *overrides],
            "tuning_trials": len(self._tuning().get(name, [])),
            "versions": {package: version(package) for package in PACKAGES},
            **result,
        }
        _write(self._path(name, seed), cell)

    def _train(self, overrides: list[str], seed: int, label: str) -> dict[str, Any]:
        print(label, flush=True)
        with tempfile.TemporaryDirectory() as run:
            command = [sys.executable, "-m", "recemb.train", *self.common, *overrides, *self.machine_overrides]
            command += [f"seed={seed}", f"paths.run={run}/run"]
            outcome = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            if outcome.returncode:
                raise SystemExit(f"{label}: {' '.join(command)} failed:\n{outcome.stderr[-4000:]}")
            return json.loads((Path(run) / "run" / "results.json").read_text())

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
        lines = [
            "| run | setting chosen on validation | test AUC | test log loss | best possible AUC "
            "| bytes | ratio | samples/s | seeds |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name in self.runs:
            cells = [
                json.loads(self._path(name, seed).read_text()) for seed in self.seeds if self._path(name, seed).exists()
            ]
            if cells:
                lines.append(_row(name, cells, self._best(name)))
        return "\n".join(lines)


def _row(name: str, cells: list[dict[str, Any]], setting: list[str]) -> str:
    optima = [cell["data"]["optimum"]["auc"] for cell in cells if cell["data"].get("optimum")]
    embedding = cells[0]["embedding"]
    short = ", ".join(text.split(".")[-1].replace("learning_rate", "rate") for text in setting) or "-"
    columns = [
        name,
        short,
        _spread([cell["test"]["auc"] for cell in cells]),
        _spread([cell["test"]["logloss"] for cell in cells]),
        f"{optima[0]:.4f}" if optima else "-",
        f"{embedding['bytes']:,}",
        f"{embedding['ratio']:.1f}x",
        f"{statistics.median(cell['train']['samples_per_second'] for cell in cells):,.0f}",
        str(len(cells)),
    ]
    return f"| {' | '.join(columns)} |"


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def _write(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
