"""Plots of an evaluation, as PNG files. Figures are built without pyplot: no display, no global state."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from recemb.evaluation.checks import Floats, Integers
from recemb.evaluation.evaluator import Evaluation, SliceRow
from recemb.evaluation.metrics import ReliabilityTable

_BLUE, _ORANGE, _GREY, _LIGHT = "#1f5fa8", "#d9772b", "#5a5f66", "#d5d9de"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": "#24292f",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebee",
    "grid.linewidth": 0.8,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "legend.frameon": False,
}
# A bar or point a value, one line of text each: more do not fit a page.
_MOST_SLICES = 25
# A click rate of fewer rows says nothing; its interval would cover the plot.
_FEWEST_ROWS = 10


def reliability_plot(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Write a PNG: observed click rate over predicted probability in bins, and below it where the predictions lie.

    Bins of equal mass show the bulk of the rows, bins of equal width the tails (those with 10 rows or more). Bars are
    95% Wilson intervals of each bin's click rate, rows taken as independent. Axes are logarithmic where nearly all
    predictions are below 20%, as with the click rates of ads, which would otherwise share a corner.

    Args:
        evaluation: the metrics; its tables are drawn.
        path: the file.
        title: first line, e.g. the data set and split.
    """
    mass, width = evaluation.equal_mass, evaluation.equal_width
    low_rates = float(mass.prediction[-1]) < 0.2 and float(mass.prediction[0]) > 0
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 7.2), dpi=150)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1), gridspec_kw={"hspace": 0.08})
        shortest, longest = _limits(mass, width, low_rates)
        line = [max(shortest, 0.0), longest]
        top.plot(line, line, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), label="perfectly calibrated")
        _points(top, width, color=_ORANGE, marker="s", filled=False, label="bins of equal width")
        _points(top, mass, color=_BLUE, marker="o", filled=True, label="bins of equal mass")
        scale = "log" if low_rates else "linear"
        top.set(xscale=scale, yscale=scale, xlim=(shortest, longest), ylim=(shortest, longest))
        top.set_ylabel("observed click rate")
        top.legend(loc="upper left")
        _row_bars(bottom, mass if low_rates else width, low_rates, shortest)
        for axis in (top.yaxis, bottom.xaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        _headline(
            figure,
            title,
            f"{evaluation.rows:,} rows, {100 * evaluation.positives / evaluation.rows:.3g}% clicked   |   "
            f"predicted / observed {evaluation.calibration:.4f}   |   "
            f"ECE {width.expected_error:.4f} (width), {mass.expected_error:.4f} (mass)",
        )
        figure.align_ylabels([top, bottom])
        _save(figure, path)


def slice_plot(evaluation: Evaluation, column: str, path: Path, *, title: str) -> None:
    """Write a PNG: the AUC of each listed value of a slice column beside that of all rows, and the rows of each.

    Bars are one standard error to each side (Hanley and McNeil 1982), so that small slices are not read as differences.
    Values without an AUC (labels of one class) are left out.

    Raises:
        KeyError: the evaluation has no such slice column.
    """
    part = evaluation.slices[column]
    shown = [(item, item.auc) for item in part.slices if item.auc is not None][:_MOST_SLICES]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.8, max(2.6, 1.6 + 0.24 * len(shown))), dpi=150)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1), gridspec_kw={"wspace": 0.09})
        places = np.arange(len(shown))[::-1]
        left.axvline(evaluation.auc, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
        left.errorbar(
            [area for _, area in shown],
            places,
            xerr=[auc_standard_error(area, item.positives, item.rows - item.positives) for item, area in shown],
            fmt="o",
            color=_BLUE,
            ecolor="#9bb7d6",
            elinewidth=1.6,
            markersize=5.5,
        )
        left.set_yticks(places, [_shortened(item) for item, _ in shown])
        left.xaxis.set_major_locator(MaxNLocator(nbins=5))
        left.set(xlabel="AUC", ylabel=column, ylim=(-0.8, len(shown) - 0.2))
        left.grid(axis="y", visible=False)
        right.barh(places, [item.rows for item, _ in shown], color=_LIGHT, height=0.7)
        right.set(xlabel="rows", xscale="log", xlim=(0.8, 3 * max([item.rows for item, _ in shown], default=1)))
        right.tick_params(axis="y", length=0)
        right.grid(axis="y", visible=False)
        _headline(
            figure,
            title,
            f"{len(shown)} of {part.num_values:,} values, those with the most rows; "
            f"bars \N{PLUS-MINUS SIGN}1 standard error; dashed: all rows, {evaluation.auc:.4f}",
        )
        _save(figure, path)


def auc_standard_error(area: float, positives: int, negatives: int) -> float:
    """Standard error of an AUC from its value and the number of labels of each class alone.

    Reference: Hanley and McNeil, "The Meaning and Use of the Area under a ROC Curve", Radiology 1982.
    """
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (positives - 1) * (first - area**2) + (negatives - 1) * (second - area**2)
    return math.sqrt(max(spread, 0.0) / (positives * negatives))


def wilson_interval(clicks: Floats, rows: Integers) -> tuple[Floats, Floats]:
    """95% Wilson score interval of ``clicks`` out of ``rows``: sound for few rows and for rates near 0."""
    z = 1.959963984540054
    rate = clicks / rows
    centre = (rate + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * np.sqrt(rate * (1 - rate) / rows + z**2 / (4 * rows**2))
    return centre - half, centre + half


def _points(axes: Axes, table: ReliabilityTable, *, color: str, marker: str, filled: bool, label: str) -> None:
    drawn = table.rows >= min(_FEWEST_ROWS, int(table.rows.max()))
    rows, observed = table.rows[drawn], table.observed[drawn]
    low, high = wilson_interval(observed * rows, rows)
    axes.errorbar(
        table.prediction[drawn],
        observed,
        # An interval of a rate of 0 or 1 ends there up to rounding, which errorbar would call negative.
        yerr=np.maximum(0, [observed - low, high - observed]),
        color=color,
        marker=marker,
        markersize=5,
        markerfacecolor=color if filled else "white",
        markeredgewidth=1.2,
        linestyle="-" if filled else "none",
        linewidth=1.2,
        elinewidth=1,
        capsize=2,
        label=label,
    )


def _row_bars(axes: Axes, table: ReliabilityTable, low_rates: bool, shortest: float) -> None:
    """Where the predictions lie: rows of equal-width bins, or rows per decade of equal-mass bins on a log axis."""
    lower, upper, heights = table.lower, table.upper, table.rows.astype(np.float64)
    if low_rates:
        lower = np.maximum(lower, shortest)
        wide = upper > lower
        lower, upper, heights = lower[wide], upper[wide], heights[wide]
        heights = heights / np.log10(upper / lower)
    axes.bar(lower, heights, upper - lower, align="edge", color=_LIGHT, edgecolor="white", linewidth=1)
    axes.set(xlabel="predicted probability", ylabel="rows per decade" if low_rates else "rows")
    axes.grid(axis="x", visible=False)
    if low_rates:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    else:
        axes.set(yscale="log")
        axes.set_ylim(bottom=0.5)


def _limits(mass: ReliabilityTable, width: ReliabilityTable, low_rates: bool) -> tuple[float, float]:
    """Common range of both axes of the upper plot."""
    kept = width.rows >= _FEWEST_ROWS
    values = np.concatenate((mass.prediction, mass.observed, width.prediction[kept], width.observed[kept]))
    longest = float(values.max())
    if low_rates:
        return float(values[values > 0].min()) / 1.6, min(1.0, longest * 1.6)
    longest = min(1.0, longest * 1.08)
    return -0.015 * longest, 1.015 * longest


def _headline(figure: Figure, title: str, subtitle: str) -> None:
    height = figure.get_figheight()
    top = 1 - 0.75 / height
    figure.subplots_adjust(top=top, right=0.99)
    left = figure.axes[0].get_position().x0
    figure.text(left, 1 - 0.28 / height, title, fontsize=12.5, fontweight="bold", color="#24292f", va="center")
    figure.text(left, 1 - 0.52 / height, subtitle, fontsize=8, color=_GREY, va="center")


def _shortened(item: SliceRow) -> str:
    text = "(missing)" if item.value is None else str(item.value)
    return text if len(text) <= 18 else text[:16] + "..."


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _save(figure: Figure, path: Path) -> None:
    """Atomically, like every result."""
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.12, facecolor="white")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
