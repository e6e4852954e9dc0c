"""Plot of bytes by physical table and by rank. Built without pyplot: no display, no global state."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recemb.figures import bytes_formatter, format_bytes, save_figure
from recemb.memory.placement import Placement
from recemb.memory.report import MemoryReport

_BLUE, _ORANGE, _GRID = "#1f5fa8", "#d9772b", "#e8ebee"
# A bar and a line of text each: more do not fit a page.
_MOST_BARS = 30


def memory_plot(memory: MemoryReport, placement: Placement | None, path: Path, *, title: str) -> None:
    """Bytes of rows and optimizer state: of the largest physical tables (log scale), and of every rank (linear).

    Args:
        memory: bytes of the tables.
        placement: the plan, None for tables only.
        path: the PNG file.
        title: above all.
    """
    tables = sorted(memory.tables, key=lambda table: -table.bytes)
    names = [table.name for table in tables[:_MOST_BARS]]
    sizes = [(table.bytes, table.optimizer_bytes) for table in tables[:_MOST_BARS]]
    if rest := tables[_MOST_BARS:]:
        names.append(f"{len(rest)} smaller")
        sizes.append((sum(table.bytes for table in rest), sum(table.optimizer_bytes for table in rest)))
    num_ranks = 0 if placement is None else min(placement.world_size, 2 * _MOST_BARS)
    figure = Figure(figsize=(7.5, 2.0 + 0.26 * (len(names) + num_ranks)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    ratios = [len(names) + 1, num_ranks + 2] if num_ranks else [1]
    panels = figure.subplots(len(ratios), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    _bars(panels[0], names, sizes, side_by_side=True)
    panels[0].set_xscale("log")
    # After the scale, which brings a formatter of its own.
    panels[0].xaxis.set_major_formatter(bytes_formatter())
    panels[0].set_title(f"physical tables: {format_bytes(memory.table_bytes)}", loc="left", fontsize=10)
    panels[0].set_xlabel("bytes (log scale)")
    if placement is not None:
        ranks = [placement.bytes_of_rank(rank) for rank in range(num_ranks)]
        _bars(panels[1], [f"rank {rank}" for rank in range(num_ranks)], ranks, side_by_side=False)
        shown = f" (the first {num_ranks})" if num_ranks < placement.world_size else ""
        panels[1].set_title(f"{placement.world_size} ranks{shown}", loc="left", fontsize=10)
        panels[1].set_xlabel("bytes")
        if placement.device_bytes is not None and not placement.in_host_memory:
            panels[1].axvline(placement.device_bytes, color="black", linewidth=1, linestyle="--")
            panels[1].set_xlabel("bytes; dashed: memory of one GPU")
    # Below the bars of the smallest tables there is room.
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    save_figure(figure, path)


def _bars(axes: Axes, names: list[str], sizes: list[tuple[int, int]], *, side_by_side: bool) -> None:
    """Rows and state beside each other where the scale is logarithmic (lengths do not add there), else stacked."""
    rows, state = [size for size, _ in sizes], [size for _, size in sizes]
    places = range(len(names))
    if side_by_side:
        axes.barh([place - 0.2 for place in places], rows, height=0.4, color=_BLUE, label="rows")
        axes.barh([place + 0.2 for place in places], state, height=0.4, color=_ORANGE, label="optimizer state")
    else:
        axes.barh(places, rows, color=_BLUE, label="rows")
        axes.barh(places, state, left=rows, color=_ORANGE, label="optimizer state")
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(bytes_formatter())
    axes.margins(y=0.02)
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
