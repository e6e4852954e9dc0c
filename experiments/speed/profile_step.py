"""Where the time of a recemb training step goes: torch.profiler over one epoch, one thread.

    python experiments/speed/profile_step.py --data FOLDER

Writes ``results/profile.json``: milliseconds a step by part, for full tables in fp32 and bf16 and unified in fp32. The
profiler adds some time to every operation, so the parts are shares of a slower step than the benchmark's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "contenders"))

import recemb_dlrm
import torch
from run_benchmark import git_state, machine

from recemb.training.loop import TrainingLoop

FOLDER = Path(__file__).resolve().parent
# Set for the child process that is profiled.
OUTPUT_VARIABLE = "SPEED_PROFILE_OUTPUT"
VARIANTS = ("full-fp32", "full-bf16", "unified-fp32")
# Part -> operations; of these the time with everything they call, of the others their own.
WHOLE = {
    "tables, forward": ("UpdatingLookup",),
    "tables, backward and update": ("UpdatingLookupBackward",),
    "interaction, forward": ("_LowerTriangle",),
    "interaction, backward": ("_LowerTriangleBackward",),
    "Adam of the dense layers": ("Optimizer.step#Adam.step", "Optimizer.zero_grad#Adam.zero_grad"),
}
OWN = {
    "matrix products of the MLPs": ("aten::mm", "aten::addmm"),
    "ReLU": ("aten::clamp_min_", "aten::threshold_backward"),
    "bias gradients": ("aten::sum",),
}


class ProfiledLoop(TrainingLoop):
    """Profiles one epoch without its validation, writes the parts and ends the process."""

    def run(self, log: Any, progress: Any) -> None:
        self.validate = lambda: {"auc": 0.5}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            wall, loader = time.perf_counter(), time.process_time() - time.thread_time()
            super().run(log, progress)
            wall, loader = time.perf_counter() - wall, time.process_time() - time.thread_time() - loader
        parts = _parts(profiler.key_averages(), self.step, wall, loader)
        Path(os.environ[OUTPUT_VARIABLE]).write_text(json.dumps(parts))
        sys.exit()


def _parts(averages: Any, steps: int, wall: float, loader: float) -> dict[str, float]:
    """Milliseconds a step: wall-clock time of the training thread, CPU time of the loader's beside it."""
    total = {row.key: row.cpu_time_total for row in averages}
    own = {row.key: row.self_cpu_time_total for row in averages}
    parts = {part: sum(total.get(name, 0.0) for name in names) for part, names in WHOLE.items()}
    parts |= {part: sum(own.get(name, 0.0) for name in names) for part, names in OWN.items()}
    milliseconds = {part: microseconds / 1e3 / steps for part, microseconds in parts.items()}
    milliseconds["everything else"] = 1e3 * wall / steps - sum(milliseconds.values())
    milliseconds["loader thread, beside it"] = 1e3 * loader / steps
    return milliseconds


def main() -> None:
    if OUTPUT_VARIABLE in os.environ:
        recemb_dlrm.TrainingLoop = ProfiledLoop  # type: ignore[misc]
        recemb_dlrm.main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that run_benchmark.py made")
    options = parser.parse_args()
    variants = {}
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, "--data", options.data, "--scratch", scratch, "--variant", variant]
            output = Path(scratch) / "parts.json"
            environment = {**os.environ, OUTPUT_VARIABLE: str(output), "OMP_NUM_THREADS": "1"}
            subprocess.run([*command, "--epochs", "1"], check=True, env=environment, stdout=subprocess.DEVNULL)
            variants[variant] = json.loads(output.read_text())
    document = {
        "study": "profile",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "git": git_state(),
        "variants": variants,
    }
    (FOLDER / "results" / "profile.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
