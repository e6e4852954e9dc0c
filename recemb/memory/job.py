"""What ``python -m recemb.memory`` does: a config in; a table for people, JSON and a plot out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recemb.assembly import ModelInputs, TableInput, sized_method
from recemb.budget import parse_bytes
from recemb.config import DataConfig, TrainConfig, build_target, parse
from recemb.data.manifest import FILE_NAME, Manifest
from recemb.files import write_json
from recemb.memory.placement import Placement, plan_placement
from recemb.memory.plots import memory_plot
from recemb.memory.report import MemoryReport, estimate_memory


@dataclass(frozen=True)
class ShapeConfig:
    """Number of ids of each feature, instead of a data set; empty: those of the data set."""

    cardinalities: list[int]


@dataclass(frozen=True)
class MemoryConfig:
    """The keys that ``configs/memory.yaml`` adds to those of training; it says what each means."""

    shape: ShapeConfig
    world_size: int
    local_world_size: int | None
    memory_per_gpu: str | int | None
    host_memory_per_gpu: str | int | None
    device: str
    output: str | None

    def __post_init__(self) -> None:
        for name in ("world_size", "local_world_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"memory: {name} must be at least 1, got {value}")
        if self.local_world_size is not None and self.world_size % self.local_world_size:
            raise ValueError(
                f"memory: world_size must be a multiple of local_world_size={self.local_world_size}, "
                f"got {self.world_size}"
            )
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"memory: device must be cuda or cpu, got {self.device!r}")
        if self.output is not None and Path(self.output).suffix != ".json":
            raise ValueError(f"memory: output must end in .json (the plot lies beside it), got {self.output!r}")
        if self.memory_per_gpu is None and (self.local_world_size or self.host_memory_per_gpu):
            raise ValueError("memory: local_world_size and host_memory_per_gpu are for a plan; give memory_per_gpu")


@dataclass(frozen=True)
class Outcome:
    """The bytes, where the number of ids came from, and the plan if one was asked for."""

    memory: MemoryReport
    source: str
    method: str
    placement: Placement | None


def run(content: Mapping[str, Any]) -> Outcome:
    """Count bytes and, with ``memory_per_gpu``, plan; write JSON and plot where ``output`` says.

    Args:
        content: ``configs/memory.yaml`` as a plain dict, resolved.

    Raises:
        ValueError: the config, a budget that cannot be met, tables that do not fit.
        FileNotFoundError: no data set, and nothing that says how many ids there are.
    """
    own = [field.name for field in dataclasses.fields(MemoryConfig)]
    settings = parse(MemoryConfig, {key: value for key, value in content.items() if key in own})
    config = TrainConfig.parse({key: value for key, value in content.items() if key not in own})
    inputs, source = _inputs(settings.shape, config.data)
    tables = inputs.logical_tables(config.embedding.embedding_dim)
    method = sized_method(config.embedding, tables)
    optimizer = build_target(config.optimizer.embedding)
    if config.trainer.caching and settings.device == "cpu":
        raise ValueError("memory: trainer.caching=true is for device=cuda, whose memory is the cache")
    small = config.embedding.full_below_rows
    memory = estimate_memory(tables, method, full_below_rows=small, optimizer=optimizer)
    placement = None
    if settings.memory_per_gpu is not None:
        host = settings.host_memory_per_gpu
        placement = plan_placement(
            tables,
            method,
            optimizer=optimizer,
            full_below_rows=small,
            world_size=settings.world_size,
            device_type=settings.device,
            local_world_size=settings.local_world_size,
            device_bytes=parse_bytes(settings.memory_per_gpu),
            host_bytes=None if host is None else parse_bytes(host),
            placement=config.trainer.placement,
            caching=config.trainer.caching,
        )
    outcome = Outcome(memory, source, config.embedding.method_name, placement)
    if settings.output is not None:
        path = Path(settings.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        memory_plot(memory, placement, path.with_suffix(".png"), title=f"{outcome.method}, {source}")
        plan = None if placement is None else placement.to_dict()
        write_json(path, {"source": source, "method": outcome.method, "memory": memory.to_dict(), "placement": plan})
    return outcome


def _inputs(shape: ShapeConfig, data: DataConfig) -> tuple[ModelInputs, str]:
    if shape.cardinalities:
        cardinalities = {f"C{number}": size for number, size in enumerate(shape.cardinalities, 1)}
        if any(not isinstance(size, int) or size < 1 for size in shape.cardinalities):
            raise ValueError(
                f"memory: cardinalities must be whole numbers of at least 1, one a feature, got {shape.cardinalities}"
            )
        return _of_cardinalities(cardinalities), f"{sum(shape.cardinalities):,} ids"
    for path in (data.path, data.synthetic.path if data.allow_synthetic else None):
        if path is not None and (Path(path) / FILE_NAME).is_file():
            return ModelInputs.of(Manifest.load(path)), str(path)
    if not data.allow_synthetic or data.synthetic.log != "criteo":
        raise FileNotFoundError(
            f"data.path={data.path}: no prepared data set there; prepare one, or give cardinalities=[1460,583,...] or "
            "shape=criteo_1tb"
        )
    # Here, because a plan for one's own log needs none of it.
    from data_pipelines.synthetic_shape import CATEGORICAL

    return _of_cardinalities({feature.name: feature.cardinality for feature in CATEGORICAL}), (
        "ids of the Criteo Kaggle log, for want of a data set"
    )


def _of_cardinalities(cardinalities: Mapping[str, int]) -> ModelInputs:
    return ModelInputs((), tuple(TableInput(name, size, (name,)) for name, size in cardinalities.items()))
