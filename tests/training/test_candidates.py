"""Scores and bytes of candidates against models that are built and run for each of them alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.budget import BudgetOutOfReach
from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compressed_groups
from recemb.data.batch import Batch
from recemb.evaluation import metrics
from recemb.memory import measure_memory
from recemb.methods.optembed import OptEmbed, Thresholds
from recemb.methods.pruned import Pruned
from recemb.models.dlrm import DLRM
from recemb.plan import CompressionPlan, TablePlan
from recemb.training.candidate_bytes import CandidateBytes, with_widths
from recemb.training.candidates import CandidateScores
from recemb.training.evolution import Evolution, EvolutionSettings
from tests.embedding_cases import KEYS, bags, small_tables

NAMES = [table.name for table in small_tables()]
SIZES = (4000, 6000, 6000, 500, 1)
METHOD = partial(OptEmbed, thresholds=Thresholds())


def batches(count: int = 3, rows: int = 50) -> list[Batch]:
    """Bags of 0 to 3 ids."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = [
            [torch.randint(0, size, (int(length),), generator=generator).tolist() for length in lengths]
            for size, lengths in zip(SIZES, torch.randint(0, 4, (5, rows), generator=generator), strict=True)
        ]
        dense = torch.randn(rows, 2, generator=generator)
        labels = torch.bernoulli(torch.full((rows,), 0.5), generator=generator)
        made.append(Batch(dense, bags(KEYS, ids), labels, {}))
    return made


def pooled_model() -> nn.Module:
    torch.manual_seed(0)
    model = DLRM(
        CompressedEmbeddingBagCollection(small_tables(), METHOD), num_dense=2, bottom_layers=[8], over_layers=[16, 1]
    )
    _prune_half(model)
    return model


class Attention(nn.Module):
    """A target's product with each of its history's events, which must be of one width."""

    def __init__(self) -> None:
        super().__init__()
        table = EmbeddingConfig(
            name="t_item", num_embeddings=6000, embedding_dim=8, feature_names=["target", "history"]
        )
        self.rows = CompressedEmbeddingCollection([table], METHOD)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        vectors = self.rows(sparse)
        target, history = (
            torch.segment_reduce(vectors[name].values(), "sum", lengths=vectors[name].lengths().long(), initial=0)
            for name in ("target", "history")
        )
        return (target * history).sum(1) * 1e4 + dense[:, 0]


def sequence_model() -> nn.Module:
    torch.manual_seed(0)
    model = Attention()
    _prune_half(model)
    return model


@torch.no_grad()
def _prune_half(model: nn.Module) -> None:
    for group in compressed_groups(model):
        assert isinstance(group, OptEmbed) and group.thresholds is not None
        group.thresholds.copy_(torch.stack([margin.median() for margin in group.margins().values()]))


def plain_scores(
    model: nn.Module, names: Sequence[str], candidates: Sequence[Sequence[int]], every: int
) -> list[float]:
    """A full pass of the model for each candidate."""
    model.eval()
    scores = []
    for candidate in candidates:
        for group in compressed_groups(model):
            assert isinstance(group, OptEmbed)
            group.set_widths(dict(zip(names, candidate, strict=True)))
        labels, logits = [], []
        for batch in batches():
            labels.append(batch.labels[::every])
            logits.append(model(batch.dense, batch.sparse).detach()[::every])
        scores.append(metrics.auc(torch.cat(labels).numpy(), torch.cat(logits).numpy()))
    for group in compressed_groups(model):
        assert isinstance(group, OptEmbed)
        group.set_widths(None)
    return scores


def draw(count: int, tables: int) -> list[tuple[int, ...]]:
    generator = random.Random(0)
    return [tuple(generator.randint(1, 8) for _ in range(tables)) for _ in range(count)]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
