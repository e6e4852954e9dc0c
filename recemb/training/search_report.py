"""``report.md`` and the plots of a search of several stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recemb.evaluation.evaluator import Evaluation
from recemb.memory import MemoryReport
from recemb.plan import CompressionPlan
from recemb.training.metrics_log import read_metrics
from recemb.training.progress import duration
from recemb.training.report import write_report
from recemb.training.search_plots import bytes_plot, fields_plot


def write_search_report(
    folder: Path,
    results: Mapping[str, Any],
    evaluation: Evaluation,
    memory: MemoryReport,
    *,
    last_training: Path,
    plan: Path | None,
) -> None:
    """``write_report`` of the last training, with the stages, and plots of what was kept.

    Args:
        folder: of the run.
        results, evaluation, memory: as for ``write_report``.
        last_training: folder of the stage that trained last.
        plan: folder of the plan whose tables it trained; None where there is none.
    """
    sections = [_stages(results)]
    points = search_points(folder / "stages", results)
    if points:
        bytes_plot(points, memory.full_bytes, folder / "search.png")
        sections.append("![bytes against validation AUC](search.png)")
    if plan is not None:
        fields_plot(CompressionPlan.load(plan), folder / "fields.png")
        sections.append("![rows and widths kept by field](fields.png)")
    write_report(folder, results, evaluation, memory, metrics=read_metrics(last_training), sections=sections)


def search_points(root: Path, results: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Stage -> (bytes, AUC) of its outcome, and of everything it looked at whose bytes it logged."""
    points: dict[str, list[tuple[float, float]]] = {}
    for index, stage in enumerate(results["stages"]):
        found = [
            (line["bytes"], line["auc"])
            for line in read_metrics(root / f"{index}-{stage['name']}")
            if "bytes" in line and "auc" in line
        ]
        if "validation" in stage and "bytes" in stage:
            found.append((stage["bytes"], stage["validation"]["auc"]))
        if found:
            points[stage["name"]] = found
    return points


def _stages(results: Mapping[str, Any]) -> str:
    search = results["search"]
    rows = [
        f"| {stage['name']} | {stage.get('steps', 0):,} | {duration(stage['seconds'])} | "
        f"{_number(stage.get('kept_rows'))} | {_number(stage.get('kept_values'))} | "
        f"{'' if 'mean_dim' not in stage else format(stage['mean_dim'], '.2f')} | {_number(stage.get('bytes'))} | "
        f"{'' if 'validation' not in stage else format(stage['validation']['auc'], '.5f')} |"
        for stage in results["stages"]
    ]
    return (
        f"## Stages\n\nAll but the last training took {duration(search['seconds'])}, as long as "
        f"{search['trainings']:.2f} of it.\n\n"
        "| stage | steps | time | rows kept | values kept | mean width | bytes | validation AUC |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|\n" + "\n".join(rows)
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"
