"""Blocks of ids of about equal frequency, over all tables together.

Shapes: n ids of a table, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.method import UNBOUNDED

_MOST_BLOCKS = 256


def frequency_blocks(
    tables: Sequence[EmbeddingBagConfig], shares: Sequence[float], train_counts: Mapping[str, Tensor] | None
) -> list[Tensor]:
    """Block of every id of every table: ids in descending order of train count, cut by share of ids.

    Args:
        tables: the logical tables.
        shares: of all ids, block by block from the most frequent ids on; they add up to 1.
        train_counts: table name -> (n,) int64, how often each id comes in the train split. None: id ``i`` of one table
            is taken to be as frequent as id ``i`` of any other, and more so than ``i + 1``, which is all that is known
            where ids are numbered by frequency.

    Returns:
        A (n,) uint8 tensor for each table. Ids of equal count come in the order of the tables, then of ids.

    Raises:
        ValueError: unbounded ids; shares that are negative, more than 256 or do not add up to 1; counts that are
            missing, of another length or negative.
    """
    if not 1 <= len(shares) <= _MOST_BLOCKS or min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"block_shares must be 1 to {_MOST_BLOCKS} shares of ids that add up to 1, got {list(shares)} "
            f"(sum {sum(shares)})"
        )
    sizes = [table.num_embeddings for table in tables]
    unbounded = [table.name for table in tables if table.num_embeddings == UNBOUNDED]
    if unbounded:
        raise ValueError(f"tables {unbounded} have unbounded (hashed) ids, which have no frequency")
    if train_counts is None:
        keys = np.concatenate([np.arange(size) for size in sizes])
    else:
        keys = -np.concatenate([_counts(table, train_counts) for table in tables])
    order = np.argsort(keys, kind="stable")
    bounds = np.rint(np.cumsum(shares) * len(keys)).astype(np.int64)
    # Whatever rounding left over belongs to the rarest.
    bounds[-1] = len(keys)
    blocks = np.empty(len(keys), dtype=np.uint8)
    blocks[order] = np.searchsorted(bounds, np.arange(len(keys)), side="right")
    return list(torch.from_numpy(blocks).split(sizes))


def frequent_ids(
    tables: Sequence[EmbeddingBagConfig], num_ids: int, train_counts: Mapping[str, Tensor] | None
) -> list[int]:
    """How many ids of each table are among the ``num_ids`` most frequent of all bounded tables.

    Args:
        tables: the logical tables; those of unbounded ids have none.
        num_ids: as many in all, or every id there is.
        train_counts: as for ``frequency_blocks``, which says what None means.

    Raises:
        ValueError: counts that are missing, of another length or negative.
    """
    sizes = np.array([0 if table.num_embeddings == UNBOUNDED else table.num_embeddings for table in tables])
    num_ids = min(num_ids, int(sizes.sum()))
    if train_counts is not None:
        counts = [_counts(table, train_counts) for table, size in zip(tables, sizes, strict=True) if size]
        all_counts = np.concatenate([*counts, np.empty(0, dtype=np.int64)])
        if num_ids == 0:
            return [0] * len(tables)
        last = np.partition(all_counts, len(all_counts) - num_ids)[len(all_counts) - num_ids]
        above, equal = np.zeros_like(sizes), np.zeros_like(sizes)
        above[sizes > 0] = [(values > last).sum() for values in counts]
        equal[sizes > 0] = [(values == last).sum() for values in counts]
    else:
        # The highest rank whose ids all are among them, and the ids of the next.
        low, high = 0, int(sizes.max()) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if np.minimum(sizes, middle).sum() <= num_ids else (low, middle)
        above = np.minimum(sizes, low)
        equal = (sizes > low).astype(np.int64)
    before = np.cumsum(equal) - equal
    chosen = above + np.clip(num_ids - above.sum() - before, 0, equal)
    return [int(count) for count in chosen]


def _counts(table: EmbeddingBagConfig, train_counts: Mapping[str, Tensor]) -> np.ndarray:
    if table.name not in train_counts:
        raise ValueError(f"table {table.name!r}: train_counts are required, got those of {sorted(train_counts)}")
    counts = train_counts[table.name].cpu().numpy()
    if counts.shape != (table.num_embeddings,) or (counts < 0).any():
        raise ValueError(
            f"table {table.name!r}: train_counts must be ({table.num_embeddings},) counts of at least 0, "
            f"got shape {counts.shape}"
        )
    return counts.astype(np.int64)
