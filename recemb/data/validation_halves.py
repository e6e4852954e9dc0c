"""The validation rows in two: those that decide an architecture, and those that decide when training stops.

A search that chose by the rows it stops by would have fitted them twice. The halves are files of their own, so that
whatever reads a data set reads them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recemb.data.manifest import FILE_NAME, Manifest, Split, describe_file
from recemb.data.row_groups import open_parquet

_ROW_GROUP_ROWS = 65_536
# Of the draw, the same in every run: runs of other seeds stop by the same rows.
_SEED = 20_240_801


def split_validation(manifest: Manifest, folder: Path, architecture_fraction: float) -> Manifest:
    """A manifest with the splits ``architecture`` and ``validation``.

    A data set that has a split ``architecture`` keeps both as they are. Otherwise each validation row goes to one of
    two files in ``folder``, drawn by its place in the data set alone; files that are there already are taken as they
    are.

    Args:
        manifest: of the data set.
        folder: where the halves go; ``manifest.json`` is written last.
        architecture_fraction: share of the rows that go to ``architecture``, in (0, 1).

    Raises:
        ValueError: a fraction outside (0, 1), or one that leaves a half without rows.
    """
    if "architecture" in manifest.splits:
        return manifest
    if not 0 < architecture_fraction < 1:
        raise ValueError(f"data.architecture_fraction must be in (0, 1), got {architecture_fraction}")
    if (folder / FILE_NAME).is_file():
        halves = Manifest.load(folder)
        halves.verify()
        return halves
    folder.mkdir(parents=True, exist_ok=True)
    names = ("architecture", "validation")
    paths = {name: folder / f"{name}.parquet" for name in names}
    _write(manifest, paths, architecture_fraction)
    splits = {name: Split((describe_file(folder, path),)) for name, path in paths.items()}
    for name, split in splits.items():
        if split.rows == 0:
            raise ValueError(
                f"data.architecture_fraction={architecture_fraction} of {manifest.split('validation').rows} validation "
                f"rows leaves none for {name}"
            )
    halves = dataclasses.replace(manifest, root=folder, splits=splits)
    halves.save()
    return halves


def _write(manifest: Manifest, paths: dict[str, Path], architecture_fraction: float) -> None:
    generator = np.random.default_rng(_SEED)
    writers: dict[str, pq.ParquetWriter] = {}
    try:
        for source in manifest.files("validation"):
            with open_parquet(source) as file:
                for index in range(file.metadata.num_row_groups):
                    rows = file.read_row_group(index)
                    chosen = generator.random(rows.num_rows) < architecture_fraction
                    for name, mask in (("architecture", chosen), ("validation", ~chosen)):
                        if name not in writers:
                            writers[name] = pq.ParquetWriter(
                                paths[name], rows.schema, compression="zstd", compression_level=1
                            )
                        writers[name].write_table(rows.filter(pa.array(mask)), row_group_size=_ROW_GROUP_ROWS)
    finally:
        for writer in writers.values():
            writer.close()
