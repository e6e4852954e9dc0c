"""Tables of which a search kept a part: the form that trains, with what was dropped masked away.

    plan --Pruned--> trains --convert()--> PackedTables, which serves

Training behind a fixed mask: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
arXiv:1506.02626; after rewinding: Frankle and Carbin, "The Lottery Ticket Hypothesis", arXiv:1803.03635.

Shapes: N ids, B batch, F features, D embedding_dim, T tables, R rows of all tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.method import CompressedTables, Method
from recemb.packed_tables import PackedTables
from recemb.packing import pack, packed_method
from recemb.plan import CompressionPlan, TablePlan
from recemb.pruned_bytes import check_dropped
from recemb.stacked import at_features, features_of_ids, first_rows, per_feature, stacked_table, start_variance
from recemb.table_rows import read_rows

_ROWS_AT_ONCE = 1 << 20


class Pruned(CompressedTables):
    """Gives an id the values of its row that a plan keeps and zeros for others; a dropped id is one that keeps none.

    Trains full-width rows behind a mask: dropped values have no gradient. ``convert`` packs what is kept.

    Memory: training ``R * D * 4`` bytes and one bit a value; serving ``recemb.pruned_bytes.plan_bytes(plan)``.

    Args:
        tables: the logical tables, of one embedding_dim.
        plan: what is kept of each; it may name more tables.
        dropped: what dropped ids get: ``"zero"``, or ``"vector"``: one learned vector a table, which costs ``D * 4``
            bytes and tells a dropped id from an empty bag; None: what the plan says.

    Raises:
        ValueError: a table that the plan does not name or that has another size there, an unknown ``dropped``.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=100, embedding_dim=8, feature_names=["ad"])]
        >>> plan = CompressionPlan({"t_ad": TablePlan(100, 8, kept_rows=torch.arange(100) < 10)}, source="by hand")
        >>> Pruned(tables, plan=plan).convert()
        PackedTables(...)
    """

    def __init__(
        self, tables: Sequence[EmbeddingBagConfig], *, plan: CompressionPlan, dropped: str | None = None
    ) -> None:
        dropped = plan.dropped if dropped is None else dropped
        check_dropped(dropped)
        self.plans = _plans_of(tables, plan)
        width = tables[0].embedding_dim
        rows = [table.num_embeddings for table in tables]
        variances = [start_variance(table) for table in tables]
        if dropped == "vector":
            # Their rows lie behind those of all tables.
            rows, variances = [*rows, *[1] * len(tables)], [*variances, *variances]
        super().__init__(tables, [[stacked_table("pruned", rows, width, variances)]])
        self._width = width
        starts = first_rows(rows)
        self.starts: Tensor
        self.register_buffer("starts", per_feature(tables, starts[: len(tables)]))
        self.dropped_rows: Tensor | None
        dropped_rows = per_feature(tables, starts[len(tables) :]) if dropped == "vector" else None
        self.register_buffer("dropped_rows", dropped_rows)
        # Saved with the rows: a checkpoint of another plan must not pass for one of this.
        self.kept: Tensor
        self.register_buffer("kept", self._packed_masks().to(torch.get_default_device()))
        self._bits: Tensor
        bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
        self.register_buffer("_bits", bits.to(torch.float32), persistent=False)

    def _packed_masks(self) -> Tensor:
        """(R, ceil(D / 8)) uint8: bit ``c % 8`` of byte ``c // 8`` is 1 where column c of a row is kept."""
        if torch.get_default_device().type == "meta":
            num_rows = sum(plan.num_embeddings for plan in self.plans.values())
            return torch.empty(num_rows, -(-self._width // 8), dtype=torch.uint8)
        weights = 1 << torch.arange(8, dtype=torch.uint8, device="cpu")
        parts = []
        for plan in self.plans.values():
            for ids in torch.arange(plan.num_embeddings, device="cpu").split(_ROWS_AT_ONCE):
                mask = torch.nn.functional.pad(plan.mask_of(ids), (0, -self._width % 8))
                parts.append((mask.view(len(ids), -1, 8) * weights).sum(dim=2, dtype=torch.uint8))
        return torch.cat(parts)

    def embed(self, bags: Bags) -> Tensor:
        features = features_of_ids(bags)
        slots = (bags.ids + at_features(self.starts, features)).view(-1)
        kept = self.kept.index_select(0, slots)
        if self.dropped_rows is not None:
            is_dropped = (kept == 0).all(dim=1)
            dropped_rows = at_features(self.dropped_rows, features).expand(bags.ids.shape).reshape(-1)
            slots = torch.where(is_dropped, dropped_rows, slots)
            kept = kept.masked_fill(is_dropped.unsqueeze(1), 255)
        rows = self.lookup_rows(0, [slots])[0]
        bits = self._bits.index_select(0, kept.view(-1).to(torch.int64)).view(len(kept), 8 * kept.shape[1])
        # 0 + row * mask, which leaves no zero a sign; a choice by a boolean mask takes twenty times as long.
        return torch.addcmul(rows.new_zeros(1), rows, bits[:, : self._width])

    def convert(self) -> PackedTables:
        """Packed tables on the CPU, with the rows trained so far.

        Raises:
            ValueError: rows were loaded from a checkpoint of another plan.
        """
        if not torch.equal(self.kept.cpu(), self._packed_masks()):
            raise ValueError("the loaded checkpoint is of another plan than the one these tables were built from")
        starts = first_rows([table.num_embeddings for table in self.tables])
        device = self.starts.device
        vectors = None
        if self.dropped_rows is not None:
            first = sum(table.num_embeddings for table in self.tables)
            vectors = read_rows(self, 0, torch.arange(first, first + len(self.tables), device=device)).cpu()
        return pack(
            self.tables,
            self.plans,
            lambda table, ids: read_rows(self, 0, (ids + starts[table]).to(device)),
            dropped_vectors=vectors,
        )

    def serving_method(self) -> Method:
        dropped = "zero" if self.dropped_rows is None else "vector"
        return packed_method(CompressionPlan(self.plans, source="these tables"), dropped=dropped)

    @torch.no_grad()
    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table, exactly; vectors of dropped ids stay as they are."""
        weight = self.get_parameter("lookups.0.embedding_bags.pruned.weight")
        starts = first_rows([table.num_embeddings for table in self.tables])
        for table, start in zip(self.tables, starts, strict=True):
            rows = full_tables[table.name]
            weight[start : start + table.num_embeddings] = rows.to(weight.device, weight.dtype)
        return [table.name for table in self.tables]


def _plans_of(tables: Sequence[EmbeddingBagConfig], plan: CompressionPlan) -> dict[str, TablePlan]:
    """The plans of these tables, checked against them."""
    for table in tables:
        wanted = (table.num_embeddings, table.embedding_dim)
        found = plan.tables.get(table.name)
        came = None if found is None else (found.num_embeddings, found.embedding_dim)
        if came != wanted:
            raise ValueError(
                f"table {table.name!r}: the plan (of {plan.source}) must be for {wanted} rows and columns, got "
                f"{came or 'none'}; it has {list(plan.tables)}"
            )
    return {table.name: plan.tables[table.name] for table in tables}
