"""Bytes of embedding tables: what serving needs, what training adds, before and after anything is allocated.

One rule: every byte that serving needs is counted, read off the tensors of the module itself (rows, maps, codes, salts,
projections). A method that serves in another form than it trains says which (``CompressedTables.serving_method``), and
that one is read too, on the meta device. The estimate builds the same module there, so it equals the measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compressed_groups
from recemb.method import UNBOUNDED, CompressedTables, Method
from recemb.optimizers import EmbeddingOptimizer
from recemb.quantised_rows import QuantisedRows

_VALUE_BYTES = 4


@dataclass(frozen=True)
class TableMemory:
    """One physical table: its rows and width, its bytes, and the optimizer's bytes beside it while training.

    Rows that serve in another form than they train have no optimizer: 0 bytes.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one collection.

    Args:
        tables: the physical tables, as they serve.
        full_tables: logical table name -> bytes it would take uncompressed, in float32; unbounded ones are left out.
        index_bytes: integer buffers serving needs: maps, codes, masks, hash salts.
        dense_bytes: parameters and buffers of the method that are not tables: projections, decoders.
        trained_bytes: all of these in the form that trains; those of serving where it is the same form.
        optimizer_bytes: state of the tables' optimizer.
    """

    tables: tuple[TableMemory, ...]
    full_tables: dict[str, int]
    index_bytes: int
    dense_bytes: int
    trained_bytes: int
    optimizer_bytes: int

    @property
    def table_bytes(self) -> int:
        return sum(table.bytes for table in self.tables)

    @property
    def serving_bytes(self) -> int:
        """Everything needed to serve."""
        return self.table_bytes + self.index_bytes + self.dense_bytes

    @property
    def training_bytes(self) -> int:
        """What training holds of the tables: values and optimizer state. No gradients: rows move inside backward()."""
        return self.trained_bytes + self.optimizer_bytes

    @property
    def full_bytes(self) -> int:
        return sum(self.full_tables.values())

    @property
    def ratio(self) -> float:
        """How many times smaller than full tables."""
        return self.full_bytes / self.serving_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: every field and every total, in bytes."""
        return {
            **dataclasses.asdict(self),
            "table_bytes": self.table_bytes,
            "serving_bytes": self.serving_bytes,
            "training_bytes": self.training_bytes,
            "full_bytes": self.full_bytes,
            "ratio": self.ratio,
        }


def full_table_bytes(tables: Sequence[BaseEmbeddingConfig]) -> dict[str, int]:
    """Table name -> bytes of an uncompressed float32 table; unbounded ids have no full table and are left out."""
    return {
        table.name: table.num_embeddings * table.embedding_dim * _VALUE_BYTES
        for table in tables
        if table.num_embeddings < UNBOUNDED
    }


def measure_memory(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection,
    optimizer: EmbeddingOptimizer | None = None,
) -> MemoryReport:
    """Bytes of a built collection, before or after ``recemb.prepare``.

    Args:
        collection: pooled or not, on any device, meta included.
        optimizer: whose state to count beside the tables; row-wise Adagrad where None.
    """
    optimizer = optimizer or EmbeddingOptimizer()
    served = [_Held.of(_serving_form(group), optimizer) for group in compressed_groups(collection)]
    trained = [_Held.of(group, optimizer) for group in compressed_groups(collection)]
    logical: Sequence[BaseEmbeddingConfig] = (
        collection.embedding_configs()
        if isinstance(collection, CompressedEmbeddingCollection)
        else collection.embedding_bag_configs()
    )
    return MemoryReport(
        tables=tuple(table for held in served for table in held.tables),
        full_tables=full_table_bytes(logical),
        index_bytes=sum(held.index_bytes for held in served),
        dense_bytes=sum(held.dense_bytes for held in served),
        trained_bytes=sum(held.all_bytes for held in trained),
        optimizer_bytes=sum(table.optimizer_bytes for held in trained for table in held.tables),
    )


@dataclass(frozen=True)
class _Held:
    """Bytes of one group of tables in one form."""

    tables: tuple[TableMemory, ...]
    index_bytes: int
    dense_bytes: int

    @property
    def all_bytes(self) -> int:
        return sum(table.bytes for table in self.tables) + self.index_bytes + self.dense_bytes

    @staticmethod
    def of(group: CompressedTables, optimizer: EmbeddingOptimizer) -> _Held:
        tables: list[TableMemory] = []
        counted: set[str] = set()
        for number, physical in enumerate(group.physical_tables):
            trained_by = group.lookup_optimizers[number] or optimizer
            for config in physical:
                key = f"lookups.{number}.embedding_bags.{config.name}.weight"
                counted.add(key)
                weight = group.get_parameter(key)
                rows, width = weight.shape
                tables.append(TableMemory(config.name, rows, width, weight.nbytes, trained_by.state_bytes(rows, width)))
        for path, module in group.named_modules():
            if isinstance(module, QuantisedRows):
                counted |= {f"{path}.{name}" for name, _ in module.named_buffers()}
                size = sum(buffer.nbytes for buffer in module.buffers())
                tables.append(TableMemory(path.replace(".", "__"), module.num_rows, module.width, size, 0))
        index_bytes = dense_bytes = 0
        for key, tensor in group.state_dict().items():
            if key in counted:
                continue
            if tensor.is_floating_point():
                dense_bytes += tensor.nbytes
            else:
                index_bytes += tensor.nbytes
        return _Held(tuple(tables), index_bytes, dense_bytes)


def _serving_form(group: CompressedTables) -> CompressedTables:
    if (method := group.serving_method()) is None:
        return group
    with torch.device("meta"):
        return method(group.tables)


def estimate_memory(
    tables: Sequence[EmbeddingBagConfig],
    method: Method,
    *,
    full_below_rows: int = 0,
    optimizer: EmbeddingOptimizer | None = None,
) -> MemoryReport:
    """What ``measure_memory`` says of ``CompressedEmbeddingBagCollection(tables, method)``, without allocating it."""
    with torch.device("meta"):
        collection = CompressedEmbeddingBagCollection(tables, method, full_below_rows=full_below_rows)
    return measure_memory(collection, optimizer)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers of ``module``."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())
