"""A model as JSON data: its class, what it was built with, and the tables inside, group by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)

from recemb.arguments import MODULE, TARGET, Unwritable, class_path, decode, import_class
from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.method import CompressedTables
from recemb.shared_features import with_own_features

Collection = CompressedEmbeddingBagCollection | CompressedEmbeddingCollection
_COLLECTIONS = (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)


def collections_of(model: nn.Module) -> dict[str, Collection]:
    """Path inside the model -> each of its collections."""
    return {path: module for path, module in model.named_modules() if isinstance(module, _COLLECTIONS)}


def describe(model: nn.Module) -> dict[str, Any]:
    """What ``build`` needs to make ``model`` again, with other values.

    Raises:
        ValueError: a class that did not remember its arguments, or arguments that JSON cannot hold.
    """
    if isinstance(model, _COLLECTIONS):
        return _describe_collection(model)
    arguments = _arguments(model)
    modules = {name: value[MODULE] for name, value in arguments.items() if isinstance(value, dict) and MODULE in value}
    held = dict(model.named_modules())
    for name, path in modules.items():
        if path not in held:
            raise ValueError(f"{type(model).__name__} must hold its argument {name!r}, a module, at {path!r}")
        arguments[name] = {MODULE: describe(held[path])}
    return {TARGET: class_path(type(model)), "arguments": arguments}


def build(description: Mapping[str, Any], *, check_ids: bool = True) -> nn.Module:
    """The model of a description, with fresh values.

    Args:
        description: of ``describe``.
        check_ids: of every collection, whatever those had that were described: training loops switch it off.

    Raises:
        ValueError: a class that cannot be imported or that is no module, or what its constructor refuses.
    """
    cls = import_class(description[TARGET])
    if not issubclass(cls, nn.Module):
        raise ValueError(f"{description[TARGET]} must be a torch.nn.Module")
    if issubclass(cls, _COLLECTIONS):
        return _build_collection(cls, description, check_ids)
    arguments = {
        name: build(value[MODULE], check_ids=check_ids)
        if isinstance(value, dict) and MODULE in value
        else decode(value)
        for name, value in description["arguments"].items()
    }
    return cls(**arguments)


def _describe_collection(collection: Collection) -> dict[str, Any]:
    weighted = collection.is_weighted() if isinstance(collection, CompressedEmbeddingBagCollection) else False
    tables: Sequence[BaseEmbeddingConfig] = (
        collection.embedding_bag_configs()
        if isinstance(collection, CompressedEmbeddingBagCollection)
        else collection.embedding_configs()
    )
    groups = []
    for group in cast(list[CompressedTables], list(collection.groups)):
        arguments = _arguments(group)
        del arguments["tables"]
        names = [table.name for table in group.tables]
        groups.append({TARGET: class_path(type(group)), "tables": names, "arguments": arguments})
    return {
        TARGET: class_path(type(collection)),
        "tables": [_describe_table(table) for table in tables],
        "groups": groups,
        # For older versions of recemb, which build by it.
        "checks_ids": collection.checks_ids(),
        "is_weighted": weighted,
    }


def _build_collection(cls: type, description: Mapping[str, Any], check_ids: bool) -> Collection:
    pooled = issubclass(cls, CompressedEmbeddingBagCollection)
    tables = [_build_table(item) for item in description["tables"]]
    own = {table.name: table for table in with_own_features(tables)}
    groups = []
    for item in description["groups"]:
        group_class = import_class(item[TARGET])
        if not issubclass(group_class, CompressedTables):
            raise ValueError(f"{item[TARGET]} must be a method of recemb")
        arguments = {name: decode(value) for name, value in item["arguments"].items()}
        groups.append(group_class([own[name] for name in item["tables"]], **arguments))
    if pooled:
        return CompressedEmbeddingBagCollection.of_groups(
            tables, groups, is_weighted=description["is_weighted"], check_ids=check_ids
        )
    unpooled = [
        EmbeddingConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=table.feature_names,
        )
        for table in tables
    ]
    return CompressedEmbeddingCollection.of_groups(unpooled, groups, check_ids=check_ids)


def _describe_table(table: BaseEmbeddingConfig) -> dict[str, Any]:
    if table.data_type != DataType.FP32:
        raise ValueError(f"table {table.name!r}: values must be float32, got {table.data_type}")
    pooling = table.pooling.value if isinstance(table, EmbeddingBagConfig) else PoolingType.SUM.value
    return {
        "name": table.name,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "features": list(table.feature_names),
        "pooling": pooling,
    }


def _build_table(item: Mapping[str, Any]) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=item["name"],
        num_embeddings=item["num_embeddings"],
        embedding_dim=item["embedding_dim"],
        feature_names=list(item["features"]),
        pooling=PoolingType(item["pooling"]),
    )


def _arguments(module: nn.Module) -> dict[str, Any]:
    """What a module was built with.

    Raises:
        ValueError: nobody remembered it, or JSON cannot hold it.
    """
    found = getattr(module, "remembered_arguments", None)
    if found is None:
        name, paths = type(module).__name__, list(collections_of(module))
        message = (
            f"{name} must remember what it was built with to be saved whole: decorate its __init__ with "
            f"recemb.arguments.remember_arguments, that of a subclass where {name} is not your own"
        )
        if paths:
            message += (
                f"; or save its collections, recemb.save(model.get_submodule(path), ...) for path in {paths}, and "
                "model.state_dict() for the rest"
            )
        raise ValueError(message)
    for name, value in found.items():
        if isinstance(value, Unwritable) and name != "tables":
            raise ValueError(
                f"{type(module).__name__}: argument {name!r} cannot be saved ({value.reason}); if it is a form that "
                "trains, save what recemb.convert makes of it"
            )
    return dict(found)
