"""Tables spread over ranks by TorchRec's DistributedModelParallel, on gloo (CPU) or NCCL.

What TorchRec leaves to its caller, and is done here: row-wise sharding on CPU is opened (TorchRec gates it to CUDA,
gloo runs it), the weights a model already has are written into the shards (on CPU TorchRec drops them), tables on the
meta device are filled shard by shard (TorchRec gives row-wise shards of ranks of one seed the same rows), data-parallel
tables are ruled out (they ignore fused optimizers), and every rank plans for itself from the same inputs, so that a
failure to plan ends all ranks with one message instead of leaving some waiting. Tables whose optimizer moves all rows
in every step are not spread: every rank holds them whole, and gradients are averaged before the step.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    ShardingOption,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.optim.optimizers import SGD, Adagrad, Adam, in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recemb.collection import compressed_groups, own_optimizers
from recemb.initial_rows import fill_rows, fills_any_rows
from recemb.optimizers import EmbeddingOptimizer

# Column-wise is left out: its row-wise Adagrad state cannot be loaded by another number of ranks.
SHARDING_TYPES = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value)
# Of a rank's memory, for dense layers, activations and what the frameworks take.
RESERVED_FRACTION = 0.15
_OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": Adagrad,
    "sgd": SGD,
    "adam": Adam,
}


class _BagSharder(EmbeddingBagCollectionSharder):
    def __init__(self, whole: Collection[nn.Module]) -> None:
        super().__init__()
        self._whole = {id(module) for module in whole}

    def shardable_parameters(self, module: EmbeddingBagCollection) -> dict[str, nn.Parameter]:
        return {} if id(module) in self._whole else super().shardable_parameters(module)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)


class _SequenceSharder(EmbeddingCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)


def sharders(whole: Collection[nn.Module] = ()) -> list[ModuleSharder[nn.Module]]:
    """Sharders that offer table-wise and row-wise on every device for all collections but those of ``whole``."""
    return [cast(ModuleSharder[nn.Module], _BagSharder(whole)), cast(ModuleSharder[nn.Module], _SequenceSharder())]


class _Enumerator(EmbeddingEnumerator):
    """Takes sharding types by path and name: TorchRec's constraints are by name, and methods that are built once a
    width or pattern call their tables alike.

    Args:
        allowed: (path of the collection, name of the table) -> sharding types; all for tables that are not there.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints],
        allowed: Mapping[tuple[str, str], Collection[str]],
    ) -> None:
        super().__init__(topology, BATCH_SIZE, constraints)
        self._allowed = allowed

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        options = super().enumerate(module, sharders)
        return [
            option
            for option in options
            if option.sharding_type in self._allowed.get((option.path, option.name), SHARDING_TYPES)
        ]


def plan_shards(
    model: nn.Module,
    *,
    world_size: int,
    device_type: str,
    local_world_size: int | None = None,
    placement: Mapping[str, Sequence[str]] | None = None,
    device_memory_bytes: int | None = None,
    host_memory_bytes: int | None = None,
    caching: bool = False,
    whole: Collection[str] = (),
) -> ShardingPlan:
    """TorchRec's planner over the collections of ``model`` (meta tensors suffice), without any communication.

    Args:
        model: holds TorchRec collections.
        world_size: ranks.
        device_type: ``"cpu"`` or ``"cuda"``.
        local_world_size: ranks of one machine; all of them where None.
        placement: physical-table-name pattern -> sharding types allowed (``"table_wise"``, ``"row_wise"``); first match
            wins, all are allowed where none does.
        device_memory_bytes: memory of one rank, 15% of which are kept free; TorchRec's default where None.
        host_memory_bytes: for CUDA, host memory of one rank, where cached tables lie; TorchRec's default where None.
        caching: keep tables in host memory behind a cache on the device (``managed_caching``, CUDA only).
        whole: paths of collections that every rank holds whole: no part of the plan.

    Raises:
        ValueError: the tables do not fit, or no allowed placement exists: one message, the same on every rank.
    """
    kernel = EmbeddingComputeKernel.FUSED_UVM_CACHING if caching else EmbeddingComputeKernel.FUSED
    allowed = {
        (path, config.name): _allowed(config, placement or {}, world_size)
        for path, module in model.named_modules()
        if isinstance(module, EmbeddingBagCollection) and path not in whole
        for config in module.embedding_bag_configs()
    }
    if not allowed:
        return ShardingPlan({})
    constraints = {name: ParameterConstraints(compute_kernels=[kernel.value], min_partition=4) for _, name in allowed}
    # On CPU TorchRec places tables in "ddr" memory, on CUDA in "hbm".
    topology = TopologyFactory.create_topology(
        TrainerConfig(
            world_size=world_size,
            local_world_size=local_world_size or world_size,
            hbm_cap_bytes=device_memory_bytes if device_type == "cuda" else None,
            ddr_cap_bytes=device_memory_bytes if device_type == "cpu" else host_memory_bytes,
        ),
        kernel_config=KernelConfig(compute_device=device_type),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints=constraints,
        enumerator=_Enumerator(topology, constraints, allowed),
        # TorchRec's default guesses the dense layers from their tensors, wrongly for meta ones.
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED_FRACTION),
    )
    try:
        return planner.plan(model, sharders([model.get_submodule(path) for path in whole]))
    except PlannerError as error:
        first = str(error).strip().splitlines()[0]
        in_host = device_type == "cpu" or caching
        held = sum(device.storage.ddr if in_host else device.storage.hbm for device in topology.devices)
        raise ValueError(
            f"tables cannot be placed on {world_size} {device_type} ranks: {first} "
            f"Their rows take {_table_bytes(model):,} bytes without the optimizer's state; the ranks have {held:,} "
            f"bytes{' of host memory' if in_host else ''}, of which {RESERVED_FRACTION:.0%} stay free. "
            "Give more ranks or memory, a smaller budget, or allow row_wise placement."
        ) from error


