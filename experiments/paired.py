"""Test AUC of runs of a study less that of a reference with the same seed, into the study's README.

    python experiments/paired.py experiments/search_methods

Runs of one seed share data, order and start, so their difference is known better than either. A README says what is
compared by a marker line with the reference's name and a regular expression that whole names of runs match; everything
up to the next marker is replaced.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

from recemb.comparison.study import Study

MARKER = re.compile(r"<!-- paired: (?P<reference>\S+) (?P<runs>\S+) -->\n.*?<!-- end of pairs -->", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("study", type=Path)
    folder = parser.parse_args().study
    readme = folder / "README.md"
    readme.write_text(with_pairs(readme.read_text(), dict(Study.open(folder).cells())))


def with_pairs(text: str, cells: dict[str, list[dict[str, Any]]]) -> str:
    """``text`` with the table of every marker; ``cells``: run -> its cells, one a seed."""

    def replace(match: re.Match[str]) -> str:
        reference = match["reference"]
        runs = [name for name in cells if name != reference and re.fullmatch(match["runs"], name)]
        lines = [f"| run | ratio | test AUC less that of {reference} | by seed |", "|---|---|---|---|"]
        lines += [line for name in runs if (line := _line(name, cells[name], cells[reference]))]
        begin = match[0].split("\n", 1)[0]
        return "\n".join([begin, *lines, "<!-- end of pairs -->"])

    return MARKER.sub(replace, text)


def differences(run: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[float]:
    """Test AUCs less those of the reference, in the order of the seeds that both have."""
    ours, theirs = (
        {cell["seed"]: cell["test"]["auc"] for cell in cells if "test" in cell} for cells in (run, reference)
    )
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def standard_error(values: list[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def _line(name: str, run: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str | None:
    found = differences(run, reference)
    if len(found) < 2:
        return None
    sizes = statistics.mean(cell["embedding"]["bytes"] for cell in run if "embedding" in cell)
    ratio = run[0]["embedding"]["full_bytes"] / sizes
    by_seed = ", ".join(f"{value:+.4f}" for value in found)
    return f"| {name} | {ratio:.1f}x | {statistics.mean(found):+.4f} ± {standard_error(found):.4f} | {by_seed} |"


if __name__ == "__main__":
    main()
