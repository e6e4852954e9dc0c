"""OptEmbed: which rows and how many columns of each table a model needs, learnt in one supernet.

Reference: Lyu et al., "OptEmbed: Learning Optimal Embedding Table for Click-through Rate Prediction", CIKM 2022,
arXiv:2208.04482.

The search has three stages. The supernet (here) trains rows under learnable thresholds on their norms, and under widths
drawn anew for every sample and table, so that every prefix of columns learns to do without the others. Evolution
(``recemb.training.evolution``) looks for one width per table by the validation AUC of the frozen supernet. The retrain
stage trains what is kept, from the initial weights of the supernet, under fixed masks.

Differs from the paper:

* Bags: rows are masked before pooling; one width per sample and table serves all ids of a bag and all features of the
  table (a target item and its history), because attention compares their columns.
* The paper trains rows by Adam with L2 weight decay of all N rows in every step. Fused kernels move only the rows of
  the batch and decay none. ``optimizer=dense_adam`` does as the paper does, 16 to 400 times slower; ``optimizer=adam``
  (sparse on CPU) moves the rows of the batch alone, and decays none.
* With ``dropped="vector"`` the vector is learnt in the retraining and keeps all columns; the released code's ``oov``
  mode trains it in the supernet too, and cuts it to the field's width.
* Tables as the search left them stay where they validate better than the retrained ones (``RetrainStage``).
* Thresholds per value: exp(-t) is summed over the values of the batch instead of all N. The others get no gradient of
  the loss either, and what they miss of the penalty is learning_rate * alpha a step.

Shapes: N ids, B batch, F features, T logical tables, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.budget import BudgetOutOfReach
from recemb.method import CompressedTables, physical_table
from recemb.optimizers import EmbeddingOptimizer
from recemb.plan import CompressionPlan, TablePlan
from recemb.pruned_bytes import check_dropped, plan_bytes
from recemb.stacked import first_rows, per_feature, stacked_table, start_variance
from recemb.step_gradient import LongTailedStep

_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class Thresholds:
    """How rows are pruned: a row stays while its norm is above the threshold, which starts at 0.

    Args:
        per: ``"table"`` (one a logical table, the paper's main mode) or ``"value"`` (one a row: 4 bytes each while
            searching, none afterwards).
        norm: 1 (the paper's default) or 2: the norm of the whole row, whatever its width in the sample.
        alpha: weight of the penalty sum of exp(-t), which pushes thresholds up. The paper tries 1e-6 to 1e-4.
        learning_rate: of the plain SGD of thresholds. The paper tries 1e-4 to 1e-2, over some hundred thousand steps:
            what a threshold can move is about ``steps * learning_rate * (alpha + what the loss says)``, so shorter
            runs need more. Rows start at an L1 norm of about ``D * sqrt(1.5 / (N + D))``; choose the two such that
            thresholds come to lie there.

    Raises:
        ValueError: another ``per`` or ``norm``, a negative number.
    """

    per: Literal["table", "value"] = "table"
    norm: int = 1
    alpha: float = 1e-5
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.per not in ("table", "value"):
            raise ValueError(f"thresholds: per must be 'table' or 'value', got {self.per!r}")
        if self.norm not in (1, 2):
            raise ValueError(f"thresholds: norm must be 1 or 2, got {self.norm}")
        for name in ("alpha", "learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"thresholds: {name} must be at least 0, got {getattr(self, name)}")


class OptEmbed(CompressedTables):
    """The supernet: every id has a row of its own, behind a threshold on its norm and a width drawn per sample.

    In training, sample b reads the first ``width[b, t]`` columns of table t, uniform in 1..D; in evaluation all of
    them, or those of ``set_widths``. A row at or below its threshold reads as zero. Gradients reach thresholds, and
    rows through their norm, by the long-tailed estimator (``recemb.step_gradient``).

    Memory: full tables, and 4 bytes a table or row of thresholds; what is saved is saved by the plan.

    Args:
        tables: the logical tables, of one width.
        thresholds: how rows are pruned; None: they are not (OptEmbed-D in the paper, widths only).
        widths: draw widths in training, to be searched afterwards; False: OptEmbed-E, rows only.
        dropped: what ids below their threshold get in the tables of the plan: ``"zero"``, the paper's default, or
            ``"vector"``: one a table, learnt in the retraining. The supernet knows zeros only.
        init: ``"xavier"``: U(+-sqrt(6 / (N + D))) for all rows of all tables, as the paper has it; pruning rates depend
            on it. ``"full"``: each table as TorchRec starts it, U(+-sqrt(1 / num_embeddings)); rows of small tables
            then start far above those of large ones.

    Raises:
        ValueError: neither thresholds nor widths, another ``dropped`` or init.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> OptEmbed(tables, thresholds=Thresholds(alpha=1e-5, learning_rate=1e-4))
        OptEmbed(...)
    """

    searches: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        thresholds: Thresholds | None,
        widths: bool = True,
        dropped: Literal["zero", "vector"] = "zero",
        init: Literal["xavier", "full"] = "xavier",
    ) -> None:
        if thresholds is None and not widths:
            raise ValueError("OptEmbed searches rows (thresholds), widths or both, got neither")
        if init not in ("xavier", "full"):
            raise ValueError(f"init must be 'xavier' or 'full', got {init!r}")
        check_dropped(dropped)
        width = tables[0].embedding_dim
        sizes = [table.num_embeddings for table in tables]
        if init == "xavier":
            rows = physical_table("optembed_rows", sum(sizes), width, (6 / (sum(sizes) + width)) ** 0.5)
        else:
            rows = stacked_table("optembed_rows", sizes, width, [start_variance(table) for table in tables])
        lookups = [[rows]]
        per_value = thresholds is not None and thresholds.per == "value"
        if per_value:
            # Four a row, which is as narrow as fused kernels take them.
            lookups.append([physical_table("optembed_thresholds", -(-sum(sizes) // 4), 4, 0.0)])
        super().__init__(tables, lookups)
        self.options = thresholds
        self.searches_widths = widths
        self._plan_options = {} if dropped == "zero" else {"dropped": dropped}
        self.thresholds: nn.Parameter | None = None
        if thresholds is not None and per_value:
            self.lookup_optimizers[1] = EmbeddingOptimizer("sgd", thresholds.learning_rate)
        elif thresholds is not None:
            self.thresholds = nn.Parameter(torch.zeros(len(tables)))
        # What serving needs is saved, and counted in the model's bytes.
        self.starts: Tensor
        self.register_buffer("starts", per_feature(tables, first_rows(sizes)))
        self._table_of_feature: Tensor
        self.register_buffer("_table_of_feature", per_feature(tables, range(len(tables))), persistent=False)
        self._columns: Tensor
        self.register_buffer("_columns", torch.arange(width), persistent=False)
        self._widths: Tensor | None
        self.register_buffer("_widths", None, persistent=False)
        self._kept_rows: Tensor | None
        self.register_buffer("_kept_rows", None, persistent=False)
        # Rows looked up last, for the penalty of thresholds per value.
        self._last_rows: Tensor | None = None

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        rows = bags.ids + bags.per_id(self.starts)
        return [[rows]] if len(self.lookups) == 1 else [[rows], [rows >> 2]]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        vectors = rows[0][0]
        if self.options is not None:
            if len(rows) > 1:
                row_numbers = (bags.ids + bags.per_id(self.starts)).view(-1)
                thresholds = rows[1][0].gather(1, (row_numbers & 3).unsqueeze(1)).squeeze(1)
                if self.training:
                    self._last_rows = row_numbers
            else:
                assert self.thresholds is not None
                thresholds = _for_ids(bags, self.thresholds[self._table_of_feature])
            vectors = vectors * LongTailedStep.apply(self._norms(vectors) - thresholds).unsqueeze(1)
        if not self.training and self._kept_rows is not None:
            kept = self._kept_rows.index_select(0, (bags.ids + bags.per_id(self.starts)).view(-1))
            vectors = vectors * kept.unsqueeze(1)
        if self.training and self.searches_widths:
            return vectors * self._prefixes(_for_bags(bags, self.sample_widths(bags.batch_size)))
        if self._widths is not None:
            return vectors * self._prefixes(_for_ids(bags, self._widths[self._table_of_feature]))
        return vectors

    def sample_widths(self, batch_size: int) -> Tensor:
        """(B, F) int64 widths of a training batch: uniform in 1..D for every sample and table."""
        widths = torch.randint(1, len(self._columns) + 1, (batch_size, len(self.tables)), device=self._columns.device)
        return widths if len(self.tables) == len(self.feature_names) else widths[:, self._table_of_feature]

    def set_widths(self, widths: Mapping[str, int] | None) -> None:
        """Evaluate, and plan, with these widths: table name -> 1..D, all tables; None: with all columns.

        Raises:
            ValueError: a table is missing or unknown, or a width outside 1..D.
        """
        if widths is None:
            self._widths = None
            return
        names, full = [table.name for table in self.tables], len(self._columns)
        if sorted(widths) != sorted(names):
            raise ValueError(f"widths must be of tables {names}, got {list(widths)}")
        for name, width in widths.items():
            if not 1 <= width <= full:
                raise ValueError(f"table {name!r}: width must be in [1, {full}] (embedding_dim), got {width}")
        self._widths = torch.tensor([widths[name] for name in names], device=self._columns.device)

    def set_kept_rows(self, plan: CompressionPlan | None) -> None:
        """Evaluate with the rows that ``plan`` keeps, where a budget leaves fewer than thresholds do; None: all."""
        if plan is None:
            self._kept_rows = None
            return
        kept = [plan.tables[table.name].kept_rows for table in self.tables]
        parts = [
            torch.ones(table.num_embeddings, dtype=torch.bool) if rows is None else rows
            for table, rows in zip(self.tables, kept, strict=True)
        ]
        self._kept_rows = torch.cat(parts).to(self._columns.device)

    def penalty(self) -> Tensor | None:
        """alpha * sum of exp(-t), over all tables, or over the distinct values of the last training batch."""
        if self.options is None:
            return None
        if self.thresholds is not None:
            return self.options.alpha * torch.exp(-self.thresholds).sum()
        if self._last_rows is None:
            return None
        return self.options.alpha * torch.exp(-self._thresholds_of(self._last_rows.unique())).sum()

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [] if self.thresholds is None else [self.thresholds]

    def architecture_optimizer(self) -> torch.optim.Optimizer | None:
        """Plain SGD of the thresholds of tables; those of values are rows, which the kernels train by SGD."""
        if self.thresholds is None or self.options is None:
            return None
        return torch.optim.SGD([self.thresholds], lr=self.options.learning_rate)

    @torch.no_grad()
    def margins(self) -> dict[str, Tensor]:
        """Table name -> (num_embeddings,) norm of each row minus its threshold: rows above 0 are kept.

        On the CPU; over ranks all of them must call it.
        """
        sizes = [table.num_embeddings for table in self.tables]
        of_table = self.starts.new_zeros(len(self.tables), dtype=torch.float32)
        if self.thresholds is not None:
            of_table = self.thresholds.detach()
        chunks = []
        for rows in torch.arange(sum(sizes), device=self.starts.device).split(_CHUNK_ROWS):
            norms = self._norms(self.lookup_rows(0, [rows])[0])
            chunks.append(norms - self._thresholds_of(rows) if len(self.lookups) > 1 else norms)
        return {
            table.name: (part - threshold).cpu()
            for table, part, threshold in zip(self.tables, torch.cat(chunks).split(sizes), of_table, strict=True)
        }

    def search_figures(self) -> dict[str, float]:
        """Rows above their threshold."""
        if self.options is None:
            return {}
        return {"kept_rows": sum(int((margin > 0).sum()) for margin in self.margins().values())}

    def folded_tables(self) -> dict[str, Tensor]:
        """Rows as they read in evaluation: zero below their threshold and beyond the widths that were set."""
        tables = self.stored_tables()
        for name, table_plan in self.derive_plan(None).tables.items():
            tables[name] *= table_plan.mask().to(tables[name].device)
        return tables

    def begin_training(self, total_steps: int, budget_bytes: int | None) -> None:
        """Refuse a budget out of reach before anything is trained.

        Raises:
            BudgetOutOfReach: all rows stay, and one column of every table exceeds the budget.
        """
        if self.options is None and budget_bytes is not None:
            _check_reach(self._plan(None, 1), budget_bytes)

    def derive_plan(self, budget_bytes: int | None) -> CompressionPlan:
        """Rows above their thresholds, and the widths that were set.

        Under a budget that they exceed, rows of the smallest margin over their threshold go first, over all tables;
        where rows are not searched, one cap on all widths goes down.

        Raises:
            ValueError: a budget that not even the smallest such plan meets; it says what that takes.
        """
        margins = self.margins() if self.options is not None else None
        if margins is None:
            # Rows stay; ``steps`` from all columns to one.
            steps = len(self._columns) - 1
            return _largest_within(lambda step: self._plan(None, len(self._columns) - step), steps, budget_bytes)
        kept = torch.cat(list(margins.values()))
        kept = kept[kept > 0].sort().values
        if len(kept) == 0:
            raise ValueError("no row is above its threshold; lower thresholds.alpha or thresholds.learning_rate")

        def cut(num_dropped: int) -> CompressionPlan:
            least = 0.0 if num_dropped == 0 else float(kept[num_dropped - 1])
            return self._plan({name: margin > least for name, margin in margins.items()}, len(self._columns))

        return _largest_within(cut, len(kept) - 1, budget_bytes)

    def _plan(self, kept_rows: Mapping[str, Tensor] | None, widest: int) -> CompressionPlan:
        full = len(self._columns)
        widths = [full] * len(self.tables) if self._widths is None else self._widths.tolist()
        plans = {}
        for table, width in zip(self.tables, widths, strict=True):
            rows = None if kept_rows is None or bool(kept_rows[table.name].all()) else kept_rows[table.name]
            columns = torch.arange(full).unsqueeze(0) < min(width, widest)
            plans[table.name] = TablePlan(
                table.num_embeddings, full, kept_rows=rows, kept_columns=None if bool(columns.all()) else columns
            )
        return CompressionPlan(plans, "OptEmbed", self._plan_options)

    def _norms(self, rows_ND: Tensor) -> Tensor:
        assert self.options is not None
        return torch.linalg.vector_norm(rows_ND, ord=self.options.norm, dim=1)

    def _thresholds_of(self, rows: Tensor) -> Tensor:
        return self.lookup_rows(1, [rows >> 2])[0].gather(1, (rows & 3).unsqueeze(1)).squeeze(1)

    def _prefixes(self, widths_N: Tensor) -> Tensor:
        """(N, D) bool: the first ``widths`` columns."""
        return self._columns < widths_N.unsqueeze(1)


def _for_ids(bags: Bags, constants_F: Tensor) -> Tensor:
    """(F,) constants -> one for each id, (N,)."""
    spread = bags.per_id(constants_F)
    return spread.expand(bags.ids.shape).reshape(-1) if bags.single else spread


def _for_bags(bags: Bags, values_BF: Tensor) -> Tensor:
    """(B, F) values of bags -> one for each id, (N,)."""
    if bags.single:
        return values_BF.view(-1)
    return torch.repeat_interleave(values_BF.t().reshape(-1), bags.lengths.view(-1), output_size=bags.ids.numel())


def _largest_within(
    plan: Callable[[int], CompressionPlan], last_step: int, budget_bytes: int | None
) -> CompressionPlan:
    """The first of ``plan(0)``, ``plan(1)``, ..., which grow smaller, that meets the budget, by bisection."""
    largest = plan(0)
    if budget_bytes is None or plan_bytes(largest) <= budget_bytes:
        return largest
    _check_reach(plan(last_step), budget_bytes)
    low, high = 0, last_step
    while high - low > 1:
        middle = (low + high) // 2
        if plan_bytes(plan(middle)) <= budget_bytes:
            high = middle
        else:
            low = middle
    return plan(high)


def _check_reach(smallest: CompressionPlan, budget_bytes: int) -> None:
    if (least := plan_bytes(smallest)) > budget_bytes:
        raise BudgetOutOfReach(f"budget of {budget_bytes:,} bytes: the smallest plan of OptEmbed takes {least:,} bytes")
