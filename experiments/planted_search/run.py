"""How much of what carries no signal do searches find? See README.md.

python experiments/planted_search/run.py optembed magnitude ...
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.planted_search.planted import Planted, make
from recemb.files import write_json
from recemb.plan import PLAN_FILE, CompressionPlan
from recemb.pruned_bytes import plan_bytes

HERE = Path(__file__).parent
# Of every method alike.
COMMON = [
    "data=parquet",
    "embedding.embedding_dim=8",
    "model.bottom_layers=[8]",
    "model.over_layers=[64,1]",
    "trainer.batch_size=512",
    "trainer.epochs=6",
    "trainer.validate_every_steps=0.5",
    "trainer.stopping.patience=4",
    "trainer.threads=1",
    "optimizer.embedding.learning_rate=0.1",
    "optimizer.dense.lr=3e-3",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("embeddings", nargs="+", help="names of configs/embedding")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--budget",
        default="truth",
        help="'truth': bytes of what carries signal; 'null': as the search ends; or 4x, ...",
    )
    parser.add_argument("--name", default="", help="of the results, where overrides make it another method")
    parser.add_argument("--override", action="append", default=[], help="of python -m recemb.train, repeatable")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        planted = make(Path(scratch) / "data")
        for embedding in arguments.embeddings:
            for seed in arguments.seeds:
                run = Path(scratch) / f"{embedding}-{seed}"
                result = run_one(planted, embedding, seed, arguments.budget, arguments.override, run)
                name = f"{arguments.name or embedding}-{arguments.budget}-{seed}.json"
                write_json(arguments.output / name, result)
                print(
                    json.dumps({"name": name, "auc": result["test_auc"], "bytes": result["bytes"], **result["found"]})
                )


def run_one(
    planted: Planted, embedding: str, seed: int, budget: str, overrides: list[str], run: Path
) -> dict[str, Any]:
    """Search, retrain and compare the plan with the truth."""
    given = str(plan_bytes(planted.truth)) if budget == "truth" else budget
    command = [sys.executable, "-m", "recemb.train", *COMMON, f"embedding={embedding}", f"embedding.budget={given}"]
    command += [f"data.path={planted.manifest.root}", f"paths.run={run}", f"seed={seed}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    results = json.loads((run / "results.json").read_text())
    plans = sorted((run / "stages").glob(f"*/plan/{PLAN_FILE}"))
    result: dict[str, Any] = {
        "embedding": embedding,
        "seed": seed,
        "budget": budget,
        "overrides": overrides,
        "test_auc": results["test"]["auc"],
        "bytes": results["embedding"]["bytes"],
        "truth_bytes": plan_bytes(planted.truth),
        "found": {},
        "git": results["git"],
    }
    # Full tables, the reference, have none.
    if plans:
        plan = CompressionPlan.load(plans[-1].parent)
        result["found"] = compare(plan, planted.truth)
        result["widths"] = {name: round(mean_width(plan, name), 2) for name in plan.tables}
        result["search_trainings"] = results["search"]["cpu_trainings"]
    return result


def compare(plan: CompressionPlan, truth: CompressionPlan) -> dict[str, float]:
    """Precision and recall of dropped rows, and of dropped columns, counted: vectors may be rotated, counts may not.

    A table drops its embedding_dim less the mean width of the rows it keeps, of which those are right that it should
    drop, and no more.
    """
    dropped = dead = both = 0
    columns = dead_columns = right = 0.0
    for name, true in truth.tables.items():
        # The row of ids without a value is read by no row of the log.
        lost, should = ~plan.tables[name].mask().any(1)[1:], ~true.mask().any(1)[1:]
        dropped, dead, both = dropped + int(lost.sum()), dead + int(should.sum()), both + int((lost & should).sum())
        narrower = true.embedding_dim - mean_width(plan, name)
        should_be = true.embedding_dim - mean_width(truth, name)
        columns, dead_columns, right = columns + narrower, dead_columns + should_be, right + min(narrower, should_be)
    return {
        "row_precision": both / max(dropped, 1),
        "row_recall": both / dead,
        "column_precision": right / max(columns, 1e-9),
        "column_recall": right / dead_columns,
    }


def mean_width(plan: CompressionPlan, table: str) -> float:
    """Values a kept row, of the rows of a table."""
    rows = plan.tables[table].num_rows()
    return plan.tables[table].num_values() / rows if rows else 0.0


if __name__ == "__main__":
    main()
