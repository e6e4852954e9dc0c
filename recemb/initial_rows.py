"""Initial values of a physical table, for all of its rows or for those of one shard.

A table that is spread over ranks need not fit any of them. What fills it must then work on a part of its rows and need
no other: ``fills_any_rows`` says of which tables that is so.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

_unfilled = False
# Rows that are drawn together.
_BLOCK = 1 << 16


class UniformRanges:
    """``init_fn`` of a table whose ranges of rows start uniform around 0, each within its own bound.

    Args:
        ranges: (rows, bound) of each range, in the order of the rows.
    """

    def __init__(self, ranges: Sequence[tuple[int, float]]) -> None:
        self._ranges = list(ranges)
        self._ends = list(itertools.accumulate(rows for rows, _ in ranges))

    def __call__(self, weight: Tensor) -> None:
        """Fill the whole (rows, width) table."""
        self.fill(weight, 0)

    @torch.no_grad()
    def fill(self, weight: Tensor, first_row: int) -> None:
        """Fill ``weight``, the rows of the table from ``first_row`` on."""
        last_row = first_row + len(weight)
        for (rows, bound), end in zip(self._ranges, self._ends, strict=True):
            low, high = max(end - rows, first_row), min(end, last_row)
            if low < high:
                nn.init.uniform_(weight[low - first_row : high - first_row], -bound, bound)


def fills_any_rows(config: EmbeddingBagConfig) -> bool:
    """Whether the table's ``init_fn`` can fill a part of its rows: ``UniformRanges``, or one distribution for all."""
    start = config.init_fn
    return isinstance(start, UniformRanges) or (
        isinstance(start, functools.partial) and start.func in (nn.init.uniform_, nn.init.normal_)
    )


@torch.no_grad()
def fill_rows(config: EmbeddingBagConfig, weight: Tensor, first_row: int, seed: int) -> None:
    """Fill ``weight``, rows of a table from ``first_row`` on, for which ``fills_any_rows``.

    Rows are drawn by blocks, each from a seed of its own, so that a row starts alike in whatever shard it lies. Torch's
    generators are left as they were.

    Args:
        config: of the table.
        weight: (rows, embedding_dim), on any device; values depend on its type.
        first_row: of ``weight`` in the table.
        seed: of the table.
    """
    end = first_row + len(weight)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        for number in range(first_row // _BLOCK, -(-end // _BLOCK)):
            start = number * _BLOCK
            block = weight.new_empty(min(_BLOCK, config.num_embeddings - start), weight.shape[1])
            torch.manual_seed(seed + number)
            if isinstance(config.init_fn, UniformRanges):
                config.init_fn.fill(block, start)
            else:
                assert config.init_fn is not None
                config.init_fn(block)
            low, high = max(start, first_row), min(start + len(block), end)
            weight[low - first_row : high - first_row] = block[low - start : high - start]


@contextmanager
def unfilled_tables() -> Iterator[None]:
    """Inside, methods build their physical tables on the meta device where every table of a lookup ``fills_any_rows``.

    For models that ``recemb.prepare`` takes before anything reads them. It makes the rows where they will be trained:
    in a process group the rank that holds a shard makes its rows, and no rank ever holds a whole table; in one process
    memory holds the tables once instead of twice meanwhile.

    Example:
        >>> from functools import partial
        >>> import recemb
        >>> from recemb.methods.unified import Unified
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> with unfilled_tables():
        ...     model = recemb.CompressedEmbeddingBagCollection(tables, partial(Unified, num_embeddings=10**5))
        >>> model.device.type
        'meta'
        >>> model, _ = recemb.prepare(model, recemb.EmbeddingOptimizer(), partial(torch.optim.Adam, lr=1e-3))
        >>> model.device.type
        'cpu'
    """
    global _unfilled
    before, _unfilled = _unfilled, True
    try:
        yield
    finally:
        _unfilled = before


def device_of(lookup: Sequence[EmbeddingBagConfig]) -> torch.device:
    """Where to build tables that are looked up together: torch's default device, or see ``unfilled_tables``."""
    if _unfilled and all(fills_any_rows(config) for config in lookup):
        return torch.device("meta")
    return torch.get_default_device()
