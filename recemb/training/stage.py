"""What a stage of a search gets and gives: the protocol of the classes that ``embedding.stages`` names.

    RUN/stages/initial/       the model's weights before anything was trained
    RUN/stages/0-supernet/    checkpoints, metrics.jsonl, plan, and at last stage.json: without it the stage did not end
    RUN/stages/1-prune/ ...

A stage is built from files alone (an earlier stage's checkpoint, an earlier stage's plan), so that any of them can be
run again, or continued after a kill.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from recemb.assembly import ModelInputs, build_model, with_train_counts
from recemb.budget import BudgetOutOfReach, parse_budget
from recemb.carry_over import carry_over
from recemb.checkpoint import load_model_tensors, load_state
from recemb.collection import compressed_groups
from recemb.config import TrainConfig, build_target
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluation.predictions import Predictions, collect
from recemb.memory import MemoryReport
from recemb.memory.report import parameter_bytes
from recemb.method import CompressedTables, method_class
from recemb.optimizers import TrainingOptimizer
from recemb.plan import CompressionPlan
from recemb.ranks import Ranks
from recemb.run_folder import build_described
from recemb.training.training import prepare_as
from recemb.training.validation import EVALUATION_BATCH_SIZE, validation_figures

STAGE_FILE = "stage.json"
PLAN_FOLDER = "plan"

Reset = Literal["none", "rewind", "fresh"]


@dataclass(frozen=True)
class StageOutcome:
    """What later stages build on.

    Args:
        plan: folder of the plan this stage wrote; None: it decided nothing.
        checkpoint: the weights it ends with; None: it trained nothing.
        figures: for people and results.json, fit for JSON: ``seconds`` and ``cpu_seconds`` always, ``steps`` and
            ``samples`` of a training.
    """

    plan: Path | None
    checkpoint: Path | None
    figures: Mapping[str, Any]

    def save(self, folder: Path, name: str) -> dict[str, Any]:
        """``stage.json`` as a dict, its paths relative to ``folder``, so that a run may be moved."""
        return {
            "name": name,
            "plan": None if self.plan is None else str(self.plan.relative_to(folder)),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint.relative_to(folder)),
            "figures": dict(self.figures),
        }

    @staticmethod
    def load(folder: Path) -> StageOutcome | None:
        """The outcome of the stage in ``folder``; None where it did not end."""
        path = folder / STAGE_FILE
        if not path.is_file():
            return None
        content = json.loads(path.read_text())
        plan, checkpoint = (None if content[key] is None else folder / content[key] for key in ("plan", "checkpoint"))
        return StageOutcome(plan, checkpoint, content["figures"])


class Stage(Protocol):
    """One step of a search. A class of its own is named by ``_target_``; its arguments are the config's keys."""

    name: str

    def run(self, context: StageContext) -> StageOutcome:
        """Do it, or go on with what ``context.folder`` has of it; on every rank alike."""
        ...


@dataclass(frozen=True)
class StageData:
    """The four splits: train and test as prepared, the two halves of the validation rows apart.

    Args:
        manifest: of the data set.
        halves: holds the splits ``architecture`` (what a search decides by) and ``validation`` (early stopping).
    """

    manifest: Manifest
    halves: Manifest

    def of(self, split: str) -> Manifest:
        """The manifest that holds ``split``."""
        return self.halves if split in ("architecture", "validation") else self.manifest


