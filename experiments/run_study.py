"""Run the cells of a study that have no result yet, then write the table of its README from the results.

    python experiments/run_study.py experiments/synthetic --jobs 2
    python experiments/run_study.py experiments/criteo_head80k data.path=FOLDER
    python experiments/run_study.py experiments/synthetic --table    only the table, from the committed results
    python experiments/run_study.py experiments/synthetic --small    every run once for a few steps, results thrown away

For studies whose runs are listed one by one; ``python -m recemb.compare`` makes those of methods times budgets, and
``--small`` tries their runs too. A study is a folder with ``runs.yaml``:

    common: [overrides of python -m recemb.train, for every cell]
    tune: {optimizer.embedding.learning_rate: [0.02, 0.05]}   grid tried for every run alike, on the validation split
    tune_seed: 0
    seeds: [1, 2, 3]
    runs: {full: [embedding=full], unified-10x: [embedding=unified, embedding.budget=10x]}

Cells, tuning and resuming: ``recemb/comparison/study.py``. The README's table stands between two marker lines.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recemb.comparison.study import Study, StudySpec
from recemb.comparison.summary import summaries, table

# On top of a study's own settings: shows that its runs still train and are evaluated, not what they find.
SMALL = ("trainer.epochs=1", "trainer.max_steps=4", "trainer.validate_every_steps=null")
BEGIN, END = "<!-- table: written by experiments/run_study.py -->", "<!-- end of table -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("overrides", nargs="*", help="more overrides, for this machine (data.path=...)")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--only", default="", help="only runs whose name matches this regular expression")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--small", action="store_true", help="train every run for 4 steps, keep nothing")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("recemb.comparison").setLevel(logging.INFO)
    if arguments.small:
        run_small(arguments.study, arguments.overrides, arguments.jobs, arguments.only)
        return
    study = Study(arguments.study, spec_of(arguments.study), arguments.overrides)
    if not arguments.table:
        study.run(arguments.jobs, arguments.only)
    write_table(study)


def spec_of(folder: Path) -> StudySpec:
    """What ``runs.yaml`` of a study says."""
    if not (folder / "runs.yaml").is_file():
        raise SystemExit(f"{folder}: no runs.yaml; python -m recemb.compare trains and reports such a study")
    content: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(folder / "runs.yaml"))  # type: ignore[assignment]
    return StudySpec(
        runs={name: list(values or []) for name, values in content["runs"].items()},
        seeds=[int(seed) for seed in content["seeds"]],
        common=[*content.get("common", []), "trainer.threads=1"],
        grid={key: list(values) for key, values in content.get("tune", {}).items()},
        tune_seed=int(content.get("tune_seed", 0)),
    )


def run_small(folder: Path, overrides: list[str], jobs: int, only: str) -> None:
    """Every run of a study once, for a few steps, in a folder that is thrown away."""
    spec = spec_of(folder) if (folder / "runs.yaml").is_file() else Study.open(folder).spec
    runs = {name: [*values, *SMALL] for name, values in spec.runs.items()}
    with tempfile.TemporaryDirectory() as scratch:
        study = Study(Path(scratch) / folder.name, replace(spec, runs=runs, seeds=[1], grid={}), overrides)
        study.run(jobs, only)
        print(table(summaries(study)))


def write_table(study: Study) -> None:
    """Replace what stands between the markers of README.md by the table of ``results/``."""
    readme = study.folder / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{table(summaries(study))}\n{END}{after}")


if __name__ == "__main__":
    main()
