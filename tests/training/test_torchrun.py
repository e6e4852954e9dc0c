"""A rank of a torchrun that is killed in mid-run, and the run resumed by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recemb.run_folder import load_model
from recemb.training.metrics_log import read_metrics
from tests.data.encoded import write_encoded

ROWS = 12_000


def torchrun(run: Path, *overrides: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "recemb.train", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks_of(agent: int) -> list[int]:
    """Process ids of the ranks that torchrun started."""
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


@pytest.mark.slow
def test_a_rank_killed_with_signal_9_ends_the_others_and_the_run_is_resumed(tmp_path: Path) -> None:
    write_encoded(tmp_path / "encoded", rows=ROWS)
    run = tmp_path / "run"
    process = torchrun(
        run,
        "data=parquet",
        f"data.path={tmp_path / 'encoded'}",
        f"hydra.run.dir={run}",
        "trainer.device=cpu",
        "trainer.batch_size=32",
        "trainer.log_every_steps=5",
        "trainer.checkpoint_every_steps=20",
        "trainer.stopping.patience=null",
    )
    log = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"step": 50,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGKILL" in output
    assert not (run / "results.json").exists()

    resumed = torchrun(run, f"resume={run}")
    output, _ = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, output
    results = json.loads((run / "results.json").read_text())
    assert (results["train"]["ranks"], results["train"]["samples"]) == (2, 0.8 * ROWS)
    steps = [line["step"] for line in read_metrics(run) if line["split"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == results["train"]["steps"] == 0.8 * ROWS / 64
    load_model(run)
