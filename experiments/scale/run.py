"""Train steps and bytes of tables as ids, batches and ranks grow, and plans for ten billion ids.

    python experiments/scale/run.py                        all parts, results/PART.json
    python experiments/scale/run.py --parts ids batches    some of them
    python experiments/scale/run.py --small --output DIR   the same code in seconds, for tests

``python experiments/scale/report.py`` turns the results into the tables and figures of README.md and
ten_billion_ids.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from cases import CONFIGS, OPTIMIZER, SEED, Case, Measured, byte_figures, full_bytes
from omegaconf import OmegaConf
from plans import PLANS, plan
from ranks import PLACES, figures, run_place

from recemb.budget import parse_bytes
from recemb.memory import MemoryReport
from recemb.run_folder import git_state

logger = logging.getLogger("scale")

FOLDER = Path(__file__).resolve().parent
PACKAGES = ("torch", "fbgemm-gpu-cpu", "torchrec", "numpy")
# The same bytes at every number of ids, where full tables have more.
FIXED = "64MB"
METHODS: tuple[tuple[str, str | None], ...] = (
    ("full", None),
    ("unified", "10x"),
    ("unified", "100x"),
    ("unified", FIXED),
    ("quotient_remainder", "10x"),
    ("quotient_remainder", "100x"),
    ("quotient_remainder", FIXED),
)
# Tables that one case may hold, and all that take turns; what is larger is left to the estimator.
MOST_BYTES_OF_ONE = 7 * 10**9
MOST_BYTES = 9 * 10**9


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is run.

    Args:
        total_ids: points of the first axis.
        batch_size: where ids or ranks are the axis.
        batch_sizes: points of the second axis.
        compared: methods and budgets where batches or ranks are the axis.
        batch_ids: ids where batches or ranks are the axis.
        turns: of every case.
        turn_rows: rows of the steps that count in a turn.
        places: names of ``ranks.PLACES``.
        rank_rounds: how often every place is started.
        rank_steps: counted steps of each start.
        plans: names of ``plans.PLANS``.
        configs: of methods whose bytes for ten billion ids are counted; empty for all.
    """

    total_ids: tuple[int, ...] = (10**5, 10**6, 10**7, 10**8, 10**9, 10**10)
    batch_size: int = 4096
    batch_sizes: tuple[int, ...] = (1024, 4096, 16_384, 65_536)
    compared: tuple[tuple[str, str | None], ...] = (("full", None), ("unified", "10x"), ("quotient_remainder", "10x"))
    batch_ids: int = 10**7
    turns: int = 8
    turn_rows: int = 16_384
    places: tuple[str, ...] = tuple(PLACES)
    rank_rounds: int = 3
    rank_steps: int = 12
    plans: tuple[str, ...] = tuple(PLANS)
    configs: tuple[str, ...] = ()


SMALL = Scale(
    total_ids=(10**5, 10**10),
    batch_size=256,
    batch_sizes=(64,),
    compared=(("unified", "10x"),),
    batch_ids=10**5,
    turns=2,
    turn_rows=256,
    places=("2 ranks, row-wise",),
    rank_rounds=1,
    rank_steps=2,
    plans=("quotient_remainder 100x, 8 GPUs",),
    configs=("cce", "hashing"),
)


def ids_part(scale: Scale) -> list[dict[str, Any]]:
    """Every method at every number of ids: measured where it fits this machine, else estimated."""
    rows = []
    for total_ids in scale.total_ids:
        cases = [Case(method, budget, total_ids, scale.batch_size) for method, budget in METHODS]
        measured, held = [], 0
        for case in cases:
            if case.budget == FIXED and full_bytes(case) <= parse_bytes(FIXED):
                continue
            report = _estimate(case)
            if isinstance(report, str):
                rows.append({**dataclasses.asdict(case), "name": case.name, "measured": False, "cannot": report})
                continue
            resident = report.serving_bytes + report.optimizer_bytes
            # Tables that come initialised are in memory twice while they move into the kernels.
            peak = resident if case.method == "full" else 2 * resident
            if peak <= MOST_BYTES_OF_ONE and held + peak <= MOST_BYTES:
                measured.append(case)
                held += resident
            else:
                rows.append({**dataclasses.asdict(case), "name": case.name, "measured": False, **byte_figures(report)})
        rows += _measure(measured, scale)
    return rows


