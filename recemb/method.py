"""The contract of a compression method: what turns ids of logical tables into rows of physical ones.

    ids --remap--> slots --lookup in physical tables--> rows --compose--> vectors --pool--> (B, sum of embedding_dims)

A *logical table* is what a CTR model asks for, a TorchRec EmbeddingBagConfig. A *method* realises a group of logical
tables with *physical tables* that a TorchRec EmbeddingBagCollection owns, so that TorchRec shards them, fbgemm's fused
kernels train them and checkpoints hold them. A new method is one file in ``recemb/methods`` and one in
``configs/embedding``; nothing else names it.

Shapes: F features, B batch, N ids in all bags, D embedding_dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recemb.arguments import remember_arguments
from recemb.bags import Bags
from recemb.distinct import DistinctIds
from recemb.initial_rows import device_of
from recemb.plan import CompressionPlan

if TYPE_CHECKING:
    from recemb.optimizers import EmbeddingOptimizer

# num_embeddings of a table whose ids are 64-bit hashes in [0, 2**63): no vocabulary, for methods that hash.
UNBOUNDED = 2**63 - 1
# Values of the widest row: fbgemm's CPU kernels keep copies of a row on the stack, and 32,768 values end the process.
WIDEST_ROW = 16_384

# A method's class, or a functools.partial of it with its options bound: call it with the logical tables.
Method = Callable[[Sequence[EmbeddingBagConfig]], "CompressedTables"]


class CompressedTables(nn.Module):
    """Base of every method: owns the physical tables of a group of logical ones.

    A subclass says in ``__init__`` which physical tables it keeps and implements ``remap`` and ``compose``; one whose
    composition is linear may override ``forward`` to pool inside the kernel. Everything that serving needs is a
    parameter or a persistent buffer (salts, codes, maps), because that is what memory reports count.

    Args:
        tables: the logical tables, in output order.
        lookups: the physical tables, as groups that are looked up together: every table of a group gets the same
            number of slots, in one kernel call. Dimensions must be multiples of 4 (fused kernels).

    Attributes:
        physical_tables: ``lookups`` as given; sharded collections do not tell.
        equal_batches: set by sharding where ranks must look up equally many bags, see ``read``.
        frozen: look rows up without training them, see ``frozen_tables``.
        lookup_optimizers: one for each group of ``lookups`` that trains otherwise than the run's tables do, None for
            the others; a method sets them in its ``__init__``.
        searches: trains what a search needs, more than it will serve: its plan decides on bytes, and what is built
            ``from_plan`` has them. A byte budget is then one for ``derive_plan``.
        reader: takes the place of ``read_rows`` where it is set, called as reader(tables, index, features); see
            ``recemb.row_decay``.
        budget_knob: constructor argument that a byte budget turns (an integer), None where size is fixed.
        supports_unbounded: takes tables of ``UNBOUNDED`` ids.
        stacks_tables: reads all tables of a group at once; where not, unpooled collections make a group per table.
        one_width: every table of a group must have the same embedding_dim; collections then make a group per width.
        merges_ids: embed each distinct id of a batch once. It costs about half a lookup an id, and click logs repeat
            three ids of four, so it pays from two lookups an id on.
    """

    searches: ClassVar[bool] = False
    budget_knob: ClassVar[str | None] = None
    supports_unbounded: ClassVar[bool] = False
    one_width: ClassVar[bool] = True
    merges_ids: ClassVar[bool] = False
    stacks_tables: ClassVar[bool] = True

    def __init__(self, tables: Sequence[EmbeddingBagConfig], lookups: Sequence[Sequence[EmbeddingBagConfig]]) -> None:
        super().__init__()
        self.tables = list(tables)
        self.physical_tables = [list(group) for group in lookups]
        self.feature_names = [name for table in tables for name in table.feature_names]
        self.equal_batches = False
        owners = [index for index, table in enumerate(tables) for _ in table.feature_names]
        sizes = [table.num_embeddings for table in tables]
        self._distinct_ids = DistinctIds(sizes, owners) if self.merges_ids else None
        self.frozen = False
        self.reader: Callable[[CompressedTables, int, KeyedJaggedTensor], Tensor] | None = None
        self.lookup_optimizers: list[EmbeddingOptimizer | None] = [None] * len(self.physical_tables)
        self.lookups = nn.ModuleList(
            EmbeddingBagCollection(tables=list(group), device=device_of(group)) for group in lookups
        )
        is_mean = [table.pooling == PoolingType.MEAN for table in tables for _ in table.feature_names]
        self._is_mean: Tensor | None
        self.register_buffer("_is_mean", torch.tensor(is_mean) if any(is_mean) else None, persistent=False)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A saved model says of every group what it was built with.
        if "__init__" in cls.__dict__:
            cls.__init__ = remember_arguments(cls.__dict__["__init__"])  # type: ignore[method-assign]

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        """Ids -> slots: for each group of ``lookups``, for each of its tables, (N,) int64 in ``bags.ids`` order."""
        raise NotImplementedError

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        """Rows of the physical tables (nested as ``remap`` returned slots, each (N, dim)) -> (N, D) vectors."""
        raise NotImplementedError

    def embed(self, bags: Bags) -> Tensor:
        """The vector of every id, before pooling: (N, D), in the order of ``bags.ids.view(-1)``."""
        merged = None if self._distinct_ids is None else self._distinct_ids.merge(bags)
        if merged is None:
            return self.embed_each(bags)
        distinct, bags = merged
        return distinct.expand(self.embed_each(bags))

    def embed_each(self, bags: Bags) -> Tensor:
        """``embed``, id by id; with ``merges_ids`` it gets distinct ones, never in the ``single`` layout on CPU."""
        slots = self.remap(bags)
        if (came := _nesting(slots)) != (wanted := [["Tensor"] * len(group) for group in self.physical_tables]):
            raise ValueError(
                f"{type(self).__name__}.remap must return {wanted}: a list for each group of lookups, in it the slots "
                f"of each of its tables; got {came}"
            )
        rows = [self.lookup_rows(index, group) for index, group in enumerate(slots)]
        return self.composed(rows, bags, bags.ids.numel())

    def composed(self, rows: list[list[Tensor]], bags: Bags, num_vectors: int) -> Tensor:
        """``compose`` with its shape checked, which no layer after it would notice; rows may be sums over bags."""
        vectors = self.compose(rows, bags)
        if vectors.shape != (wanted := (num_vectors, self.tables[0].embedding_dim)):
            got = tuple(vectors.shape)
            raise ValueError(f"{type(self).__name__}.compose must return shape {wanted} (N, embedding_dim), got {got}")
        return vectors

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """(B, sum of embedding_dims over features) float32; features in ``feature_names`` order."""
        bags = Bags.of(features)
        return bags.pool(self.embed(bags), self._is_mean)

    def vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """The vector of every id, unpooled: (N, D) in the order of ``features.values()``."""
        return self.embed(Bags.of(features, allow_single=False))

    def expect_weights(self) -> None:
        """Called once where ids come with weights. ``Bags.pool`` applies them; kernels that pool must be told."""

    def after_step(self, step: int) -> None:
        """Called on every rank after optimizer step ``step`` (1 is the first): where a method reorganises itself.

        The training loop of recemb does; a loop of one's own calls it for each of ``compressed_groups(model)``.
        Nothing by default.
        """

    @property
    def settled(self) -> bool:
        """False while a search is not what it is to be yet (not pruned enough): validations do not count until then."""
        return True

    def penalty(self) -> Tensor | None:
        """A term of the training loss, of the ids that were looked up last; None: none."""
        return None

    def architecture_parameters(self) -> list[nn.Parameter]:
        """What a search learns besides weights (thresholds, selections): ``architecture_optimizer`` alone moves it."""
        return []

    def architecture_optimizer(self) -> torch.optim.Optimizer | None:
        """A new optimizer of ``architecture_parameters``; None where there are none."""
        return None

    def derive_plan(self, budget_bytes: int | None) -> CompressionPlan:
        """The end of a search: what is kept.

        Args:
            budget_bytes: serving bytes of the tables that may be used; None: as many as the search found useful.

        Raises:
            ValueError: a budget that the method cannot meet, or not be asked for.
            TypeError: a method that searches nothing.
        """
        raise TypeError(f"{type(self).__name__} searches nothing, so there is no plan to derive")

    @classmethod
    def from_plan(cls, plan: CompressionPlan) -> Method:
        """The tables that a plan of this search asks for, to be trained and converted."""
        # Here, because it is a method itself.
        from recemb.methods.pruned import Pruned

        return functools.partial(Pruned, plan=plan)

    def begin_training(self, total_steps: int, budget_bytes: int | None) -> None:
        """Told before a stage how long it is and how many bytes the plan may take: to prune meanwhile, or to refuse."""

    def search_figures(self) -> dict[str, float]:
        """How far a search is (rows kept, mean width), logged with every validation, on every rank alike."""
        return {}

    def stored_tables(self) -> dict[str, Tensor]:
        """Table name -> (num_embeddings, D) rows, where each id has one; a copy. {} where ids share rows.

        What tables built from a plan are rewound to. By default those of a search, whose first physical table holds
        the rows of one logical table after the other. Over ranks all of them must call it.
        """
        if not self.searches:
            return {}
        # Here, because it reads methods.
        from recemb.table_rows import read_stack

        sizes = [table.num_embeddings for table in self.tables]
        parts = read_stack(self, 0, sum(sizes)).split(sizes)
        return {table.name: part for table, part in zip(self.tables, parts, strict=True)}

    def folded_tables(self) -> dict[str, Tensor]:
        """``stored_tables`` with what the search learnt beside the rows: the vectors of all ids."""
        return self.stored_tables()

    def convert(self) -> CompressedTables:
        """The form that serves: the same vectors bit for bit in evaluation, in as few bytes as they need."""
        return self

    def serving_method(self) -> Method | None:
        """What builds the form that ``convert`` returns, empty, so that a byte budget is one for its bytes.

        None: this form is counted, because it serves itself or because only trained values decide on the other.
        """
        return None

    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Start from trained full tables, where the method can.

        Args:
            full_tables: table name -> (num_embeddings, embedding_dim) float32.

        Returns:
            Names of the tables that were taken over, wholly or approximately; none by default.
        """
        return []

    def lookup_rows(self, index: int, slots: Sequence[Tensor]) -> list[Tensor]:
        """Rows of each table of ``lookups[index]`` at its (N,) slots, as bags of one id: 8x faster than no pooling."""
        num_rows = slots[0].numel()
        if num_rows == 0:
            # TorchRec has no batch of no bags: one empty bag, dropped again.
            offsets = torch.zeros(len(slots) + 1, dtype=torch.int64, device=slots[0].device)
            pooled = self.lookup_bags(index, slots, offsets, 1)[:0]
        else:
            offsets = torch.arange(num_rows * len(slots) + 1, device=slots[0].device)
            pooled = self.lookup_bags(index, slots, offsets, num_rows)
        return list(pooled.split(self._dims(index), dim=1)) if len(slots) > 1 else [pooled]

    def lookup_bags(self, index: int, slots: Sequence[Tensor], offsets: Tensor, num_bags: int) -> Tensor:
        """Sums over bags of slots: (num_bags, sum of the tables' dims).

        Args:
            index: which group of ``lookups``.
            slots: one flat int64 tensor per table of the group.
            offsets: (tables * num_bags + 1,) int64 start of each bag, table after table.
            num_bags: bags per table.
        """
        features = KeyedJaggedTensor(
            keys=[name for config in self.physical_tables[index] for name in config.feature_names],
            values=slots[0].view(-1) if len(slots) == 1 else torch.cat([slot.view(-1) for slot in slots]),
            offsets=offsets,
            stride=num_bags,
        )
        return self.read(index, features)

    def read(self, index: int, features: KeyedJaggedTensor) -> Tensor:
        """Pooled rows of ``lookups[index]``: (bags per key, sum of dims).

        Where ``equal_batches`` is set, every rank is brought to the largest number of bags of any, with empty ones:
        gloo cannot gather the gradients of row-wise shards otherwise.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.reader(self, index, features) if self.reader is not None else self.read_rows(index, features)

    def read_rows(self, index: int, features: KeyedJaggedTensor) -> Tensor:
        """``read``, without ``frozen`` and ``reader``."""
        if not self.equal_batches:
            return self._in_order(index, self.collection(index)(features))
        num_bags = features.stride()
        largest = torch.tensor(num_bags)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        lengths = torch.nn.functional.pad(
            features.lengths().view(len(features.keys()), num_bags), (0, int(largest) - num_bags)
        )
        padded = KeyedJaggedTensor(
            keys=features.keys(),
            values=features.values(),
            weights=features.weights_or_none(),
            lengths=lengths.view(-1),
            stride=int(largest),
        )
        return self._in_order(index, self.collection(index)(padded))[:num_bags]

    def _in_order(self, index: int, output: KeyedTensor) -> Tensor:
        """Values in table order: sharded collections order their output by where tables lie."""
        keys = [name for config in self.physical_tables[index] for name in config.feature_names]
        return output.values() if output.keys() == keys else torch.cat([output[key] for key in keys], dim=1)

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        """Smallest and largest useful value of ``budget_knob``; bytes are monotone between them."""
        return 1, sum(table.num_embeddings for table in tables)

    def collection(self, index: int) -> EmbeddingBagCollection:
        """``lookups[index]``: TorchRec's collection, or the fused or sharded one in its place, called alike."""
        return cast(EmbeddingBagCollection, self.lookups[index])

    def _dims(self, index: int) -> list[int]:
        return [config.embedding_dim for config in self.physical_tables[index]]


