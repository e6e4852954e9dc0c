"""From a model that defines its tables to one that trains them fast: fused kernels for TorchRec's plain collections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.collection import compressed_groups, own_optimizers
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
        architecture, excluded = _architecture(sharded)
        dense = [parameter for parameter in dense_parameters(sharded) if id(parameter) not in excluded]
        return sharded, TrainingOptimizer(
            {}, {"dense": dense_optimizer(dense)} if dense else {}, table_optimizer, architecture
        )
    own = own_optimizers(model)
    fused: dict[str, FusedTables] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    sparse: dict[EmbeddingOptimizer, list[nn.Parameter]] = {}
    collections = {path: child for path, child in model.named_modules() if type(child) is EmbeddingBagCollection}
    for path, collection in collections.items():
        trained_by = own.get(id(collection), embedding_optimizer)
        if trained_by.is_fused(device):
            fused[path] = FusedTables(collection, trained_by, device)
            model = _replace(model, path, fused[path])
            continue
        for bag in collection.embedding_bags.values():
            bag.sparse = True
            sparse.setdefault(trained_by, []).append(bag.weight)
    model.to(device)
    if sparse:
        optimizers["sparse"] = torch.optim.SparseAdam(
            [{"params": weights, "lr": by.learning_rate, "eps": by.eps} for by, weights in sparse.items()]
        )
    architecture, excluded = _architecture(model)
    excluded |= {id(weight) for weights in sparse.values() for weight in weights}
    dense = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in excluded]
    if dense:
        optimizers["dense"] = dense_optimizer(dense)
    return model, TrainingOptimizer(fused, optimizers, architecture=architecture)


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
