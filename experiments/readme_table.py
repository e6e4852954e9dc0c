"""Write README.md's table of results from the studies' committed cells, or check that it is theirs.

python experiments/readme_table.py
python experiments/readme_table.py --check      exit status 1 where README.md says something else
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recemb.comparison.study import Study
from recemb.comparison.summary import RunSummary, spread, summaries

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: written by experiments/readme_table.py -->", "<!-- end of results -->"
STUDIES = {"criteo_head80k": "80,000 Criteo rows", "synthetic": "a million synthetic rows"}
BUDGETS = ("10x", "100x")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = with_table(before)
    if parser.parse_args().check:
        sys.exit(0 if before == after else "README.md: run python experiments/readme_table.py")
    readme.write_text(after)


def with_table(text: str) -> str:
    """``text`` with the table between its two marker lines."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def table() -> str:
    """Test AUC of every static method at each budget on both logs, best first at the first of them."""
    runs = {study: {run.name: run for run in summaries(Study.open(ROOT / "experiments" / study))} for study in STUDIES}
    columns = ["`embedding=`", *(f"{title}, {budget}" for title in STUDIES.values() for budget in BUDGETS)]
    first = runs[next(iter(STUDIES))]
    methods = [name.removesuffix("-10x") for name in first if name.endswith("-10x")]
    methods.sort(key=lambda method: _order(first[f"{method}-10x"]))
    full = [f"{_auc(runs[study]['full'])} (1x)" for study in STUDIES]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", f"| `full` | {full[0]} | | {full[1]} | |"]
    for method in methods:
        cells = [_auc(runs[study].get(f"{method}-{budget}")) for study in STUDIES for budget in BUDGETS]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _order(run: RunSummary) -> float:
    return -run.mean_auc if run.auc else 0.0


def _auc(run: RunSummary | None) -> str:
    if run is None:
        return "not run"
    return spread(run.auc) if run.refused is None else "cannot be so small"


if __name__ == "__main__":
    main()
