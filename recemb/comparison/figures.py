"""Figures of a study that people look at. Built without pyplot: no display, no global state."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from recemb.comparison.summary import RunSummary, budgets_of
from recemb.figures import bytes_formatter, format_bytes, save_figure

# Distinct in print and for the colour-blind; markers tell the second round of colours from the first.
_COLORS = ("#1f5fa8", "#d9772b", "#2e8b57", "#a03060", "#6a4fb3", "#8c6d1f", "#1b9e9e", "#c44e52", "#555b66", "#b58900")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GRID = "#e8ebee"
_FULL = "full"


def auc_figure(runs: Sequence[RunSummary], path: Path, *, title: str) -> None:
    """Test AUC against serving bytes: a line a method, bars of one standard deviation, full tables and optimum across.

    Methods that lead at a budget are drawn thick, the others pale.

    Args:
        runs: of the study; refused ones are left out.
        path: the PNG file.
        title: above all.
    """
    _auc_figure(runs, path, title, "serving bytes of the tables (log scale)", lambda run: run.serving_bytes)


def training_auc_figure(runs: Sequence[RunSummary], path: Path, *, title: str) -> None:
    """``auc_figure`` against the bytes that training holds: values and optimizer state of the tables."""
    known = [run for run in runs if run.training_bytes is not None]
    _auc_figure(known, path, title, "training bytes of the tables (log scale)", lambda run: run.training_bytes or 0)


def _auc_figure(
    runs: Sequence[RunSummary], path: Path, title: str, x: str, size_of: Callable[[RunSummary], int]
) -> None:
    trained = [run for run in runs if run.refused is None]
    figure, axes = _axes(title, x, "test AUC")
    leaders = {
        max((run for run in trained if run.budget == budget), key=lambda run: run.mean_auc).method
        for budget in budgets_of(trained)
    }
    _lines(axes, trained, size_of, lambda run: (run.mean_auc, run.auc_spread), leaders=leaders)
    # Full tables too: runs of one budget differ by a few bytes only.
    sizes = [size_of(run) for run in trained]
    axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    for run in trained:
        if run.method == _FULL:
            axes.axhline(run.mean_auc, color="black", linewidth=1)
            axes.axhspan(run.mean_auc - run.auc_spread, run.mean_auc + run.auc_spread, color="black", alpha=0.08)
            axes.annotate(
                "full tables", (0.01, run.mean_auc), xycoords=("axes fraction", "data"), fontsize=8, va="bottom"
            )
    best = next((run.best_possible_auc for run in trained if run.best_possible_auc is not None), None)
    if best is not None:
        axes.axhline(best, color="black", linewidth=1, linestyle="--")
        axes.annotate("best possible", (0.01, best), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    _finish(figure, axes, path)


def throughput_figure(runs: Sequence[RunSummary], path: Path, *, title: str) -> None:
    """Training samples a second of CPU time against serving bytes, both logarithmic."""
    trained = [run for run in runs if run.refused is None]
    figure, axes = _axes(title, "serving bytes of the tables (log scale)", "training samples / CPU second (log scale)")
    _lines(
        axes,
        trained,
        lambda run: run.serving_bytes,
        lambda run: (statistics.median(run.samples_per_cpu_second), 0.0),
        with_full=True,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _finish(figure, axes, path)


def components_figure(runs: Sequence[RunSummary], path: Path, *, title: str) -> None:
    """What the bytes of every run are made of (rows, maps and salts, dense layers), and what training adds."""
    trained = [run for run in runs if run.refused is None and run.components]
    figure = Figure(figsize=(8, 1.8 + 0.24 * len(trained)), layout="constrained")
    axes = figure.subplots()
    places = range(len(trained))
    parts = (
        ("rows", [dict(run.components).get("table", 0) for run in trained], _COLORS[0]),
        ("maps, codes, salts", [dict(run.components).get("index", 0) for run in trained], _COLORS[1]),
        ("dense layers of the method", [dict(run.components).get("dense", 0) for run in trained], _COLORS[2]),
        ("optimizer state, training only", [run.optimizer_bytes for run in trained], "#c9ced6"),
    )
    # As shares, because the runs' bytes differ by orders of magnitude.
    left = [0.0] * len(trained)
    for name, sizes, color in parts:
        shares = [size / run.serving_bytes for size, run in zip(sizes, trained, strict=True)]
        axes.barh(places, shares, left=left, color=color, label=name)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    axes.margins(y=0.5 / max(len(trained), 1))
    axes.set_yticks(places, [f"{run.name}  {format_bytes(run.serving_bytes)}" for run in trained], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="share of the serving bytes; beyond 1: in training only", title=title)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y, title=title, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(bytes_formatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    return figure, axes


def _lines(
    axes: Axes,
    runs: Sequence[RunSummary],
    size_of: Callable[[RunSummary], int],
    value: Callable[[RunSummary], tuple[float, float]],
    *,
    with_full: bool = False,
    leaders: Collection[str] = (),
) -> None:
    """One line a method through its runs, in the order of bytes; of ``leaders`` thick, where there are any."""
    methods = list(dict.fromkeys(run.method for run in runs if with_full or run.method != _FULL))
    for index, method in enumerate(methods):
        points = sorted((run for run in runs if run.method == method), key=size_of)
        values = [value(run) for run in points]
        axes.errorbar(
            [size_of(run) for run in points],
            [mean for mean, _ in values],
            yerr=[spread for _, spread in values],
            color=_COLORS[index % len(_COLORS)],
            marker=_MARKERS[index // len(_COLORS) % len(_MARKERS)],
            markersize=5,
            linewidth=2.4 if method in leaders else 1.2,
            capsize=2,
            alpha=0.5 if leaders and method not in leaders else 1.0,
            zorder=3 if method in leaders else 2,
            label=method,
        )


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
