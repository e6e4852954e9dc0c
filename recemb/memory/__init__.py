"""Bytes of embedding tables, before and after anything is allocated; ``python -m recemb.memory`` prints them."""

from recemb.memory.report import (
    MemoryReport,
    TableMemory,
    estimate_memory,
    full_table_bytes,
    measure_memory,
    parameter_bytes,
)

__all__ = [
    "MemoryReport",
    "TableMemory",
    "estimate_memory",
    "full_table_bytes",
    "measure_memory",
    "parameter_bytes",
]