def batches_part(scale: Scale) -> list[dict[str, Any]]:
    """Some methods at every batch size."""
    return [
        row
        for batch_size in scale.batch_sizes
        for row in _measure(
            [Case(method, budget, scale.batch_ids, batch_size) for method, budget in scale.compared], scale
        )
    ]


def ranks_part(scale: Scale) -> list[dict[str, Any]]:
    """Some methods on every place, in reversed order every other round."""
    cases = [Case(method, budget, scale.batch_ids, scale.batch_size) for method, budget in scale.compared]
    keys = [(case, name) for case in cases for name in scale.places]
    runs: dict[tuple[Case, str], list[list[dict[str, Any]]]] = {key: [] for key in keys}
    for number in range(scale.rank_rounds):
        for case, name in keys if number % 2 == 0 else keys[::-1]:
            runs[case, name].append(run_place(case, PLACES[name], scale.rank_steps))
    return [figures(name, case, runs[case, name]) for case, name in keys]


def plans_part(scale: Scale) -> list[dict[str, Any]]:
    """What the planner says of ten billion ids."""
    return [{"name": name, **plan(PLANS[name])} for name in scale.plans]


def methods_part(scale: Scale) -> list[dict[str, Any]]:
    """Bytes of every method without a search for ten billion ids of width 128, at a hundredth of full tables."""
    rows = []
    for name in scale.configs or sorted(path.stem for path in CONFIGS.glob("*.yaml")):
        config = OmegaConf.load(CONFIGS / f"{name}.yaml")
        if "stages" in config:
            continue
        case = Case(name, None if config.budget is None else "100x", 10**10, scale.batch_size, dim=128)
        report = _estimate(case)
        found = {"cannot": report} if isinstance(report, str) else byte_figures(report)
        if not isinstance(report, str):
            found["index_bytes"] = report.index_bytes
        rows.append({**dataclasses.asdict(case), "name": case.name, **found})
    return rows


PARTS: dict[str, Callable[[Scale], list[dict[str, Any]]]] = {
    "ids": ids_part,
    "batches": batches_part,
    "ranks": ranks_part,
    "plans": plans_part,
    "methods": methods_part,
}


def main() -> None:
    # This logger alone: fbgemm writes pages about every kernel to the root logger.
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--small", action="store_true", help="few ids, rows and steps")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scale = SMALL if options.small else Scale()
    options.output.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        logger.info("%s", part)
        document = {**_origin(part, scale), "rows": PARTS[part](scale)}
        (options.output / f"{part}.json").write_text(json.dumps(document, indent=1) + "\n")


def _estimate(case: Case) -> MemoryReport | str:
    """The bytes, or why there are none."""
    try:
        return case.estimate()
    except ValueError as error:
        return str(error)


def _measure(cases: Sequence[Case], scale: Scale) -> list[dict[str, Any]]:
    """Cases take turns, in reversed order every other time."""
    running = [Measured(case) for case in cases]
    for number in range(scale.turns):
        for measured in running if number % 2 == 0 else running[::-1]:
            counted = max(1, scale.turn_rows // measured.case.batch_size)
            measured.turn(counted, scattered_first=number % 2 == 1)
    rows = [measured.finish() for measured in running]
    for row in rows:
        logger.info(
            "%-24s %14s ids, batch %6d: %8.2f ms (scattered %8.2f), %s bytes, peak %s",
            row["name"],
            f"{row['total_ids']:,}",
            row["batch_size"],
            row["cpu_ms"]["by frequency"]["median"],
            row["cpu_ms"]["scattered"]["median"],
            f"{row['serving_bytes']:,}",
            f"{row['training_peak_bytes']:,}",
        )
    return rows


def _origin(part: str, scale: Scale) -> dict[str, Any]:
    return {
        "study": "scale",
        "part": part,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "git": git_state(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
        "config": {**dataclasses.asdict(scale), "seed": SEED, "optimizer": dataclasses.asdict(OPTIMIZER)},
    }


def _machine() -> dict[str, Any]:
    processor = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert memory is not None
    return {
        "cpu": processor[1] if processor else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": 1024 * int(memory[1]),
        "platform": platform.platform(),
    }


if __name__ == "__main__":
    main()
