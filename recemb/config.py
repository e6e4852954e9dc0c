"""What a training run is told, as frozen dataclasses: the last place that sees a config file.

Every key of the config has a field here, or is an argument of the class that its ``_target_`` names. Anything else is
an error, with the keys there are: a misspelt key must never be a run of hours with the default.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hydra.utils import instantiate

T = TypeVar("T")


@dataclass(frozen=True)
class SyntheticConfig:
    """The synthetic log that stands in for a missing one.

    Args:
        path: its folder, made on first use.
        rows: of all splits together.
        seed: of its draws.
        log: ``"criteo"``: of Criteo's shape (``data_pipelines.synthetic``); ``"behaviour"``: users with histories
            (``data_pipelines.behaviour``).
    """

    path: str
    rows: int
    seed: int
    log: Literal["criteo", "behaviour"] = "criteo"


@dataclass(frozen=True)
class DataConfig:
    """The encoded data set.

    Args:
        path: folder with manifest.json; None: the synthetic log, or an error where that is not allowed.
        allow_synthetic: make (or reuse) the synthetic log where nothing lies at ``path``: True, always; False, never,
            that is an error; a path, where ``path`` is that one, so that a mistyped one is an error.
        synthetic: the synthetic log.
        shuffle: draw train rows in another order each epoch.
        verify_checksums: read every byte before training and compare with the manifest; about 1 GB a second.
        architecture_fraction: for runs of several stages, share of the validation rows that decide an architecture and
            then never when training stops; a data set with a split ``architecture`` of its own ignores it.
    """

    path: str | None
    allow_synthetic: bool | str
    synthetic: SyntheticConfig
    shuffle: bool
    verify_checksums: bool
    architecture_fraction: float = 0.5


@dataclass(frozen=True)
class EmbeddingConfig:
    """The tables.

    Args:
        embedding_dim: width of every vector, in float32 values.
        budget: see ``recemb.budget.parse_budget``; None: the method's size is as configured.
        method: target of the method, partial.
        full_below_rows: tables of fewer rows stay full; their bytes count towards the budget.
        stages: of a search, in order: targets of ``recemb.training.stages`` or others of that protocol, each with a
            ``name`` of its own; none: one plain training.
        mini_batch_aware_decay: strength of ``recemb.row_decay``, 0 for none; needs a data set with train counts.
    """

    embedding_dim: int
    budget: str | float | int | None
    method: Mapping[str, Any]
    full_below_rows: int = 0
    mini_batch_aware_decay: float = 0.0
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.mini_batch_aware_decay >= 0:
            raise ValueError(f"embedding.mini_batch_aware_decay must be at least 0, got {self.mini_batch_aware_decay}")
        if self.embedding_dim < 4 or self.embedding_dim % 4:
            raise ValueError(
                f"embedding.embedding_dim must be a multiple of 4 (fused kernels read 16 bytes at a time), "
                f"got {self.embedding_dim}"
            )

    @property
    def method_name(self) -> str:
        """``"unified"`` for ``recemb.methods.unified.Unified``; the full target for a class from elsewhere."""
        target = str(self.method["_target_"])
        return target.split(".")[-2] if target.startswith("recemb.methods.") else target


@dataclass(frozen=True)
class OptimizerConfig:
    """Target of the tables' optimizer (``EmbeddingOptimizer``), and of the dense layers' (torch's, partial)."""

    embedding: Mapping[str, Any]
    dense: Mapping[str, Any]


@dataclass(frozen=True)
class ScheduleConfig:
    """See ``recemb.training.schedule.LearningRateSchedule``."""

    warmup_steps: int
    decay: Literal["none", "linear", "cosine"]
    decay_start_step: int
    final_factor: float


@dataclass(frozen=True)
class StoppingConfig:
    """See ``recemb.training.stopping.EarlyStopping``."""

    metric: Literal["auc", "gauc", "logloss"]
    patience: int | None
    min_delta: float


@dataclass(frozen=True)
class TrainerConfig:
    """The step loop; every count is in steps.

    Args:
        validate_every_steps: a number of steps, or a fraction of an epoch in (0, 1).
    """

    epochs: int
    max_steps: int | None
    batch_size: int
    device: str
    precision: Literal["fp32", "bf16"]
    compile: bool
    threads: int | None
    log_every_steps: int
    validate_every_steps: int | float | None
    checkpoint_every_steps: int | None
    schedule: ScheduleConfig
    stopping: StoppingConfig
    placement: dict[str, list[str]]
    caching: bool

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "threads"):
            _at_least_one(f"trainer.{name}", getattr(self, name))
        for name in ("log_every_steps", "checkpoint_every_steps"):
            _at_least_one(f"trainer.{name}", getattr(self, name))
        every = self.validate_every_steps
        if every is not None and not (0 < every < 1 or (every >= 1 and isinstance(every, int))):
            raise ValueError(
                "trainer.validate_every_steps must be a whole number of steps, a fraction of an epoch below 1 or null, "
                f"got {every}"
            )

    def steps_between_validations(self, steps_per_epoch: int) -> int | None:
        """``validate_every_steps`` in steps, a fraction rounded up."""
        every = self.validate_every_steps
        return math.ceil(every * steps_per_epoch) if isinstance(every, float) else every


