"""Tables behind a plan's mask: what trains, what does not, and what becomes of it over two ranks."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.conversion import convert
from recemb.memory import estimate_memory, measure_memory
from recemb.methods.pruned import Pruned
from recemb.optimizers import EmbeddingOptimizer
from recemb.plan import CompressionPlan, TablePlan
from recemb.preparation import prepare
from recemb.pruned_bytes import plan_bytes
from tests.embedding_cases import KEYS, MULTI_HOT, SINGLE, bags, small_tables
from tests.gloo import run_ranks
from tests.plans import plans, table_plan, tables_of

KINDS = {"t_ad": "values", "t_item": "blocks", "t_site": "rows", "t_one": "all"}
PLAN = CompressionPlan(
    {
        table.name: table_plan(table.num_embeddings, 8, KINDS[table.name], 0.3, seed)
        for seed, table in enumerate(small_tables())
    },
    source="by hand",
)
DENSE = partial(torch.optim.SGD, lr=0.1)
DROPPED = pytest.mark.parametrize("dropped", ["zero", "vector"])


def build(dropped: str = "zero", seed: int = 0) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(seed)
    return CompressedEmbeddingBagCollection(small_tables(), partial(Pruned, plan=PLAN, dropped=dropped))


@settings(max_examples=40, deadline=None)
@given(plan=plans(embedding_dims=(4, 8, 12)), dropped=st.sampled_from(["zero", "vector"]))
def test_conversion_changes_no_bit_and_takes_the_bytes_that_were_promised(plan: CompressionPlan, dropped: str) -> None:
    tables = tables_of(plan)
    collection = CompressedEmbeddingBagCollection(tables, partial(Pruned, plan=plan, dropped=dropped)).eval()
    sizes = [table.num_embeddings for table in tables]
    ids = [[[index % size] for index in range(max(sizes))] for size in sizes]
    features = bags([table.feature_names[0] for table in tables], ids)
    expected = collection(features).values().detach()
    for table, values in zip(tables, expected.split([table.embedding_dim for table in tables], dim=1), strict=True):
        mask = plan.tables[table.name].mask()
        if dropped == "zero":
            assert torch.equal(values[: table.num_embeddings] != 0, mask)
    promised = measure_memory(collection)
    assert promised.serving_bytes == plan_bytes(plan, dropped=dropped)
    assert promised.trained_bytes == sum(tensor.nbytes for tensor in collection.state_dict().values())
    assert convert(collection) is collection
    assert torch.equal(collection(features).values().view(torch.int32), expected.view(torch.int32))
    assert measure_memory(collection).serving_bytes == plan_bytes(plan, dropped=dropped)


@DROPPED
@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE, [[[]] * 2] * 5], ids=["multi-hot", "single", "all empty"])
def test_conversion_changes_no_bit_of_pooled_vectors(dropped: str, ids: list[list[list[int]]]) -> None:
    collection = build(dropped).eval()
    expected = collection(bags(KEYS, ids)).values().detach()
    assert torch.equal(convert(collection)(bags(KEYS, ids)).values(), expected)


def test_conversion_changes_no_bit_of_unpooled_vectors() -> None:
    tables = [
        EmbeddingConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=table.feature_names,
        )
        for table in small_tables()
    ]
    collection = CompressedEmbeddingCollection(tables, partial(Pruned, plan=PLAN))
    before = collection(bags(KEYS, MULTI_HOT))
    after = convert(collection)(bags(KEYS, MULTI_HOT))
    for key in KEYS:
        assert torch.equal(after[key].values(), before[key].values())


def test_dropped_values_have_no_gradient() -> None:
    collection = build()
    ids = [[[index % n] for index in range(6000)] for n in (4000, 6000, 6000, 500, 1)]
    (collection(bags(KEYS, ids)).values() * torch.rand(6000, 40)).sum().backward()
    gradient = collection.groups[0].get_parameter("lookups.0.embedding_bags.pruned.weight").grad
    mask = torch.cat([plan.mask() for plan in PLAN.tables.values()])
    assert torch.equal(gradient != 0, mask)


def test_a_dropped_id_trains_the_vector_of_its_table() -> None:
    collection = build("vector")
    site = PLAN.tables["t_site"]
    dropped, kept = (int(rows[0]) for rows in ((~site.mask().any(1)).nonzero(), site.mask().any(1).nonzero()))
    output = collection(bags(KEYS, [[[]], [[]], [[]], [[dropped, kept]], [[]]]))["site"]
    output.sum().backward()
    gradient = collection.groups[0].get_parameter("lookups.0.embedding_bags.pruned.weight").grad
    # Behind the rows of all tables: a vector each, the site's is the third.
    assert gradient.any(1).nonzero().view(-1).tolist() == [4000 + 6000 + kept, 4000 + 6000 + 500 + 1 + 2]


@DROPPED
@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
def test_a_fused_sgd_step_equals_autograd_and_torch_sgd(dropped: str, ids: list[list[list[int]]]) -> None:
    plain, fused = build(dropped), build(dropped)
    model, optimizer = prepare(fused, EmbeddingOptimizer("sgd", 0.1), DENSE)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for module, step in ((model, optimizer), (plain, reference)):
        step.zero_grad()
        (module(bags(KEYS, ids)).values() - 1).square().sum().backward()
        step.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)
    # Also after fused training.
    model.eval()
    expected = model(bags(KEYS, ids)).values()
    assert torch.equal(convert(model)(bags(KEYS, ids)).values(), expected)


@DROPPED
def test_estimate_equals_measurement_and_what_serves(dropped: str) -> None:
    collection = build(dropped)
    estimate = estimate_memory(small_tables(), partial(Pruned, plan=PLAN, dropped=dropped))
    assert estimate == measure_memory(collection)
    served = convert(collection)
    assert estimate.serving_bytes == sum(tensor.nbytes for tensor in served.state_dict().values())
    assert [(part.name, part.bytes) for part in estimate.tables] == [
        (part.name, part.bytes) for part in measure_memory(served).tables
    ]


def test_full_tables_are_taken_over() -> None:
    rows = {table.name: torch.randn(table.num_embeddings, 8) for table in small_tables()}
    collection = build()
    assert collection.groups[0].seed_from(rows) == list(rows)
    output = convert(collection)(bags(KEYS, SINGLE))["ad"]
    ids = [bag[0] for bag in SINGLE[0]]
    assert torch.equal(output, torch.where(PLAN.tables["t_ad"].mask()[ids], rows["t_ad"][ids], 0.0))


def test_a_checkpoint_of_another_plan_is_refused() -> None:
    other = CompressionPlan({name: TablePlan(p.num_embeddings, 8) for name, p in PLAN.tables.items()}, source="other")
    collection = CompressedEmbeddingBagCollection(small_tables(), partial(Pruned, plan=other))
    collection.load_state_dict(build().state_dict())
    with pytest.raises(ValueError, match="the loaded checkpoint is of another plan"):
        convert(collection)


def test_tables_must_be_those_of_the_plan() -> None:
    tables = small_tables()
    with pytest.raises(ValueError, match=r"table 't_ad': the plan \(of by hand\) must be for \(4000, 8\).* got none"):
        Pruned(tables, plan=CompressionPlan({}, source="by hand"))
    wrong = CompressionPlan({**PLAN.tables, "t_site": TablePlan(499, 8)}, source="by hand")
    with pytest.raises(ValueError, match=r"table 't_site': .*must be for \(500, 8\).* got \(499, 8\)"):
        Pruned(tables, plan=wrong)
    with pytest.raises(ValueError, match="dropped must be one of"):
        Pruned(tables, plan=PLAN, dropped="mean")


class Model(nn.Module):
    def __init__(self, dropped: str) -> None:
        super().__init__()
        self.tables = build(dropped)
        self.head = nn.Linear(40, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.head(self.tables(features).values()).squeeze(1)


def train_ranks(rank: int, folder: Path) -> None:
    for dropped in ("zero", "vector"):
        for placement in ("table_wise", "row_wise"):
            torch.manual_seed(0)
            model = Model(dropped)
            sharded, optimizer = prepare(
                copy.deepcopy(model), EmbeddingOptimizer("sgd", 0.1), DENSE, placement={"*": [placement]}
            )
            torch.testing.assert_close(sharded(bags(KEYS, SINGLE)), model(bags(KEYS, SINGLE)))
            for ids in (SINGLE, MULTI_HOT):
                optimizer.zero_grad()
                sharded(bags(KEYS, ids)).square().sum().backward()
                optimizer.step()
            with pytest.raises(ValueError, match="sharded over ranks: load the run's checkpoint"):
                convert(sharded)
            dcp.save({"model": sharded.state_dict()}, checkpoint_id=str(folder / f"{dropped}-{placement}"))


def test_two_ranks_train_as_one_process_does_and_convert_from_their_checkpoint(tmp_path: Path) -> None:
    run_ranks(train_ranks, tmp_path)
    for dropped in ("zero", "vector"):
        torch.manual_seed(0)
        model, optimizer = prepare(Model(dropped), EmbeddingOptimizer("sgd", 0.1), DENSE)
        for ids in (SINGLE, MULTI_HOT):
            optimizer.zero_grad()
            # Both ranks have the same batch, and gradients are averaged.
            model(bags(KEYS, ids)).square().sum().backward()
            optimizer.step()
        expected = convert(model).eval()(bags(KEYS, MULTI_HOT)).detach()
        for placement in ("table_wise", "row_wise"):
            loaded = Model(dropped)
            state = {"model": loaded.state_dict()}
            dcp.load(state, checkpoint_id=str(tmp_path / f"{dropped}-{placement}"), no_dist=True)
            loaded.load_state_dict(state["model"])
            torch.testing.assert_close(convert(loaded)(bags(KEYS, MULTI_HOT)).detach(), expected, rtol=1e-4, atol=1e-5)
