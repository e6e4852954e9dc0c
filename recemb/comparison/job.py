"""What ``python -m recemb.compare`` does, from its config to the report."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from recemb.assembly import ModelInputs
from recemb.budget import parse_budget
from recemb.command_line import quoted
from recemb.comparison.cells import composed, names_of
from recemb.comparison.recommendation import recommend
from recemb.comparison.report import REPORT_FILE, write_report
from recemb.comparison.study import SPEC_FILE, Study, StudySpec
from recemb.comparison.summary import summaries, table
from recemb.config import TrainConfig, parse
from recemb.data_source import open_data_set
from recemb.memory import full_table_bytes

logger = logging.getLogger(__name__)

# What a training process takes before it has a table: torch, TorchRec, the loader's windows.
_PROCESS_BYTES = 1_200_000_000

# Keys of train.yaml that every training of a study has a value of its own for -> what to give instead.
_OF_THE_STUDY = {
    "seed": "seeds=NUMBER",
    "embedding": "methods=[NAME,NAME]",
    "embedding.budget": "budgets=[10x,100x]",
    "stage": "methods=[NAME], whose stages are all run",
    "resume": "output=FOLDER, where the same command goes on",
    "paths.run": "output=FOLDER",
}


@dataclass(frozen=True)
class CompareConfig:
    """The keys of ``configs/compare.yaml``; every other override goes to the trainings.

    Args:
        methods: names of the group ``embedding``.
        budgets: one run a method and budget; methods without a budget have one run. ``full`` is always trained.
        seeds: number of seeds, 1, 2, ...
        tune: ``"key=value,value"``; every combination is tried for every run on the validation split; [] for no tuning.
        jobs: cells at a time; None: as cores and memory allow.
        output: folder of the study.
        recommend: a budget; the study in ``output`` is read, nothing is trained.
    """

    methods: list[str]
    budgets: list[str | int | float]
    seeds: int
    tune: list[str]
    jobs: int | None
    output: str
    recommend: str | int | float | None

    def __post_init__(self) -> None:
        if self.seeds < 1 or (self.jobs is not None and self.jobs < 1):
            raise ValueError(f"seeds and jobs must be at least 1, got {self.seeds} and {self.jobs}")
        if not self.methods or not self.budgets:
            raise ValueError("methods and budgets must not be empty")
        for budget in self.budgets:
            # Only whether it is one: a bad one must not be found by its training, after those of the others.
            parse_budget(budget, full_bytes=1)

    def grid(self) -> dict[str, list[str]]:
        """``tune`` as key -> values.

        Raises:
            ValueError: an entry that is not ``key=value,value``.
        """
        grid: dict[str, list[str]] = {}
        for entry in self.tune:
            key, equals, values = entry.partition("=")
            if not key or not equals or not values:
                raise ValueError(f"tune: every entry must read key=value,value, got {entry!r}")
            grid[key] = values.split(",")
        return grid


def compare(content: Mapping[str, Any], overrides: Sequence[str], config_folders: Sequence[str] = ()) -> str:
    """Train what is missing of the study, write its report.

    Args:
        content: ``configs/compare.yaml`` resolved, plain.
        overrides: the command line's, of which those that are not the comparison's own go to every training.
        config_folders: of configs besides the package's, as Hydra's search path has them (``file:///DIR``).

    Returns:
        For the screen: table and reading, or the recommendation.

    Raises:
        ValueError: a method that has no config, a key that the study sets itself.
        ValueError, OSError: see ``Study`` and ``recemb.training.run.train``.
    """
    config = parse(CompareConfig, content)
    folder = Path(config.output)
    if config.recommend is not None:
        runs = summaries(Study.open(folder))
        full_bytes = max((run.full_bytes for run in runs), default=0)
        return recommend(runs, parse_budget(config.recommend, full_bytes)).text()
    given = {text: _key_of(text) for text in overrides}
    _check_keys([*given.values(), *config.grid()])
    common = [text for text, key in given.items() if key.split(".")[0] not in CompareConfig.__dataclass_fields__]
    machine = [text for text in common if given[text].startswith(("data.path", "data.synthetic.path", "paths."))]
    common = ["trainer.threads=1", *(text for text in common if text not in machine)]
    if config_folders:
        machine.append(f"hydra.searchpath=[{','.join(map(quoted, config_folders))}]")
    known = names_of("embedding", machine)
    if unknown := [name for name in config.methods if name not in known]:
        raise ValueError(f"methods: {unknown} are none of {known}")
    spec = StudySpec(_runs(config), list(range(1, config.seeds + 1)), common, config.grid())
    study = Study(folder, spec, machine)
    total = TrainConfig.parse(composed([*common, *machine, "paths.run=none"]))
    # Here, not in a process of every cell: a synthetic log is made once, and a missing one is an error before any work.
    manifest = open_data_set(total.data)
    full_bytes = sum(full_table_bytes(ModelInputs.of(manifest).logical_tables(total.embedding.embedding_dim)).values())
    jobs = config.jobs or jobs_that_fit(full_bytes)
    missing = len(study.missing(list(spec.runs)))
    logger.info("%s: %d cells to train, %d at a time (%s)", folder, missing, jobs, SPEC_FILE)
    study.run(jobs)
    # All of it, also what an earlier command trained and this one does not name.
    study = Study.open(folder)
    text = write_report(study)
    return f"{table(summaries(study))}\n\n{text}\n\n{folder / REPORT_FILE}"


def _key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _check_keys(keys: Sequence[str]) -> None:
    for key in keys:
        if instead := _OF_THE_STUDY.get(key):
            raise ValueError(f"{key}: every training of a study has its own; give {instead}")


def _runs(config: CompareConfig) -> dict[str, list[str]]:
    runs = {"full": ["embedding=full"]}
    for budget in config.budgets:
        for method in config.methods:
            if method != "full":
                runs[f"{method}-{budget}"] = [f"embedding={method}", f"embedding.budget={budget}"]
    return runs


def jobs_that_fit(full_bytes: int) -> int:
    """Trainings at a time: one a core that this process may use, as far as memory holds full tables for each."""
    # fbgemm's kernels take a copy of the weights while they are built; their state and the best checkpoint's read.
    needed = _PROCESS_BYTES + 3 * full_bytes
    by_memory = psutil.virtual_memory().available // needed
    return max(1, min(len(os.sched_getaffinity(0)), int(by_memory)))
