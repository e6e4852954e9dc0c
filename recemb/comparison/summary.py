"""Cells of a study -> one line a run: means over seeds, their spread, and the points that figures draw."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recemb.budget import parse_budget
from recemb.comparison.study import Study


@dataclass(frozen=True)
class RunSummary:
    """One run over its seeds.

    Args:
        name: of the run.
        method: of its tables.
        budget: as asked for, None where none was.
        refused: why no seed of it could be trained, None where one was; everything below is then empty or zero, but for
            ``out_of_reach`` and ``diverged``.
        setting: chosen on the validation split.
        tuning_trials: trainings that chose it.
        auc, logloss: of the test split, one a seed.
        serving_bytes, full_bytes: of the tables, as a mean over seeds; of full ones.
        components: part of the tables (rows, maps, dense layers) -> bytes, as a mean over seeds.
        optimizer_bytes: of the tables, in training, as a mean over seeds.
        training_bytes: values of the tables and their optimizer state, in the training that held most, as a mean over
            seeds; None where the cells of a search do not say.
        samples_per_cpu_second: of training, one a seed.
        best_possible_auc: where the log's true probabilities are known.
        search_cost: CPU time of a search before its last training, in trainings like that one; one a seed, empty for
            methods that search nothing.
        gauc: AUC inside users on the test split, one a seed; empty where no user is known or has both classes.
        out_of_reach: seeds whose budget could not be met; a search may meet it with others.
        diverged: seeds whose model diverged.
    """

    name: str
    method: str
    budget: str | None
    refused: str | None
    setting: tuple[str, ...]
    tuning_trials: int
    auc: tuple[float, ...] = ()
    logloss: tuple[float, ...] = ()
    serving_bytes: int = 0
    full_bytes: int = 0
    components: tuple[tuple[str, int], ...] = ()
    optimizer_bytes: int = 0
    samples_per_cpu_second: tuple[float, ...] = ()
    best_possible_auc: float | None = None
    search_cost: tuple[float, ...] = ()
    gauc: tuple[float, ...] = ()
    training_bytes: int | None = None
    out_of_reach: int = 0
    diverged: int = 0

    @property
    def mean_auc(self) -> float:
        return statistics.mean(self.auc)

    @property
    def auc_spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return statistics.stdev(self.auc) if len(self.auc) > 1 else 0.0

    @property
    def certainty(self) -> str:
        """``auc_spread`` for people; one seed says nothing of it."""
        return f"sd {self.auc_spread:.4f}" if len(self.auc) > 1 else "one seed"

    @property
    def ratio(self) -> float:
        return self.full_bytes / self.serving_bytes


def summaries(study: Study) -> list[RunSummary]:
    """Every run that has results, in the study's order."""
    return [_summary(name, cells, study.best_setting(name)) for name, cells in study.cells()]


def _summary(name: str, cells: Sequence[dict[str, Any]], setting: Sequence[str]) -> RunSummary:
    first = cells[0]
    chosen = dict(text.split("=", 1) for text in first["overrides"] if "=" in text)
    method = chosen.get("embedding", name)
    budget = chosen.get("embedding.budget")
    refused = [cell["refused"] for cell in cells if "refused" in cell]
    diverged = [f"diverged: {cell['diverged']}" for cell in cells if "diverged" in cell]
    if len(refused) + len(diverged) == len(cells):
        return RunSummary(
            name,
            method,
            budget,
            (refused or diverged)[0],
            tuple(setting),
            first["tuning_trials"],
            out_of_reach=len(refused),
            diverged=len(diverged),
        )
    cells = [cell for cell in cells if "test" in cell]
    first = cells[0]
    embedding = first["embedding"]
    parts = [
        (part, _mean_bytes(cells, f"{part}_bytes"))
        for part in ("table", "index", "dense")
        if f"{part}_bytes" in embedding
    ]
    return RunSummary(
        name=name,
        method=method,
        budget=budget,
        refused=None,
        setting=tuple(setting),
        tuning_trials=first["tuning_trials"],
        auc=tuple(cell["test"]["auc"] for cell in cells),
        logloss=tuple(cell["test"]["logloss"] for cell in cells),
        # A search ends with other bytes for other seeds.
        serving_bytes=_mean_bytes(cells, "bytes"),
        full_bytes=embedding["full_bytes"],
        components=tuple(parts),
        optimizer_bytes=_mean_bytes(cells, "optimizer_bytes"),
        samples_per_cpu_second=tuple(cell["train"]["samples_per_cpu_second"] for cell in cells),
        best_possible_auc=(first["data"].get("optimum") or {}).get("auc"),
        gauc=tuple(
            users["gauc"] for cell in cells if (users := cell["test"].get("users")) and users["gauc"] is not None
        ),
        search_cost=tuple(cell["search"]["cpu_trainings"] for cell in cells if "search" in cell),
        training_bytes=_training_bytes(cells),
        out_of_reach=len(refused),
        diverged=len(diverged),
    )


