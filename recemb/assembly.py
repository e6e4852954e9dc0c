"""From a data set and a config to a model: logical tables, byte budget, collection, head."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_configs import EmbeddingConfig as UnpooledTableConfig

from recemb.budget import fit_to_budget, parse_budget
from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.config import EmbeddingConfig, build_target
from recemb.data.manifest import CategoricalFeature, Manifest
from recemb.initial_rows import unfilled_tables
from recemb.memory import MemoryReport, estimate_memory, full_table_bytes, measure_memory
from recemb.method import UNBOUNDED, Method, method_class
from recemb.models.histories import History
from recemb.optimizers import EmbeddingOptimizer
from recemb.row_decay import decay_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableInput:
    """One id space: number of ids (None: 64-bit hashes) and the features that draw ids from it."""

    name: str
    num_embeddings: int | None
    features: tuple[str, ...]


@dataclass(frozen=True)
class ModelInputs:
    """What a model reads, kept with its checkpoints so that it can be built without the data set.

    Args:
        numeric: names of the numeric features, in the order of ``Batch.dense``.
        tables: id spaces, in the order of their first features.
        histories: sequences that share the tables of single features, their targets; for sequence models. Others pool
            every feature alike.
        bags: features of any number of ids a row that are in no history: lists, and sequences without a target.
    """

    numeric: tuple[str, ...]
    tables: tuple[TableInput, ...]
    histories: tuple[History, ...] = ()
    bags: tuple[str, ...] = ()

    @staticmethod
    def of(manifest: Manifest) -> ModelInputs:
        """The inputs of a data set.

        Raises:
            ValueError: features of one table disagree about its number of ids, or several single features could be
                the target of a sequence.
        """
        tables: dict[str, TableInput] = {}
        for feature in manifest.categorical:
            known = tables.get(feature.table)
            if known is not None and known.num_embeddings != feature.num_embeddings:
                raise ValueError(
                    f"{manifest.root}: table {feature.table!r} has {known.num_embeddings} ids for feature "
                    f"{known.features[0]!r} and {feature.num_embeddings} for {feature.name!r}"
                )
            features = (*known.features, feature.name) if known else (feature.name,)
            tables[feature.table] = TableInput(feature.table, feature.num_embeddings, features)
        histories = _histories(manifest)
        attended = {name for history in histories for name in history.sequences}
        bags = tuple(
            feature.name
            for feature in manifest.categorical
            if feature.kind != "single" and feature.name not in attended
        )
        return ModelInputs(tuple(manifest.numeric_names), tuple(tables.values()), histories, bags)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> ModelInputs:
        tables = (
            TableInput(item["name"], item["num_embeddings"], tuple(item["features"])) for item in content["tables"]
        )
        # Checkpoints from before there were histories have neither of these two.
        histories = (
            History(item["events"], tuple(item["sequences"]), tuple(item["targets"]))
            for item in content.get("histories", ())
        )
        return ModelInputs(tuple(content["numeric"]), tuple(tables), tuple(histories), tuple(content.get("bags", ())))

    def logical_tables(self, embedding_dim: int) -> list[EmbeddingBagConfig]:
        """One sum-pooled table ``t_<name>`` per id space."""
        return [
            EmbeddingBagConfig(
                name=f"t_{table.name}",
                num_embeddings=UNBOUNDED if table.num_embeddings is None else table.num_embeddings,
                embedding_dim=embedding_dim,
                feature_names=list(table.features),
            )
            for table in self.tables
        ]


def _histories(manifest: Manifest) -> tuple[History, ...]:
    """Sequences with a target, by list of events."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for feature in manifest.categorical:
        if feature.kind == "sequence" and (target := _target(feature, manifest)) is not None:
            sequences, targets = found.setdefault(feature.events, ([], []))
            sequences.append(feature.name)
            targets.append(target)
    return tuple(History(events, tuple(names), tuple(targets)) for events, (names, targets) in found.items())


def _target(sequence: CategoricalFeature, manifest: Manifest) -> str | None:
    """The single feature of the sequence's table; of several, the one that has the table's name."""
    singles = [item.name for item in manifest.categorical if item.kind == "single" and item.table == sequence.table]
    if sequence.table in singles:
        return sequence.table
    if len(singles) > 1:
        raise ValueError(
            f"{manifest.root}: sequence {sequence.name!r} shares table {sequence.table!r} with {singles}; its target "
            f"must be the only single feature of the table, or the one called {sequence.table!r}"
        )
    return singles[0] if singles else None


def sized_method(config: EmbeddingConfig, tables: list[EmbeddingBagConfig]) -> Method:
    """The configured method, at the size that its budget allows.

    Raises:
        ValueError: neither a budget nor a size, both, or a budget that cannot be met (the smallest size is named).
    """
    method: Method = build_target(config.method)
    if method_class(method).searches:
        # Its budget is one for the plan.
        return method
    if config.budget is not None:
        budget = parse_budget(config.budget, sum(full_table_bytes(tables).values()))
        return fit_to_budget(tables, method, budget, full_below_rows=config.full_below_rows)
    cls = method_class(method)
    bound = method.keywords if isinstance(method, functools.partial) else {}
    knob = cls.budget_knob
    if (
        knob is not None
        and knob not in bound
        and inspect.signature(cls).parameters[knob].default is inspect.Parameter.empty
    ):
        raise ValueError(f"embedding: give embedding.budget (such as 10x) or embedding.method.{knob}; got neither")
    return method


