"""``python -m recemb.evaluate``: metrics of a saved model, or of any system's predictions in a Parquet file.

    python -m recemb.evaluate checkpoint=RUN_FOLDER data=DIR split=test user_column=user slices=[C1]
    python -m recemb.evaluate predictions=FILE.parquet label=click score=probability user=user_id

Every key: ``configs/evaluate.yaml``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recemb import command_line
from recemb.evaluation import job

SHORT = {"data": "data.path", "user": "user_column", "label": "label_column", "score": "score_column"}
PATHS = ("checkpoint", "data.path", "predictions", "output")


def spelled_out(
    arguments: Sequence[str], *, short: Mapping[str, str] = SHORT, paths: Sequence[str] = PATHS
) -> list[str]:
    """Short keys in full, and paths quoted: they may hold characters (``=``, ``,``) that mean something to Hydra."""
    result = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = short.get(key, key) if equals else key
        if key in paths and value not in ("", "null") and value[0] not in "'\"$":
            value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
        result.append(f"{key}{equals}{value}")
    return result


def load(path: Path, device: torch.device) -> tuple[torch.nn.Module, Any]:
    """The model of a run folder or checkpoint, and the config of its run."""
    # Here, because it imports TorchRec: seconds that metrics of a Parquet file need not wait.
    from recemb.run_folder import load_model

    return load_model(path, device)


def task(config: dict[str, Any]) -> None:
    outcome = job.run(config, load)
    print(f"{outcome.evaluation.table()}\nresults: {outcome.folder}")


def main() -> None:
    sys.argv[1:] = spelled_out(sys.argv[1:])
    command_line.run(task, "evaluate")


if __name__ == "__main__":
    main()