@dataclass(frozen=True)
class StageContext:
    """What a stage may use.

    Args:
        name: of the stage.
        folder: of this stage; its files go there.
        seed: of this stage; the generators start from it.
        config: of the run.
        content: the same as a plain dict.
        data: the splits.
        inputs: what the model reads.
        device: where to train.
        ranks: processes of the run; the first alone writes files.
        initial: checkpoint of the weights before the first stage.
        earlier: outcomes of the stages before this one, by name, in order.
    """

    name: str
    folder: Path
    seed: int
    config: TrainConfig
    content: Mapping[str, Any]
    data: StageData
    inputs: ModelInputs
    device: torch.device
    ranks: Ranks
    initial: Path
    earlier: Mapping[str, StageOutcome] = field(default_factory=dict)

    @property
    def plan_folder(self) -> Path | None:
        """Folder of the latest plan, None before the first."""
        return next((outcome.plan for outcome in reversed([*self.earlier.values()]) if outcome.plan), None)

    @property
    def checkpoint(self) -> Path | None:
        """Latest weights, None before the first training."""
        return next((outcome.checkpoint for outcome in reversed([*self.earlier.values()]) if outcome.checkpoint), None)

    def latest_plan(self) -> Path:
        """Folder of the latest plan.

        Raises:
            ValueError: no earlier stage made one.
        """
        if (folder := self.plan_folder) is None:
            raise ValueError(f"stage {self.name!r} needs a plan; the stages before it, {list(self.earlier)}, made none")
        return folder

    def latest_weights(self) -> Path:
        """Latest weights.

        Raises:
            ValueError: no earlier stage trained.
        """
        if (path := self.checkpoint) is None:
            raise ValueError(
                f"stage {self.name!r} needs trained weights; the stages before it, {list(self.earlier)}, trained none"
            )
        return path

    def budget_bytes(self) -> int | None:
        """``embedding.budget`` in bytes, for all tables together; None where there is none."""
        tables = self.inputs.logical_tables(self.config.embedding.embedding_dim)
        full = sum(table.num_embeddings * table.embedding_dim * 4 for table in tables)
        budget = self.config.embedding.budget
        return None if budget is None else parse_budget(budget, full)

    def build(self, plan: Path | None = None) -> tuple[nn.Module, MemoryReport]:
        """A model on the CPU with fresh weights: of the configured method, or of the tables that ``plan`` asks for."""
        method = with_train_counts(build_target(self.config.embedding.method), self.data.manifest)
        if plan is not None:
            method = method_class(method).from_plan(CompressionPlan.load(plan))
        return build_model(
            self.config.embedding,
            self.config.model,
            self.inputs,
            build_target(self.config.optimizer.embedding),
            method=method,
        )

    def load(self, checkpoint: Path) -> nn.Module:
        """The model of a checkpoint on the CPU, whole, in eval mode."""
        described = load_state(checkpoint)["run"]
        model, _ = build_described(described, checkpoint)
        load_model_tensors(checkpoint, model)
        return model.eval()

    def start(self, model: nn.Module, plan: Path | None, reset: Reset) -> None:
        """Give a fresh ``model`` of ``plan`` the weights that a stage starts from.

        Args:
            model: from ``build(plan)``.
            plan: what it was built from.
            reset: ``"none"``: the latest trained ones, as the search left them; ``"rewind"``: those from before the
                first stage; ``"fresh"``: those it has.
        """
        source = {"none": self.checkpoint, "rewind": self.initial, "fresh": None}[reset]
        if source is None:
            return
        state = load_state(source)["run"].get("plan")
        of_plan = None if state is None else (source / state).resolve()
        if of_plan == (None if plan is None else plan.resolve()):
            load_model_tensors(source, model)
        else:
            carry_over(self.load(source), model, folded=reset == "none")

    def prepare(self, model: nn.Module) -> tuple[nn.Module, TrainingOptimizer]:
        """``model`` on its device, in fused kernels or spread over the ranks, and its optimizer."""
        return prepare_as(self.config, model, self.device)

    def loader(
        self, split: str, batch_size: int, *, shuffle: bool = False, extra_columns: Sequence[str] = ()
    ) -> ParquetLoader:
        """This rank's batches of ``"train"``, ``"architecture"``, ``"validation"`` or ``"test"``."""
        return ParquetLoader(
            self.data.of(split),
            split,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.config.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            extra_columns=extra_columns,
        )

    def predict(self, model: nn.Module, split: str, extra_columns: Sequence[str] = ()) -> Predictions:
        """Predictions of all ranks, on every rank."""
        loader = self.loader(split, EVALUATION_BATCH_SIZE, extra_columns=extra_columns)
        return collect(model, loader, device=self.device, in_lockstep=self.ranks.world_size > 1)

    def validate(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
        """AUC and log loss, and GAUC where users are known; equal on every rank."""
        user = self.data.manifest.user
        predictions = self.predict(model, split, [] if user is None else [user])
        return validation_figures(predictions, user=user, stops_by=self.config.trainer.stopping.metric)

    def description(self, checkpoint_folder: Path, plan: Path | None) -> dict[str, Any]:
        """``run`` of a checkpoint's state: all that a model can be built from.

        Args:
            checkpoint_folder: where the checkpoint will lie.
            plan: what the model was built from; kept as a path relative to the checkpoint.
        """
        return {
            "config": dict(self.content),
            "inputs": self.inputs.to_dict(),
            "data": str(self.data.manifest.root.resolve()),
            "plan": None if plan is None else os.path.relpath(plan.resolve(), checkpoint_folder.resolve()),
        }

    def save_plan(self, plan: CompressionPlan | None) -> Path:
        """Write this stage's plan; that of the first rank counts, others may have None. Its folder, on every rank."""
        folder = self.folder / PLAN_FOLDER
        if self.ranks.is_first:
            assert plan is not None
            plan.save(folder)
        self.ranks.share(f"{self.name}/plan", None)
        return folder


def search_budgets(model: nn.Module, budget: int | None) -> list[tuple[CompressedTables, int | None]]:
    """The groups of ``model`` that search, and of a budget for all tables the bytes that each may use.

    Tables of other groups take what they take; groups that search share the rest in proportion to their full tables.

    Raises:
        BudgetOutOfReach: the other tables take more than the budget already.
    """
    groups = compressed_groups(model)
    searching = [group for group in groups if group.searches]
    if budget is None or not searching:
        return [(group, None) for group in searching]
    left = budget - sum(parameter_bytes(group) for group in groups if not group.searches)
    if left <= 0:
        raise BudgetOutOfReach(
            f"budget of {budget:,} bytes: tables that stay full (embedding.full_below_rows) take {budget - left:,}"
        )
    sizes = [sum(table.num_embeddings * table.embedding_dim for table in group.tables) for group in searching]
    return [(group, left * size // sum(sizes)) for group, size in zip(searching, sizes, strict=True)]


def joined_plan(plans: Sequence[CompressionPlan]) -> CompressionPlan:
    """The plans of the groups of one model as one."""
    tables = {name: table for plan in plans for name, table in plan.tables.items()}
    return dataclasses.replace(plans[0], tables=tables)


def plan_figures(plan: CompressionPlan) -> dict[str, float]:
    """What a plan keeps, for people: rows, values, mean width of the rows kept and the share of all values."""
    rows, values = sum(table.num_rows() for table in plan.tables.values()), plan.num_values()
    return {
        "kept_rows": rows,
        "kept_values": values,
        "mean_dim": values / max(rows, 1),
        "kept_fraction": plan.kept_fraction(),
    }
