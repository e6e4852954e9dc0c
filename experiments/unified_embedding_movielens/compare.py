"""Put the study's AUCs beside the published ones, in README.md.

python experiments/unified_embedding_movielens/compare.py
"""

from __future__ import annotations

from pathlib import Path

from recemb.comparison.study import Study
from recemb.comparison.summary import spread, summaries

FOLDER = Path(__file__).resolve().parent
BEGIN = "<!-- published: written by experiments/unified_embedding_movielens/compare.py -->"
END = "<!-- end of published -->"
# Run -> AUC of the paper's Table 1, AUC of the replication.
PUBLISHED = {
    "collisionless": (0.8872, 0.8985),
    "separate-1.6MB": (0.8537, 0.8684),
    "multiplexed-1.6MB": (0.8774, 0.8872),
    "separate-791kB": (0.8300, 0.8407),
    "multiplexed-791kB": (0.8693, 0.8759),
    "separate-158kB": (0.7707, 0.7712),
    "multiplexed-158kB": (0.8200, 0.8263),
}


def main() -> None:
    runs = {run.name: run for run in summaries(Study.open(FOLDER))}
    lines = ["| run | ours | paper | ours - paper | replication | ours - replication |", "|---|---|---|---|---|---|"]
    for name, (paper, replication) in PUBLISHED.items():
        if name in runs:
            ours = runs[name].mean_auc
            lines.append(
                f"| {name} | {spread(runs[name].auc)} | {paper:.4f} | {ours - paper:+.4f} | {replication:.4f} | "
                f"{ours - replication:+.4f} |"
            )
    path = FOLDER / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
