"""What every search owes besides what every method does, run over every configs/embedding/*.yaml that names one.

A search is a method whose class says ``searches``. Its own form is larger than full tables; what must be small is the
converted form of the tables that its plan asks for.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from recemb.carry_over import carry_over
from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.config import check_target
from recemb.conversion import convert
from recemb.memory import estimate_memory, full_table_bytes, measure_memory
from recemb.method import CompressedTables, Method, method_class
from recemb.plan import CompressionPlan
from tests.embedding_cases import (
    KEYS,
    MULTI_HOT,
    SINGLE,
    bags,
    embedding_configs,
    load_embedding_config,
    quarter_sized,
    small_tables,
)

# AutoDim's narrowest candidate takes a little more than a quarter.
BUDGET = sum(full_table_bytes(small_tables()).values()) // 3
SEARCHES = [
    name for name in embedding_configs() if method_class(instantiate(load_embedding_config(name)["method"])).searches
]


@pytest.fixture(params=SEARCHES)
def method(request: pytest.FixtureRequest) -> Method:
    return quarter_sized(request.param)


def build(method: Method, seed: int = 0) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(seed)
    return CompressedEmbeddingBagCollection(small_tables(), method)


def group_of(collection: CompressedEmbeddingBagCollection) -> CompressedTables:
    [group] = compressed_groups(collection)
    return group


def planned(method: Method) -> tuple[CompressedEmbeddingBagCollection, CompressionPlan]:
    """The tables that a search would build at a third of the bytes, with the weights it ended with."""
    search = build(method)
    plan = group_of(search).derive_plan(BUDGET)
    tables = build(method_class(method).from_plan(plan), seed=1)
    carry_over(search, tables, folded=True)
    return tables.eval(), plan


@pytest.mark.parametrize("name", embedding_configs())
def test_conversion_changes_no_vector(name: str) -> None:
    collection = build(quarter_sized(name)).eval()
    served = convert(copy.deepcopy(collection))
    for ids in (MULTI_HOT, SINGLE):
        features = bags(KEYS, ids)
        assert torch.equal(served(features).values(), collection(features).values())


def test_converted_tables_of_the_plan_meet_the_budget_and_serve_the_same_vectors(method: Method) -> None:
    tables, _ = planned(method)
    served = convert(copy.deepcopy(tables))
    memory = measure_memory(served)
    assert 0 < memory.serving_bytes <= BUDGET
    assert memory.serving_bytes == sum(tensor.nbytes for tensor in served.state_dict().values())
    generator = torch.Generator().manual_seed(0)
    many = [[torch.randint(0, n, (3,), generator=generator).tolist() for _ in range(64)] for n in SIZES]
    for ids in (MULTI_HOT, SINGLE, many):
        features = bags(KEYS, ids)
        assert torch.equal(served(features).values(), tables(features).values())


# Rows of the table of each key.
SIZES = (4000, 6000, 6000, 500, 1)


def test_a_saved_plan_builds_the_same_model(method: Method, tmp_path: Path) -> None:
    tables, plan = planned(method)
    plan.save(tmp_path / "plan")
    again = build(method_class(method).from_plan(CompressionPlan.load(tmp_path / "plan")), seed=2)
    again.load_state_dict(tables.state_dict())
    features = bags(KEYS, MULTI_HOT)
    assert torch.equal(again.eval()(features).values(), tables(features).values())
    estimate = estimate_memory(small_tables(), method_class(method).from_plan(plan))
    assert estimate == measure_memory(tables)


def test_stored_and_folded_tables_have_a_row_for_every_id(method: Method) -> None:
    search = build(method).eval()
    group = group_of(search)
    folded, stored = group.folded_tables(), group.stored_tables()
    shapes = {table.name: (table.num_embeddings, table.embedding_dim) for table in small_tables()}
    assert {name: tuple(rows.shape) for name, rows in folded.items()} == shapes
    # A search whose rows are not of the tables' width cannot be rewound, and says so by having none.
    assert not stored or {name: tuple(rows.shape) for name, rows in stored.items()} == shapes
    output = search(bags(KEYS, SINGLE))
    for key, ids in zip(KEYS, SINGLE, strict=True):
        table = next(table.name for table in small_tables() if key in table.feature_names)
        expected = folded[table][[bag[0] for bag in ids]]
        torch.testing.assert_close(output[key], expected, rtol=1e-5, atol=1e-7)


def test_stages_of_the_config_are_stages(method: Method, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["method"]
    stages = load_embedding_config(name)["stages"]
    assert isinstance(stages, list)
    for stage in stages:
        check_target(stage, "stages", given=())
        assert instantiate(stage).name == stage["name"]