def shard(
    model: nn.Module,
    optimizer: EmbeddingOptimizer,
    device: torch.device,
    *,
    placement: Mapping[str, Sequence[str]] | None = None,
    caching: bool = False,
) -> tuple[DistributedModelParallel, KeyedOptimizer]:
    """Spread the tables of ``model`` over the ranks of the process group; its other parameters are replicated.

    Args:
        model: the same on every rank, weights included: those of rank 0 are not broadcast. Tables on the meta device
            are filled shard by shard where they lie, see ``recemb.initial_rows``; no rank then holds a whole one.
        optimizer: trains the rows inside backward(), or all of them in a step after it: such tables stay whole.
        device: of this rank.
        placement: see ``plan_shards``.
        caching: see ``plan_shards``.

    Returns:
        The wrapped model, called as before, and the optimizer of its tables (state only; rows move in backward).

    Raises:
        ValueError: Adam on CPU (fbgemm has no kernel), a plan that does not exist in the memory that ranks have, or a
            table on the meta device whose ``init_fn`` cannot fill a part of it.
    """
    if not (optimizer.is_fused(device) or optimizer.trains_all_rows):
        raise ValueError(
            f"sharded tables on {device.type} cannot be trained by {optimizer.name!r}: fbgemm has no kernel"
        )
    whole = train_in_backward(model, optimizer)
    unfilled = _take_unfilled(model)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    device_bytes, host_bytes = _free_bytes(device, local_world_size)
    plan = plan_shards(
        model,
        world_size=dist.get_world_size(),
        device_type=device.type,
        local_world_size=local_world_size,
        placement=placement,
        device_memory_bytes=device_bytes,
        host_memory_bytes=host_bytes,
        caching=caching,
        whole=whole,
    )
    for path in whole:
        if any(weight.is_meta for weight in model.get_submodule(path).parameters()):
            model.get_submodule(path).to_empty(device=device)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    _keep_initial_values(model)
    # Where a search looks tables up without training them they get no gradient, which DistributedDataParallel does not
    # allow: ``average_gradients`` takes its place.
    kept = {id(weight) for path in whole for weight in model.get_submodule(path).to(device).parameters()}
    ignored = [name for name, parameter in model.named_parameters() if id(parameter) in kept]
    sharded = DistributedModelParallel(
        model,
        device=device,
        plan=plan,
        sharders=sharders(),
        data_parallel_wrapper=DefaultDataParallelWrapper(params_to_ignore=ignored),
    )
    write_weights(sharded, weights)
    _fill(sharded, unfilled)
    if dist.get_backend() == "gloo":
        for group in compressed_groups(sharded):
            group.equal_batches = True
    return sharded, cast(KeyedOptimizer, sharded.fused_optimizer)


def train_in_backward(model: nn.Module, optimizer: EmbeddingOptimizer) -> list[str]:
    """Tell TorchRec how the collections of ``model`` are trained; planning counts the optimizer's state by it.

    Returns:
        Paths of the collections that are not: those whose optimizer moves all rows in every step.
    """
    own = own_optimizers(model)
    whole: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            by = own.get(id(module), optimizer)
            if by.trains_all_rows:
                whole.append(path)
                continue
            arguments: dict[str, Any] = {"lr": by.learning_rate}
            if by.name != "sgd":
                arguments["eps"] = by.eps
            apply_optimizer_in_backward(_OPTIMIZERS[by.name], module.parameters(), arguments)
    return whole


