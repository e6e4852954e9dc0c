"""Whether a split has labels of both classes, without which nothing can be ranked: from statistics, before any work."""

from __future__ import annotations

import pyarrow.compute as pc

from recemb.data.manifest import Manifest
from recemb.data.row_groups import open_parquet, row_groups_of


def check_both_labels(manifest: Manifest, split: str) -> None:
    """Raise ValueError where all rows of a split have one label; names data set, split and counts."""
    if (label := only_label(manifest, split)) is not None:
        rows = manifest.split(split).rows
        positives = rows * label
        raise ValueError(
            f"{manifest.root}: split {split!r}: labels of both classes are required, got {positives:,} rows with label "
            f"1 and {rows - positives:,} with label 0; AUC is undefined, so divide the log otherwise"
        )


def only_label(manifest: Manifest, split: str) -> int | None:
    """The label of all rows of a split, None where both occur or it has no rows.

    A row group's statistics are read, and its labels where it has none.
    """
    seen: set[int] = set()
    for number, path in enumerate(manifest.files(split)):
        with open_parquet(path) as file:
            leaf = [file.schema.column(position).path for position in range(len(file.schema))].index(manifest.label)
            for group in row_groups_of(file, number):
                statistics = file.metadata.row_group(group.index).column(leaf).statistics
                if statistics is not None and statistics.has_min_max:
                    seen |= {statistics.min, statistics.max}
                else:
                    labels = file.read_row_group(group.index, columns=[manifest.label])[manifest.label]
                    seen |= set(pc.min_max(labels).as_py().values())
                if len(seen) > 1:
                    return None
    return next(iter(seen), None)
