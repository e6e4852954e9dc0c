"""What the three DINs of the study have in common: features, widths, and the protocol of the other speed study.

Runs in the peers' virtual environments too, so it needs nothing but the standard library, numpy, pyarrow and torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "speed" / "contenders"))

SINGLE = ["item", "category", "device"]
HISTORIES = {"item_history": "item", "category_history": "category"}
EMBEDDING_DIM = 16
ATTENTION_LAYERS = [36]
LAYERS = [200, 80]
DENSE_LEARNING_RATE = 1e-3
EMBEDDING_LEARNING_RATE = 0.02


def cardinalities(data: Path) -> dict[str, int]:
    """Rows of the full table of each single feature."""
    features = json.loads((data / "manifest.json").read_text())["categorical"]
    return {feature["name"]: feature["num_embeddings"] for feature in features if feature["name"] in SINGLE}


def padded(data: Path, split: str, length: int) -> dict[str, np.ndarray]:
    """Columns as numpy: single ids (rows,), histories (rows, length) filled with 0 behind, ``history_length`` (rows,).

    No event has id 0, which the peers take for padding.
    """
    table = pq.read_table(data / split / "part-00000.parquet", use_threads=False)
    columns = {name: table[name].to_numpy() for name in [*SINGLE, "label"]}
    for name in HISTORIES:
        lists = table[name].combine_chunks()
        ids, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
        lengths = np.diff(offsets)
        rows = np.zeros((len(lists), length), dtype=np.int64)
        rows[np.arange(length) < lengths[:, None]] = ids
        columns[name] = rows
        columns["history_length"] = lengths
    return columns


def history_length(data: Path) -> int:
    """The longest history of the data set, in events."""
    return int(json.loads((data / "manifest.json").read_text())["preparation"]["longest"])
