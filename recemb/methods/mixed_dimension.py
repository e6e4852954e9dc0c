"""Mixed dimensions: large tables take narrow rows, projected to the common width.

Reference: Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems",
arXiv:1909.11810.

Differs from the paper: popularity is the size of a table; widths are 1, 2 or a multiple of 4, because fused kernels
take rows of multiples of 4 floats (rows of width 1 and 2 are stored four and two to a row, and share the accumulator
of a row-wise optimizer); a table that projecting would not make smaller stays full; rows start with the variance that
gives projected vectors that of a full table, where the paper leaves vectors of narrow tables smaller.

Shapes: N ids, B batch, F features, D embedding_dim, G features of one width, d that width, P = max(4 / d, 1) ids that
share a stored row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.method import CompressedTables
from recemb.stacked import bag_offsets, first_rows, per_feature, stacked_table, start_variance

ROUNDINGS = ("power_of_two", "nearest")


class MixedDimension(CompressedTables):
    """Gives id ``i`` of table ``t`` row ``i`` of width ``d_t``, times a (d_t, D) matrix of the table where d_t < D.

    ``d_t = lambda * num_embeddings_t ** -temperature``, rounded to a width that can be stored, in [1, D]; lambda is the
    largest for which the tables take no more than ``num_parameters`` floats (where tables would
    round up together, smaller ones go first). What is left then goes to the tables that would be next in line and are
    small enough for it.

    Memory: ``num_embeddings_t * d_t + d_t * D`` floats a projected table, ``num_embeddings_t * D`` a full one.

    Args:
        tables: the logical tables.
        num_parameters: floats in all, matrices included; what a byte budget turns. One float an id is the least.
        widths: table name -> width in {1, 2, 4, 8, 12, ..., D}, chosen by others than the rule above; instead of
            num_parameters, temperature and rounding.
        temperature: how much narrower larger tables are: 0 gives all one width, 0.3 is the paper's choice for DLRM on
            Criteo, 1 as many floats to each table.
        rounding: ``"power_of_two"`` or ``"nearest"`` width that can be stored; the latter meets budgets more closely.

    Raises:
        ValueError: num_parameters below 1, a temperature outside [0, 1], an unknown rounding; both or neither of
            num_parameters and widths; a table without a width, or of one that cannot be stored.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> MixedDimension(tables, num_parameters=10**6)
        MixedDimension(...)
    """

    budget_knob: ClassVar[str | None] = "num_parameters"

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_parameters: int | None = None,
        widths: Mapping[str, int] | None = None,
        temperature: float = 0.3,
        rounding: str = "nearest",
    ) -> None:
        if (num_parameters is None) == (widths is None):
            raise ValueError(
                f"MixedDimension: give a budget (num_parameters) or widths, one of them; "
                f"got num_parameters={num_parameters}, widths={widths}"
            )
        if num_parameters is not None:
            self.widths = choose_widths(
                [table.num_embeddings for table in tables],
                tables[0].embedding_dim,
                num_parameters,
                temperature=temperature,
                rounding=rounding,
            )
        else:
            self.widths = [_given_width(table, widths or {}) for table in tables]
        parts = [_Part(tables, self.widths, width) for width in sorted(set(self.widths))]
        super().__init__(tables, [[part.physical_table()] for part in parts])
        self.parts = nn.ModuleList(parts)
        # Feature -> its part, and its place there.
        places = {
            feature: (number, place) for number, part in enumerate(parts) for place, feature in enumerate(part.features)
        }
        self._places = [places[feature] for feature in range(len(places))]

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        bags = Bags.of(features)
        columns = [self._pooled(number, bags) for number in range(len(self.parts))]
        return torch.cat([columns[number][place] for number, place in self._places], dim=1)

    def embed(self, bags: Bags) -> Tensor:
        assert not bags.single
        columns = []
        for number in range(len(self.parts)):
            part = self._part(number)
            chosen = part.select(bags)
            rows = self._rows(number, chosen).split(chosen.lengths.sum(dim=1).tolist())
            columns.append(rows if part.projection is None else part.project_each(rows))
        return torch.cat([columns[number][place] for number, place in self._places])

    def _pooled(self, number: int, bags: Bags) -> tuple[Tensor, ...]:
        """(B, D) of each feature of a part: pooled at their own width, then projected, which commutes."""
        part = self._part(number)
        chosen = part.select(bags)
        mean = None if self._is_mean is None else self._is_mean.index_select(0, part.feature_index)
        if chosen.single or chosen.weights is not None or part.per_row > 1:
            pooled = chosen.pool(self._rows(number, chosen), mean)
        else:
            lengths = chosen.lengths.view(-1)
            sums = self.lookup_bags(number, [part.slots(chosen)], bag_offsets(lengths), lengths.numel())
            pooled = chosen.lay_out(sums, mean)
        return part.project(pooled.view(bags.batch_size, len(part.features), part.width))

    def _rows(self, number: int, chosen: Bags) -> Tensor:
        """(N, d) rows of the ids of a part."""
        part = self._part(number)
        rows = self.lookup_rows(number, [part.slots(chosen)])[0]
        if part.per_row == 1:
            return rows
        # Rows of 4 floats hold the vectors of several ids: one of them is picked.
        positions = torch.arange(rows.shape[0], device=rows.device) * part.per_row
        return rows.view(-1, part.width).index_select(0, positions + (chosen.ids.view(-1) & (part.per_row - 1)))

    def _part(self, number: int) -> _Part:
        part = self.parts[number]
        assert isinstance(part, _Part)
        return part

    @torch.no_grad()
    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table: exactly where it stays full, else by its best approximation of rank d."""
        for number in range(len(self.parts)):
            part = self._part(number)
            name = part.physical_table().name
            weight = self.get_parameter(f"lookups.{number}.embedding_bags.{name}.weight")
            for index, (table, first) in enumerate(zip(part.tables, part.first_rows(), strict=True)):
                rows = full_tables[table.name].to(weight.device, torch.float32)
                if part.projection is not None:
                    # The leading eigenvectors of the Gram matrix are the leading right singular vectors of the table.
                    basis = torch.linalg.eigh((rows.T @ rows).double())[1][:, -part.width :].float()
                    rows = rows @ basis
                    part.projection[index].copy_(basis.T)
                missing = -rows.shape[0] % part.per_row
                stored = nn.functional.pad(rows, (0, 0, 0, missing)).reshape(-1, weight.shape[1])
                weight[first : first + stored.shape[0]].copy_(stored)
        return [table.name for table in self.tables]

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        return 1, sum(table.num_embeddings * table.embedding_dim for table in tables)


