"""DNIS, later AutoSrh: which columns ids of each frequency need, learnt as a soft selection of blocks of ids.

References: Cheng, Shen and Huang, "Differentiable Neural Input Search for Recommender Systems", arXiv:2006.04466;
Kong et al., "AutoSrh: An Embedding Dimensionality Search Framework for Tabular Data Prediction", TKDE 35(7), 2023,
which prunes to a memory budget.

A search in stages: rows are trained as usual with every selection at 1 (warm start); then rows of train batches and
selections of architecture batches take turns, first order, as in the released code (``recemb.training.bilevel``); the
selection is folded into the rows and the smallest values are dropped, over all tables alike, to the budget; what
survives is trained on from the folded values (``reset: none``, as the authors' notebook does), or again from the
weights before all training (``rewind``, which the config does: logs of one or two epochs are overfitted by a third).
Tables as they were pruned stay where they validate better (``recemb.training.stages.RetrainStage``).

Differs from the paper: frequencies are train counts (the released code counts the test split as well), ids of equal
count are cut in the order of the tables. Differs from the released code: selections are learnt on rows of their own, so
that early stopping looks at others; budgets are bytes of the tables as they will serve, index included, not numbers of
values; and, with ``structured``, whole columns of a block are dropped, which leaves dense tables behind.

Shapes: N ids, D embedding_dim, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, overload

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.budget import BudgetOutOfReach
from recemb.frequency_blocks import frequency_blocks
from recemb.magnitude import magnitude_plan
from recemb.method import CompressedTables
from recemb.plan import CompressionPlan, TablePlan
from recemb.pruned_bytes import plan_bytes
from recemb.stacked import first_rows, per_feature, seed_full_tables, stacked_table, start_variance
from recemb.table_rows import read_stack

_EPS = 1e-8


class Dnis(CompressedTables):
    """Gives id ``i`` its row times ``selection[block of i]``, (D,) factors in [0, 1] that its block shares.

    Blocks span all tables: ids in descending order of train count, cut by share of ids.

    Memory: full tables, one byte an id of blocks, and L * D floats; what is saved is saved by the plan.

    Args:
        tables: the logical tables.
        block_shares: share of all ids in each block, from the most frequent ones on. The paper takes ten equal shares,
            or ``[0.1, 0.2, 0.2, 0.2, 0.3]``; logs as skewed as Criteo's, whose upper half are ids of a few rows, want
            narrow blocks at the top.
        train_counts: table name -> (num_embeddings,) rows of the train split that have each id. None: ids are taken to
            be numbered by frequency, and those of one number to be as frequent in all tables.
        learning_rate: of the selections. Their gradients average 1 in size, so ``1 / learning_rate`` steps lead from 1
            to 0; a search needs a few times as many.
        l1: weight of the sum of all selections in the loss of architecture batches.
        structured: plan whole columns of a block instead of single values.

    Raises:
        ValueError: bad shares or counts (see ``frequency_blocks``), unbounded ids, a negative rate or weight.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> Dnis(tables, block_shares=[0.1, 0.2, 0.2, 0.2, 0.3])
        Dnis(...)
    """

    searches: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        block_shares: Sequence[float],
        train_counts: Mapping[str, Tensor] | None = None,
        learning_rate: float = 0.01,
        l1: float = 1e-5,
        structured: bool = False,
    ) -> None:
        for name, value in (("learning_rate", learning_rate), ("l1", l1)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        width = tables[0].embedding_dim
        sizes = [table.num_embeddings for table in tables]
        super().__init__(tables, [[stacked_table("dnis", sizes, width, [start_variance(table) for table in tables])]])
        self._learning_rate, self._l1, self._structured = learning_rate, l1, structured
        self.starts: Tensor
        self.register_buffer("starts", per_feature(tables, first_rows(sizes)))
        # Saved with the rows: a checkpoint can be read where there are no counts.
        self.blocks: Tensor
        self.register_buffer("blocks", torch.cat(frequency_blocks(tables, block_shares, train_counts)))
        self.selection = nn.Parameter(torch.ones(len(block_shares), width))

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        return [[bags.ids + bags.per_id(self.starts)]]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        [[stacked]] = self.remap(bags)
        blocks = self.blocks.index_select(0, stacked.view(-1)).to(torch.int32)
        return rows[0][0] * nn.functional.embedding(blocks, self.selection)

    def penalty(self) -> Tensor | None:
        """``l1`` times the sum of the selections."""
        return self._l1 * self.selection.abs().sum()

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [self.selection]

    def architecture_optimizer(self) -> torch.optim.Optimizer | None:
        return SelectionOptimizer([self.selection], self._learning_rate)

    def folded_tables(self) -> dict[str, Tensor]:
        """Table name -> (num_embeddings, D) rows times selection: what full tables would hold to give these vectors.

        Over ranks all of them must call it.
        """
        rows = read_stack(self, 0, sum(table.num_embeddings for table in self.tables))
        rows *= self.selection.detach().index_select(0, self.blocks.to(torch.int32))
        parts = rows.split([table.num_embeddings for table in self.tables])
        return {table.name: part for table, part in zip(self.tables, parts, strict=True)}

    def search_figures(self) -> dict[str, float]:
        """Mean number of columns, over ids, whose selection is not 0, and the mean of all selections."""
        selection = self.selection.detach().cpu()
        sizes = torch.bincount(self.blocks.cpu(), minlength=selection.shape[0]).float()
        shares = sizes / sizes.sum()
        return {
            "mean_dim": float(shares @ (selection > 0).float().sum(dim=1)),
            "mean_selection": float(shares @ selection.mean(dim=1)),
        }

    def derive_plan(self, budget_bytes: int | None) -> CompressionPlan:
        """The largest folded values, or columns of blocks, that fit; without a budget those whose selection is not 0.

        Columns are ranked by the root mean square of their folded values.

        Raises:
            ValueError: a budget that no table at all would meet.
        """
        folded = self.folded_tables()
        if not self._structured:
            return magnitude_plan(folded, budget_bytes, source="dnis")
        return self._plan_columns(folded, budget_bytes)

    def _plan_columns(self, folded: Mapping[str, Tensor], budget_bytes: int | None) -> CompressionPlan:
        num_blocks, width = self.selection.shape
        blocks = self.blocks.cpu()
        values = torch.cat(list(folded.values())).cpu()
        sums = torch.zeros(num_blocks, width).index_add_(0, blocks.to(torch.int32), values.square())
        sizes = torch.bincount(blocks, minlength=num_blocks).clamp(min=1).unsqueeze(1)
        scores = (sums / sizes).view(-1)
        groups = dict(zip(folded, blocks.to(torch.int16).split([len(part) for part in folded.values()]), strict=True))

        def plan(columns: Iterable[int]) -> CompressionPlan:
            kept = torch.zeros(num_blocks * width, dtype=torch.bool)
            kept[list(columns)] = True
            kept_columns = kept.view(num_blocks, width)
            tables = {
                name: TablePlan(part.shape[0], width, kept_columns=kept_columns, row_groups=groups[name])
                for name, part in folded.items()
            }
            return CompressionPlan(tables, "dnis")

        ranked = [index for index in scores.argsort(descending=True).tolist() if scores[index] > 0]
        if budget_bytes is None:
            return plan(ranked)
        return plan(most_that_fit(ranked, lambda columns: plan_bytes(plan(columns)), budget_bytes))

    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table, exactly as long as selections are 1."""
        weight = self.get_parameter("lookups.0.embedding_bags.dnis.weight")
        starts = first_rows([table.num_embeddings for table in self.tables])
        return seed_full_tables([(weight, starts)], self.tables, [True] * len(self.tables), full_tables)


