"""Write the tables of README.md and ten_billion_ids.md and the figures, from results/*.json.

python experiments/scale/report.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from drawing import COLOURS, batches_figure, ids_figure

from recemb.figures import format_bytes

FOLDER = Path(__file__).resolve().parent
Row = dict[str, Any]
# Lines of ranks that a page shows of a plan.
SHOWN_RANKS = 2


def main() -> None:
    parts = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "results").glob("*.json"))}
    ids, batches = parts["ids"]["rows"], parts["batches"]["rows"]
    ids_figure(ids, FOLDER / "ids.png")
    batches_figure(batches, FOLDER / "batches.png")
    readme = {
        "steps": f"{_origin(parts['ids'])}\n\n{steps_table(ids)}",
        "memory": memory_table(ids),
        "batches": f"{_origin(parts['batches'])}\n\n{batches_table(batches)}",
        "ranks": f"{_origin(parts['ranks'])}\n\n{ranks_table(parts['ranks']['rows'])}",
    }
    page = {
        "plans": f"{_origin(parts['plans'])}\n\n{plans_table(parts['plans']['rows'])}",
        "screens": screens(parts["plans"]["rows"]),
        "methods": methods_table(parts["methods"]["rows"]),
    }
    for name, tables in (("README.md", readme), ("ten_billion_ids.md", page)):
        path = FOLDER / name
        text = path.read_text()
        for marker, table in tables.items():
            text = _replace(text, marker, table)
        path.write_text(text)


def steps_table(rows: list[Row]) -> str:
    """CPU milliseconds a step, a line a method, a column a number of ids."""
    return _by_ids(rows, _step_cell)


def memory_table(rows: list[Row]) -> str:
    """Estimated bytes of tables and optimizer, and the measured peak, a line a method, a column a number of ids."""
    return _by_ids(rows, _memory_cell)


def _by_ids(rows: list[Row], cell: Any) -> str:
    totals = sorted({row["total_ids"] for row in rows})
    found = {(row["name"], row["total_ids"]): row for row in rows}
    lines = _head("ids in all", *(f"{total:.0e}".replace("e+", "e").replace("e0", "e") for total in totals))
    for name in COLOURS:
        cells = [cell(found[name, total]) if (name, total) in found else "" for total in totals]
        lines.append(_line(name, *cells))
    return "\n".join(lines)


def _step_cell(row: Row) -> str:
    if "cannot" in row:
        return "cannot be so small"
    if not row["measured"]:
        return "not run"
    return " / ".join(f"{row['cpu_ms'][order]['median']:.1f}" for order in ("by frequency", "scattered"))


def _memory_cell(row: Row) -> str:
    if "cannot" in row:
        return "cannot be so small"
    estimate = format_bytes(row["serving_bytes"] + row["optimizer_bytes"])
    if not row["measured"]:
        return f"{estimate}, estimate only"
    return f"{estimate} / {format_bytes(row['training_peak_bytes'])} ({format_bytes(row['build_peak_bytes'])})"


def batches_table(rows: list[Row]) -> str:
    """CPU microseconds a sample and the step's memory, a line a method, a column a batch size."""
    sizes = sorted({row["batch_size"] for row in rows})
    found = {(row["name"], row["batch_size"]): row for row in rows}
    lines = _head("rows a step", *(f"{size:,}" for size in sizes))
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = []
        for size in sizes:
            row = found[name, size]
            times = " / ".join(
                f"{1e3 * row['cpu_ms'][order]['median'] / size:.2f}" for order in ("by frequency", "scattered")
            )
            beside = row["training_peak_bytes"] - row["serving_bytes"] - row["optimizer_bytes"]
            cells.append(f"{times} ({format_bytes(max(beside, 0))})")
        lines.append(_line(name, *cells))
    return "\n".join(lines)


def ranks_table(rows: list[Row]) -> str:
    """Wall-clock and CPU milliseconds a step, and memory of the largest rank."""
    lines = _head(
        *("method", "place", "ms a step (p10-p90)", "CPU ms, all ranks (p10-p90)"),
        *("tables of each rank", "peak of the largest rank", "while building"),
    )
    for row in rows:
        wall, cpu = (
            f"{row[kind]['median']:.1f} ({row[kind]['p10']:.1f}-{row[kind]['p90']:.1f})"
            for kind in ("wall_ms", "cpu_ms")
        )
        held = ", ".join(format_bytes(size) for size in row["table_bytes_of_ranks"])
        peaks = (format_bytes(row[kind]) for kind in ("training_peak_bytes", "build_peak_bytes"))
        lines.append(_line(row["name"], row["place"], wall, cpu, held, *peaks))
    return "\n".join(lines)


def plans_table(rows: list[Row]) -> str:
    """What the planner decided, and what asking took."""
    lines = _head(
        *("", "tables", "optimizer state", "placed", "largest table, rows", "largest shard, rows"),
        *("fullest GPU", "emptiest", "CPU s", "peak memory"),
    )
    for row in rows:
        asking = (f"{row['cpu_seconds']:.1f}", format_bytes(row["peak_bytes"]))
        if "refused" in row:
            lines.append(_line(row["name"], "", "", "refused", "", "", "", "", *asking))
            continue
        placed = ", ".join(f"{count} {kind}" for kind, count in sorted(row["placements"].items()))
        sizes = (format_bytes(row[key]) for key in ("largest_rank_bytes", "smallest_rank_bytes"))
        rows_of = (f"{row[key]:,}" for key in ("largest_table_rows", "largest_shard_rows"))
        held = (format_bytes(row[key]) for key in ("serving_bytes", "optimizer_bytes"))
        lines.append(_line(row["name"], *held, placed, *rows_of, *sizes, *asking))
    return "\n".join(lines)


def screens(rows: list[Row]) -> str:
    """Every command and what it answered, of which most ranks are left out."""
    parts = []
    for row in rows:
        answer = row["refused"] if "refused" in row else _shortened(row["screen"])
        command = " ".join(f'"{word}"' if "[" in word else word for word in row["command"])
        parts.append(f"**{row['name']}**\n\n    {command}\n\n```text\n{answer}\n```")
    return "\n\n".join(parts)


def _shortened(screen: str) -> str:
    """From the totals on, without most ranks."""
    lines = screen[screen.index("\nbytes\n") + 1 :].rstrip().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("rank ")) + 1
    last = len(lines) - 1
    if last - first > SHOWN_RANKS + 1:
        lines[first + SHOWN_RANKS : last] = [f"... {last - first - SHOWN_RANKS} more"]
    return "\n".join(lines)


def methods_table(rows: list[Row]) -> str:
    """Whether a method can be a hundredth of full tables for ten billion ids."""
    lines = _head("method", "bytes", "ratio", "of them maps and salts")
    for row in rows:
        if "cannot" in row:
            lines.append(_line(row["method"], row["cannot"], "", ""))
        else:
            sizes = (format_bytes(row["serving_bytes"]), f"{row['ratio']:,.0f}x", format_bytes(row["index_bytes"]))
            lines.append(_line(row["method"], *sizes))
    return "\n".join(lines)


def _head(*names: str) -> list[str]:
    return [_line(*names), f"|{'---|' * len(names)}"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(document: Row) -> str:
    machine, git = document["machine"], document["git"]
    state = " with uncommitted changes" if git["dirty"] else ""
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    place = f"{machine['cpu']}, {machine['cores']} cores, {memory}"
    return f"{document['made'][:10]}, {place}, commit {git['sha'][:10]}{state}."


def _replace(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin, made by report.py -->", f"<!-- {name}: end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    main()
