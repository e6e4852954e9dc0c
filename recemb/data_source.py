"""Which data set a run trains on: the one at ``data.path``, or the synthetic log that stands in for it."""

from __future__ import annotations

import logging
from pathlib import Path

from recemb.config import DataConfig
from recemb.data.manifest import FILE_NAME, Manifest

logger = logging.getLogger(__name__)

_OTHERS = "avazu, movielens, amazon, taobao, trivago, parquet"


def open_data_set(config: DataConfig) -> Manifest:
    """The manifest of the data set to train on, verified; a synthetic log is made or reused where the config allows it.

    Raises:
        FileNotFoundError: nothing at ``data.path`` and ``data.allow_synthetic`` is false or another path, or a raw log
            instead of a prepared one, or a listed file missing.
        ValueError: no ``data.path`` where one has to be given, or files that do not match the manifest.
    """
    if config.path is not None and Path(config.path).exists():
        path = Path(config.path)
        if not (path / FILE_NAME).is_file() and (path.is_file() or any(path.iterdir())):
            raise FileNotFoundError(
                f"data.path={path} is no prepared data set (no {FILE_NAME}): a raw log is prepared with "
                f"python -m data_pipelines.criteo (or {_OTHERS}) {path} --out DIR, then data.path=DIR"
            )
        manifest = Manifest.load(path)
    elif _may_stand_in(config):
        manifest = _synthetic(config)
    elif config.path is None:
        raise ValueError(
            "data.path=DIR is required: the folder of a log that was prepared with python -m data_pipelines.criteo "
            f"(or {_OTHERS}) RAW... --out DIR"
        )
    else:
        why = "is false" if not config.allow_synthetic else f"is {config.allow_synthetic}, not this path (true: any)"
        raise FileNotFoundError(
            f"data.path={config.path}: no such folder, and data.allow_synthetic {why}. Prepare a log with "
            f"python -m data_pipelines.criteo (or {_OTHERS}) RAW... --out DIR, then data.path=DIR"
        )
    manifest.verify(checksums=config.verify_checksums)
    return manifest


def _may_stand_in(config: DataConfig) -> bool:
    """Whether the synthetic log may, for want of one at ``data.path``."""
    allowed = config.allow_synthetic
    if isinstance(allowed, bool) or config.path is None:
        return bool(allowed)
    # Resolved, because an entry point may have made one of them absolute.
    return Path(allowed).resolve() == Path(config.path).resolve()


def _synthetic(config: DataConfig) -> Manifest:
    # Here, because preparing data needs engines that training on prepared data does not.
    from data_pipelines.behaviour import prepare_behaviour
    from data_pipelines.synthetic import prepare_synthetic

    settings = config.synthetic
    if config.path is not None:
        logger.warning(
            "NO LOG AT data.path=%s: TRAINING ON A SYNTHETIC LOG of %s rows (%s); its figures are no benchmark's",
            config.path,
            f"{settings.rows:,}",
            settings.path,
        )
    if settings.log == "behaviour":
        return prepare_behaviour(Path(settings.path), rows=settings.rows, seed=settings.seed)
    return prepare_synthetic(Path(settings.path), rows=settings.rows, seed=settings.seed)
