"""Bytes as aligned text for people."""

from __future__ import annotations

from collections.abc import Sequence

from recemb.memory.job import Outcome
from recemb.memory.placement import PlacedShard, Placement
from recemb.memory.report import MemoryReport
from recemb.sharding import RESERVED_FRACTION


def as_text(outcome: Outcome) -> str:
    """Every physical table, the totals, and the ranks of the plan if there is one."""
    memory = outcome.memory
    parts = [
        f"{outcome.method} for {outcome.source}: {len(memory.full_tables)} logical tables, "
        f"{len(memory.tables)} physical ones",
        _physical(memory),
        _totals(memory),
    ]
    if outcome.placement is not None:
        parts += [_shards(outcome.placement), _ranks(outcome.placement)]
    return "\n\n".join(parts)


def _physical(memory: MemoryReport) -> str:
    full = memory.full_bytes
    rows = [
        (
            table.name,
            f"{table.num_embeddings:,}",
            f"{table.embedding_dim:,}",
            f"{table.bytes:,}",
            # Several logical tables may share one physical table, so its share is of all full tables.
            f"{table.bytes / full:.4%}" if full else "",
            f"{table.optimizer_bytes:,}",
        )
        for table in memory.tables
    ]
    return _aligned(("physical table", "rows", "dim", "bytes", "of full", "optimizer bytes"), rows)


def _totals(memory: MemoryReport) -> str:
    ratio = f"{memory.ratio:,.2f}x smaller than full tables" if memory.full_bytes else ""
    rows = [
        ("tables", f"{memory.table_bytes:,}", ""),
        ("maps and salts", f"{memory.index_bytes:,}", ""),
        ("dense layers of the method", f"{memory.dense_bytes:,}", ""),
        ("serving", f"{memory.serving_bytes:,}", ratio),
        ("full tables", f"{memory.full_bytes:,}", ""),
        ("optimizer state", f"{memory.optimizer_bytes:,}", ""),
        ("training", f"{memory.training_bytes:,}", "no gradients of tables: rows are updated inside backward()"),
    ]
    return _aligned(("bytes", "", ""), rows, left=(0, 2))


def _shards(placement: Placement) -> str:
    tables: dict[tuple[str, str], list[PlacedShard]] = {}
    for shard in placement.shards:
        tables.setdefault((shard.collection, shard.table), []).append(shard)
    rows = [
        (
            name,
            shards[0].sharding_type,
            f"{max(shard.num_rows for shard in shards):,}",
            _ranges(sorted({shard.rank for shard in shards})),
        )
        for (_, name), shards in tables.items()
    ]
    return _aligned(("physical table", "placement", "rows of a shard", "ranks"), rows, left=(0, 1, 3))


def _ranks(placement: Placement) -> str:
    limit = placement.device_bytes
    rows = []
    for rank in range(placement.world_size):
        table_bytes, optimizer_bytes = placement.bytes_of_rank(rank)
        total = table_bytes + optimizer_bytes
        share = f"{100 * total / limit:.1f}%" if limit and not placement.in_host_memory else ""
        rows.append((str(rank), f"{table_bytes:,}", f"{optimizer_bytes:,}", f"{total:,}", share))
    place = "host memory, cached on the device" if placement.in_host_memory else "device memory"
    note = f"in {place}; {RESERVED_FRACTION:.0%} of a device stays free for dense layers and activations"
    return _aligned(("rank", "table bytes", "optimizer bytes", "total", "of memory"), rows) + "\n" + note


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5] -> "0-2, 5"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
