"""Where TorchRec's planner would put tables, worked out on the meta device: no rank, no GPU and no table is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed.types import EmbeddingModuleShardingPlan, EnumerableShardingSpec, ParameterSharding
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.collection import CompressedEmbeddingBagCollection, own_optimizers
from recemb.method import Method
from recemb.optimizers import EmbeddingOptimizer
from recemb.sharding import RESERVED_FRACTION, plan_shards, train_in_backward

_VALUE_BYTES = 4


@dataclass(frozen=True)
class PlacedShard:
    """Rows ``[first_row, first_row + num_rows)`` of a physical table, whole rows, on one rank.

    Tables of several collections may have one name.
    """

    collection: str
    table: str
    sharding_type: str
    rank: int
    first_row: int
    num_rows: int
    embedding_dim: int
    table_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class Placement:
    """A plan for some ranks.

    Args:
        world_size: ranks.
        device_bytes: memory of one rank, None where TorchRec's default was used.
        in_host_memory: tables lie in the host's memory, behind a cache on the device.
        shards: of every physical table.
    """

    world_size: int
    device_bytes: int | None
    in_host_memory: bool
    shards: tuple[PlacedShard, ...]

    def bytes_of_rank(self, rank: int) -> tuple[int, int]:
        """Bytes of tables and of optimizer state on ``rank``."""
        shards = [shard for shard in self.shards if shard.rank == rank]
        return sum(shard.table_bytes for shard in shards), sum(shard.optimizer_bytes for shard in shards)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the shards, and bytes by rank."""
        ranks = [self.bytes_of_rank(rank) for rank in range(self.world_size)]
        return {
            **dataclasses.asdict(self),
            "reserved_fraction": RESERVED_FRACTION,
            "ranks": [
                {"rank": rank, "table_bytes": table_bytes, "optimizer_bytes": optimizer_bytes}
                for rank, (table_bytes, optimizer_bytes) in enumerate(ranks)
            ],
        }


def plan_placement(
    tables: Sequence[EmbeddingBagConfig],
    method: Method,
    *,
    optimizer: EmbeddingOptimizer,
    world_size: int,
    full_below_rows: int = 0,
    device_type: str = "cuda",
    local_world_size: int | None = None,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
    placement: Mapping[str, Sequence[str]] | None = None,
    caching: bool = False,
) -> Placement:
    """The plan that training on ``world_size`` ranks would follow.

    Args:
        tables: logical tables.
        method: what realises them.
        optimizer: whose state lies beside the rows.
        world_size: ranks.
        full_below_rows: as for the collection.
        device_type: ``"cuda"`` or ``"cpu"``.
        local_world_size: ranks of one machine, all where None.
        device_bytes: memory of one rank; TorchRec's default where None.
        host_bytes: host memory of one rank, where cached tables lie; TorchRec's default where None.
        placement: see ``recemb.sharding.plan_shards``.
        caching: see ``recemb.sharding.plan_shards``.

    Raises:
        ValueError: the tables do not fit, or are not spread with this optimizer.
    """
    if optimizer.trains_all_rows:
        raise ValueError(
            f"optimizer {optimizer.name!r} keeps all tables whole on every rank: there is nothing to place"
        )
    with torch.device("meta"):
        collection = CompressedEmbeddingBagCollection(tables, method, full_below_rows=full_below_rows)
    train_in_backward(collection, optimizer)
    plan = plan_shards(
        collection,
        world_size=world_size,
        device_type=device_type,
        local_world_size=local_world_size,
        placement=placement,
        device_memory_bytes=device_bytes,
        host_memory_bytes=host_bytes,
        caching=caching,
    )
    own = own_optimizers(collection)
    shards = [
        shard
        for path, module in plan.plan.items()
        if isinstance(module, EmbeddingModuleShardingPlan)
        for name, sharding in module.items()
        for shard in _shards(path, name, sharding, own.get(id(collection.get_submodule(path)), optimizer))
    ]
    return Placement(world_size, device_bytes, caching, tuple(shards))


def _shards(path: str, name: str, sharding: ParameterSharding, optimizer: EmbeddingOptimizer) -> list[PlacedShard]:
    specification = sharding.sharding_spec
    assert isinstance(specification, EnumerableShardingSpec), "tables are placed table-wise or row-wise"
    shards = []
    for piece in specification.shards:
        (first_row, _), (num_rows, width) = piece.shard_offsets, piece.shard_sizes
        rank = piece.placement.rank()
        assert rank is not None
        table_bytes = num_rows * width * _VALUE_BYTES
        state = optimizer.state_bytes(num_rows, width)
        kind = sharding.sharding_type
        shards.append(PlacedShard(path, name, kind, rank, first_row, num_rows, width, table_bytes, state))
    return shards
