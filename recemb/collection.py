"""Drop-in replacements of TorchRec's collections, with any compression method behind them.

Shapes: F features, B batch, N ids in all bags.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from recemb.bags import one_empty_sample
from recemb.id_checks import IdChecks
from recemb.method import UNBOUNDED, CompressedTables, Method, method_class
from recemb.methods.full import Full
from recemb.optimizers import EmbeddingOptimizer
from recemb.shared_features import select_keys, with_own_features


class CompressedEmbeddingBagCollection(nn.Module):
    """Called like TorchRec's EmbeddingBagCollection: KeyedJaggedTensor in, KeyedTensor out.

    It holds TorchRec collections (it is none: TorchRec silently does not shard subclasses), so
    ``recemb.prepare`` or DistributedModelParallel find and replace them.

    Args:
        tables: logical tables; outputs come in this order, feature after feature, as TorchRec's.
        method: what realises the tables, a class of ``recemb.methods`` or a functools.partial of one; or several by
            table-name pattern (``{"t_user*": ..., "*": ...}``, first match wins), each taking its tables as a group.
        full_below_rows: tables of fewer rows stay full; compressing them saves nothing worth a collision.
        is_weighted: ids come with float32 weights (``KeyedJaggedTensor.weights()``) that scale their vectors before
            the sum; every table must be sum-pooled.
        check_ids: raise on ids outside [0, num_embeddings), naming feature, row and value, at about 1% of a step.
            Switched off, a wrong id of a full table fails in the kernel, that of a hashed one reads some row.

    Raises:
        ValueError: no tables, duplicate names, a feature named twice by one table, a name TorchRec refuses later,
            unbounded ids with a method that cannot hash.

    Example:
        >>> from functools import partial
        >>> from recemb.methods.unified import Unified
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> collection = CompressedEmbeddingBagCollection(tables, partial(Unified, num_embeddings=10**5))
        >>> ids = KeyedJaggedTensor(["ad"], torch.tensor([7, 8, 9]), lengths=torch.tensor([1, 2]))
        >>> collection(ids)["ad"].shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        method: Method | Mapping[str, Method],
        *,
        full_below_rows: int = 0,
        is_weighted: bool = False,
        check_ids: bool = True,
    ) -> None:
        super().__init__()
        check_tables(tables)
        averaged = [table.name for table in tables if table.pooling == PoolingType.MEAN]
        if is_weighted and averaged:
            raise ValueError(f"tables {averaged}: per-id weights need sum pooling, got mean")
        groups = make_groups(with_own_features(tables), method, full_below_rows)
        for group in groups if is_weighted else []:
            group.expect_weights()
        self._hold(tables, groups, is_weighted, check_ids)

    @classmethod
    def of_groups(
        cls,
        tables: Sequence[EmbeddingBagConfig],
        groups: Sequence[CompressedTables],
        *,
        is_weighted: bool = False,
        check_ids: bool = True,
    ) -> Self:
        """A collection of groups that exist already, which hold exactly ``tables``: how saved models are put together.

        Raises:
            ValueError: as the constructor, and groups of other tables.
        """
        check_tables(tables)
        _check_groups(with_own_features(tables), groups)
        for group in groups if is_weighted else []:
            group.expect_weights()
        collection = cls.__new__(cls)
        nn.Module.__init__(collection)
        collection._hold(tables, groups, is_weighted, check_ids)
        return collection

    def _hold(
        self,
        tables: Sequence[EmbeddingBagConfig],
        groups: Sequence[CompressedTables],
        is_weighted: bool,
        check_ids: bool,
    ) -> None:
        self._is_weighted = is_weighted
        self._tables = list(tables)
        self.groups = nn.ModuleList(groups)
        self._group_features = [group.feature_names for group in groups]
        own = with_own_features(tables)
        self._keys = [name for table in tables for name in table.feature_names]
        self._feature_names = [name for table in own for name in table.feature_names]
        self._dims = [table.embedding_dim for table in tables for _ in table.feature_names]
        self._ids = IdChecks(own) if check_ids else None

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The logical tables, as given."""
        return self._tables

    def is_weighted(self) -> bool:
        """Whether ids come with weights."""
        return self._is_weighted

    def checks_ids(self) -> bool:
        """Whether ids outside [0, num_embeddings) are refused with an error that names them."""
        return self._ids is not None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors, keyed by feature (``feature@table`` for one of several tables): values (B, sum of
        embedding_dims) float32.

        Args:
            features: int64 ids under at least the keys of the tables, in any order; a batch may have no samples.

        Raises:
            ValueError: a key is missing, ids are not int64 or int32, or outside [0, num_embeddings), weights are
                missing, or came for tables that were built without.
        """
        if features.stride() == 0:
            # Through the tables all the same: where they are sharded, the other ranks wait for this one.
            pooled = self(one_empty_sample(features))
            return KeyedTensor(pooled.keys(), pooled.length_per_key(), pooled.values()[:0])
        if (features.weights_or_none() is not None) != self._is_weighted:
            came = "none" if self._is_weighted else "some"
            raise ValueError(f"KeyedJaggedTensor: weights must come exactly where is_weighted, got {came}")
        features = select_keys(features, self._keys, self._feature_names)
        if self._ids is not None:
            self._ids.check(features)
        # Tables stay float32 where the dense layers run under autocast, products inside methods included.
        with torch.autocast(features.values().device.type, enabled=False):
            outputs = [
                group(select_keys(features, names))
                for group, names in zip(self.groups, self._group_features, strict=True)
            ]
        values = outputs[0] if len(outputs) == 1 else self._join(outputs)
        return KeyedTensor(self._feature_names, self._dims, values)

    def _join(self, outputs: list[Tensor]) -> Tensor:
        """Columns of the groups -> the order of the tables."""
        dims = dict(zip(self._feature_names, self._dims, strict=True))
        columns: dict[str, Tensor] = {}
        for output, names in zip(outputs, self._group_features, strict=True):
            columns.update(zip(names, output.split([dims[name] for name in names], dim=1), strict=True))
        return torch.cat([columns[name] for name in self._feature_names], dim=1)


