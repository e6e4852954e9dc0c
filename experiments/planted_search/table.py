"""Write the table of README.md from ``results/``: python experiments/planted_search/table.py"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- table: written by table.py -->", "<!-- end of table -->"
COLUMNS = ("row_precision", "row_recall", "column_precision", "column_recall")


def main() -> None:
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((HERE / "results").glob("*.json")):
        runs.setdefault(path.stem.rpartition("-")[0], []).append(json.loads(path.read_text()))
    lines = ["| run | bytes | test AUC | rows: precision | recall | columns: precision | recall |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, results in runs.items():
        found = [_shown([result["found"].get(column) for result in results], 2) for column in COLUMNS]
        size = f"{statistics.mean(result['bytes'] for result in results):,.0f}"
        lines.append(
            f"| {name} ({len(results)} seeds) | {size} | {_shown([result['test_auc'] for result in results], 4)} | "
            + " | ".join(found)
            + " |"
        )
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


def _shown(values: list[float | None], digits: int) -> str:
    """Mean and range."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{statistics.mean(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"


if __name__ == "__main__":
    main()
