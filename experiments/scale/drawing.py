"""Figures of the scale study. Built without pyplot: no display, no global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recemb.figures import bytes_formatter, save_figure

Row = dict[str, Any]
COLOURS = {
    "full": "#333333",
    "unified 10x": "#1f5fa8",
    "unified 100x": "#6ea0d6",
    "unified 64MB": "#12837a",
    "quotient_remainder 10x": "#c05a12",
    "quotient_remainder 100x": "#e8a76a",
    "quotient_remainder 64MB": "#a5347a",
}
ORDERS = {"by frequency": "-", "scattered": ":"}


def ids_figure(rows: list[Row], path: Path) -> None:
    """Time of a step and bytes against ids."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in COLOURS.items():
        own = [row for row in rows if row["name"] == name and "cannot" not in row]
        measured = [row for row in own if row["measured"]]
        for order, style in ORDERS.items():
            _line_of(
                left, measured, "total_ids", lambda row, order=order: row["cpu_ms"][order]["median"], colour, style
            )
        right.plot([row["total_ids"] for row in own], [_estimate(row) for row in own], color=colour, label=name)
        right.plot(
            [row["total_ids"] for row in measured],
            [row["training_peak_bytes"] for row in measured],
            *("o",),
            color=colour,
            markersize=5,
        )
        estimated = [row for row in own if not row["measured"]]
        right.plot(
            [row["total_ids"] for row in estimated],
            [_estimate(row) for row in estimated],
            *("o",),
            color=colour,
            markersize=6,
            markerfacecolor="white",
        )
    left.set_xscale("log")
    left.set_ylim(bottom=0)
    left.set_title("train step of the tables, one thread", loc="left", fontsize=10)
    left.set_ylabel("CPU ms (dotted: ids scattered over the rows)")
    right.set_xscale("log")
    right.set_yscale("log")
    right.yaxis.set_major_formatter(bytes_formatter())
    right.set_title("tables and optimizer state: line estimate, dots measured peak", loc="left", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("ids of all 26 features")
        axes.grid(color="#e8ebee")
    right.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def batches_figure(rows: list[Row], path: Path) -> None:
    """Time of a sample against the batch size."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        for order, style in ORDERS.items():
            _line_of(
                axes,
                own,
                "batch_size",
                lambda row, order=order: 1e3 * row["cpu_ms"][order]["median"] / row["batch_size"],
                COLOURS[name],
                style,
                label=name if style == "-" else None,
            )
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of a step")
    axes.set_ylabel("CPU µs a row (dotted: ids scattered)")
    axes.set_title("train step of the tables, 10 million ids, one thread", loc="left", fontsize=10)
    axes.grid(color="#e8ebee")
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def _line_of(
    axes: Axes, rows: list[Row], key: str, value: Any, colour: str, style: str, *, label: str | None = None
) -> None:
    places = [row[key] for row in rows]
    axes.plot(places, [value(row) for row in rows], style, color=colour, marker="o", markersize=4, label=label)


def _estimate(row: Row) -> int:
    return int(row["serving_bytes"]) + int(row["optimizer_bytes"])