class CompressedEmbeddingCollection(nn.Module):
    """Called like TorchRec's EmbeddingCollection: one vector an id, unpooled, for sequences.

    Features of one table (a target item and a user's history) read the same physical rows.

    Args:
        tables: logical tables, of any widths.
        method: as for ``CompressedEmbeddingBagCollection``.
        full_below_rows: tables of fewer rows stay full.
        check_ids: raise on ids outside [0, num_embeddings).

    Raises:
        ValueError: as ``CompressedEmbeddingBagCollection``.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingConfig],
        method: Method | Mapping[str, Method],
        *,
        full_below_rows: int = 0,
        check_ids: bool = True,
    ) -> None:
        super().__init__()
        bags = _as_bags(tables)
        check_tables(bags)
        self._hold(tables, make_groups(with_own_features(bags), method, full_below_rows, unpooled=True), check_ids)

    @classmethod
    def of_groups(
        cls, tables: Sequence[EmbeddingConfig], groups: Sequence[CompressedTables], *, check_ids: bool = True
    ) -> Self:
        """A collection of groups that exist already, which hold exactly ``tables``: how saved models are put together.

        Raises:
            ValueError: as the constructor, and groups of other tables.
        """
        bags = _as_bags(tables)
        check_tables(bags)
        _check_groups(with_own_features(bags), groups)
        collection = cls.__new__(cls)
        nn.Module.__init__(collection)
        collection._hold(tables, groups, check_ids)
        return collection

    def _hold(self, tables: Sequence[EmbeddingConfig], groups: Sequence[CompressedTables], check_ids: bool) -> None:
        self._tables = list(tables)
        self.groups = nn.ModuleList(groups)
        self._group_features = [group.feature_names for group in groups]
        own = with_own_features(_as_bags(tables))
        self._keys = [name for table in tables for name in table.feature_names]
        self._feature_names = [name for table in own for name in table.feature_names]
        self._ids = IdChecks(own) if check_ids else None

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The logical tables, as given."""
        return self._tables

    def checks_ids(self) -> bool:
        """Whether ids outside [0, num_embeddings) are refused with an error that names them."""
        return self._ids is not None

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Feature -> JaggedTensor of values (ids of the feature, embedding_dim) with the lengths of ``features``.

        Raises:
            ValueError: as ``CompressedEmbeddingBagCollection.forward``.
        """
        if features.stride() == 0:
            return {
                name: JaggedTensor(bags.values(), lengths=bags.lengths()[:0], offsets=bags.offsets()[:1])
                for name, bags in self(one_empty_sample(features)).items()
            }
        features = select_keys(features, self._keys, self._feature_names)
        if self._ids is not None:
            self._ids.check(features)
        output: dict[str, JaggedTensor] = {}
        for group, names in zip(self.groups, self._group_features, strict=True):
            part = select_keys(features, names)
            with torch.autocast(part.values().device.type, enabled=False):
                vectors = cast(CompressedTables, group).vectors(part)
            for name, values in zip(names, vectors.split(part.length_per_key()), strict=True):
                bags = part[name]
                output[name] = JaggedTensor(values, lengths=bags.lengths(), offsets=bags.offsets())
        return {name: output[name] for name in self._feature_names}


def _as_bags(tables: Sequence[EmbeddingConfig]) -> list[EmbeddingBagConfig]:
    """What methods are built for, whether their collection pools or not."""
    return [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=table.feature_names,
        )
        for table in tables
    ]


def _check_groups(tables: Sequence[EmbeddingBagConfig], groups: Sequence[CompressedTables]) -> None:
    wanted = {table.name: table.feature_names for table in tables}
    held = {table.name: table.feature_names for group in groups for table in group.tables}
    if held != wanted or sum(len(group.tables) for group in groups) != len(tables):
        raise ValueError(f"groups must hold each of tables {wanted} once, got {held}")


def make_groups(
    tables: Sequence[EmbeddingBagConfig],
    method: Method | Mapping[str, Method],
    full_below_rows: int,
    *,
    unpooled: bool = False,
) -> list[CompressedTables]:
    """One method instance for each set of tables it may take together.

    Raises:
        ValueError: a table that no pattern matches, or unbounded ids with a method that cannot hash them.
    """
    methods = method if isinstance(method, Mapping) else {"*": method}
    small = [table for table in tables if table.num_embeddings < full_below_rows]
    chosen: dict[str, list[EmbeddingBagConfig]] = {pattern: [] for pattern in methods}
    for table in tables:
        if table.num_embeddings >= full_below_rows:
            pattern = next((pattern for pattern in methods if fnmatch.fnmatchcase(table.name, pattern)), None)
            if pattern is None:
                raise ValueError(f"table {table.name!r}: no pattern of {list(methods)} matches; add '*' for the others")
            chosen[pattern].append(table)
    groups = [Full(part) for part in _parts(small, Full, unpooled)]
    made: list[CompressedTables] = [*groups]
    for pattern, matched in chosen.items():
        cls = method_class(methods[pattern])
        for part in _parts(matched, cls, unpooled):
            names = [table.name for table in part if table.num_embeddings == UNBOUNDED]
            if names and not cls.supports_unbounded:
                raise ValueError(f"tables {names} have unbounded (hashed) ids, which {cls.__name__} cannot take")
            made.append(methods[pattern](part))
    return made


def _parts(
    tables: list[EmbeddingBagConfig], cls: type[CompressedTables], unpooled: bool
) -> list[list[EmbeddingBagConfig]]:
    """The tables as groups: by width where the method or the output needs one, single where it looks them up apart."""
    if unpooled and not cls.stacks_tables:
        return [[table] for table in tables]
    if not (cls.one_width or unpooled):
        return [tables] if tables else []
    widths = sorted({table.embedding_dim for table in tables})
    return [[table for table in tables if table.embedding_dim == width] for width in widths]


def compressed_groups(module: nn.Module) -> list[CompressedTables]:
    """Every method instance inside ``module``."""
    return [child for child in module.modules() if isinstance(child, CompressedTables)]


def own_optimizers(module: nn.Module) -> dict[int, EmbeddingOptimizer]:
    """``id`` of each collection that its method has trained otherwise than the run's tables -> how."""
    return {
        id(group.lookups[index]): optimizer
        for group in compressed_groups(module)
        for index, optimizer in enumerate(group.lookup_optimizers)
        if optimizer is not None
    }


