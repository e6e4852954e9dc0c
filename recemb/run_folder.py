"""The folder of a run: what was asked for, on which machine, and what came out.

config.yaml  environment.json  metrics.jsonl  tensorboard/  checkpoints/{last,best}  train.log
memory.json  *.png  report.md  results.json       results.json is written last: without it the run did not finish
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from recemb.assembly import ModelInputs, build_model
from recemb.checkpoint import STATE_FILE, Checkpoints, load_model_tensors, load_state
from recemb.config import TrainConfig, build_target
from recemb.files import locked, write_atomically, write_json
from recemb.memory import MemoryReport
from recemb.method import Method, method_class
from recemb.plan import CompressionPlan

CONFIG_FILE = "config.yaml"
RESULTS_FILE = "results.json"


class RunFolder:
    """Paths and files of one run.

    Args:
        path: the folder; made by ``begin``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from writing into this run, see ``recemb.files.locked``."""
        return locked(self.path, "run")

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write config and environment of a new run.

        Raises:
            FileExistsError: the folder holds a run already.
        """
        if (self.path / CONFIG_FILE).exists():
            raise FileExistsError(
                f"{self.path} already holds a run: continue it with resume={self.path}, or give hydra.run.dir=OTHER"
            )
        write_json(self.path / "environment.json", environment())
        write_atomically(self.path / CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False))

    def config(self) -> dict[str, Any]:
        """The config the run began with.

        Raises:
            FileNotFoundError: not the folder of a run.
        """
        path = self.path / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{self.path}: not the folder of a run (no {CONFIG_FILE})")
        content: dict[str, Any] = yaml.safe_load(path.read_text())
        return content

    def results(self) -> dict[str, Any] | None:
        """``results.json``, None for a run that did not finish."""
        path = self.path / RESULTS_FILE
        return json.loads(path.read_text()) if path.is_file() else None


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, TrainConfig]:
    """A trained model in eval mode, and the config of its run.

    Args:
        path: folder of a run (its best checkpoint is taken) or one checkpoint, ``RUN/checkpoints/last`` for instance.
            A checkpoint is complete: it may have been moved, and the data set may be gone.
        device: where to put the model.

    Returns:
        The model, called as ``model(dense, sparse) -> (B,) logits``, and the config, whose ``data.path`` is the data
        set that was trained on, the synthetic one if it was that.

    Raises:
        FileNotFoundError: neither a run with a checkpoint nor a checkpoint.
        ValueError: the checkpoint does not fit the model that its config describes.
    """
    path = Path(path)
    checkpoint = path if (path / STATE_FILE).is_file() else RunFolder(path).checkpoints.best
    if checkpoint is None:
        raise FileNotFoundError(f"{path}: neither a checkpoint nor the folder of a run that has one")
    described = load_state(checkpoint)["run"]
    config = TrainConfig.parse(described["config"])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=described["data"]))
    model, _ = build_described(described, checkpoint)
    load_model_tensors(checkpoint, model)
    return model.to(device).eval(), config


def build_described(described: Mapping[str, Any], checkpoint: Path) -> tuple[nn.Module, MemoryReport]:
    """The model of a checkpoint on the CPU with fresh weights, and the bytes of its tables.

    Args:
        described: ``run`` of the checkpoint's state.
        checkpoint: its folder; the plan of tables that a search made lies where the state says, seen from there.
    """
    config = TrainConfig.parse(described["config"])
    method: Method | None = None
    if (plan := described.get("plan")) is not None:
        searched = method_class(build_target(config.embedding.method))
        # Resolved, because a run's checkpoints are a link to those of its last stage.
        method = searched.from_plan(CompressionPlan.load(checkpoint.resolve() / plan))
    inputs = ModelInputs.from_dict(described["inputs"])
    optimizer = build_target(config.optimizer.embedding)
    return build_model(config.embedding, config.model, inputs, optimizer, method=method)


def environment() -> dict[str, Any]:
    """What a run depends on besides its config: command, code, packages, machine."""
    packages = {item.metadata["Name"]: item.version for item in metadata.distributions() if item.metadata["Name"]}
    return {
        "command": sys.orig_argv,
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from and whether files differ from it; None for an installed wheel."""
    checkout = Path(__file__).resolve().parents[1]
    # A wheel may lie inside somebody's repository (in its virtual environment), whose commit says nothing about us.
    if not (checkout / ".git").exists():
        return None
    try:
        sha, changes = (
            subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"sha": sha.strip(), "dirty": bool(changes.strip())}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
