"""The stage between OptEmbed's supernet and its retraining: which width each table gets.

Reference: Lyu et al., arXiv:2208.04482. The search itself is in ``recemb.training.evolution``.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from recemb.collection import compressed_groups
from recemb.method import CompressedTables
from recemb.methods.optembed import OptEmbed
from recemb.plan import CompressionPlan
from recemb.training.candidate_bytes import CandidateBytes, with_widths
from recemb.training.candidates import CandidateScores
from recemb.training.evolution import STATE_FILE, Candidate, Evolution, EvolutionSettings, EvolutionState
from recemb.training.metrics_log import MetricsLog, NoLog, StepLog
from recemb.training.stage import StageContext, StageOutcome, joined_plan, search_budgets
from recemb.training.stages import as_pruned
from recemb.training.validation import EVALUATION_BATCH_SIZE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvolutionStage:
    """Hardens the rows of the latest supernet, looks for one width per table by AUC on the architecture rows, plans.

    With ``embedding.budget``, no candidate is scored that exceeds it: those that would are repaired, by taking columns
    off until they fit. Rows go before that (those of the smallest margin over their threshold) only where half of the
    columns of what the thresholds keep exceed the budget already.

    Args:
        name: of the stage's folder.
        generations, mutants, children, parents, mutation_probability: see ``EvolutionSettings``; the paper's.
        sample_rows: of the architecture rows, on which new candidates are compared before the better of them are scored
            on all (successive halving). 10,000 tell AUCs some 0.001 apart, which sorts out most of what is drawn; more
            cost more. Where there are not twice as many rows, all are scored on all. None: always.
        promoted_fraction: of the new candidates, how many that is.
        size_weight: AUC that a plan of full bytes costs against one of none, 0 in the paper: 0.001 makes a tenth of
            the bytes worth 0.0001 of AUC.
    """

    name: str
    generations: int = 30
    mutants: int = 10
    children: int = 10
    parents: int = 15
    mutation_probability: float = 0.1
    sample_rows: int | None = 10_000
    promoted_fraction: float = 0.25
    size_weight: float = 0.0

    def run(self, context: StageContext) -> StageOutcome:
        clock = _Clock()
        model = context.load(context.latest_weights()).to(context.device)
        groups = [group for group in compressed_groups(model) if isinstance(group, OptEmbed) and group.searches_widths]
        if not groups:
            raise ValueError(f"stage {self.name!r}: tables that search widths are required, the model has none")
        search = _Search(self, context, model, groups, clock)
        plan, figures = search.to_the_end()
        folder = context.save_plan(plan)
        checkpoint, pruned = as_pruned(context, folder)
        seconds, cpu_seconds = clock.read()
        figures = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            **figures,
            **pruned,
        }
        logger.info(
            "stage %s: %s rows of mean width %.2f, %s bytes; AUC %.5f, %.5f with all columns",
            self.name,
            f"{figures['kept_rows']:,}",
            figures["mean_dim"],
            f"{figures['bytes']:,}",
            figures["auc"],
            figures["full_width_auc"],
        )
        return StageOutcome(folder, checkpoint, figures)


class _Clock:
    """Time since it was made, and before that in killed runs.

    Attributes:
        earlier: seconds and CPU seconds of those.
    """

    def __init__(self) -> None:
        self._begun, self._begun_cpu = time.perf_counter(), time.process_time()
        self.earlier = (0.0, 0.0)

    def read(self) -> tuple[float, float]:
        """Seconds, and CPU seconds."""
        seconds, cpu_seconds = self.earlier
        return seconds + time.perf_counter() - self._begun, cpu_seconds + time.process_time() - self._begun_cpu


class _Search:
    """The search of one stage over the frozen supernet."""

    def __init__(
        self,
        stage: EvolutionStage,
        context: StageContext,
        model: nn.Module,
        groups: Sequence[OptEmbed],
        clock: _Clock,
    ) -> None:
        self.stage = stage
        self.context = context
        self.clock = clock
        tables = [table for group in groups for table in group.tables]
        self.names = [table.name for table in tables]
        self.full = tuple(table.embedding_dim for table in tables)
        self.full_bytes = sum(table.num_embeddings * table.embedding_dim * 4 for table in tables)
        shares = search_budgets(model, context.budget_bytes())
        limits = [share for _, share in shares if share is not None]
        self.budget = sum(limits) if limits else None
        self.rows = _kept_rows(shares)
        self.bytes_of = CandidateBytes(self.rows, self.names)
        rows = context.data.of("architecture").split("architecture").rows
        every = 1 if stage.sample_rows is None else max(rows // stage.sample_rows, 1)
        self.scores = CandidateScores(
            model,
            self.names,
            lambda: context.loader("architecture", EVALUATION_BATCH_SIZE),
            device=context.device,
            every=every,
        )
        self.evolution = Evolution(
            self.full,
            EvolutionSettings(
                generations=stage.generations,
                mutants=stage.mutants,
                children=stage.children,
                parents=stage.parents,
                mutation_probability=stage.mutation_probability,
                promoted_fraction=stage.promoted_fraction,
            ),
            seed=context.seed,
            repair=None if self.budget is None else self._repair,
            has_sample=every > 1,
        )

    def to_the_end(self) -> tuple[CompressionPlan, dict[str, Any]]:
        """The plan, and what the search was like."""
        path = self.context.folder / STATE_FILE
        shared = self.context.ranks.share(f"{self.stage.name}/state", path.read_text() if path.is_file() else None)
        if shared is not None:
            self.evolution.state = state = EvolutionState.from_json(shared)
            self.clock.earlier = (state.seconds, state.cpu_seconds)
            logger.info("stage %s: goes on after generation %d", self.stage.name, state.generation)
        begun = time.perf_counter()
        known = len(self.evolution.state.scores) + len(self.evolution.state.dropped)
        with ExitStack() as stack:
            log: StepLog = NoLog()
            if self.context.ranks.is_first:
                done = self.evolution.state.generation
                log = stack.enter_context(MetricsLog(self.context.folder, resume_step=done or None))
            best = self.evolution.run(self._score, lambda state: self._after_generation(state, log))
        state, seconds = self.evolution.state, time.perf_counter() - begun
        plan = with_widths(self.rows, self.widths_found())
        [auc, full_width_auc] = self.scores([best, self.full])
        return plan, {
            "widths": self.widths_found(),
            "auc": auc,
            "full_width_auc": full_width_auc,
            "generations": state.generation,
            "candidates": len(state.scores) + len(state.dropped),
            "candidates_on_all_rows": len(state.scores),
            "candidates_per_second": (len(state.scores) + len(state.dropped) - known) / max(seconds, 1e-9),
        }

    def widths_found(self) -> dict[str, int]:
        """Table name -> width of the best candidate."""
        return dict(zip(self.names, self.evolution.state.best, strict=True))

    def _repair(self, candidate: Candidate, generator: random.Random) -> Candidate:
        assert self.budget is not None
        return self.bytes_of.fit(candidate, self.budget, generator)

    def _score(self, candidates: Sequence[Candidate], sample: bool) -> list[float]:
        aucs = self.scores(candidates, sample)
        if not self.stage.size_weight:
            return aucs
        costs = [self.stage.size_weight * self.bytes_of(candidate) / self.full_bytes for candidate in candidates]
        return [auc - cost for auc, cost in zip(aucs, costs, strict=True)]

    def _after_generation(self, state: EvolutionState, log: StepLog) -> None:
        best = state.best
        size = self.bytes_of(best)
        rows = [self.rows.tables[name].num_rows() for name in self.names]
        values = {
            "auc": state.scores[best],
            "bytes": size,
            "kept_rows": sum(rows),
            "mean_dim": sum(width * count for width, count in zip(best, rows, strict=True)) / max(sum(rows), 1),
        }
        log.write(state.generation, "architecture", values)
        state.seconds, state.cpu_seconds = self.clock.read()
        if self.context.ranks.is_first:
            state.save(self.context.folder / STATE_FILE)
        logger.info(
            "stage %s: generation %d of %d, %d candidates, best score %.5f so far: %s rows, mean width %.2f, %s bytes",
            self.stage.name,
            state.generation,
            self.stage.generations,
            len(state.scores) + len(state.dropped),
            state.scores[best],
            f"{sum(rows):,}",
            values["mean_dim"],
            f"{size:,}",
        )


def _kept_rows(shares: Sequence[tuple[CompressedTables, int | None]]) -> CompressionPlan:
    """The rows above their thresholds, with all columns; fewer where half of the columns exceed a group's share.

    Groups then evaluate with these rows, so that candidates are scored as what they would become.
    """
    plans = []
    for group, share in shares:
        assert isinstance(group, OptEmbed), "the groups of one method"
        if share is not None and group.options is not None:
            group.set_widths({table.name: -(-table.embedding_dim // 2) for table in group.tables})
        plans.append(group.derive_plan(share if group.options is not None else None))
        group.set_widths(None)
        group.set_kept_rows(None if share is None else plans[-1])
    rows = joined_plan(plans)
    return with_widths(rows, {name: table.embedding_dim for name, table in rows.tables.items()})