@torch.no_grad()
def average_gradients(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
    """Before a step of an optimizer of parameters that every rank holds: the mean of all ranks' gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@torch.no_grad()
def write_weights(sharded: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write whole tensors into the shards this rank holds.

    Args:
        sharded: a model after ``shard``.
        weights: state-dict key -> whole tensor; keys that are missing keep their values.
    """
    for key, target in sharded.state_dict().items():
        source = weights.get(key)
        if source is None:
            continue
        if isinstance(target, ShardedTensor):
            for piece in target.local_shards():
                (row, column), (rows, columns) = piece.metadata.shard_offsets, piece.metadata.shard_sizes
                piece.tensor.copy_(source[row : row + rows, column : column + columns])
        else:
            target.copy_(source)


def dense_parameters(sharded: nn.Module) -> list[nn.Parameter]:
    """Parameters that no fused optimizer trains."""
    return [
        parameter
        for _, parameter in in_backward_optimizer_filter(sharded.named_parameters())
        if parameter.requires_grad
    ]


def _table_bytes(model: nn.Module) -> int:
    collections = (module for module in model.modules() if isinstance(module, EmbeddingBagCollection))
    return sum(bag.weight.nbytes for collection in collections for bag in collection.embedding_bags.values())


def _allowed(config: EmbeddingBagConfig, placement: Mapping[str, Sequence[str]], world_size: int) -> list[str]:
    # A rank without rows makes fbgemm's backward fail, so tables too small to give each rank one lie whole on one rank.
    rows_per_rank = -(-config.num_embeddings // world_size)
    if rows_per_rank * (world_size - 1) >= config.num_embeddings:
        return [ShardingType.TABLE_WISE.value]
    matches = (types for pattern, types in placement.items() if fnmatch.fnmatchcase(config.name, pattern))
    types = [kind for kind in next(matches, SHARDING_TYPES) if kind in SHARDING_TYPES]
    if not types:
        raise ValueError(f"table {config.name!r}: placement must allow one of {SHARDING_TYPES}, got {dict(placement)}")
    return types


def _free_bytes(device: torch.device, local_world_size: int) -> tuple[int, int]:
    """Memory that every rank has for itself, on its device and on its host; equal on all, so that all plan alike."""
    host = psutil.virtual_memory().available // local_world_size
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    free = torch.tensor([on_device, host], device=device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    device_bytes, host_bytes = free.tolist()
    return device_bytes, host_bytes


def _take_unfilled(model: nn.Module) -> dict[str, tuple[EmbeddingBagConfig, int]]:
    """State-dict key -> config and seed of every table on the meta device.

    Raises:
        ValueError: one that only a whole table can be filled by.
    """
    configs = {
        f"{path}.embedding_bags.{config.name}.weight".removeprefix("."): replace(config)
        for path, module in model.named_modules()
        if isinstance(module, EmbeddingBagCollection) and module.device.type == "meta"
        for config in module.embedding_bag_configs()
    }
    for config in configs.values():
        if not fills_any_rows(config):
            raise ValueError(
                f"table {config.name!r} is on the meta device, and its init_fn, {config.init_fn!r}, may not know what "
                "to do with a shard: give a functools.partial of torch.nn.init.uniform_ or normal_, or build the table "
                "on the CPU"
            )
    # Seeds of the run's generator, which all ranks share, before TorchRec draws from it as shards lie.
    return {key: (config, int(torch.empty((), dtype=torch.int64).random_(2**62))) for key, config in configs.items()}


@torch.no_grad()
def _fill(sharded: nn.Module, unfilled: Mapping[str, tuple[EmbeddingBagConfig, int]]) -> None:
    """Initial rows for the tables that were built on the meta device, by the ranks that hold them."""
    for key, target in sharded.state_dict().items() if unfilled else ():
        if key not in unfilled:
            continue
        config, seed = unfilled[key]
        if isinstance(target, ShardedTensor):
            for piece in target.local_shards():
                fill_rows(config, piece.tensor, piece.metadata.shard_offsets[0], seed)
        else:
            fill_rows(config, target, 0, seed)


def _keep_initial_values(model: nn.Module) -> None:
    # TorchRec initialises every shard anew, on ranks of one seed with the same numbers.
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for config in module.embedding_bag_configs():
                config.init_fn = torch.nn.init.zeros_