@dataclass(frozen=True)
class PathsConfig:
    """Folder of data sets, folder of runs, folder of this run."""

    data: str
    runs: str
    run: str


@dataclass(frozen=True)
class TrainConfig:
    """All of ``configs/train.yaml``, and ``stage``: the one of ``embedding.stages`` to run, None for all."""

    task_name: str
    seed: int
    resume: str | None
    data: DataConfig
    model: Mapping[str, Any]
    embedding: EmbeddingConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    paths: PathsConfig
    stage: str | None = None

    @staticmethod
    def parse(config: Mapping[str, Any]) -> TrainConfig:
        """The resolved config, checked.

        Raises:
            ValueError: a key that nothing reads, a key missing, a value of another type or out of range; names the key.
        """
        parsed = parse(TrainConfig, config)
        check_target(parsed.model, "model", given=("embeddings", "num_dense"))
        check_target(parsed.embedding.method, "embedding.method", given=("tables",))
        _check_stages(parsed.embedding.stages, parsed.stage)
        check_target(parsed.optimizer.embedding, "optimizer.embedding", given=())
        check_target(parsed.optimizer.dense, "optimizer.dense", given=("params",))
        return parsed


def _check_stages(stages: Sequence[Mapping[str, Any]], asked: str | None) -> None:
    for index, stage in enumerate(stages):
        check_target(stage, f"embedding.stages.{index}", given=())
    names = [stage.get("name") for stage in stages]
    # They become names of folders.
    if any(not isinstance(name, str) or not name.isidentifier() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"config: every one of embedding.stages needs a name, a word of its own; got {names}")
    if asked is not None and asked not in names:
        raise ValueError(f"config: stage must be one of embedding.stages, {names}, got {asked!r}")


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def parse(cls: type[T], mapping: Any, where: str = "") -> T:
    """A dataclass from a plain dict of the same shape, strictly: no key too many, none missing, no type changed.

    Raises:
        ValueError: names the key with its dots, what is allowed there and what came.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"config: {where or 'the whole'} must be a group of keys, got {mapping!r}")
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    if unknown := [key for key in mapping if key not in names]:
        raise ValueError(f"config: nothing reads {prefix}{unknown[0]}; the keys of {where or 'the top'} are {names}")
    required = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in mapping]:
        raise ValueError(f"config: {prefix}{missing[0]} is missing")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], mapping[name], prefix + name) for name in mapping})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where)
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"config: {where} must be one of {list(typing.get_args(hint))}, got {value!r}")
        return value
    if origin in (types.UnionType, typing.Union):
        allowed = tuple(type(None) if option is None else option for option in typing.get_args(hint))
    else:
        allowed = (origin if origin is not None else hint,)
    # bool is an int to Python, not to the writer of a config; an int is a fine float.
    fits = bool in allowed if isinstance(value, bool) else isinstance(value, allowed)
    if not fits and float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not fits:
        wanted = " or ".join("null" if option is type(None) else option.__name__ for option in allowed)
        raise ValueError(f"config: {where} must be {wanted}, got {value!r}")
    return value


def check_target(target: Mapping[str, Any], where: str, *, given: Sequence[str]) -> None:
    """Check that every key of a ``_target_`` group is an argument of the class or function it names.

    Args:
        target: the group.
        where: its key, for errors.
        given: arguments that the program gives itself, so that a config's would be ignored.

    Raises:
        ValueError: no ``_target_``, nothing importable there, or a key that it does not take or that is not for a
            config to give; those it takes are named.
    """
    path = target.get("_target_")
    if not isinstance(path, str) or "." not in path:
        raise ValueError(
            f"config: {where}._target_ must be a dotted path such as recemb.methods.full.Full, got {path!r}"
        )
    module_name, _, name = path.rpartition(".")
    try:
        callee = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"config: {where}._target_: cannot import {path}: {error}") from error
    arguments = [name for name in inspect.signature(callee).parameters if name not in given]
    for key in target:
        if key not in ("_target_", "_partial_") and key not in arguments:
            raise ValueError(f"config: nothing reads {where}.{key}; {path} takes {arguments}")


def build_target(target: Mapping[str, Any]) -> Any:
    """The object (or, with ``_partial_: true``, the partial) that a checked ``_target_`` group describes."""
    return instantiate(dict(target), _convert_="all")
