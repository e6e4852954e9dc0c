"""A small encoded behaviour log: users with interests, targets, and histories of items with their categories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recemb.data.manifest import CategoricalFeature, Manifest, NumericFeature, Split, describe_file

NUM_ITEMS = 120
NUM_CATEGORIES = 12
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def write_behaviour_log(root: Path, *, rows: int, longest: int = 12, num_users: int = 40, seed: int = 0) -> Manifest:
    """Write a data set whose labels depend on how much of the history is of the target's category.

    Features: item, category, user_group (single), item_history and category_history (parallel), tags (a list) and one
    number; user column ``user``. A tenth of the histories are empty.
    """
    generator = np.random.default_rng(seed)
    category_of = np.concatenate([[0], 1 + np.arange(NUM_ITEMS - 1) % (NUM_CATEGORIES - 1)])
    users = generator.integers(0, num_users, rows)
    interests = generator.integers(1, NUM_CATEGORIES, (num_users, 2))
    lengths = generator.integers(1, longest + 1, rows) * (generator.random(rows) > 0.1)
    owners = np.repeat(np.arange(rows), lengths)
    wanted = interests[users[owners], generator.integers(0, 2, len(owners))]
    history = wanted + (NUM_CATEGORIES - 1) * generator.integers(0, 10, len(owners))
    # Half of the targets lie in an interest of the user, half anywhere.
    inside = generator.random(rows) < 0.5
    target = np.where(
        inside,
        interests[users, generator.integers(0, 2, rows)] + (NUM_CATEGORIES - 1) * generator.integers(0, 10, rows),
        generator.integers(1, NUM_ITEMS, rows),
    )
    matches = np.bincount(owners, category_of[history] == category_of[target[owners]], rows)
    logit = -1.5 + 3.0 * (matches > 0)
    label = generator.random(rows) < 1 / (1 + np.exp(-logit))
    tag_lengths = generator.integers(0, 4, rows)
    tags = generator.integers(0, 6, tag_lengths.sum())
    table = pa.table(
        {
            "label": label.astype(np.int8),
            "hour": generator.random(rows, dtype=np.float32),
            "item": target.astype(np.int32),
            "category": category_of[target].astype(np.int32),
            "user_group": (users % 7).astype(np.int32),
            "tags": _lists(tags, tag_lengths),
            "item_history": _lists(history, lengths),
            "category_history": _lists(category_of[history], lengths),
            "user": users,
        }
    )
    counts = {
        "item": np.bincount(target, minlength=NUM_ITEMS) + np.bincount(history, minlength=NUM_ITEMS),
        "category": np.bincount(category_of[target], minlength=NUM_CATEGORIES)
        + np.bincount(category_of[history], minlength=NUM_CATEGORIES),
        "user_group": np.bincount(users % 7, minlength=7),
        "tags": np.bincount(tags, minlength=6),
    }
    (root / "vocabulary").mkdir(parents=True)
    for name, count in counts.items():
        values = pa.array([None, *(str(value) for value in range(1, len(count)))])
        pq.write_table(pa.table({"value": values, "train_count": count}), root / "vocabulary" / f"{name}.parquet")
    bounds = np.round(np.cumsum([0.0, *SHARES.values()]) * rows).astype(int)
    splits = {}
    for name, first, last in zip(SHARES, bounds, bounds[1:], strict=False):
        path = root / name / "part-00000.parquet"
        path.parent.mkdir()
        pq.write_table(table.slice(first, last - first), path, row_group_size=256)
        splits[name] = Split((describe_file(root, path),))
    manifest = Manifest(root, "synthetic", "label", (NumericFeature("hour"),), _features(), splits, user="user")
    manifest.save()
    return manifest


def _features() -> tuple[CategoricalFeature, ...]:
    def feature(name: str, size: int, kind: str = "single", table: str = "") -> CategoricalFeature:
        return CategoricalFeature(name, size, kind, table, f"vocabulary/{table or name}.parquet", out_of_vocabulary=0)

    return (
        feature("item", NUM_ITEMS),
        feature("category", NUM_CATEGORIES),
        feature("user_group", 7),
        feature("tags", 6, "list"),
        feature("item_history", NUM_ITEMS, "sequence", "item"),
        feature("category_history", NUM_CATEGORIES, "sequence", "category"),
    )


def _lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int64)))