def test_scores_equal_a_pass_for_each_candidate(sequences: bool, sample: bool) -> None:
    model, names = (sequence_model(), ["t_item"]) if sequences else (pooled_model(), NAMES)
    candidates = draw(6, len(names))
    scores = CandidateScores(model, names, batches, device=torch.device("cpu"), every=3)(candidates, sample)
    assert scores == pytest.approx(plain_scores(model, names, candidates, 3 if sample else 1), abs=1e-12)
    assert len(set(scores)) > 1


def test_rows_are_looked_up_once_a_batch_and_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pooled_model().train()
    before = {name: type(module) for name, module in model.named_modules()}
    calls = []
    [group] = compressed_groups(model)
    lookup = group.lookup_rows
    monkeypatch.setattr(group, "lookup_rows", lambda *given: calls.append(1) or lookup(*given))
    CandidateScores(model, NAMES, batches, device=torch.device("cpu"))(draw(7, 4))
    assert len(calls) == 3
    assert model.training
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_the_search_in_one_pass_finds_what_a_plain_search_finds() -> None:
    model = pooled_model()
    settings_ = EvolutionSettings(generations=5, mutants=4, children=4, parents=4)
    scores = CandidateScores(model, NAMES, batches, device=torch.device("cpu"))
    ours = Evolution([8] * 4, settings_, seed=3)
    plain = Evolution([8] * 4, settings_, seed=3)
    assert ours.run(scores) == plain.run(lambda candidates, sample: plain_scores(model, NAMES, candidates, 1))
    assert list(ours.state.scores) == list(plain.state.scores)
    assert scores.passes == 5


def half_the_rows() -> CompressionPlan:
    generator = torch.Generator().manual_seed(1)
    tables = {
        table.name: TablePlan(
            table.num_embeddings, 8, kept_rows=torch.rand(table.num_embeddings, generator=generator) < 0.5
        )
        for table in small_tables()[:3]
    }
    return CompressionPlan({**tables, "t_one": TablePlan(1, 8)}, "by hand")


def test_bytes_of_a_candidate_are_those_of_its_converted_tables() -> None:
    rows = half_the_rows()
    bytes_of = CandidateBytes(rows, NAMES)
    for candidate in [(8, 8, 8, 8), (1, 1, 1, 1), *draw(6, 4)]:
        plan = with_widths(rows, dict(zip(NAMES, candidate, strict=True)))
        collection = CompressedEmbeddingBagCollection(small_tables(), partial(Pruned, plan=plan))
        [group] = compressed_groups(collection)
        collection.groups[0] = group.convert()
        assert bytes_of(candidate) == measure_memory(collection).serving_bytes


@given(st.lists(st.integers(1, 8), min_size=4, max_size=4), st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_repaired_candidates_fit_their_budget_closely_and_never_grow(
    candidate: list[int], share: float, seed: int
) -> None:
    bytes_of = CandidateBytes(half_the_rows(), NAMES)
    budget = int(bytes_of.smallest() + share * (bytes_of((8,) * 4) - bytes_of.smallest()))
    fitted = bytes_of.fit(tuple(candidate), budget, random.Random(seed))
    size = bytes_of(fitted)
    assert size <= budget
    assert all(1 <= new <= old for new, old in zip(fitted, candidate, strict=True))
    if fitted == tuple(candidate):
        return
    # Within a column of the largest table, and a pattern of columns.
    assert size > budget - 3100 * 4 - 100


def test_a_budget_below_one_column_a_table_is_refused() -> None:
    bytes_of = CandidateBytes(half_the_rows(), NAMES)
    with pytest.raises(BudgetOutOfReach, match="one column of every table takes"):
        bytes_of.fit((8, 8, 8, 8), bytes_of.smallest() - 1, random.Random(0))


def test_no_batches_are_an_error() -> None:
    def none() -> Iterator[Batch]:
        return iter([])

    with pytest.raises(ValueError, match="at least one"):
        CandidateScores(pooled_model(), NAMES, none, device=torch.device("cpu"))([(1, 1, 1, 1)])
