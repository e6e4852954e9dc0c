"""Plots of a search: how each stage went, what is kept of each field, and what bytes bought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from recemb.figures import bytes_formatter, save_figure
from recemb.plan import CompressionPlan

_BLUE, _ORANGE, _LIGHT, _GRID = "#1f5fa8", "#d9772b", "#c9ced6", "#e8ebee"
_COLORS = ("#8a929c", "#d9772b", "#1f5fa8", "#3a8f5c", "#8b5aa8", "#b0413e")
# A pair of bars each: more do not fit a page.
_MOST_TABLES = 40
# Ticks of bytes that are about of one size are legible on a linear axis alone.
_LOG_FROM = 4.0


@dataclass(frozen=True)
class StageCurve:
    """How a stage went, look by look at validation rows.

    Args:
        name: of the stage.
        unit: of ``positions``: ``"step"`` or ``"generation"``.
        positions: of the looks.
        aucs: at them.
        kept: what the search would keep at them, as shares of full tables: of ``"rows"``, ``"values"``, ... Empty for
            a stage that searches nothing.
    """

    name: str
    unit: str
    positions: Sequence[int]
    aucs: Sequence[float]
    kept: Mapping[str, Sequence[float]]


def progress_plot(curves: Sequence[StageCurve], path: Path) -> None:
    """Validation AUC of every stage, and below it what its search would keep.

    Args:
        curves: at least one.
        path: the file.
    """
    num_rows = 2 if any(curve.kept for curve in curves) else 1
    figure = Figure(figsize=(1.2 + 3.4 * len(curves), 1.0 + 2.4 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, len(curves), squeeze=False, sharex="col", sharey="row")
    for number, curve in enumerate(curves):
        top = panels[0, number]
        top.plot(curve.positions, curve.aucs, "o-", color=_BLUE, markersize=3)
        top.set_title(curve.name)
        _prepare(top)
        panels[-1, number].set_xlabel(curve.unit if curve.unit == "step" else f"{curve.unit} (AUC of rows that decide)")
        panels[-1, number].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if num_rows == 2:
            _draw_kept(panels[1, number], curve)
    panels[0, 0].set_ylabel("validation AUC")
    if num_rows == 2:
        panels[1, 0].set_ylabel("share of full tables kept")
    save_figure(figure, path)


def _draw_kept(axes: Axes, curve: StageCurve) -> None:
    for color, (name, shares) in zip(_COLORS[1:] * len(curve.kept), curve.kept.items(), strict=False):
        axes.plot(curve.positions, shares, "o-", color=color, markersize=3, label=name)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _prepare(axes)
    if curve.kept:
        axes.legend(frameon=False, loc="best", fontsize=8)
    else:
        axes.text(0.5, 0.5, "nothing is searched here", ha="center", color="#8a929c", transform=axes.transAxes)


def fields_plot(plan: CompressionPlan, path: Path) -> None:
    """Share of the rows kept, with their number, and mean width of a kept row, of each of the largest tables.

    Args:
        plan: what was kept.
        path: the file.
    """
    tables = sorted(plan.tables.items(), key=lambda item: -item[1].num_embeddings)[:_MOST_TABLES]
    names = [f"{name}  ({table.num_embeddings:,})" for name, table in tables]
    kept = [table.num_rows() for _, table in tables]
    widths = [table.num_values() / max(rows, 1) for (_, table), rows in zip(tables, kept, strict=True)]
    shares = [rows / table.num_embeddings for (_, table), rows in zip(tables, kept, strict=True)]
    figure = Figure(figsize=(9.0, 1.3 + 0.22 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [1.0] * len(names), color=_LIGHT)
    left.barh(names, shares, color=_BLUE)
    for position, rows in enumerate(kept):
        color = "white" if shares[position] > 0.15 else "black"
        left.text(0.015, position, f"{rows:,}", va="center", fontsize=7, color=color)
    left.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), xlabel="share of the table's rows", title="Rows kept")
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    right.barh(names, [table.embedding_dim for _, table in tables], color=_LIGHT)
    right.barh(names, widths, color=_BLUE)
    right.set(xlabel="mean number of values of a kept row", title="Width kept")
    right.set_xlim(0, max(table.embedding_dim for _, table in tables))
    for axes in (left, right):
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="x", color=_GRID)
        axes.set_axisbelow(True)
    save_figure(figure, path)


def bytes_plot(
    outcomes: Mapping[str, tuple[float, float]],
    paths: Mapping[str, Sequence[tuple[float, float]]],
    full_bytes: int,
    path: Path,
) -> None:
    """AUC against the bytes of the tables that reached it.

    Args:
        outcomes: stage -> (bytes, AUC) of what it ended with, on the rows of early stopping.
        paths: stage -> (bytes, AUC) of the best so far, look by look, on the rows that decide what is kept: AUCs of
            other rows, hence apart.
        full_bytes: of full tables, drawn as a line.
        path: the file.
    """
    panels: list[tuple[str, dict[str, Sequence[tuple[float, float]]]]] = [
        ("what stages ended with, early-stopping rows", {name: [point] for name, point in outcomes.items()})
    ]
    if paths:
        panels.append(("best so far, rows that decide", dict(paths)))
    colors = dict(zip([*outcomes, *paths], _COLORS * (len(outcomes) + len(paths)), strict=False))
    figure = Figure(figsize=(1.5 + 4.6 * len(panels), 4.2), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, found in points.items():
            sizes, scores = zip(*found, strict=True)
            style = "o-" if len(found) > 1 else "o"
            axes.plot(sizes, scores, style, color=colors[name], markersize=4, linewidth=0.8, alpha=0.8, label=name)
            if len(found) > 1:
                axes.plot(sizes[-1], scores[-1], "*", color=colors[name], markersize=10, linestyle="", label="its end")
        axes.axvline(full_bytes, color=_LIGHT, linestyle="--", label="full tables")
        every = [size for found in points.values() for size, _ in found] + [full_bytes]
        if max(every) > _LOG_FROM * min(every):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter("")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(bytes_formatter())
        axes.set(xlabel="bytes of the tables", ylabel="AUC")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        _prepare(axes)
    figure.suptitle("Bytes against validation AUC over the search")
    save_figure(figure, path)


def _prepare(axes: Axes) -> None:
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
