"""Synthetic data sets: made once, reused where everything they were made with is the same."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.workspace import check_target, staged
from recemb.data.manifest import FILE_NAME, Manifest

logger = logging.getLogger(__name__)


def make_once(
    out: str | Path, source: str, options: Mapping[str, Any], make: Callable[[Path, Path], Manifest]
) -> Manifest:
    """Make the encoded data set ``out``, or reuse the one there if made with equal options.

    Args:
        out: its directory.
        source: of its manifest.
        options: everything that decides its content; kept in the manifest, JSON-able.
        make: (scratch folder, directory to make) -> manifest.

    Raises:
        ValueError: ``out`` holds another data set, or one made with other options (each is named).
        FileExistsError: ``out`` is no data set.
    """
    out = Path(out)
    if (out / FILE_NAME).is_file():
        return _reuse(out, source, options)
    check_target(out, overwrite=False)
    try:
        # Inside one workspace: a killed run leaves nothing that could be reused.
        with staged(out, overwrite=False) as (scratch, encoded):
            manifest = make(scratch, encoded)
            preparation = {**manifest.preparation, source: dict(options)}
            # A path inside the workspace means nothing to anybody later.
            preparation["raw_files"] = []
            dataclasses.replace(manifest, root=encoded, preparation=preparation).save()
    except FileExistsError:
        # Another process finished the same data set meanwhile.
        if (out / FILE_NAME).is_file():
            return _reuse(out, source, options)
        raise
    logger.info("synthetic log ready in %s", out)
    return Manifest.load(out)


def _reuse(out: Path, source: str, options: Mapping[str, Any]) -> Manifest:
    manifest = Manifest.load(out)
    if manifest.source != source:
        raise ValueError(
            f"{out}: holds a data set of source {manifest.source!r}, and a {source} one is to be made there; "
            "choose another directory"
        )
    found = manifest.preparation.get(source, {})
    differing = [
        f"{name} is {found.get(name)!r}, asked for {wanted!r}"
        for name, wanted in options.items()
        if found.get(name) != wanted
    ]
    if differing:
        raise ValueError(
            f"{out}: holds a synthetic log made with other options: {'; '.join(differing)}. "
            "Choose another directory, or delete this one"
        )
    manifest.verify()
    logger.info("reusing the synthetic log in %s", out)
    return manifest
