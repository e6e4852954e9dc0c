"""One training of a study, in a process of its own and a folder that is thrown away."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from recemb.command_line import config_folder


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """``configs/train.yaml`` with ``overrides``, resolved, as a plain dict."""
    # The entry point's own Hydra stands in the way of another.
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", list(overrides))
    content: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    return content


def train_cell(overrides: Sequence[str]) -> dict[str, Any]:
    """results.json of ``python -m recemb.train OVERRIDES``, or ``{"refused": why}`` for a budget out of reach."""
    result = _train(overrides, test=True)
    if "refused" not in result:
        # Folders of this machine.
        result.pop("run")
        result["data"].pop("path")
    return result


def try_setting(overrides: Sequence[str]) -> dict[str, Any]:
    """``{"validation_auc": best}`` of a training that leaves the test split alone, or ``{"refused": why}``."""
    result = _train(overrides, test=False)
    return result if "refused" in result else {"validation_auc": result["validation"]["auc"]}


def _train(overrides: Sequence[str], *, test: bool) -> dict[str, Any]:
    from recemb.training.run import train

    with tempfile.TemporaryDirectory() as folder:
        content: Mapping[str, Any] = composed([*overrides, f"paths.run={folder}/run"])
        try:
            return train(content, test=test)
        except ValueError as error:
            # A budget below what a method can reach is a finding of the study, not a failure of it.
            if "budget" not in str(error):
                raise
            return {"refused": str(error)}
