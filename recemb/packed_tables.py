"""Tables of which a search kept a part, as they serve: kept values side by side, nothing of what was dropped.

    id --section, bitmap--> code, row --by code--> dense row of some columns | sparse row | dropped

Shapes: N ids in all bags, D embedding_dim, S sections, W columns of a dense row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.method import CompressedTables
from recemb.pruned_bytes import PackedSizes
from recemb.rank_bitmap import RankBitmap, blocks_for
from recemb.row_sections import DROPPED
from recemb.sparse_rows import Found, MarkedColumns, NumberedColumns
from recemb.stacked import at_features, features_of_ids, first_rows, per_feature

# Stand where dense rows have the number of their pattern.
SPARSE, MARKED = -2, -3
# Dense rows are told apart by their number of columns.
_MARKED_FORM, _SPARSE_FORM, _DROPPED_FORM = -2, -1, 0
# More sections a table than this are searched.
_COMPARED_SECTIONS = 8
_NEVER = 2**63 - 1


class PackedTables(CompressedTables):
    """Gives an id the values that were kept of its row, zeros for others, zeros or a learned vector if it was dropped.

    Made by ``recemb.packing.pack`` from trained rows. It serves: nothing in it trains.

    Memory: 4 bytes a kept value, and the smallest of these maps a table: 26 bytes a run of ids, 1.25 bits an id, or
    for values kept one by one either a column's number each (1 byte up to D = 256) and 1.25 bytes a row, or 1.25 bits a
    column of every row.

    Args:
        tables: the logical tables, of one embedding_dim.
        sizes: of all tensors, one entry for each embedding_dim there is.

    Raises:
        ValueError: no sizes for this embedding_dim and number of tables.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], *, sizes: Sequence[PackedSizes]) -> None:
        width = tables[0].embedding_dim
        found = [item for item in sizes if (item.embedding_dim, item.num_tables) == (width, len(tables))]
        if len(found) != 1:
            raise ValueError(
                f"sizes must have one entry for {len(tables)} tables of embedding_dim {width}, got "
                f"{[(item.num_tables, item.embedding_dim) for item in sizes]}"
            )
        [self.sizes] = found
        stored = [_storage(f"packed__dense{columns}", rows, columns) for columns, rows in self.sizes.dense]
        if self.sizes.num_sparse_values:
            stored.append(_storage("packed__sparse", self.sizes.num_sparse_values, 1))
        if self.sizes.num_marked_values:
            stored.append(_storage("packed__marked", self.sizes.num_marked_values, 1))
        if self.sizes.num_vectors:
            stored.append(_storage("packed__dropped", self.sizes.num_vectors, width))
        super().__init__(tables, [stored] if stored else [])
        self.requires_grad_(False)
        sections = self.sizes.num_sections
        self.section_starts: Tensor
        self.register_buffer("section_starts", torch.zeros(sections, dtype=torch.int64))
        self.section_rows: Tensor
        self.register_buffer("section_rows", torch.zeros(sections, dtype=torch.int64))
        self.section_bits: Tensor
        self.register_buffer("section_bits", torch.full((sections,), -1, dtype=torch.int64))
        self.section_patterns: Tensor
        self.register_buffer("section_patterns", torch.full((sections,), DROPPED, dtype=torch.int16))
        self.patterns: Tensor
        self.register_buffer("patterns", torch.zeros(self.sizes.num_patterns, width, dtype=torch.bool))
        blocks = blocks_for(self.sizes.num_bits)
        self.bitmap = RankBitmap(blocks) if blocks else None
        rows, values = self.sizes.num_sparse_rows, self.sizes.num_sparse_values
        self.sparse = NumberedColumns(rows, values, width) if values else None
        rows, values = self.sizes.num_marked_rows, self.sizes.num_marked_values
        self.marked = MarkedColumns(rows, width) if values else None
        self.vector_of_table: Tensor | None
        vector_of_table = torch.zeros(len(tables), dtype=torch.int32) if self.sizes.num_vectors else None
        self.register_buffer("vector_of_table", vector_of_table)
        self._first_positions: Tensor
        starts = per_feature(tables, first_rows([table.num_embeddings for table in tables]))
        self.register_buffer("_first_positions", starts, persistent=False)
        self._end_positions: Tensor
        ends = starts + per_feature(tables, [table.num_embeddings for table in tables])
        self.register_buffer("_end_positions", ends, persistent=False)
        self._table_of_feature: Tensor
        self.register_buffer("_table_of_feature", per_feature(tables, range(len(tables))), persistent=False)

    def values(self, name: str) -> Tensor:
        """The values called ``packed__<name>``: ``dense<columns>``, ``sparse``, ``marked`` or ``dropped``."""
        return self.get_parameter(f"lookups.0.embedding_bags.packed__{name}.weight")

    @torch.no_grad()
    def embed(self, bags: Bags) -> Tensor:
        features = features_of_ids(bags)
        positions = bags.ids + at_features(self._first_positions, features)
        section, rows, is_kept = self._locate(positions.view(-1), self._sections(positions, features).view(-1))
        num_columns = self.patterns.sum(dim=1)
        # A section's patterns from 0 are dense; MARKED, SPARSE and DROPPED are negative and count from the end.
        forms = torch.cat([num_columns, num_columns.new_tensor([_MARKED_FORM, _SPARSE_FORM, _DROPPED_FORM])])
        form = forms.index_select(0, self.section_patterns.to(torch.int64) % len(forms)).index_select(0, section)
        if is_kept is not None:
            # _DROPPED_FORM is 0.
            form.mul_(is_kept)
        vectors = self._read_dense(form, section, rows)
        for number, name, columns in ((_SPARSE_FORM, "sparse", self.sparse), (_MARKED_FORM, "marked", self.marked)):
            if columns is not None:
                chosen = (form == number).nonzero().view(-1)
                self._scatter(vectors, chosen, columns.find(rows.index_select(0, chosen)), self.values(name))
        if self.vector_of_table is not None:
            chosen = (form == _DROPPED_FORM).nonzero().view(-1)
            table = self._tables_of_ids(bags, features).index_select(0, chosen)
            vector = self.vector_of_table.index_select(0, table)
            vectors.index_copy_(0, chosen, self.values("dropped").index_select(0, vector))
        return vectors

    def _sections(self, positions: Tensor, features: Tensor | None) -> Tensor:
        """Section of each position, ids counted through all tables: the last that starts at it or before it."""
        if self.sizes.max_sections > _COMPARED_SECTIONS:
            return torch.searchsorted(self.section_starts, positions, right=True).sub_(1)
        # Few sections a table are faster compared one by one than searched among all.
        first = torch.searchsorted(self.section_starts, self._first_positions)
        end = torch.searchsorted(self.section_starts, self._end_positions)
        section = at_features(first, features).expand(positions.shape).clone()
        for number in range(1, self.sizes.max_sections):
            start = self.section_starts[(first + number).clamp_(max=self.sizes.num_sections - 1)]
            start = torch.where(first + number < end, start, _NEVER)
            section += positions >= at_features(start, features)
        return section

    def _locate(self, positions: Tensor, section: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Section and row among those of its form, both (N,) int64, of each position; (N,) whether there is a row."""
        if self.bitmap is None:
            return section, positions - (self.section_starts - self.section_rows).index_select(0, section), None
        for layer in range(self.sizes.num_layers):
            start = self.section_starts.index_select(0, section)
            offset = positions - start
            first_bit = self.section_bits.index_select(0, section)
            has_bits = first_bit >= 0
            is_set, rank = self.bitmap(offset.add(first_bit).mul_(has_bits))
            is_kept = is_set.logical_or_(has_bits.logical_not())
            if layer + 1 < self.sizes.num_layers:
                # An id without its bit may have one in the section before, over the same ids.
                before = (section - 1).clamp_(min=0)
                is_layered = self.section_starts.index_select(0, before) == start
                section = torch.where(is_kept.logical_not() & is_layered, before, section)
        rows = self.section_rows.index_select(0, section).add_(torch.where(has_bits, rank, offset))
        return section, rows, is_kept

    def _read_dense(self, form: Tensor, section: Tensor, rows: Tensor) -> Tensor:
        """(N, D) vectors of ids with dense rows, zeros for others."""
        width = self.sizes.embedding_dim
        if self.sparse is None and self.marked is None and [columns for columns, _ in self.sizes.dense] == [width]:
            # Most ids have a row, of full width: read one for all, and clear the others.
            is_dropped = form == _DROPPED_FORM
            vectors = self.values(f"dense{width}").index_select(0, rows.masked_fill(is_dropped, 0))
            return vectors.index_fill_(0, is_dropped.nonzero().view(-1), 0.0)
        vectors = torch.zeros(len(rows), width, device=rows.device)
        # Which patterns keep their first columns and no others.
        order = torch.arange(width, device=rows.device)
        is_prefix = (self.patterns == (order < self.patterns.sum(dim=1, keepdim=True))).all(dim=1)
        spread = set(self.patterns[~is_prefix].sum(dim=1).tolist())
        for columns, _ in self.sizes.dense:
            chosen = (form == columns).nonzero().view(-1)
            packed = self.values(f"dense{columns}").index_select(0, rows.index_select(0, chosen))
            if columns in spread:
                pattern = self.section_patterns.index_select(0, section.index_select(0, chosen))
                vectors.index_copy_(0, chosen, self._spread(packed, pattern.to(torch.int64)))
            else:
                vectors.narrow(1, 0, columns).index_copy_(0, chosen, packed)
        return vectors

    def _spread(self, packed_NW: Tensor, patterns_N: Tensor) -> Tensor:
        """(N, W) kept values -> (N, D), zeros in the columns that are not kept."""
        absent = packed_NW.shape[1]
        source = torch.where(self.patterns, self.patterns.cumsum(dim=1) - 1, absent)
        return nn.functional.pad(packed_NW, (0, 1)).gather(1, source.index_select(0, patterns_N))

    def _scatter(self, vectors: Tensor, targets: Tensor, found: Found, values: Tensor) -> None:
        """Write the found values into rows ``targets`` ((M,) int64) of ``vectors``."""
        owners, columns, places = found
        positions = targets.index_select(0, owners).mul_(vectors.shape[1]).add_(columns)
        vectors.view(-1).index_copy_(0, positions, values.view(-1).index_select(0, places))

    def _tables_of_ids(self, bags: Bags, features: Tensor | None) -> Tensor:
        tables = at_features(self._table_of_feature, features)
        return tables.expand(bags.ids.shape).reshape(-1)


def _storage(name: str, num_rows: int, width: int) -> EmbeddingBagConfig:
    """Rows that memory reports list as a table; they are read directly, so their width need not be a multiple of 4."""
    return EmbeddingBagConfig(
        name=name, num_embeddings=num_rows, embedding_dim=width, feature_names=[name], init_fn=nn.init.zeros_
    )
