"""What every figure of the package shares: whole files, and axes of bytes. Built without pyplot: no global state."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter


def format_bytes(value: float) -> str:
    """``1_234_567 -> "1.23 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def bytes_formatter() -> FuncFormatter:
    """Ticks of an axis of bytes; a new one for each axis, which matplotlib binds it to."""
    return FuncFormatter(lambda value, _: format_bytes(value))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=130)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