def check_tables(tables: Sequence[EmbeddingBagConfig]) -> None:
    """Refuse what TorchRec would refuse later, or silently misread.

    Raises:
        ValueError: naming the table, what is required and what came.
    """
    if not tables:
        raise ValueError("tables must hold at least one EmbeddingBagConfig, got none")
    names: set[str] = set()
    for table in tables:
        if table.name in names:
            raise ValueError(f"table {table.name!r}: table names must be unique, got it twice")
        names.add(table.name)
        if "." in table.name or "@" in table.name:
            raise ValueError(
                f"table {table.name!r}: table names must not hold '.' or '@' (state-dict keys of TorchRec)"
            )
        if not 1 <= table.num_embeddings <= UNBOUNDED:
            raise ValueError(
                f"table {table.name!r}: num_embeddings must be at most {UNBOUNDED} (64-bit hashes) and at least 1, "
                f"got {table.num_embeddings}"
            )
        if table.embedding_dim < 4 or table.embedding_dim % 4:
            raise ValueError(
                f"table {table.name!r}: embedding_dim must be a multiple of 4 (fused kernels), "
                f"got {table.embedding_dim}"
            )
        if len(set(table.feature_names)) < len(table.feature_names):
            raise ValueError(f"table {table.name!r}: features must be named once, got {table.feature_names}")