class _Part(nn.Module):
    """The tables of one width: their rows' places in the stacked table, and their matrices.

    Args:
        tables: all logical tables.
        widths: of each.
        width: that of this part.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.width = width
        self.dim = tables[0].embedding_dim
        self.per_row = max(4 // width, 1)
        self.tables = [table for table, own in zip(tables, widths, strict=True) if own == width]
        owners = [index for index, table in enumerate(tables) for _ in table.feature_names]
        self.features = [feature for feature, owner in enumerate(owners) if widths[owner] == width]
        self._is_all = len(self.features) == len(owners)
        self.feature_index: Tensor
        self.register_buffer("feature_index", torch.tensor(self.features), persistent=False)
        self.starts: Tensor
        self.register_buffer("starts", per_feature(self.tables, self.first_rows()))
        self._owner: Tensor
        self.register_buffer("_owner", per_feature(self.tables, range(len(self.tables))), persistent=False)
        self._one_feature_each = len(self.features) == len(self.tables)
        self.projection: nn.Parameter | None = None
        if width < self.dim:
            bound = math.sqrt(6 / (width + self.dim))
            self.projection = nn.Parameter(torch.empty(len(self.tables), width, self.dim).uniform_(-bound, bound))

    def num_rows(self) -> list[int]:
        """Stored rows of each table."""
        return [-(-table.num_embeddings // self.per_row) for table in self.tables]

    def first_rows(self) -> list[int]:
        """Where each table's rows begin."""
        return first_rows(self.num_rows())

    def physical_table(self) -> EmbeddingBagConfig:
        # A Xavier matrix has variance 2 / (d + D), and an element of a vector is a sum of d products.
        spread = 1.0 if self.projection is None else (self.width + self.dim) / (2 * self.width)
        variances = [spread * start_variance(table) for table in self.tables]
        return stacked_table(f"mixed_dimension__{self.width}", self.num_rows(), max(self.width, 4), variances)

    def select(self, bags: Bags) -> Bags:
        """The bags of this part's features."""
        return bags if self._is_all else bags.select(self.feature_index)

    def slots(self, chosen: Bags) -> Tensor:
        """Stored rows of the ids of ``select``."""
        return (chosen.ids >> self.per_row.bit_length() - 1) + chosen.per_id(self.starts)

    def project(self, pooled_BGd: Tensor) -> tuple[Tensor, ...]:
        """(B, G, d) -> (B, D) for each feature."""
        if self.projection is None:
            return pooled_BGd.unbind(1)
        return torch.bmm(pooled_BGd.transpose(0, 1), self._matrices()).unbind(0)

    def project_each(self, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(N_g, d) rows of each feature -> (N_g, D) of each."""
        return tuple(part @ matrix for part, matrix in zip(rows, self._matrices(), strict=True))

    def _matrices(self) -> Tensor:
        """(G, d, D), one a feature."""
        assert self.projection is not None
        return self.projection if self._one_feature_each else self.projection.index_select(0, self._owner)


def choose_widths(
    num_embeddings: Sequence[int], dim: int, num_parameters: int, *, temperature: float, rounding: str
) -> list[int]:
    """The popularity rule: a width for each table, in {1, 2, 4, 8, 12, ..., dim} or the powers of two and dim.

    Args:
        num_embeddings: rows of each table.
        dim: D, the largest width.
        num_parameters: floats in all that widths may take, unless all at 1 take more.
        temperature: exponent of the rule.
        rounding: see ``MixedDimension``.

    Returns:
        A width for each table; no table takes more floats, matrix included, than a full one.
    """
    if num_parameters < 1:
        raise ValueError(f"num_parameters must be at least 1 float, got {num_parameters}")
    if not 0 <= temperature <= 1:
        raise ValueError(f"temperature must be in [0, 1], got {temperature}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")
    widths = storable_widths(dim)
    if rounding == "power_of_two":
        widths = [width for width in widths if width & (width - 1) == 0 or width == dim]
    # The scale at which the rule first rounds a table's width up to each next one. Tables grow in this order, whatever
    # the budget. A larger budget first differs where it takes a step that a smaller one cannot, so it never takes fewer
    # floats in all; a table may get less where another's step uses what had been left over for it.
    steps = sorted(
        (_boundary(low, high, rounding) * size**temperature, size, index, high)
        for index, size in enumerate(num_embeddings)
        for low, high in itertools.pairwise(widths)
    )
    chosen = [widths[0]] * len(num_embeddings)
    # A table too large for what is left keeps its width; smaller ones behind it use up the rest.
    stopped: set[int] = set()
    total = sum(stored_floats(size, widths[0], dim) for size in num_embeddings)
    for _, size, index, width in steps:
        more = stored_floats(size, width, dim) - stored_floats(size, chosen[index], dim)
        if index not in stopped and total + more <= num_parameters:
            total += more
            chosen[index] = width
        else:
            stopped.add(index)
    return [
        dim if stored_floats(size, width, dim) == size * dim else width
        for size, width in zip(num_embeddings, chosen, strict=True)
    ]


def _given_width(table: EmbeddingBagConfig, widths: Mapping[str, int]) -> int:
    """The table's, or all of its dim where projecting would not make it smaller."""
    dim, width = table.embedding_dim, widths.get(table.name)
    if width not in storable_widths(dim):
        raise ValueError(
            f"table {table.name!r}: width must be one of {storable_widths(dim)}, got {width} of tables {list(widths)}"
        )
    return dim if stored_floats(table.num_embeddings, width, dim) == table.num_embeddings * dim else width


def storable_widths(dim: int) -> list[int]:
    """1, 2, 4, 8, 12, ..., dim."""
    return [1, 2, *range(4, dim + 1, 4)]


def _boundary(low: int, high: int, rounding: str) -> float:
    """Between two widths: what is above rounds up."""
    return math.sqrt(low * high) if rounding == "power_of_two" else (low + high) / 2


def stored_floats(num_embeddings: int, width: int, dim: int) -> int:
    """Floats of a table of this width, its matrix included; those of a full one where that is not less."""
    per_row = max(4 // width, 1)
    projected = -(-num_embeddings // per_row) * max(width, 4) + width * dim
    return min(projected, num_embeddings * dim)
