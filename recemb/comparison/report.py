"""``report.md`` of a study: what was compared, the figures, the table, and one paragraph of reading."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from recemb.budget import parse_budget
from recemb.comparison.data_set import in_words
from recemb.comparison.figures import auc_figure, components_figure, throughput_figure, training_auc_figure
from recemb.comparison.recommendation import recommend
from recemb.comparison.study import Study
from recemb.comparison.summary import RunSummary, budget_table, budgets_of, summaries, table
from recemb.files import write_atomically

REPORT_FILE = "report.md"


def write_report(study: Study) -> str:
    """Write ``report.md`` and its figures into the study's folder; returns the paragraph of reading.

    Raises:
        ValueError: no cell has a result.
    """
    runs = summaries(study)
    if not any(run.refused is None for run in runs):
        raise ValueError(f"{study.folder}: no cell has a result")
    name = study.folder.name
    auc_figure(runs, study.folder / "auc.png", title=f"{name}: test AUC against serving bytes")
    training_auc_figure(runs, study.folder / "auc_training.png", title=f"{name}: test AUC against training bytes")
    throughput_figure(runs, study.folder / "throughput.png", title=f"{name}: training speed against bytes")
    parts = ["auc", "auc_training", "throughput"]
    if any(run.components for run in runs):
        components_figure(runs, study.folder / "components.png", title=f"{name}: what the bytes are")
        parts.append("components")
    text = reading(runs)
    settings = len(study.spec.settings()) if study.spec.grid else 0
    tuning = (
        f"Every run was tuned with {settings} trials over {', '.join(study.spec.grid)} on the validation split (seed "
        f"{study.spec.tune_seed})"
        if settings
        else "No run was tuned: all have the same settings"
    )
    cells = [cell for _, found in study.cells() for cell in found]
    data = list(dict.fromkeys(in_words(cell["data"]) for cell in cells if "data" in cell))
    content = [
        f"# {name}",
        text,
        *([f"Data: {'; '.join(data)}."] if data else []),
        f"{tuning}; the test split was read once a cell. ± is one standard deviation over seeds.",
        "Test AUC, a column a budget (-: the method cannot be so small; bold: the best there):",
        budget_table(runs),
        *(f"![{part}]({part}.png)" for part in parts),
        table(runs),
    ]
    write_atomically(study.folder / REPORT_FILE, "\n\n".join(content) + "\n")
    return text


def reading(runs: Sequence[RunSummary]) -> str:
    """One paragraph: the full tables, the best method at each budget, where each method falls off."""
    trained = [run for run in runs if run.refused is None]
    full = next((run for run in trained if run.method == "full"), None)
    sentences = []
    if full is not None:
        sentences.append(
            f"Full tables ({full.serving_bytes:,} bytes) reach a test AUC of {full.mean_auc:.4f} ({full.certainty})."
        )
    for budget in budgets_of(trained):
        limit = max(run.serving_bytes for run in trained if run.budget == budget)
        advice = recommend([run for run in trained if run.budget == budget or run is full], limit)
        best = advice.best
        sentence = f"At {budget} {best.method} leads with {best.mean_auc:.4f}"
        if full is not None:
            sentence += f" ({best.mean_auc - full.mean_auc:+.4f} against full tables)"
        # One seed says nothing about chance.
        rivals = [run for run, chance in advice.others if chance < 0.95 and len(run.auc) > 1 and len(best.auc) > 1]
        if rivals:
            sentence += f", not told apart at 95% from {', '.join(run.method for run in rivals)}"
        single = [run for run, _ in advice.others if min(len(run.auc), len(best.auc)) == 1]
        if single:
            sentence += f", on one seed {', '.join(f'{run.method} {run.mean_auc:.4f}' for run in single)}"
        sentences.append(sentence + ".")
    if full is not None and full.training_bytes is not None:
        sentences += _by_training_bytes(trained, full, full.training_bytes)
    if full is not None and (cliffs := _cliffs(trained, full)):
        sentences.append(f"More than 0.01 AUC below full tables: {cliffs}.")
    fastest = max(trained, key=lambda run: statistics.median(run.samples_per_cpu_second))
    slowest = min(trained, key=lambda run: statistics.median(run.samples_per_cpu_second))
    sentences.append(
        f"Training ran at {statistics.median(fastest.samples_per_cpu_second):,.0f} samples a CPU second with "
        f"{fastest.name} and {statistics.median(slowest.samples_per_cpu_second):,.0f} with {slowest.name}."
    )
    if refused := [run for run in runs if run.out_of_reach or (run.refused is not None and not run.diverged)]:
        sentences.append(f"Out of reach: {', '.join(_seeds(run, run.out_of_reach) for run in refused)}.")
    if diverged := [run for run in runs if run.diverged]:
        sentences.append(f"Diverged: {', '.join(_seeds(run, run.diverged) for run in diverged)}.")
    return " ".join(sentences)


def _seeds(run: RunSummary, lost: int) -> str:
    seeds = len(run.auc) + run.out_of_reach + run.diverged
    return run.name if lost == seeds else f"{run.name} ({lost} of {seeds} seeds)"


def _by_training_bytes(runs: Sequence[RunSummary], full: RunSummary, full_bytes: int) -> list[str]:
    """Who leads where the bytes that training holds are to shrink as the budgets do; one sentence, or none."""
    leaders = []
    for budget in budgets_of(runs):
        limit = full_bytes * parse_budget(budget, full.full_bytes) // full.full_bytes
        fitting = [run for run in runs if run.training_bytes is not None and run.training_bytes <= limit]
        if fitting:
            best = max(fitting, key=lambda run: run.mean_auc)
            leaders.append(f"{best.name} at {budget} ({best.mean_auc:.4f})")
    if not leaders:
        return []
    return [f"Where training (values and optimizer state of the tables) must be as much smaller: {', '.join(leaders)}."]


def _cliffs(runs: Sequence[RunSummary], full: RunSummary) -> str:
    """Per method the largest of its runs that loses more than 0.01 AUC."""
    found = {}
    for run in sorted(runs, key=lambda run: run.serving_bytes):
        if run.mean_auc < full.mean_auc - 0.01 and run.budget is not None:
            found[run.method] = run
    return ", ".join(f"{method} from {run.budget}" for method, run in found.items())
