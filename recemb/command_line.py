"""How every entry point starts: where its configs lie, and the overrides that people write out of habit.

The configs are a folder beside the package in a checkout and inside it in an installed wheel, so that the working
directory never matters. ``--config-dir DIR`` adds a folder of the user's own.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

# What keeps Hydra from making a folder and a log file, and our loggers from the screen.
SILENT = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "++hydra.job_logging.loggers.recemb.level=ERROR",
    "++hydra.job_logging.loggers.data_pipelines.level=ERROR",
    "++hydra.job_logging.loggers.torchrec.level=ERROR",
)

PACKAGE = Path(__file__).resolve().parent


def config_folder() -> Path:
    """The folder of ``train.yaml``: ``recemb/configs`` in a wheel, ``configs`` beside the package in a checkout.

    Raises:
        FileNotFoundError: neither is there; names both places.
    """
    candidates = (PACKAGE / "configs", PACKAGE.parent / "configs")
    for candidate in candidates:
        if (candidate / "train.yaml").is_file():
            return candidate
    raise FileNotFoundError(
        f"no configs: looked for train.yaml in {candidates[0]} and {candidates[1]}; reinstall recemb"
    )


def rewrite(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments as Hydra wants them.

    - ``experiment=x`` becomes ``+experiment=x``. Hydra accepts only one of the two spellings: the first with an
      ``experiment: null`` in the defaults list, the second without. We leave the entry out and accept both; likewise
      ``stage=x``.
    - ``resume=DIR`` also makes DIR the output folder, so that a continued run writes where it began.

    Raises:
        FileNotFoundError: no run in the folder to resume.
    """
    result = []
    for argument in arguments:
        result.append(f"+{argument}" if argument.startswith(("experiment=", "stage=")) else argument)
        if argument.startswith("resume=") and argument not in ("resume=", "resume=null"):
            folder = argument.removeprefix("resume=").strip("'\"")
            # Before Hydra, which would make the folder of a mistyped name.
            if not (Path(folder) / "config.yaml").is_file():
                raise FileNotFoundError(f"resume={folder}: not the folder of a run (no config.yaml)")
            result[-1] = f"resume={quoted(folder)}"
            result.append(f"hydra.run.dir={quoted(folder)}")
    return result


def quoted(path: str) -> str:
    """For Hydra's grammar: a path may hold characters that mean something to it."""
    escaped = path.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def run(task: Callable[[dict[str, Any]], Any], config_name: str) -> None:
    """Compose ``config_name`` with the command line and call ``task`` with the resolved config, a plain dict.

    Exit status 1 and a traceback that ends in the error when the task raises; a full disk is named as such.
    """

    def call(config: DictConfig) -> Any:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        try:
            return task(resolved)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno,
                    f"disk full while writing {error.filename or 'the run folder'}: free some space; "
                    "files written before are whole, and resume=RUN_FOLDER continues from the last checkpoint",
                ) from error
            raise

    sys.argv = [sys.argv[0], *rewrite(sys.argv[1:])]
    if os.environ.get("RANK", "0") != "0":
        # Of several processes that torchrun started the first alone writes, and tells the others where.
        sys.argv += SILENT
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(call)()
