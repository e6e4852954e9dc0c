"""Training speed of recemb beside other libraries: every contender in its own process, repetitions in turn.

    python experiments/speed/run_benchmark.py --deepctr-python PATH --fuxictr-python PATH

Makes the data set, runs ``--repetitions`` rounds of all contenders (the order is reversed every other round), and
writes ``results/training.json``; ``python experiments/speed/report.py`` turns that into the table of the README.
A contender whose interpreter is not given is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import make_dataset

logger = logging.getLogger("speed")

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]


@dataclass(frozen=True)
class Contender:
    """One row: a file of ``contenders``, its variant, and whose interpreter runs it."""

    name: str
    file: str
    variant: str
    python: str = "recemb"


CONTENDERS = (
    Contender("DeepCTR-Torch DeepFM", "deepctr_torch_deepfm", "fp32", "deepctr"),
    Contender("FuxiCTR DLRM", "fuxictr_dlrm", "fp32", "fuxictr"),
    Contender("TorchRec DLRM on one raw kernel", "torchrec_dlrm", "fp32"),
    Contender("bare loop, fp32", "bare_loop", "fp32"),
    Contender("bare loop, fp32, compiled", "bare_loop", "fp32-compile"),
    Contender("bare loop, bf16", "bare_loop", "bf16"),
    Contender("bare loop, bf16, compiled", "bare_loop", "bf16-compile"),
    Contender("recemb full, fp32", "recemb_dlrm", "full-fp32"),
    Contender("recemb full, fp32, compiled", "recemb_dlrm", "full-fp32-compile"),
    Contender("recemb full, bf16", "recemb_dlrm", "full-bf16"),
    Contender("recemb full, bf16, compiled", "recemb_dlrm", "full-bf16-compile"),
    Contender("recemb unified 10x, fp32", "recemb_dlrm", "unified-fp32"),
    Contender("recemb unified 10x, bf16", "recemb_dlrm", "unified-bf16"),
)


def main() -> None:
    # This logger alone: fbgemm writes pages about every kernel to the root logger.
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    options = _parse()
    pythons = {"recemb": sys.executable, "deepctr": options.deepctr_python, "fuxictr": options.fuxictr_python}
    chosen = [c for c in CONTENDERS if options.only is None or any(part in c.name for part in options.only)]
    runnable = [c for c in chosen if pythons[c.python]]
    for contender in chosen:
        if contender not in runnable:
            logger.warning("left out: %s (no interpreter given)", contender.name)
    data = options.data or Path(tempfile.gettempdir()) / f"recemb-speed-{options.train_rows}"
    make_dataset(data, train_rows=options.train_rows, validation_rows=50_000)
    runs: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in runnable}
    with tempfile.TemporaryDirectory() as scratch:
        for repetition in range(options.repetitions):
            # Reversed every other round, so that no row always follows the same neighbour.
            for contender in runnable if repetition % 2 == 0 else runnable[::-1]:
                result = _run(contender, str(pythons[contender.python]), data, Path(scratch), options, repetition)
                runs[contender.name].append(result)
                last = result["epochs"][-1]
                logger.info(
                    "%d %-34s %7.0f samples/s (%7.0f per CPU second) AUC %.4f, %4d MB",
                    repetition,
                    contender.name,
                    last["samples_per_second"],
                    last["samples_per_cpu_second"],
                    result["auc"],
                    result["peak_rss_bytes"] / 2**20,
                )
    options.output.write_text(json.dumps(_document(options, runs), indent=1) + "\n")
    logger.info("wrote %s", options.output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepctr-python", type=Path, help="interpreter of a venv with deepctr-torch")
    parser.add_argument("--fuxictr-python", type=Path, help="interpreter of a venv with fuxictr")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="of each run; the last one counts, the first warms up")
    parser.add_argument("--train-rows", type=int, default=200_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--core", type=int, help="pin every contender to this core, so that no helper thread is free")
    parser.add_argument("--data", type=Path, help="folder of the data set; a temporary one without")
    parser.add_argument("--only", nargs="*", help="contenders whose name holds one of these")
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "training.json")
    return parser.parse_args()


def _run(
    contender: Contender, python: str, data: Path, scratch: Path, options: argparse.Namespace, repetition: int
) -> dict[str, Any]:
    """One child process; its last line of standard output is the result."""
    command = [python, str(FOLDER / "contenders" / f"{contender.file}.py"), "--data", str(data)]
    command += ["--variant", contender.variant, "--scratch", str(scratch), "--seed", str(repetition)]
    command += ["--batch-size", str(options.batch_size), "--epochs", str(options.epochs)]
    if options.core is not None:
        command += ["--core", str(options.core)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if finished.returncode:
        raise RuntimeError(f"{contender.name} failed:\n{' '.join(command)}\n{finished.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def _document(options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Runs with what they ran on, and per row the figures the table shows."""
    return {
        "study": "training",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "git": git_state(),
        "options": {
            "repetitions": options.repetitions,
            "epochs": options.epochs,
            "train_rows": options.train_rows,
            "batch_size": options.batch_size,
            "core": options.core,
        },
        "rows": {name: _row(results) for name, results in runs.items()},
        "runs": runs,
    }


def _row(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range over the repetitions, of the last epoch of each."""
    last = [result["epochs"][-1] for result in results]
    row: dict[str, Any] = {}
    for figure in ("samples_per_second", "samples_per_cpu_second", "page_faults"):
        values = sorted(epoch[figure] for epoch in last)
        row[figure] = {"median": statistics.median(values), "min": values[0], "max": values[-1]}
    row["auc"] = {
        "mean": statistics.mean(result["auc"] for result in results),
        "min": min(result["auc"] for result in results),
        "max": max(result["auc"] for result in results),
    }
    row["peak_rss_bytes"] = max(result["peak_rss_bytes"] for result in results)
    return row


def machine() -> dict[str, Any]:
    """Processor and operating system, and what of the processor decides about bf16."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_family_model": f"{cpu.get('vendor_id', '?')} {cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cores": os.cpu_count(),
        "simd": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}),
        "platform": platform.platform(),
    }


def git_state() -> dict[str, Any]:
    """Commit of the sources and whether they differ from it; empty outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
        ).stdout.strip()

    # Results are what a run writes, not what it runs.
    changes = git("status", "--porcelain", "--", "recemb", "experiments/speed", ":!experiments/speed/results")
    return {"sha": git("rev-parse", "HEAD"), "dirty": bool(changes)}


if __name__ == "__main__":
    main()
