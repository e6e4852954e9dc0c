"""A search from its first stage to the one look at the test split, with the converted model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recemb.assembly import ModelInputs
from recemb.checkpoint import Checkpoints
from recemb.config import TrainConfig, build_target
from recemb.conversion import convert
from recemb.data.manifest import Manifest
from recemb.data.validation_halves import split_validation
from recemb.evaluation.evaluator import Evaluation, evaluate_predictions
from recemb.files import write_json
from recemb.memory import MemoryReport, measure_memory
from recemb.ranks import Ranks
from recemb.run_folder import RESULTS_FILE, RunFolder
from recemb.saved_model import save
from recemb.training.randomness import seed_everything
from recemb.training.results import common_results, dense_parameters
from recemb.training.search_report import write_search_report
from recemb.training.stage import STAGE_FILE, Stage, StageContext, StageData, StageOutcome

logger = logging.getLogger(__name__)

_MODEL_FOLDER = "model"
_MEMORY_FILE = "memory.json"
_FILES_AT_THE_END = ("report.md", _MEMORY_FILE, "checkpoints")


class StagedRun:
    """The stages of ``embedding.stages``, in order, each in a folder of its own below the run's.

    Args:
        config: of the run.
        content: the same as a plain dict.
        device: where to train.
        ranks: processes of the run.
        manifest: of the data set.
    """

    def __init__(
        self, config: TrainConfig, content: Mapping[str, Any], device: torch.device, ranks: Ranks, manifest: Manifest
    ) -> None:
        self.config = config
        self.content = content
        self.device = device
        self.ranks = ranks
        self.folder = RunFolder(Path(config.paths.run))
        self.root = self.folder.path / "stages"
        self.stages: list[Stage] = [build_target(stage) for stage in config.embedding.stages or ()]
        fraction = config.data.architecture_fraction
        halves = ranks.first_then_others(
            "halves", lambda: split_validation(manifest, self.root / "validation", fraction)
        )
        self.data = StageData(manifest, halves)
        self.inputs = ModelInputs.of(manifest)

    def to_the_end(self, *, test: bool) -> dict[str, Any]:
        """Run what has not ended yet, or the one stage that was asked for; then look at the test split once.

        Returns:
            What results.json holds; without the test split where ``test`` is False or a single stage was asked for.

        Raises:
            ValueError: a stage that does not exist, or one whose predecessors have not ended.
        """
        asked = self.config.stage
        if asked is not None:
            self._begin_again(asked)
        self._save_initial()
        outcomes: dict[str, StageOutcome] = {}
        for index, stage in enumerate(self.stages):
            folder = self._folder(index)
            ended = self.ranks.share(f"{stage.name}/ended", (folder / STAGE_FILE).is_file())
            if not ended and asked is not None and stage.name != asked:
                raise ValueError(f"stage={asked} builds on stage {stage.name!r}, which has not ended in {self.root}")
            if not ended:
                logger.info("stage %d of %d: %s", index + 1, len(self.stages), stage.name)
                self._run(index, stage, outcomes)
            outcome = StageOutcome.load(folder)
            assert outcome is not None
            outcomes[stage.name] = outcome
            if stage.name == asked:
                return self._partial(outcomes)
        return self._finish(outcomes) if test else self._partial(outcomes)

    def _folder(self, index: int) -> Path:
        return self.root / f"{index}-{self.stages[index].name}"

    def _begin_again(self, asked: str) -> None:
        """A stage that has ended and is asked for is run anew, and what was built on it goes."""
        names = [stage.name for stage in self.stages]
        if asked not in names:
            raise ValueError(f"stage must be one of {names}, got {asked!r}")
        first = names.index(asked)
        if not self.ranks.is_first or not (self._folder(first) / STAGE_FILE).is_file():
            return
        gone = [self._folder(index) for index in range(first, len(names)) if self._folder(index).exists()]
        logger.warning("running stage %s again: removing %s", asked, ", ".join(folder.name for folder in gone))
        path = self.folder.path
        # What the end of the run made of them; results first, which say that it ended.
        for file in (path / RESULTS_FILE, *map(path.joinpath, _FILES_AT_THE_END), *path.glob("*.png")):
            file.unlink(missing_ok=True)
        shutil.rmtree(path / _MODEL_FOLDER, ignore_errors=True)
        for folder in reversed(gone):
            shutil.rmtree(folder)

    def _context(self, index: int, outcomes: Mapping[str, StageOutcome]) -> StageContext:
        return StageContext(
            name=self.stages[index].name,
            folder=self._folder(index),
            seed=_seed_of(self.config.seed, index),
            config=self.config,
            content=self.content,
            data=self.data,
            inputs=self.inputs,
            device=self.device,
            ranks=self.ranks,
            initial=initial_checkpoints(self.folder.path).folder / "step-00000000",
            earlier=dict(outcomes),
        )

    def _save_initial(self) -> None:
        """The weights that stages are rewound to: those that a run of this seed begins with."""
        checkpoints = initial_checkpoints(self.folder.path)
        if self.ranks.share("initial", checkpoints.last is not None):
            return
        seed_everything(self.config.seed)
        context = self._context(0, {})
        model, _ = context.build()
        state = {"run": context.description(checkpoints.folder / "step", None)}
        checkpoints.save(0, {"model": model.state_dict()}, state, best_step=0)

    def _run(self, index: int, stage: Stage, outcomes: Mapping[str, StageOutcome]) -> None:
        context = self._context(index, outcomes)
        if self.ranks.is_first:
            context.folder.mkdir(parents=True, exist_ok=True)
        self.ranks.share(f"{stage.name}/folder", None)
        seed_everything(context.seed)
        outcome = stage.run(context)
        if self.ranks.is_first:
            write_json(context.folder / STAGE_FILE, outcome.save(context.folder, stage.name))
        self.ranks.share(f"{stage.name}/done", None)

    def _partial(self, outcomes: Mapping[str, StageOutcome]) -> dict[str, Any]:
        figures = _figures(outcomes)
        validated: dict[str, float] = next(
            (stage["validation"] for stage in reversed(figures) if "validation" in stage), {}
        )
        return {"run": str(self.folder.path), "validation": validated, "stages": figures}

    def _finish(self, outcomes: Mapping[str, StageOutcome]) -> dict[str, Any]:
        """The last weights, converted, on the test split."""
        context = self._context(len(self.stages) - 1, outcomes)
        last = context.latest_weights()
        self._link_checkpoints(last)
        model = convert(context.load(last))
        self._save(model)
        model.to(self.device)
        embeddings = model.get_submodule("embeddings")
        memory = measure_memory(embeddings, build_target(self.config.optimizer.embedding))  # type: ignore[arg-type]
        user = self.data.manifest.user
        predictions = context.predict(model, "test", [] if user is None else [user])
        results: dict[str, Any] = {}
        if self.ranks.is_first:
            evaluation = evaluate_predictions(predictions, user_column=user)
            results = self._results(outcomes, evaluation, memory, dense_parameters(model))
            write_json(self.folder.path / _MEMORY_FILE, memory.to_dict())
            write_search_report(
                self.folder.path,
                results,
                evaluation,
                memory,
                last_training=self._last_training(outcomes),
                plan=context.plan_folder,
            )
            write_json(self.folder.path / RESULTS_FILE, results)
        return self.ranks.share("results", results)

    def _save(self, model: nn.Module) -> None:
        """``RUN/model``, for ``recemb.load``."""
        folder = self.folder.path / _MODEL_FOLDER
        if self.ranks.is_first:
            if folder.exists():
                # Of a run that was killed before its results.
                shutil.rmtree(folder)
            save(model, folder, manifest=self.data.manifest)

    def _last_training(self, outcomes: Mapping[str, StageOutcome]) -> Path:
        trained = [index for index, outcome in enumerate(outcomes.values()) if "steps" in outcome.figures]
        return self._folder(trained[-1])

    def _link_checkpoints(self, last: Path) -> None:
        """``RUN/checkpoints`` are those of the last stage, so that a run is evaluated like any other."""
        link = self.folder.checkpoints.folder
        if self.ranks.is_first:
            link.unlink(missing_ok=True)
            link.symlink_to(last.parent.relative_to(self.folder.path))

    def _results(
        self,
        outcomes: Mapping[str, StageOutcome],
        evaluation: Evaluation,
        memory: MemoryReport,
        dense_parameters: int,
    ) -> dict[str, Any]:
        figures = _figures(outcomes)
        trained = [stage for stage in figures if "steps" in stage]
        last, metric = trained[-1], self.config.trainer.stopping.metric
        validated = figures[-1]["validation"]
        test = evaluation.to_dict()
        # In reliability.png; here it would hide the figures among 200 lines of bins.
        del test["reliability"]
        return {
            **common_results(
                self.config,
                self.folder.path,
                memory,
                self.data.manifest,
                training_bytes=max(stage["training_bytes"] for stage in trained),
            ),
            "test": test,
            "validation": {
                "best_step": last["best_step"],
                metric: validated[metric],
                **validated,
                "rows": self.data.halves.split("validation").rows,
            },
            "train": {
                **{key: value for key, value in last.items() if key in _TRAINING},
                "device": str(self.device),
                "precision": self.config.trainer.precision,
                "dense_parameters": dense_parameters,
                "ranks": self.ranks.world_size,
            },
            "stages": figures,
            "search": _cost(figures, last),
        }


def initial_checkpoints(run: Path) -> Checkpoints:
    """Where a run of several stages keeps its weights from before the first."""
    return Checkpoints(run / "stages" / "initial")


_TRAINING = (
    "samples",
    "samples_per_second",
    "seconds",
    "samples_per_cpu_second",
    "steps",
    "epochs",
    "stopped_early",
)


def _cost(figures: list[dict[str, Any]], last: Mapping[str, Any]) -> dict[str, float]:
    """Time of everything before the last training, in seconds and in trainings like that one."""
    seconds = sum(stage["seconds"] for stage in figures) - last["seconds"]
    cpu_seconds = sum(stage["cpu_seconds"] for stage in figures) - last["cpu_seconds"]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "trainings": seconds / last["seconds"],
        "cpu_trainings": cpu_seconds / last["cpu_seconds"],
    }


def _figures(outcomes: Mapping[str, StageOutcome]) -> list[dict[str, Any]]:
    return [{"name": name, **outcome.figures} for name, outcome in outcomes.items()]


def _seed_of(seed: int, index: int) -> int:
    """The first stage begins as a plain run of this seed does; the others must not draw the same numbers again."""
    return seed if index == 0 else int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