def _nesting(slots: object) -> object:
    if isinstance(slots, list | tuple):
        return [_nesting(item) for item in slots]
    return "Tensor" if isinstance(slots, Tensor) else type(slots).__name__


@contextmanager
def frozen_tables(module: nn.Module) -> Iterator[None]:
    """Inside, lookups read the tables without training them, even where kernels train inside ``backward()``.

    For architecture steps: gradients reach ``architecture_parameters`` and the dense layers, no row moves.
    """
    groups = [child for child in module.modules() if isinstance(child, CompressedTables)]
    for group in groups:
        group.frozen = True
    try:
        yield
    finally:
        for group in groups:
            group.frozen = False


def method_class(method: Method) -> type[CompressedTables]:
    """The class behind a method, whatever its options.

    Raises:
        ValueError: not a class of recemb.methods, nor a functools.partial of one.
    """
    inner = method.func if isinstance(method, functools.partial) else method
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not (isinstance(inner, type) and issubclass(inner, CompressedTables)):
        raise ValueError(f"method must be a class of recemb.methods or a functools.partial of one, got {inner!r}")
    return inner


def physical_table(
    name: str, num_embeddings: int, embedding_dim: int, init_bound: float | Callable[[Tensor], Tensor | None]
) -> EmbeddingBagConfig:
    """A physical table that is looked up under its own name.

    Args:
        name: unique in the model; no "." or "@" (TorchRec).
        num_embeddings: rows.
        embedding_dim: width, a multiple of 4 up to ``WIDEST_ROW``.
        init_bound: initial values are U(-init_bound, init_bound), or a function that fills the weight in place.
    """
    if embedding_dim % 4 or embedding_dim > WIDEST_ROW:
        raise ValueError(
            f"physical table {name!r}: embedding_dim must be a multiple of 4 up to {WIDEST_ROW:,} (fused kernels), got "
            f"{embedding_dim:,}"
        )
    init = init_bound if callable(init_bound) else functools.partial(nn.init.uniform_, a=-init_bound, b=init_bound)
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        feature_names=[name],
        pooling=PoolingType.SUM,
        init_fn=init,
    )


def full_table_variance(tables: Iterable[EmbeddingBagConfig]) -> float:
    """Variance of the values of full tables, over all rows, at TorchRec's init U(+-sqrt(1 / num_embeddings)).

    Methods whose rows serve several tables start at this variance.
    """
    bounded = [table for table in tables if table.num_embeddings < UNBOUNDED]
    rows = sum(table.num_embeddings for table in bounded)
    # Each table has num_embeddings rows of variance 1 / (3 * num_embeddings).
    return len(bounded) / (3 * rows) if rows else 1e-4


def uniform_bound(variance: float) -> float:
    """The a for which U(-a, a) has this variance."""
    return math.sqrt(3 * variance)