class SelectionOptimizer(torch.optim.Optimizer):
    """Gradient descent on (L, D) selections: each row's gradient is scaled to a mean size of 1, results stay in [0, 1].

    Frequent ids have gradients far above those of rare ones; scaled, all blocks learn at one speed.

    Args:
        parameters: the selections.
        learning_rate: of the scaled gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
        super().__init__(parameters, {"lr": learning_rate})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        assert closure is None, "selections move once a batch"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(scale_rows(parameter.grad), alpha=group["lr"]).clamp_(0.0, 1.0)
        return None


def scale_rows(gradient_LD: Tensor) -> Tensor:
    """Every row divided by the mean size of its elements plus 1e-8: of mean size 1, rows of zeros as they are."""
    return gradient_LD / (gradient_LD.abs().mean(dim=1, keepdim=True) + _EPS)


def most_that_fit(ranked: Sequence[int], size: Callable[[Sequence[int]], int], budget_bytes: int) -> list[int]:
    """The longest beginning of ``ranked`` within the budget, and of the rest, in order, whatever still fits.

    Args:
        ranked: best first.
        size: bytes of a choice; grows with it.
        budget_bytes: the most that it may take.

    Raises:
        BudgetOutOfReach: the empty choice takes more.
    """
    if (least := size([])) > budget_bytes:
        raise BudgetOutOfReach(
            f"budget of {budget_bytes:,} bytes cannot be met: empty tables take {least:,} bytes already"
        )
    low, high = 0, len(ranked) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if size(ranked[:middle]) <= budget_bytes:
            low = middle
        else:
            high = middle
    chosen = list(ranked[:low])
    for item in ranked[low + 1 :]:
        if size([*chosen, item]) <= budget_bytes:
            chosen.append(item)
    return chosen
