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
STUDIES = {
    "frontier_criteo": ("80,000 Criteo rows", ("10x", "100x")),
    "frontier_synthetic": ("6 million synthetic rows", ("10x", "100x", "1000x")),
}


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
    """Test AUC of every method at budgets of both logs, best first at the first of them."""
    columns = [(study, budget) for study, (_, budgets) in STUDIES.items() for budget in budgets]
    runs = {study: summaries(Study.open(ROOT / "experiments" / study)) for study in STUDIES}
    found = {(study, run.method, run.budget): run for study in STUDIES for run in runs[study]}
    first = columns[0]
    methods = sorted(
        {run.method for study in STUDIES for run in runs[study]} - {"full"},
        key=lambda method: (_order(found.get((first[0], method, first[1]))), method),
    )
    heads = [f"{STUDIES[study][0]}, {budget}" for study, budget in columns]
    lines = [f"| {' | '.join(['`embedding=`', *heads])} |", f"|{'---|' * (len(columns) + 1)}"]
    full = [
        f"{_auc(found[study, 'full', None])} (1x) {'| ' * (len(budgets) - 1)}"
        for study, (_, budgets) in STUDIES.items()
    ]
    lines.append(f"| `full` | {'| '.join(full)}|")
    for method in methods:
        cells = [_auc(found.get((study, method, budget))) for study, budget in columns]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _order(run: RunSummary | None) -> float:
    return -run.mean_auc if run is not None and run.auc else 0.0


def _auc(run: RunSummary | None) -> str:
    if run is None:
        return "not run"
    return spread(run.auc) if run.refused is None else "-"


if __name__ == "__main__":
    main()
