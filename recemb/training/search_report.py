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
from recemb.training.search_plots import StageCurve, bytes_plot, fields_plot, progress_plot


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
    kept = None if plan is None else CompressionPlan.load(plan)
    if curves := stage_curves(folder / "stages", results, kept):
        progress_plot(curves, folder / "progress.png")
        sections.append("![validation AUC and what is kept, over the stages](progress.png)")
    outcomes, paths = search_points(folder / "stages", results)
    if outcomes:
        bytes_plot(outcomes, paths, memory.full_bytes, folder / "search.png")
        sections.append("![bytes against validation AUC](search.png)")
    if kept is not None:
        fields_plot(kept, folder / "fields.png")
        sections.append("![rows and widths kept by field](fields.png)")
    write_report(folder, results, evaluation, memory, metrics=read_metrics(last_training), sections=sections)


def search_points(
    root: Path, results: Mapping[str, Any]
) -> tuple[dict[str, tuple[float, float]], dict[str, list[tuple[float, float]]]]:
    """(bytes, AUC): of each stage's outcome on the rows of early stopping, and of all looks at those that decide.

    The second of stages that logged bytes with every look.
    """
    outcomes: dict[str, tuple[float, float]] = {}
    paths: dict[str, list[tuple[float, float]]] = {}
    for index, stage in enumerate(results["stages"]):
        if "validation" in stage and "bytes" in stage:
            outcomes[stage["name"]] = (stage["bytes"], stage["validation"]["auc"])
        found = [
            (line["bytes"], line["auc"])
            for line in read_metrics(root / f"{index}-{stage['name']}")
            if line["split"] == "architecture" and "bytes" in line
        ]
        if found:
            paths[stage["name"]] = found
    return outcomes, paths


def stage_curves(root: Path, results: Mapping[str, Any], plan: CompressionPlan | None) -> list[StageCurve]:
    """Of every stage that looked at validation rows as it went on: AUC, and what it would keep then.

    Args:
        root: folder of the stages' folders.
        results: of the run.
        plan: of the run, whose tables shares are of; None: no shares.
    """
    tables = [] if plan is None else list(plan.tables.values())
    rows = sum(table.num_embeddings for table in tables)
    values = sum(table.num_embeddings * table.embedding_dim for table in tables)
    wholes = {
        "kept_rows": ("rows", rows),
        "kept_values": ("values", values),
        "mean_dim": ("mean width", values / max(rows, 1)),
        "mean_selection": ("mean selection", 1.0),
        "bytes": ("bytes", results["embedding"]["full_bytes"]),
    }
    curves = []
    for index, stage in enumerate(results["stages"]):
        lines = [line for line in read_metrics(root / f"{index}-{stage['name']}") if line["split"] != "train"]
        if not lines:
            continue
        kept = {
            name: [line[key] / whole for line in lines]
            for key, (name, whole) in wholes.items()
            if tables and all(key in line for line in lines)
        }
        unit = "generation" if lines[0]["split"] == "architecture" else "step"
        curves.append(
            StageCurve(stage["name"], unit, [line["step"] for line in lines], [line["auc"] for line in lines], kept)
        )
    return curves


def _stages(results: Mapping[str, Any]) -> str:
    search = results["search"]
    rows = [
        f"| {stage['name']} | {stage.get('steps', 0):,} | {duration(stage['seconds'])} | "
        f"{_number(stage.get('kept_rows'))} | {_number(stage.get('kept_values'))} | "
        f"{'' if 'mean_dim' not in stage else format(stage['mean_dim'], '.2f')} | {_number(stage.get('bytes'))} | "
        f"{'' if 'validation' not in stage else format(stage['validation']['auc'], '.5f')} |"
        for stage in results["stages"]
    ]
    last = results["stages"][-1]
    kept = ""
    if last.get("keeps", last["name"]) != last["name"]:
        kept = (
            f" Retrained tables have a validation AUC of {last['retrained_validation']['auc']:.5f}; those that "
            f"stage {last['keeps']} left validate better and stay."
        )
    return (
        f"## Stages\n\nAll but the last training took {duration(search['seconds'])}, as long as "
        f"{search['trainings']:.2f} of it.{kept}\n\n"
        "| stage | steps | time | rows kept | values kept | mean width | bytes | validation AUC |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|\n" + "\n".join(rows)
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"
