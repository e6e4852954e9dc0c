"""Train on one rank and on two with equal batches of all ranks together, then write the table of README.md.

    python experiments/ranks/run.py                                  synthetic log of a million rows, made at first use
    python experiments/ranks/run.py data.synthetic.path=FOLDER       where it lies already
    python experiments/ranks/run.py --table                          only the table, from the committed results

Every (method, ranks, seed) is one training started by torchrun and one JSON in ``results/``, written once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
BEGIN, END = "<!-- table: written by run.py -->", "<!-- end of table -->"
PACKAGES = ("torch", "torchrec", "numpy", "pyarrow")

# Rows of one step, of all ranks together.
STEP_ROWS = 4096
METHODS = {
    "full": ["embedding=full"],
    "unified-10x": ["embedding=unified", "embedding.budget=10x"],
}
SEEDS = (1, 2, 3)
# Name -> number of ranks and what else is said.
PLACES: dict[str, tuple[int, list[str]]] = {
    "1 rank": (1, []),
    "2 ranks": (2, []),
    "2 ranks, row-wise": (2, ["+trainer.placement={*:[row_wise]}"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("overrides", nargs="*", help="more overrides, for this machine (data.synthetic.path=...)")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_intermixed_args()
    if not arguments.table:
        for seed, method, place in itertools.product(SEEDS, METHODS, PLACES):
            path = result_path(method, place, seed)
            if not path.exists():
                path.write_text(json.dumps(train(method, place, seed, arguments.overrides), indent=1) + "\n")
                print(f"{path.name}: AUC {json.loads(path.read_text())['test']['auc']:.5f}", flush=True)
    write_table()


def result_path(method: str, place: str, seed: int) -> Path:
    return RESULTS / f"{method}-{place.replace(', ', '-').replace(' ', '-')}-seed{seed}.json"


def train(method: str, place: str, seed: int, machine_overrides: Sequence[str]) -> dict[str, Any]:
    """What results.json of one training holds, and what it was made with."""
    num_ranks, more = PLACES[place]
    overrides = [
        "+experiment=criteo",
        "data=synthetic",
        *METHODS[method],
        *more,
        f"trainer.batch_size={STEP_ROWS // num_ranks}",
        "trainer.threads=1",
        f"seed={seed}",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [*launcher, "-m", "recemb.train", *overrides, *machine_overrides, f"hydra.run.dir={run}"]
        finished = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"{method}, {place}, seed {seed}: {finished.stderr[-3000:]}")
        results: dict[str, Any] = json.loads((run / "results.json").read_text())
    results.pop("run")
    results["data"].pop("path")
    return {
        "study": FOLDER.name,
        "name": f"{method}, {place}",
        "overrides": overrides,
        "versions": {package: version(package) for package in PACKAGES},
        **results,
    }


def write_table() -> None:
    """Replace what stands between the markers of README.md by the table of ``results/``."""
    readme = FOLDER / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    columns = ["method", "ranks", "test AUC, each seed", "mean ± deviation", "minus 1 rank, same seed", "seeds"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for method in METHODS:
        alone = aucs(method, "1 rank")
        for place in PLACES:
            here = aucs(method, place)
            if not here:
                continue
            values = list(here.values())
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            differences = [here[seed] - alone[seed] for seed in here if seed in alone]
            cells = [
                method,
                place,
                ", ".join(f"{value:.4f}" for value in values),
                f"{statistics.mean(values):.4f}{spread}",
                "-" if place == "1 rank" else ", ".join(f"{value:+.4f}" for value in differences),
                str(len(values)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    readme.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


def aucs(method: str, place: str) -> dict[int, float]:
    """Seed -> test AUC, of the cells that have been run."""
    paths = {seed: result_path(method, place, seed) for seed in SEEDS}
    return {seed: float(json.loads(path.read_text())["test"]["auc"]) for seed, path in paths.items() if path.exists()}


if __name__ == "__main__":
    main()
