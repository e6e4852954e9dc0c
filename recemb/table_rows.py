"""Rows of a method's physical tables read and written between steps, wherever they lie: plain, fused or sharded.

Methods that reorganise themselves during training (promotions, clusterings) move rows from here to there. Over ranks
every rank must call these with the same rows, as all of them hold the same maps.

Shapes: R rows, W width of the physical table.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from recemb.method import CompressedTables

# Of a whole table, so that slots and rows of a piece stay in the caches.
_ROWS_AT_ONCE = 1 << 18


@torch.no_grad()
def read_rows(method: CompressedTables, index: int, rows: Tensor) -> Tensor:
    """(R, W) values of the one table of ``lookups[index]`` at (R,) int64 ``rows``; a copy, through the lookup."""
    return method.lookup_rows(index, [rows])[0].clone()


@torch.no_grad()
def write_rows(method: CompressedTables, index: int, rows: Tensor, values: Tensor) -> None:
    """Write (R, W) ``values`` to distinct ``rows`` of the one table of ``lookups[index]``; a rank writes what it holds.

    Optimizer state stays with the row, whoever owned it before.
    """
    [config] = method.physical_tables[index]
    weight = method.lookups[index].state_dict()[f"embedding_bags.{config.name}.weight"]
    if not isinstance(weight, ShardedTensor):
        weight.index_copy_(0, rows, values.to(weight.dtype))
        return
    for piece in weight.local_shards():
        (first, column), (count, width) = piece.metadata.shard_offsets, piece.metadata.shard_sizes
        held = (rows >= first) & (rows < first + count)
        target = piece.tensor.detach()
        target.index_copy_(0, rows[held] - first, values[held, column : column + width].to(target.dtype))


@torch.no_grad()
def read_stack(method: CompressedTables, index: int, num_rows: int) -> Tensor:
    """(num_rows, W) rows 0 .. num_rows - 1 of the one table of ``lookups[index]``: a copy, on every rank the whole."""
    device = next(method.lookups[index].parameters()).device
    parts = torch.arange(num_rows, device=device).split(_ROWS_AT_ONCE)
    return torch.cat([read_rows(method, index, part) for part in parts])
