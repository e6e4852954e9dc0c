"""AutoDim: one width for each table, chosen among candidates that are trained side by side.

Reference: Zhao et al., "AutoDim: Field-aware Embedding Dimension Search in Recommender Systems", WWW 2021,
arXiv:2006.14827.

A search in stages: every table has rows of every candidate width, whose normalised projections are mixed by a softmax
over the architecture; weights learn on train batches and the architecture on architecture batches, in turns and first
order (``recemb.training.bilevel``); each table then takes the candidate of the largest probability, as rows of that
width and a projection (``recemb.methods.mixed_dimension``), trained from fresh weights, or from the best approximation
of the vectors that the search ended with.

Differs from the paper: a trainable scale a table, the same for all its candidates, follows the normalisation and starts
such that vectors are as wide as a full table's (normalised ones have variance 1, hundreds of times as much); what is
chosen has a projection without bias, and none where the candidate is as wide as the vectors; a budget, which the paper
has not, chooses among all combinations the one of about the largest product of probabilities that fits.

Shapes: N ids, F features, T tables, K candidates, D embedding_dim, c width of a candidate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.budget import BudgetOutOfReach
from recemb.grouped_linear import grouped_linear
from recemb.memory import estimate_memory
from recemb.method import CompressedTables, Method, full_table_variance
from recemb.methods.mixed_dimension import MixedDimension, storable_widths, stored_floats
from recemb.plan import CompressionPlan, TablePlan
from recemb.ranks import differentiable_sum
from recemb.stacked import first_rows, per_feature, stacked_table, start_variance

_LOWEST_TEMPERATURE = 0.01
_IDS_AT_ONCE = 1 << 16
_EPS = 1e-5
_MOMENTUM = 0.1


class AutoDim(CompressedTables):
    """Gives id ``i`` of table ``t`` the mix ``scale_t * sum_k p_tk * normalise_k(T_k[i] @ W_tk + b_tk)``.

    In training ``p_t = softmax((log softmax(architecture_t) + Gumbel noise) / temperature)``, with noise drawn once a
    step for each table and candidate, the same on all ranks; in evaluation without noise. Normalisation takes the
    statistics of all ids of the batch, over all tables and ranks, in training, and running ones in evaluation.

    Memory: the sum of the candidates' widths a row (2 counts as 4: fused kernels), and K * T projections; what is saved
    is saved by the plan.

    Args:
        tables: the logical tables.
        candidates: widths, in {1, 2, 4, 8, 12, ...}, ascending; the paper takes 2, 4, 8, ... . The first decides which
            budgets can be met. Those above D are left out.
        learning_rate: of the architecture (Adam).
        anneal_steps: steps over which the temperature falls from 1 to 0.01, in a line. The paper: 20,000 batches of
            2,000 rows; as many steps as the search has is a good choice for shorter ones.

    Raises:
        ValueError: candidates that cannot be stored, or not ascending, a negative rate, fewer than one step.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**5, embedding_dim=16, feature_names=["ad"])]
        >>> AutoDim(tables, candidates=[2, 4, 8, 16])
        AutoDim(...)
    """

    searches: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        candidates: Sequence[int] = (2, 4, 8, 16),
        learning_rate: float = 1e-3,
        anneal_steps: int = 20_000,
    ) -> None:
        dim = tables[0].embedding_dim
        storable = storable_widths(max([dim, *candidates]))
        if sorted(set(candidates) & set(storable)) != list(candidates) or not any(c <= dim for c in candidates):
            raise ValueError(f"candidates must be ascending, out of {storable_widths(dim)}, got {list(candidates)}")
        candidates = [width for width in candidates if width <= dim]
        if not learning_rate >= 0:
            raise ValueError(f"learning_rate must be at least 0, got {learning_rate}")
        if anneal_steps < 1:
            raise ValueError(f"anneal_steps must be at least 1 step, got {anneal_steps}")
        sizes = [table.num_embeddings for table in tables]
        # Rows of all tables start alike, because they are normalised together.
        variances = [full_table_variance(tables)] * len(tables)
        stacks = [stacked_table(f"autodim__{width}", sizes, max(width, 4), variances) for width in candidates]
        super().__init__(tables, [stacks])
        self.candidates = candidates
        self._learning_rate, self._anneal_steps = learning_rate, anneal_steps
        self.architecture = nn.Parameter(torch.zeros(len(tables), len(candidates)))
        self.projections = nn.ParameterList(torch.empty(len(tables), width, dim) for width in candidates)
        for width, projection in zip(candidates, self.projections, strict=True):
            bound = math.sqrt(6 / (width + dim))
            nn.init.uniform_(projection, -bound, bound)
        self.biases = nn.Parameter(torch.zeros(len(candidates), len(tables), dim))
        # A mix of K independent vectors of variance 1 has variance 1 / K where all weigh the same.
        scales = [math.sqrt(start_variance(table) * len(candidates)) for table in tables]
        self.scales = nn.Parameter(torch.tensor(scales))
        self.running_mean: Tensor
        self.register_buffer("running_mean", torch.zeros(len(candidates), dim))
        self.running_var: Tensor
        self.register_buffer("running_var", torch.ones(len(candidates), dim))
        self.num_steps: Tensor
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        # Noise follows from this and the step alone: a run goes on as it would have, and ranks agree.
        self.noise_seed: Tensor
        self.register_buffer("noise_seed", torch.randint(2**31, ()))
        self.starts: Tensor
        self.register_buffer("starts", per_feature(tables, first_rows(sizes)))
        self._owner: Tensor
        self.register_buffer("_owner", per_feature(tables, range(len(tables))), persistent=False)

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        return [[bags.ids + bags.per_id(self.starts)] * len(self.candidates)]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        # (N,) table of each id, for what is one number a table.
        owner = bags.per_id(self._owner).expand(bags.ids.shape).reshape(-1)
        weights = (self.probabilities() * self.scales.unsqueeze(1)).index_select(0, owner)
        projected = [self._project(index, stored, bags) for index, stored in enumerate(rows[0])]
        means, variances = self._statistics(projected)
        mixed = torch.zeros_like(projected[0])
        for index, vectors in enumerate(projected):
            normalised = (vectors - means[index]) * (variances[index] + _EPS).rsqrt()
            mixed = torch.addcmul(mixed, normalised, weights[:, index : index + 1])
        return mixed

    def _project(self, index: int, stored: Tensor, bags: Bags) -> Tensor:
        """(N, max(c, 4)) rows of candidate ``index`` -> (N, D)."""
        rows = stored[:, : self.candidates[index]]
        matrices = self.projections[index].index_select(0, self._owner)
        biases = self.biases[index].index_select(0, self._owner)
        if not bags.single:
            return grouped_linear(rows, matrices, biases, bags.lengths.sum(dim=1).tolist())
        by_feature = rows.view(bags.batch_size, bags.num_features, -1).transpose(0, 1)
        return torch.baddbmm(biases.unsqueeze(1), by_feature, matrices).transpose(0, 1).flatten(0, 1)

    def _statistics(self, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(K, D) means and variances to normalise by."""
        if not self.training:
            return self.running_mean, self.running_var
        count = differentiable_sum(self.scales.new_full((), projected[0].shape[0]).detach())
        if count < 2:
            return self.running_mean, self.running_var
        means = differentiable_sum(torch.stack([vectors.sum(dim=0) for vectors in projected])) / count
        deviations = [vectors - mean for vectors, mean in zip(projected, means, strict=True)]
        sums = differentiable_sum(torch.stack([deviation.square().sum(dim=0) for deviation in deviations]))
        with torch.no_grad():
            self.running_mean.lerp_(means, _MOMENTUM)
            self.running_var.lerp_(sums / (count - 1), _MOMENTUM)
        return means, sums / count

    def temperature(self) -> float:
        """Of the softmax, at the current step."""
        return max(_LOWEST_TEMPERATURE, 1 - (1 - _LOWEST_TEMPERATURE) * int(self.num_steps) / self._anneal_steps)

    def probabilities(self) -> Tensor:
        """(T, K): how the candidates are mixed now."""
        logits = torch.log_softmax(self.architecture, dim=1)
        if self.training:
            logits = logits + self._noise()
        return torch.softmax(logits / self.temperature(), dim=1)

    def _noise(self) -> Tensor:
        """(T, K) standard Gumbel noise of this step, other noise in architecture steps."""
        generator = torch.Generator().manual_seed(
            (int(self.noise_seed) << 31) + 2 * int(self.num_steps) + int(self.frozen)
        )
        exponential = torch.empty(self.architecture.shape, device="cpu").exponential_(generator=generator)
        return -exponential.log().to(self.architecture.device)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Count steps, which lower the temperature."""
        self.num_steps.fill_(step)

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [self.architecture]

    def architecture_optimizer(self) -> torch.optim.Optimizer | None:
        return torch.optim.Adam([self.architecture], lr=self._learning_rate)

    def search_figures(self) -> dict[str, float]:
        """Mean width, over ids, of the candidates that are likeliest now."""
        return {"mean_dim": _mean_width(self.tables, [self.candidates[index] for index in self._likeliest()])}

    def _likeliest(self) -> list[int]:
        """Candidate of each table."""
        return [int(index) for index in self.architecture.argmax(dim=1).tolist()]

    def stored_tables(self) -> dict[str, Tensor]:
        """None: rows are of other widths, so what comes out starts from fresh ones, or from ``folded_tables``."""
        return {}

    @torch.no_grad()
    def folded_tables(self) -> dict[str, Tensor]:
        """Table name -> (num_embeddings, D) vectors of all ids in evaluation. Over ranks all of them must call it."""
        was_training = self.training
        self.eval()
        folded, device = {}, self.starts.device
        for number, table in enumerate(self.tables):
            feature = self._owner.tolist().index(number)
            parts = []
            for ids in torch.arange(table.num_embeddings, device=device).split(_IDS_AT_ONCE):
                lengths = torch.zeros(len(self.feature_names), 1, dtype=torch.int64, device=device)
                lengths[feature] = len(ids)
                parts.append(self.embed(Bags(ids, lengths, single=False)))
            folded[table.name] = torch.cat(parts)
        self.train(was_training)
        return folded

    def begin_training(self, total_steps: int, budget_bytes: int | None) -> None:
        """Refuse a budget out of reach before anything is trained.

        Raises:
            BudgetOutOfReach: a budget that the narrowest candidate exceeds.
        """
        if budget_bytes is not None:
            self._narrowest_bytes(budget_bytes)

    def _narrowest_bytes(self, budget_bytes: int) -> int:
        """Bytes of tables of the narrowest candidate alone, which must meet the budget."""
        narrowest = functools.partial(MixedDimension, widths={table.name: self.candidates[0] for table in self.tables})
        num_bytes = estimate_memory(self.tables, narrowest).serving_bytes
        if num_bytes > budget_bytes:
            raise BudgetOutOfReach(
                f"budget of {budget_bytes:,} bytes cannot be met: tables of width {self.candidates[0]} take "
                f"{num_bytes:,} bytes; give a narrower candidate"
            )
        return num_bytes

    @torch.no_grad()
    def derive_plan(self, budget_bytes: int | None) -> CompressionPlan:
        """The width of the largest probability for each table, or widths of about the largest product that fit.

        Raises:
            BudgetOutOfReach: a budget that the narrowest candidate exceeds.
        """
        scores = torch.log_softmax(self.architecture.double(), dim=1).cpu().tolist()
        names = [table.name for table in self.tables]
        costs = [[bytes_of_table(table, width) for width in self.candidates] for table in self.tables]
        best = self._likeliest()
        if budget_bytes is not None:
            # Maps, which are the same for all widths.
            fixed = self._narrowest_bytes(budget_bytes) - sum(row[0] for row in costs)
            best = choose_candidates(scores, costs, budget_bytes - fixed)
        widths = {name: self.candidates[index] for name, index in zip(names, best, strict=True)}
        columns = torch.arange(self.tables[0].embedding_dim, device="cpu")
        plans = {
            table.name: TablePlan(
                table.num_embeddings, table.embedding_dim, kept_columns=(columns < widths[table.name]).unsqueeze(0)
            )
            for table in self.tables
        }
        return CompressionPlan(plans, "autodim", {"widths": widths})

    @classmethod
    def from_plan(cls, plan: CompressionPlan) -> Method:
        """Mixed dimensions of the widths in ``plan.options``."""
        return functools.partial(MixedDimension, widths=plan.options["widths"])


def _mean_width(tables: Sequence[EmbeddingBagConfig], widths: Sequence[int]) -> float:
    values = sum(table.num_embeddings * width for table, width in zip(tables, widths, strict=True))
    return values / sum(table.num_embeddings for table in tables)


def bytes_of_table(table: EmbeddingBagConfig, width: int) -> int:
    """Bytes of rows and projection of a table of ``MixedDimension``."""
    return 4 * stored_floats(table.num_embeddings, width, table.embedding_dim)


def choose_candidates(
    scores: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget_bytes: int
) -> list[int]:
    """One candidate a table: a large sum of scores within the budget.

    By Lagrange's multiplier (the best where the budget lies on the convex hull of what can be reached), and then single
    improvements that still fit, best first.

    Args:
        scores, costs: of each table, of each candidate; the first of each table fit the budget together.
        budget_bytes: sum of costs allowed.
    """

    def at(price: float) -> list[int]:
        return [
            max(range(len(row)), key=lambda index: (row[index] - price * cost[index], -cost[index]))
            for row, cost in zip(scores, costs, strict=True)
        ]

    def spent(chosen: Sequence[int]) -> int:
        return sum(cost[index] for cost, index in zip(costs, chosen, strict=True))

    if spent(at(0.0)) <= budget_bytes:
        return at(0.0)
    spread = max(max(row) - min(row) for row in scores) + 1.0
    low, high = 0.0, spread
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(at(middle)) <= budget_bytes else (middle, high)
    chosen = at(high)
    while True:
        room = budget_bytes - spent(chosen)
        steps = [
            (row[index] - row[chosen[table]], table, index)
            for table, (row, cost) in enumerate(zip(scores, costs, strict=True))
            for index in range(len(row))
            if row[index] > row[chosen[table]] and cost[index] - cost[chosen[table]] <= room
        ]
        if not steps:
            return chosen
        _, table, index = max(steps)
        chosen[table] = index
