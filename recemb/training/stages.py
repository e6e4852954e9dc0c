"""The stages that searches are made of; the evolution of widths has a file of its own."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from recemb.assembly import decay_by_train_counts
from recemb.checkpoint import load_model_tensors
from recemb.collection import compressed_groups
from recemb.conversion import convert
from recemb.memory.report import parameter_bytes
from recemb.plan import CompressionPlan
from recemb.run_folder import RunFolder
from recemb.training.bilevel import ByTurns, Steps, Together
from recemb.training.stage import (
    Reset,
    StageContext,
    StageOutcome,
    joined_plan,
    plan_figures,
    search_budgets,
)
from recemb.training.stopping import SIGNS
from recemb.training.training import Training, batch_size_of

logger = logging.getLogger(__name__)

Keep = Literal["best", "last"]


@dataclass(frozen=True)
class TrainingStage:
    """What stages that train have in common.

    Args:
        name: of the stage's folder.
        epochs: instead of ``trainer.epochs``.
        max_steps: instead of ``trainer.max_steps``.
        stops_early: False trains all steps, whatever ``trainer.stopping`` says.
        keep: the weights that later stages get: of the ``"best"`` validation, or the ``"last"``, for a search that
            becomes what it is to be only at its end.
        reset: what it starts from: ``"none"``: the stage before, where there is one; ``"rewind"``: the weights from
            before the first stage; ``"fresh"``: others.
    """

    name: str
    epochs: int | None = None
    max_steps: int | None = None
    stops_early: bool = True
    keep: Keep = "best"
    reset: Reset = "none"


@dataclass(frozen=True)
class TrainStage(TrainingStage):
    """Trains the method's own tables: a supernet, a warm start, or all there is to a search that prunes as it trains.

    Args:
        architecture: let the architecture learn, from the same batches as the weights; False for a warm start.
    """

    architecture: bool = True

    def run(self, context: StageContext) -> StageOutcome:
        return _train(self, context, None, Together(architecture=self.architecture))


@dataclass(frozen=True)
class BilevelStage(TrainingStage):
    """Weights learn from train batches, and between their steps the architecture from batches of its own split.

    Args:
        train_dense: train the dense layers with the tables; False leaves them as they are.
        every_steps: steps of the weights for one of the architecture.
    """

    train_dense: bool = False
    every_steps: int = 1

    def run(self, context: StageContext) -> StageOutcome:
        batch_size = batch_size_of(context.config, RunFolder(context.folder), context.ranks)
        steps = ByTurns(
            context.loader("architecture", batch_size, shuffle=True),
            device=context.device,
            precision=context.config.trainer.precision,
            every_steps=self.every_steps,
            train_dense=self.train_dense,
        )
        return _train(self, context, None, steps)


@dataclass(frozen=True)
class PruneStage:
    """Ends a search: writes the plan, and the tables it asks for with the weights as the search left them.

    Args:
        name: of the stage's folder.
    """

    name: str

    def run(self, context: StageContext) -> StageOutcome:
        begun, begun_cpu = time.perf_counter(), time.process_time()
        trained = context.load(context.latest_weights())
        plan: CompressionPlan | None = None
        if context.ranks.is_first:
            budgets = search_budgets(trained, context.budget_bytes())
            plan = joined_plan([group.derive_plan(budget) for group, budget in budgets])
        folder = context.save_plan(plan)
        checkpoint, figures = as_pruned(context, folder)
        logger.info(
            "stage %s: %s, validation AUC %.5f as it is", self.name, _shown(figures), figures["validation"]["auc"]
        )
        return StageOutcome(
            folder,
            checkpoint,
            {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - begun_cpu, **figures},
        )


def as_pruned(context: StageContext, plan: Path) -> tuple[Path, dict[str, Any]]:
    """The tables that a stage's plan asks for with the weights as the search left them, saved for later stages.

    Returns:
        Their checkpoint, and figures: what the plan keeps, ``bytes`` that serve, ``validation``.
    """
    model, _ = context.build(plan)
    context.start(model, plan, "none")
    checkpoints = RunFolder(context.folder).checkpoints
    state = {"run": context.description(checkpoints.folder / "step", plan)}
    checkpoint = checkpoints.save(0, {"model": model.state_dict()}, state, best_step=0)
    figures = _of_plan(context, plan, model)
    return checkpoint, {**figures, "validation": context.validate(model.to(context.device))}


@dataclass(frozen=True)
class RetrainStage(TrainingStage):
    """Trains the tables that the latest plan asks for, with what it keeps fixed.

    The tables as the search left them are a candidate as well: where they validate better they stay, whatever the
    reset (``keeps`` in the stage's figures says which did). Where a log is passed once, starting again from the
    beginning often loses more than pruning did.

    Differs from the papers of OptEmbed, PEP and DNIS, which take the retrained tables whatever they validate.

    Args:
        reset: ``"rewind"`` (what a lottery ticket is), ``"none"`` (on from what the search had learnt) or ``"fresh"``.
    """

    reset: Reset = "rewind"

    def run(self, context: StageContext) -> StageOutcome:
        outcome = _train(self, context, context.latest_plan(), Together())
        # Going on from the pruned tables began with a validation of them: they are the best already where they are.
        return outcome if self.reset == "none" else self._or_as_pruned(context, outcome)

    def _or_as_pruned(self, context: StageContext, outcome: StageOutcome) -> StageOutcome:
        name, pruned = next((name, made) for name, made in reversed([*context.earlier.items()]) if made.plan)
        if pruned.checkpoint is None:
            return outcome
        metric = context.config.trainer.stopping.metric
        retrained, left = outcome.figures["validation"], pruned.figures["validation"]
        if SIGNS[metric] * (retrained[metric] - left[metric]) >= 0.0:
            return replace(outcome, figures={**outcome.figures, "keeps": self.name})
        logger.info(
            "stage %s: validation %s %.5f after retraining, %.5f as stage %s left the tables: those stay",
            *(self.name, metric, retrained[metric], left[metric], name),
        )
        figures = {"validation": left, "retrained_validation": retrained, "best_step": 0, "keeps": name}
        # Without a checkpoint of its own: the latest weights are those of the stage that pruned.
        return StageOutcome(None, None, {**outcome.figures, **figures})


def _train(stage: TrainingStage, context: StageContext, plan: Path | None, steps: Steps) -> StageOutcome:
    folder = RunFolder(context.folder)
    model, memory = context.build(plan)
    if folder.checkpoints.last is None:
        context.start(model, plan, stage.reset)
    budgets = [budget for _, budget in search_budgets(model, context.budget_bytes())]
    sizes = {"bytes": memory.serving_bytes, "training_bytes": memory.training_bytes}
    if plan is not None:
        sizes |= _of_plan(context, plan, model)
        logger.info("stage %s: %s", stage.name, _shown(sizes))
    elif tables := [table for group in compressed_groups(model) if group.searches for table in group.tables]:
        logger.info(
            "stage %s: trains all %s rows of width %d, in %d tables",
            stage.name,
            f"{sum(table.num_embeddings for table in tables):,}",
            tables[0].embedding_dim,
            len(tables),
        )
    if strength := context.config.embedding.mini_batch_aware_decay:
        decay_by_train_counts(model, context.data.manifest, strength)
    prepared, optimizer = context.prepare(model)
    groups = compressed_groups(prepared)

    def validate() -> dict[str, float]:
        found = {name: value for group in groups for name, value in group.search_figures().items()}
        return {**context.validate(prepared), **found}

    training = Training(
        context.config,
        folder,
        model=prepared,
        optimizer=optimizer,
        train_rows=context.data.manifest.split("train").rows,
        loader=context.loader(
            "train",
            batch_size_of(context.config, folder, context.ranks),
            shuffle=context.config.data.shuffle,
        ),
        validate=validate,
        device=context.device,
        ranks=context.ranks,
        description=context.description(folder.checkpoints.folder / "step", plan),
        steps=steps,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
        stops_early=stage.stops_early,
        validate_start=isinstance(stage, RetrainStage) and stage.reset == "none",
    )
    searching = [group for group in groups if group.searches]
    for group, budget in zip(searching, budgets, strict=True):
        group.begin_training(training.loop.settings.total_steps, budget)
    training.run()
    best, last = folder.checkpoints.best, folder.checkpoints.last
    if stage.keep == "best" and best is None:
        logger.warning(
            "stage %s: no validation counted, the search did not settle; its last weights are kept", stage.name
        )
    kept = best if stage.keep == "best" and best is not None else last
    assert kept is not None, "every training ends with a checkpoint"
    load_model_tensors(kept, prepared)
    return StageOutcome(
        None,
        kept,
        {
            **training.figures(),
            **sizes,
            "reset": stage.reset,
            "best_step": training.stopping.best_step,
            "validation": context.validate(prepared),
        },
    )


def _of_plan(context: StageContext, plan: Path, model: nn.Module) -> dict[str, Any]:
    """Figures of a plan, with the bytes of the tables of ``model`` once converted."""
    size = sum(parameter_bytes(group) for group in compressed_groups(convert(copy.deepcopy(model))))
    budget = context.budget_bytes()
    if budget is not None and size > budget:
        logger.warning("the tables of %s take %s bytes, more than the budget of %s", plan, f"{size:,}", f"{budget:,}")
    return {**plan_figures(CompressionPlan.load(plan)), "bytes": size}


def _shown(figures: dict[str, Any]) -> str:
    return (
        f"{figures['kept_rows']:,} rows of mean width {figures['mean_dim']:.2f} kept, "
        f"{figures['kept_fraction']:.2%} of all values, {figures['bytes']:,} bytes"
    )
