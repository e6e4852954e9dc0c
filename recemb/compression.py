"""Compress the tables of a model that exists already."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compressed_groups
from recemb.method import Method

logger = logging.getLogger(__name__)


def compress_(
    model: nn.Module,
    method: Method | Mapping[str, Method],
    *,
    full_below_rows: int = 0,
    seed_from_weights: bool = False,
) -> nn.Module:
    """Swap every EmbeddingBagCollection and EmbeddingCollection of ``model`` for compressed tables, in place.

    Args:
        model: holds plain TorchRec collections, not yet sharded or fused; or is one.
        method: a method, or several by table-name pattern (first match wins), as for
            ``CompressedEmbeddingBagCollection``. Fit it to a budget first with ``recemb.fit_to_budget``.
        full_below_rows: tables of fewer rows stay full.
        seed_from_weights: start from the rows the model has, where the method can: exactly for tables that stay full,
            approximately for hashed ones (a row starts at the mean of its ids' rows). Tables that cannot be seeded
            are logged, and start at random.

    Returns:
        ``model``, or the collection that takes its place where it is one itself.

    Raises:
        ValueError: no plain collection to compress, tables on the meta device to seed, or what the collections refuse.

    Example:
        >>> from functools import partial
        >>> from torchrec import EmbeddingBagConfig
        >>> from recemb.methods.unified import Unified
        >>> tables = [EmbeddingBagConfig(name="t", num_embeddings=10**5, embedding_dim=8, feature_names=["f"])]
        >>> model = nn.Sequential(EmbeddingBagCollection(tables=tables))
        >>> compress_(model, partial(Unified, num_embeddings=10**4))
        Sequential(...)
    """
    plain = (EmbeddingBagCollection, EmbeddingCollection)
    found = [(path, module) for path, module in model.named_modules() if type(module) in plain]
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no plain EmbeddingBagCollection or EmbeddingCollection; "
            "compress a model before recemb.prepare or DistributedModelParallel"
        )
    for path, module in found:
        new = _compressed(module, method, full_below_rows)
        if seed_from_weights:
            _seed(new, module)
        if not path:
            return new
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    return model


def _compressed(
    module: nn.Module, method: Method | Mapping[str, Method], full_below_rows: int
) -> CompressedEmbeddingBagCollection | CompressedEmbeddingCollection:
    device = next(module.parameters()).device
    with torch.device(device):
        if isinstance(module, EmbeddingBagCollection):
            return CompressedEmbeddingBagCollection(
                module.embedding_bag_configs(),
                method,
                full_below_rows=full_below_rows,
                is_weighted=module.is_weighted(),
            )
        assert isinstance(module, EmbeddingCollection)
        return CompressedEmbeddingCollection(module.embedding_configs(), method, full_below_rows=full_below_rows)


def _seed(new: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection, old: nn.Module) -> None:
    bags = old.embedding_bags if isinstance(old, EmbeddingBagCollection) else old.embeddings
    assert isinstance(bags, nn.ModuleDict)
    if any(weight.is_meta for weight in new.parameters()):
        raise ValueError(
            "seed_from_weights needs tables with rows to write to and to read from, got tables on the meta device "
            "(of the model, or because of unfilled_tables)"
        )
    rows: dict[str, Tensor] = {name: bag.get_parameter("weight").detach() for name, bag in bags.items()}
    seeded = {name for group in compressed_groups(new) for name in group.seed_from(rows)}
    if missing := sorted(set(rows) - seeded):
        logger.warning("tables %s start at random: their method cannot be seeded from full tables", missing)
