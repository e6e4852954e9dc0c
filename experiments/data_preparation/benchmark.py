"""Rows per second and peak memory of data_pipelines.criteo beside pyarrow.csv that merely reads the same file.

    python experiments/data_preparation/benchmark.py --folder SCRATCH [--rows 5000000] [--rounds 3]
    python experiments/data_preparation/benchmark.py --table

The first makes the raw TSV in SCRATCH (unless it is there), runs every case in a process of its own, in turns, and
writes results/criteo_tsv.json; the second prints the README's table from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.csv

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_pipelines import criteo
from data_pipelines.synthetic_log import generate

RESULT = Path(__file__).parent / "results" / "criteo_tsv.json"
REPOSITORY = Path(__file__).parents[2]
BYTES_PER_KILOBYTE = 1024  # ru_maxrss is in KiB on Linux.


def read_streaming(raw: Path, out: Path) -> None:
    """pyarrow.csv batch by batch, its default blocks, the types of Criteo's columns."""
    types = {name: pa.int64() for name in (criteo.LABEL, *criteo.NUMERIC)}
    types |= dict.fromkeys(criteo.CATEGORICAL, pa.string())
    reader = pyarrow.csv.open_csv(
        raw,
        read_options=pyarrow.csv.ReadOptions(column_names=list(criteo.COLUMNS)),
        parse_options=pyarrow.csv.ParseOptions(delimiter="\t"),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types),
    )
    for _ in reader:
        pass


def read_whole(raw: Path, out: Path) -> None:
    """pyarrow.csv into one table in memory, all cores."""
    pyarrow.csv.read_csv(
        raw,
        read_options=pyarrow.csv.ReadOptions(column_names=list(criteo.COLUMNS)),
        parse_options=pyarrow.csv.ParseOptions(delimiter="\t"),
    )


CASES: dict[str, Callable[[Path, Path], object]] = {
    "pyarrow.csv, streaming": read_streaming,
    "pyarrow.csv, whole table": read_whole,
    "criteo, log1p, min_count 2": lambda raw, out: criteo.prepare(raw, out),
    "criteo, log1p and buckets, min_count 2": lambda raw, out: criteo.prepare(raw, out, numeric="both"),
    "criteo, log1p, hashed ids": lambda raw, out: criteo.prepare(raw, out, encoding="hash"),
}


def run_case(case: str, raw: Path, folder: Path) -> dict[str, float]:
    """One case in a fresh process."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--case", case, "--raw", str(raw), "--folder", str(folder)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)
    measured: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    if out.exists():
        measured["output_bytes"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        shutil.rmtree(out)
    return measured


def measure(case: str, raw: Path, folder: Path) -> None:
    """In the child: run the case, print its seconds, processor seconds and peak bytes."""
    before, busy, started = os.times(), busy_seconds(), time.perf_counter()
    CASES[case](raw, folder / "out")
    seconds, after, busy = time.perf_counter() - started, os.times(), busy_seconds() - busy
    own = after.user + after.system - before.user - before.system
    print(
        json.dumps(
            {
                "seconds": seconds,
                "processor_seconds": own,
                "cores_busy_with_others": max(0.0, busy - own) / seconds,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES_PER_KILOBYTE,
            }
        )
    )


def busy_seconds() -> float:
    """Processor seconds that all processes of the machine have used: neighbours are part of the result."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    idle_and_waiting = fields[3] + fields[4]
    return (sum(fields) - idle_and_waiting) / os.sysconf("SC_CLK_TCK")


def run(rows: int, rounds: int, folder: Path) -> None:
    """Measure all cases in turns and write the result."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / f"criteo-{rows}.tsv"
    if not raw.exists():
        generate(raw, rows=rows, format="tsv")
    git = ["git", "-C", str(REPOSITORY)]
    changes = subprocess.run([*git, "status", "--porcelain", "data_pipelines"], check=True, capture_output=True)
    result: dict[str, Any] = {
        "rows": rows,
        "raw_bytes": raw.stat().st_size,
        "cores": len(os.sched_getaffinity(0)),
        "git": subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip(),
        "dirty": bool(changes.stdout),
        "versions": {"python": platform.python_version(), "pyarrow": pa.__version__, "polars": pl.__version__},
    }
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for number in range(rounds):
        for case in CASES:
            runs[case].append(run_case(case, raw, folder))
            print(f"round {number}: {case}: {runs[case][-1]}", flush=True)
    result["runs"] = runs
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def table() -> str:
    """The README's table: medians over the rounds; ratios of the same round."""
    result = json.loads(RESULT.read_text())
    rows, runs = result["rows"], result["runs"]
    lines = [
        "| case | thousand rows/s | of streaming pyarrow.csv, same round | processor seconds | peak RSS, GB "
        "| output, GB | cores busy with others |",
        "|---|---|---|---|---|---|---|",
    ]
    baseline = [run["seconds"] for run in runs["pyarrow.csv, streaming"]]
    for case, measured in runs.items():
        seconds = [run["seconds"] for run in measured]
        ratios = [base / own for base, own in zip(baseline, seconds, strict=True)]
        peak = max(run["peak_bytes"] for run in measured) / 1e9
        output = f"{measured[0]['output_bytes'] / 1e9:.2f}" if "output_bytes" in measured[0] else ""
        lines.append(
            f"| {case} | {rows / statistics.median(seconds) / 1e3:.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {statistics.median(run['processor_seconds'] for run in measured):.1f} | {peak:.2f} | {output} "
            f"| {statistics.median(run['cores_busy_with_others'] for run in measured):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="scratch directory with some 5 GB free")
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the table of the last run")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table())
    elif options.folder is None:
        parser.error("--folder is required")
    elif options.case is not None:
        measure(options.case, options.raw, options.folder)
    else:
        run(options.rows, options.rounds, options.folder)


if __name__ == "__main__":
    main()
