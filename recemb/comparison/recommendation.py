"""For a byte budget: the method to take, and how sure the study is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from recemb.comparison.summary import RunSummary


@dataclass(frozen=True)
class Recommendation:
    """What a study says about one budget.

    Args:
        budget_bytes: serving bytes that may be used.
        best: the run with the highest mean test AUC among those that fit.
        others: the other methods' best runs that fit, best first, each with the probability that ``best`` is truly
            better, see ``probability_better``.
        loss_to_full: AUC of full tables minus that of ``best``; None where the study has no full tables.
    """

    budget_bytes: int
    best: RunSummary
    others: tuple[tuple[RunSummary, float], ...]
    loss_to_full: float | None

    def text(self) -> str:
        """For people."""
        best = self.best
        seeds = f" over {len(best.auc)} seeds" if len(best.auc) > 1 else ""
        lines = [
            f"Within {self.budget_bytes:,} bytes take {best.method} ({best.name}): {best.serving_bytes:,} bytes "
            f"({best.ratio:.1f}x), test AUC {best.mean_auc:.4f}{seeds} ({best.certainty})."
        ]
        if self.loss_to_full is not None:
            lines.append(f"Full tables: {self.loss_to_full:+.4f} AUC against it.")
        if not self.others:
            lines.append("No other method of the study fits, so this is no comparison.")
        else:
            runner_up, probability = self.others[0]
            lines.append(
                f"Next is {runner_up.method} at {runner_up.mean_auc:.4f}; that {best.method} is better is "
                f"{probability:.0%} probable, {_in_words(probability)}."
            )
            ties = [run.method for run, chance in self.others[1:] if chance < 0.95]
            if ties:
                lines.append(f"Not told apart from it at 95% either: {', '.join(ties)}.")
        return "\n".join(lines)


def recommend(runs: Sequence[RunSummary], budget_bytes: int) -> Recommendation:
    """The method to take for ``budget_bytes``.

    Only what was trained is recommended: nothing is interpolated between the sizes of the study.

    Raises:
        ValueError: no run fits; the smallest is named.
    """
    trained = [run for run in runs if run.refused is None]
    fitting = [run for run in trained if run.serving_bytes <= budget_bytes]
    if not fitting:
        smallest = min(trained, key=lambda run: run.serving_bytes, default=None)
        came = (
            "the study has no result"
            if smallest is None
            else f"the smallest is {smallest.name}, {smallest.serving_bytes:,} bytes"
        )
        raise ValueError(f"no run of the study fits {budget_bytes:,} bytes; {came}")
    of_method: dict[str, RunSummary] = {}
    for run in sorted(fitting, key=lambda run: -run.mean_auc):
        of_method.setdefault(run.method, run)
    best, *others = of_method.values()
    full = next((run for run in trained if run.method == "full"), None)
    return Recommendation(
        budget_bytes,
        best,
        tuple((other, probability_better(best.auc, other.auc)) for other in others),
        None if full is None else full.mean_auc - best.mean_auc,
    )


def probability_better(first: Sequence[float], second: Sequence[float]) -> float:
    """Probability that the mean of ``first``'s distribution is above that of ``second``'s, by Welch's t (flat prior).

    Seeds vary initial weights and the order of rows, not the log: another week of clicks can turn the order round.

    Returns:
        In [0, 1]; 0.5 where one seed was trained, which says nothing.
    """
    if len(first) < 2 or len(second) < 2:
        return 0.5
    variances = [statistics.variance(values) / len(values) for values in (first, second)]
    difference = statistics.mean(first) - statistics.mean(second)
    total = sum(variances)
    if total == 0:
        return 0.5 if difference == 0 else float(difference > 0)
    degrees = total**2 / sum(
        variance**2 / (len(values) - 1) for variance, values in zip(variances, (first, second), strict=True)
    )
    return float(stats.t.cdf(difference / math.sqrt(total), degrees))


def _in_words(probability: float) -> str:
    if probability >= 0.99:
        return "as sure as seeds can make it"
    if probability >= 0.95:
        return "sure"
    if probability >= 0.8:
        return "likely, not sure: more seeds would tell"
    return "a toss-up: take the simpler or faster of the two"
