"""One training of a study, in a process of its own and a folder that is thrown away."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import parent_process
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


def names_of(group: str, overrides: Sequence[str]) -> list[str]:
    """Configs of a group: the package's, and those of folders that ``hydra.searchpath`` among ``overrides`` adds."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return loader.get_group_options(group, config_name="train", overrides=list(overrides))


def end_with_parent() -> None:
    """End this process when the one that started it is gone: a killed study must not leave its trainings behind."""
    parent = parent_process()
    assert parent is not None, "for processes that multiprocessing started"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_cell(overrides: Sequence[str]) -> dict[str, Any]:
    """results.json of ``python -m recemb.train OVERRIDES``, or why there is none.

    That is ``{"refused": why}`` for a budget out of reach and ``{"diverged": where}`` for a model that diverged.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = _trained(composed([*overrides, f"paths.run={folder}/run"]), test=True)
    if "test" in result:
        # Folders of this machine.
        result.pop("run")
        result["data"].pop("path")
    return result


def try_setting(overrides: Sequence[str]) -> dict[str, Any]:
    """``{"validation_auc": best}`` of a training that leaves the test split alone, or as ``train_cell`` why not.

    Named after the metric that stops the training: ``validation_gauc`` or ``validation_logloss`` where it is another.
    """
    with tempfile.TemporaryDirectory() as folder:
        content = composed([*overrides, f"paths.run={folder}/run"])
        result = _trained(content, test=False)
    metric = content["trainer"]["stopping"]["metric"]
    return {f"validation_{metric}": result["validation"][metric]} if "validation" in result else result


def _trained(content: Mapping[str, Any], *, test: bool) -> dict[str, Any]:
    from recemb.budget import BudgetOutOfReach
    from recemb.evaluation.predictions import Diverged
    from recemb.training.run import train

    try:
        return train(content, test=test)
    # Both are findings of the study, not failures of it.
    except BudgetOutOfReach as error:
        return {"refused": str(error)}
    except Diverged as error:
        return {"diverged": str(error)}
