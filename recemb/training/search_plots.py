"""Plots of a search: what is kept of each field, and what bytes bought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from recemb.figures import format_bytes, save_figure
from recemb.plan import CompressionPlan

_BLUE, _LIGHT = "#1f5fa8", "#c9ced6"
_COLORS = ("#8a929c", "#d9772b", "#1f5fa8", "#3a8f5c", "#8b5aa8", "#b0413e")
# A pair of bars each: more do not fit a page.
_MOST_TABLES = 40


def fields_plot(plan: CompressionPlan, path: Path) -> None:
    """Rows kept, of all, and mean width of the rows kept, of each of the largest tables.

    Args:
        plan: what was kept.
        path: the file.
    """
    tables = sorted(plan.tables.items(), key=lambda item: -item[1].num_embeddings)[:_MOST_TABLES]
    names = [name for name, _ in tables]
    kept = [table.num_rows() for _, table in tables]
    widths = [table.num_values() / max(rows, 1) for (_, table), rows in zip(tables, kept, strict=True)]
    figure = Figure(figsize=(9.0, 1.6 + 0.22 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [table.num_embeddings for _, table in tables], color=_LIGHT, label="all rows")
    left.barh(names, kept, color=_BLUE, label="kept")
    left.set(xscale="log", xlabel="rows (log scale)", title="Rows kept")
    left.invert_yaxis()
    left.legend(frameon=False, loc="lower right")
    right.barh(names, [table.embedding_dim for _, table in tables], color=_LIGHT)
    right.barh(names, widths, color=_BLUE)
    right.set(xlabel="mean number of values of a kept row", title="Width kept")
    for axes in (left, right):
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="x", color="#e8ebee")
        axes.set_axisbelow(True)
    save_figure(figure, path)


def bytes_plot(points: Mapping[str, Sequence[tuple[float, float]]], full_bytes: int, path: Path) -> None:
    """Validation AUC against the bytes of the tables that reached it.

    Args:
        points: stage -> (bytes, AUC) of each look at validation rows.
        full_bytes: of full tables, drawn as a line.
        path: the file.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for color, (name, found) in zip(_COLORS * len(points), points.items(), strict=False):
        sizes, scores = zip(*found, strict=True)
        axes.plot(sizes, scores, "o", color=color, markersize=5, alpha=0.8, label=name)
    axes.axvline(full_bytes, color=_LIGHT, linestyle="--", label="full tables")
    axes.set(xscale="log", xlabel="bytes of the tables (log scale)", ylabel="validation AUC")
    axes.set_title("Bytes against validation AUC over the search")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.legend(frameon=False)
    axes.grid(color="#e8ebee")
    save_figure(figure, path)