def build_model(
    config: EmbeddingConfig,
    head: Mapping[str, Any],
    inputs: ModelInputs,
    optimizer: EmbeddingOptimizer,
    *,
    method: Method | None = None,
    counted_by: Manifest | None = None,
    spread: bool = False,
) -> tuple[nn.Module, MemoryReport]:
    """The model on the CPU with fresh weights, and the bytes of its tables.

    Args:
        config: the tables.
        head: target of the model, partial; called with ``embeddings`` and ``num_dense``. One that also takes
            ``histories`` and ``bags`` is a sequence model: it gets them, and a collection that does not pool.
        inputs: what it reads.
        optimizer: of the tables, whose state is counted.
        method: of the tables, instead of the configured one: what a search's plan asks for.
        counted_by: data set whose train counts a configured method gets that takes them, once it is sized. Without, as
            where weights are loaded that were trained with them, sizes are the same.
        spread: the tables will be spread over ranks, which fill their shards themselves where they can: see
            ``recemb.initial_rows.unfilled_tables``.

    Raises:
        ValueError: see ``sized_method`` and the classes built.
        MemoryError: the tables and their optimizer state are larger than the memory there is; of tables that will be
            spread, the planner says it.
    """
    tables = inputs.logical_tables(config.embedding_dim)
    if method is None:
        method = sized_method(config, tables)
        method = method if counted_by is None else with_train_counts(method, counted_by)
    estimate = estimate_memory(tables, method, full_below_rows=config.full_below_rows, optimizer=optimizer)
    if not spread:
        _check_fits(estimate)
    build = build_target(head)
    embeddings: nn.Module
    # The loader has checked every id against the manifest already, hence check_ids=False.
    with unfilled_tables() if spread else nullcontext():
        if "histories" in inspect.signature(build).parameters:
            if not inputs.histories:
                raise ValueError(
                    f"model {head['_target_']} needs histories, and the data set has no sequence that shares its table "
                    "with a single feature (the target)"
                )
            embeddings = CompressedEmbeddingCollection(
                [_unpooled(table) for table in tables], method, full_below_rows=config.full_below_rows, check_ids=False
            )
            build = functools.partial(build, histories=inputs.histories, bags=inputs.bags)
        else:
            embeddings = CompressedEmbeddingBagCollection(
                tables, method, full_below_rows=config.full_below_rows, check_ids=False
            )
    report = measure_memory(embeddings, optimizer)
    assert report == estimate, f"estimated memory {estimate} differs from measured {report}"
    return build(embeddings=embeddings, num_dense=len(inputs.numeric)), report


def _unpooled(table: EmbeddingBagConfig) -> UnpooledTableConfig:
    return UnpooledTableConfig(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=table.feature_names,
    )


def decay_by_train_counts(model: nn.Module, manifest: Manifest, strength: float) -> None:
    """``recemb.row_decay.decay_rows`` with the train counts of a data set.

    Raises:
        ValueError: a table without vocabulary, so nobody counted.
    """
    decay_rows(model, train_counts(manifest), strength)


def with_train_counts(method: Method, manifest: Manifest) -> Method:
    """``method``, with the train counts of a data set bound where it takes ``train_counts`` and nobody gave any.

    Where not every table was counted it stays as it is, and a warning is logged.
    """
    bound = method.keywords if isinstance(method, functools.partial) else {}
    if "train_counts" not in inspect.signature(method_class(method)).parameters or "train_counts" in bound:
        return method
    try:
        counts = train_counts(manifest)
    except ValueError as error:
        logger.warning("%s does without train counts: %s", method_class(method).__name__, error)
        return method
    return functools.partial(method, train_counts=counts)  # type: ignore[call-arg]


def train_counts(manifest: Manifest) -> dict[str, Tensor]:
    """Logical table name -> (num_embeddings,) int64, how often each id comes in the train split.

    Raises:
        ValueError: a table without vocabulary, so nobody counted.
    """
    return {
        f"t_{feature.table}": torch.from_numpy(manifest.train_counts(feature.name).to_numpy().copy())
        for feature in manifest.categorical
    }


def _check_fits(report: MemoryReport) -> None:
    import psutil

    available = psutil.virtual_memory().available
    # fbgemm's kernels take a copy of the initial weights.
    needed = 2 * report.trained_bytes + report.optimizer_bytes
    if needed > available:
        raise MemoryError(
            f"the tables need {needed:,} bytes while they are built (twice {report.trained_bytes:,}, and "
            f"{report.optimizer_bytes:,} of optimizer state), {available:,} are available; lower embedding.budget"
        )
