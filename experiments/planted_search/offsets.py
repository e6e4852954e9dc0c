"""Why dead rows are kept: what they have in common in OptEmbed's supernet. See README.md.

python experiments/planted_search/offsets.py --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.planted_search.planted import WITH_DEAD_ROWS, Planted, make
from experiments.planted_search.run import COMMON
from recemb.collection import compressed_groups
from recemb.run_folder import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--override", action="append", default=[], help="of python -m recemb.train, repeatable")
    arguments = parser.parse_args()
    print("| seed | field | dead rows dropped | live rows dropped | norm of the dead rows' mean | their mean norm |")
    print("|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        planted = make(Path(scratch) / "data")
        for seed in arguments.seeds:
            print_one(planted, seed, arguments.override, Path(scratch) / str(seed))


def print_one(planted: Planted, seed: int, overrides: list[str], run: Path) -> None:
    """Train the supernet of one seed; a line for each field with dead rows."""
    command = [sys.executable, "-m", "recemb.train", *COMMON, "embedding=optembed", "+stage=supernet"]
    command += [f"data.path={planted.manifest.root}", f"paths.run={run}", f"seed={seed}", *overrides]
    subprocess.run(command, check=True, capture_output=True)
    model, _ = load_model(run / "stages" / "0-supernet" / "checkpoints" / "best")
    [group] = compressed_groups(model)
    plan, rows = group.derive_plan(None), group.stored_tables()
    for field in WITH_DEAD_ROWS:
        table = f"t_{field}"
        # Without the row of ids that have no value, which no row of the log reads.
        alive = planted.truth.tables[table].mask().any(1)[1:]
        dropped = ~plan.tables[table].mask().any(1)[1:]
        dead = rows[table][1:][~alive]
        norms = (float(torch.linalg.vector_norm(dead.mean(0))), float(torch.linalg.vector_norm(dead, dim=1).mean()))
        print(
            f"| {seed} | {field} | {int((dropped & ~alive).sum())} of {int((~alive).sum())} | "
            f"{int((dropped & alive).sum())} of {int(alive.sum())} | {norms[0]:.2f} | {norms[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
