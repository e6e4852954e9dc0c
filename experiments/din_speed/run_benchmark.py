"""Training speed of recemb's DIN beside other libraries': every contender in its own process, repetitions in turn.

    python experiments/din_speed/run_benchmark.py --deepctr-python PATH --fuxictr-python PATH

Writes ``results/training.json`` and prints its table. The interpreters are those of ``experiments/speed``.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER)]

from dataset import make_dataset  # noqa: E402

from recemb.run_folder import git_state  # noqa: E402

logger = logging.getLogger("din_speed")

# Name -> (file of contenders, variant, whose interpreter).
CONTENDERS = {
    "DeepCTR-Torch DIN": ("deepctr_torch_din", "fp32", "deepctr"),
    "FuxiCTR DIN": ("fuxictr_din", "fp32", "fuxictr"),
    "recemb DIN": ("recemb_din", "attention", "recemb"),
    "recemb base model": ("recemb_din", "sum", "recemb"),
}
PEERS = ("DeepCTR-Torch DIN", "FuxiCTR DIN")
# Name -> shortest and longest history.
LENGTHS = {"50 events": (50, 50), "1 to 50 events": (1, 50)}


def main() -> None:
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepctr-python", type=Path, required=True, help="interpreter of a venv with deepctr-torch")
    parser.add_argument("--fuxictr-python", type=Path, required=True, help="interpreter of a venv with fuxictr")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--train-rows", type=int, default=40_960)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "training.json")
    options = parser.parse_args()
    pythons = {"recemb": sys.executable, "deepctr": options.deepctr_python, "fuxictr": options.fuxictr_python}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {c: [] for c in CONTENDERS} for name in LENGTHS}
    with tempfile.TemporaryDirectory() as scratch:
        for repetition in range(options.repetitions):
            for lengths, (shortest, longest) in LENGTHS.items():
                data = Path(scratch) / f"{shortest}-{longest}"
                make_dataset(data, shortest=shortest, longest=longest, train_rows=options.train_rows)
                # Reversed every other round, so that no row always follows the same neighbour.
                for name in list(CONTENDERS)[:: 1 if repetition % 2 == 0 else -1]:
                    file, variant, python = CONTENDERS[name]
                    result = _run(pythons[python], file, variant, data, Path(scratch), options.batch_size)
                    runs[lengths][name].append(result)
                    logger.info("%d %-15s %-20s %s", repetition, lengths, name, _figures(result))
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "git": git_state(),
        "batch_size": options.batch_size,
        "train_rows": options.train_rows,
        "runs": runs,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(runs))


def _run(python: Path | str, file: str, variant: str, data: Path, scratch: Path, batch_size: int) -> dict[str, Any]:
    command = [str(python), str(FOLDER / "contenders" / f"{file}.py"), "--data", str(data), "--variant", variant]
    command += ["--scratch", str(scratch), "--batch-size", str(batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _figures(result: dict[str, Any]) -> str:
    last = result["epochs"][-1]
    return f"{last['samples_per_second']:.0f} samples/s, {last['samples_per_cpu_second']:.0f} per CPU second"


def table(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Medians over repetitions as Markdown; ratios to the better of the two libraries."""
    lines = [
        "| histories | | samples/s | samples per CPU second (range) | to best library: CPU time (wall) | AUC | RSS |",
        "|---|---|---|---|---|---|---|",
    ]
    for lengths, contenders in runs.items():

        def median(name: str, key: str, contenders: dict[str, list[dict[str, Any]]] = contenders) -> float:
            return statistics.median(run["epochs"][-1][key] for run in contenders[name])

        best = {
            key: max(median(peer, key) for peer in PEERS) for key in ("samples_per_second", "samples_per_cpu_second")
        }
        for name, results in contenders.items():
            wall, cpu = median(name, "samples_per_second"), median(name, "samples_per_cpu_second")
            all_cpu = [run["epochs"][-1]["samples_per_cpu_second"] for run in results]
            auc = statistics.median(run["auc"] for run in results)
            memory = statistics.median(run["peak_rss_bytes"] for run in results) / 2**20
            lines.append(
                f"| {lengths} | {name} | {wall / 1000:.1f}k | {cpu / 1000:.1f}k ({min(all_cpu) / 1000:.1f}-"
                f"{max(all_cpu) / 1000:.1f}) | **{cpu / best['samples_per_cpu_second']:.2f}** "
                f"({wall / best['samples_per_second']:.2f}) | {auc:.4f} | {memory:.0f} MiB |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
