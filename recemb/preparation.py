"""From a model that defines its tables to one that trains them fast: fused kernels for TorchRec's plain collections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.fused import FusedTables
from recemb.optimizers import EmbeddingOptimizer, TrainingOptimizer
from recemb.sharding import dense_parameters, shard


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
    a batch does not touch keep their moments).

    Args:
        model: any module that holds TorchRec or recemb collections, or is one.
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
        ValueError: tables that fused kernels or the planner cannot take; on every rank alike.

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
        dense = dense_parameters(sharded)
        return sharded, TrainingOptimizer({}, {"dense": dense_optimizer(dense)} if dense else {}, table_optimizer)
    collections = {path: child for path, child in model.named_modules() if type(child) is EmbeddingBagCollection}
    fused: dict[str, FusedTables] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    table_parameters: list[nn.Parameter] = []
    if embedding_optimizer.is_fused(device):
        for path, collection in collections.items():
            fused[path] = FusedTables(collection, embedding_optimizer, device)
            model = _replace(model, path, fused[path])
    else:
        for collection in collections.values():
            for bag in collection.embedding_bags.values():
                bag.sparse = True
                table_parameters.append(bag.weight)
    model.to(device)
    if table_parameters:
        optimizers["sparse"] = torch.optim.SparseAdam(
            table_parameters, lr=embedding_optimizer.learning_rate, eps=embedding_optimizer.eps
        )
    tables = {id(parameter) for parameter in table_parameters}
    dense = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in tables]
    if dense:
        optimizers["dense"] = dense_optimizer(dense)
    return model, TrainingOptimizer(fused, optimizers)


def _replace(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    if not path:
        return new
    parent_path, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, new)
    return model