def _mean_bytes(cells: Sequence[dict[str, Any]], key: str) -> int:
    return round(statistics.mean(cell["embedding"][key] for cell in cells))


def _training_bytes(cells: Sequence[dict[str, Any]]) -> int | None:
    sizes = []
    for cell in cells:
        embedding = cell["embedding"]
        # Cells trained before results said it: what searches nothing trains what it serves.
        old = None if "search" in cell else embedding["bytes"] + embedding["optimizer_bytes"]
        sizes.append(embedding.get("training_bytes", old))
    return None if None in sizes else round(statistics.mean(sizes))


def table(runs: Sequence[RunSummary]) -> str:
    """The study as one Markdown table, runs and seeds that could not be trained included."""
    tuned = any(run.setting for run in runs)
    known = any(run.best_possible_auc is not None for run in runs)
    searched = any(run.search_cost for run in runs)
    columns = ["run", *(["setting chosen on validation"] if tuned else []), "test AUC"]
    grouped = any(run.gauc for run in runs)
    columns += [*(["test GAUC"] if grouped else []), "test log loss"]
    columns += [*(["best possible AUC"] if known else []), "bytes", "ratio", "training bytes", "samples/CPU s"]
    columns += [*(["search / training"] if searched else []), "seeds"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for run in runs:
        if run.refused is not None:
            lines.append(f"| {run.name} | {run.refused} {'| ' * (len(columns) - 2)}|")
            continue
        settings = (text.split("=", 1) for text in run.setting)
        chosen = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in settings) or "-"
        values = [run.name, *([chosen] if tuned else []), spread(run.auc)]
        if grouped:
            values.append(spread(run.gauc) if run.gauc else "-")
        values.append(spread(run.logloss))
        if known:
            values.append("-" if run.best_possible_auc is None else f"{run.best_possible_auc:.4f}")
        values += [f"{run.serving_bytes:,}", f"{run.ratio:.1f}x"]
        values.append("-" if run.training_bytes is None else f"{run.training_bytes:,}")
        values.append(f"{statistics.median(run.samples_per_cpu_second):,.0f}")
        if searched:
            values.append(f"{statistics.median(run.search_cost):.1f}" if run.search_cost else "-")
        lost = [(run.out_of_reach, "out of reach"), (run.diverged, "diverged")]
        values.append(", ".join([str(len(run.auc)), *(f"{count} {why}" for count, why in lost if count)]))
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def budgets_of(runs: Sequence[RunSummary]) -> list[str]:
    """The budgets of ``runs``, the largest first."""
    full_bytes = max((run.full_bytes for run in runs), default=0)
    budgets = {run.budget for run in runs if run.budget is not None}
    return sorted(budgets, key=lambda budget: -parse_budget(budget, full_bytes))


def budget_table(runs: Sequence[RunSummary]) -> str:
    """Test AUC as a Markdown table, a line a method and a column a budget, the best of each budget in bold.

    "-" where a method cannot be so small, "diverged" where every seed did, empty where it was not trained. Full tables
    and runs without a budget have lines of their own, with their ratio.
    """
    budgets = budgets_of(runs)
    trained = [run for run in runs if run.refused is None]
    best = {
        budget: max((run for run in trained if run.budget == budget), key=lambda run: run.mean_auc, default=None)
        for budget in budgets
    }
    lines = [f"| {' | '.join(['method', *budgets])} |", f"|{'---|' * (1 + len(budgets))}"]
    for run in trained:
        if run.budget is None:
            lines.append(f"| {run.name} | {spread(run.auc)} ({run.ratio:.1f}x) {'| ' * (len(budgets) - 1)}|")
    for method in dict.fromkeys(run.method for run in runs if run.budget is not None):
        values = []
        for budget in budgets:
            found = next((run for run in runs if (run.method, run.budget) == (method, budget)), None)
            text = "" if found is None else _auc(found)
            values.append(f"**{text}**" if found is not None and found is best[budget] else text)
        lines.append(f"| {method} | {' | '.join(values)} |")
    return "\n".join(lines)


def _auc(run: RunSummary) -> str:
    if run.refused is None:
        return spread(run.auc)
    return "diverged" if run.diverged else "-"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean
