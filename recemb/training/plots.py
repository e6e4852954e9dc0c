"""Plots of a training run, as PNG files. Figures are built without pyplot: no display, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recemb.figures import bytes_formatter, format_bytes, save_figure
from recemb.memory import MemoryReport

_BLUE, _ORANGE, _LIGHT = "#1f5fa8", "#d9772b", "#c9ced6"
# A bar and a line of text each: more do not fit a page.
_MOST_TABLES = 30


def loss_plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss of train and validation, and validation AUC, over steps.

    Args:
        lines: of metrics.jsonl.
        path: the file.
    """
    train = [line for line in lines if line["split"] == "train"]
    validation = [line for line in lines if line["split"] == "validation"]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [line["step"] for line in train], [line["loss"] for line in train], color=_LIGHT, label="train, logged mean"
    )
    steps = [line["step"] for line in validation]
    axes.plot(steps, [line["logloss"] for line in validation], "o-", color=_BLUE, markersize=4, label="validation")
    # The first steps start at a constant prediction's loss and would flatten everything after them.
    later = [line["loss"] for line in train[len(train) // 20 :]] + [line["logloss"] for line in validation]
    low, high = min(later), max(later)
    margin = 0.05 * (high - low) or 0.01
    axes.set(xlabel="step", ylabel="log loss (nats)", ylim=(low - margin, high + margin), title="Loss over steps")
    right = axes.twinx()
    right.plot(steps, [line["auc"] for line in validation], "s--", color=_ORANGE, markersize=4, label="validation AUC")
    right.set_ylabel("AUC")
    # Below: inside, curves of any shape would lie under it.
    figure.legend(handles=[*axes.get_lines(), *right.get_lines()], frameon=False, loc="outside lower center", ncols=3)
    axes.grid(color="#e8ebee")
    save_figure(figure, path)


def table_bytes_plot(memory: MemoryReport, path: Path) -> None:
    """Bytes of every physical table, largest first, beside those of the full tables they stand for.

    Args:
        memory: bytes of the tables.
        path: the file.
    """
    full = _largest(dict(memory.full_tables))
    physical = _largest({table.name: table.bytes for table in memory.tables})
    height = 1.6 + 0.22 * (len(full) + len(physical))
    figure = Figure(figsize=(7.5, height), layout="constrained")
    panels = figure.subplots(
        2, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [len(full) + 1, len(physical) + 1]}
    )[:, 0]
    contents = (
        (full, memory.full_bytes, _LIGHT, "full tables"),
        (physical, memory.table_bytes, _BLUE, "physical tables"),
    )
    for axes, (sizes, total, color, name) in zip(panels, contents, strict=True):
        axes.barh(list(sizes), list(sizes.values()), color=color)
        axes.set_ylim(len(sizes) - 0.4, -0.6)
        axes.set_title(f"{name}: {format_bytes(total)}", loc="left", fontsize=10)
        axes.set_xscale("log")
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="x", color="#e8ebee")
        axes.set_axisbelow(True)
    panels[-1].xaxis.set_major_formatter(bytes_formatter())
    panels[-1].set_xlabel("bytes (log scale)")
    save_figure(figure, path)


def _largest(sizes: dict[str, int]) -> dict[str, int]:
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    shown = dict(ordered[:_MOST_TABLES])
    if rest := ordered[_MOST_TABLES:]:
        shown[f"{len(rest)} smaller"] = sum(size for _, size in rest)
    return shown
