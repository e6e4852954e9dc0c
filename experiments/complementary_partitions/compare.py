"""Loss and AUC of every run beside the full tables' of the same seed, in the README of both logs.

python experiments/complementary_partitions/compare.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recemb.comparison.study import Study
from recemb.comparison.summary import spread

FOLDER = Path(__file__).resolve().parent
FOLDERS = (FOLDER, FOLDER.with_name("complementary_partitions_synthetic"))
BEGIN = "<!-- differences: written by experiments/complementary_partitions/compare.py -->"
END = "<!-- end of differences -->"
# What is the same of a run and of its hashing: the collisions, and which tables stay full.
_COLLISIONS = re.compile(r"-(?=(?:4|60)(?:-full|$))")


def main() -> None:
    for folder in FOLDERS:
        path = folder / "README.md"
        before, _, rest = path.read_text().partition(BEGIN)
        text = "\n".join(differences(Study.open(folder)))
        path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def differences(study: Study) -> list[str]:
    """Markdown: a line a run, each difference taken seed by seed, then mean and standard deviation."""
    cells = dict(study.cells())
    lines = [
        "| run | bytes | test log loss, % above full | test AUC - full | AUC - hashing at as many collisions |",
        "|---|---|---|---|---|",
    ]
    for name, found in cells.items():
        loss = [
            100 * (ours["test"]["logloss"] / full["test"]["logloss"] - 1) for ours, full in _pairs(found, cells["full"])
        ]
        baseline = f"hashing-{_COLLISIONS.split(name, maxsplit=1)[1]}" if name != "full" else ""
        values = ["-", "-", "-"] if name == "full" else [_signed(loss, 2), _signed(_auc(found, cells["full"]), 4), "-"]
        if name != "full" and not name.startswith("hashing"):
            values[2] = _signed(_auc(found, cells[baseline]), 4)
        lines.append(f"| {name} | {found[0]['embedding']['bytes']:,} | {' | '.join(values)} |")
    for first, second in (("mult-60", "hashing-4"), ("concat-60", "hashing-4")):
        lines += ["", f"{first} - {second}, test AUC: {_signed(_auc(cells[first], cells[second]), 4)}."]
    return lines


def _auc(cells: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[float]:
    return [ours["test"]["auc"] - other["test"]["auc"] for ours, other in _pairs(cells, others)]


def _pairs(
    cells: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Cells of the same seed."""
    by_seed = {cell["seed"]: cell for cell in others}
    return [(cell, by_seed[cell["seed"]]) for cell in cells if cell["seed"] in by_seed]


def _signed(values: Sequence[float], digits: int) -> str:
    mean, _, deviation = spread(values).partition(" ± ")
    text = f"{float(mean):+.{digits}f}"
    return f"{text} ± {float(deviation):.{digits}f}" if deviation else text


if __name__ == "__main__":
    main()
