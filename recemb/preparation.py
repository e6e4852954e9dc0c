"""From a model that defines its tables to one that trains them fast: fused kernels for TorchRec's plain collections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.collection import compressed_groups, own_optimizers
from recemb.fused import FusedTables
from recemb.optimizers import EmbeddingOptimizer, TrainingOptimizer, torch_optimizers
from recemb.sharding import average_gradients, dense_parameters, shard


def prepare(
    model: nn.Module,
    embedding_optimizer: EmbeddingOptimizer,
    dense_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    device: torch.device | str = "cpu",
    placement: Mapping[str, Sequence[str]] | None = None,
    caching: bool = False,
) -> tuple[nn.Module, TrainingOptimizer]:
    """Move ``model`` to ``device`` and replace every EmbeddingBagCollection in it by fused kernels, in place.

    In a process group the tables are spread over its ranks by TorchRec's DistributedModelParallel instead (see
    ``recemb.sharding``); the step loop is the same. State-dict keys stay the same. With Adam on CPU, for which fbgemm
    has no kernel, tables stay TorchRec's with sparse gradients and torch's SparseAdam (several times slower; rows that
    a batch does not touch keep their moments). With dense Adam, which moves all rows in every step, they stay
    TorchRec's with dense gradients, on any device; every rank of a process group then holds them whole.

    Args:
        model: any module that holds TorchRec or recemb collections, or is one. While fused kernels are made, memory
            holds the tables twice; TorchRec collections on the meta device, and tables built in ``unfilled_tables``,
            are filled in the kernels instead, which takes half, and in a process group shard by shard where they lie.
        embedding_optimizer: trains the tables.
        dense_optimizer: makes the optimizer of all other parameters, e.g. ``partial(torch.optim.Adam, lr=1e-3)``.
        device: where to train.
        placement: physical-table-name pattern -> sharding types allowed (``"table_wise"``, ``"row_wise"``), for
            process groups; the planner chooses where nothing is said.
        caching: keep sharded tables in host memory behind a cache on the device (``managed_caching``, CUDA only).

    Returns:
        The model (the same object, unless it is itself a collection or is sharded) and the optimizer to step after
        backward().

    Raises:
        ValueError: tables that fused kernels or the planner cannot take; on every rank alike. Without a process group
            also tensors on the meta device that are no fused tables.

    Example:
        >>> from functools import partial
        >>> from torchrec import EmbeddingBagConfig
        >>> tables = [EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=4, feature_names=["f"])]
        >>> model = nn.ModuleDict({"tables": EmbeddingBagCollection(tables=tables), "head": nn.Linear(4, 1)})
        >>> model, optimizer = prepare(model, EmbeddingOptimizer(), partial(torch.optim.Adam, lr=1e-3))
    """
    device = torch.device(device)
    if dist.is_initialized():
        sharded, table_optimizer = shard(model, embedding_optimizer, device, placement=placement, caching=caching)
        optimizers, architecture = _others(sharded, dense_parameters(sharded), embedding_optimizer, dense_optimizer)
        if "all_rows" in optimizers:
            optimizers["all_rows"].register_step_pre_hook(average_gradients)
        return sharded, TrainingOptimizer({}, optimizers, table_optimizer, architecture)
    own = own_optimizers(model)
    fused: dict[str, FusedTables] = {}
    collections = {path: child for path, child in model.named_modules() if type(child) is EmbeddingBagCollection}
    for path, collection in collections.items():
        trained_by = own.get(id(collection), embedding_optimizer)
        if trained_by.is_fused(device):
            fused[path] = FusedTables(collection, trained_by, device)
            model = _replace(model, path, fused[path])
            continue
        for bag in collection.embedding_bags.values():
            bag.sparse = not trained_by.trains_all_rows
    if left := [name for name, tensor in _tensors(model) if tensor.is_meta]:
        raise ValueError(f"only tables of fused kernels may lie on the meta device, got {left[0]!r} there")
    model.to(device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers, architecture = _others(model, trainable, embedding_optimizer, dense_optimizer)
    return model, TrainingOptimizer(fused, optimizers, architecture=architecture)


def _others(
    model: nn.Module,
    trainable: Sequence[nn.Parameter],
    embedding_optimizer: EmbeddingOptimizer,
    dense_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> tuple[dict[str, torch.optim.Optimizer], list[torch.optim.Optimizer]]:
    """Optimizers by name of what no kernel trains, and those of architectures.

    Args:
        model: with kernels, or shards, in place of the collections that have them.
        trainable: its parameters that no kernel trains.
        embedding_optimizer: of the collections that are left, where they have none of their own.
        dense_optimizer: of the rest.
    """
    own = own_optimizers(model)
    tables: dict[EmbeddingOptimizer, list[nn.Parameter]] = {}
    for child in model.modules():
        if type(child) is EmbeddingBagCollection:
            tables.setdefault(own.get(id(child), embedding_optimizer), []).extend(child.parameters())
    architecture, excluded = _architecture(model)
    excluded |= {id(weight) for weights in tables.values() for weight in weights}
    optimizers = torch_optimizers(tables)
    if dense := [parameter for parameter in trainable if id(parameter) not in excluded]:
        optimizers["dense"] = dense_optimizer(dense)
    return optimizers, architecture


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _architecture(model: nn.Module) -> tuple[list[torch.optim.Optimizer], set[int]]:
    """The optimizers of what a search learns, and the identities of the parameters that are thus theirs."""
    groups = compressed_groups(model)
    optimizers = [optimizer for group in groups if (optimizer := group.architecture_optimizer()) is not None]
    return optimizers, {id(parameter) for group in groups for parameter in group.architecture_parameters()}


def _replace(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    if not path:
        return new
    parent_path, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, new)
    return model
