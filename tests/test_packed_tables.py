"""Packed tables against full tables behind the plan's mask, and their bytes against what lies on disk."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.memory import estimate_memory, measure_memory
from recemb.packed_tables import PackedTables
from recemb.packing import pack, packed_method
from recemb.plan import CompressionPlan, TablePlan
from recemb.pruned_bytes import plan_bytes
from tests.embedding_cases import bags
from tests.plans import KINDS, plans, table_plan, tables_of


def rows_of(plan: CompressionPlan, seed: int = 0) -> dict[str, Tensor]:
    """Full tables of random values, none of them 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(table.num_embeddings, table.embedding_dim, generator=generator)
        for name, table in plan.tables.items()
    }


def packed(plan: CompressionPlan, rows: dict[str, Tensor], vectors: Tensor | None = None) -> PackedTables:
    names = list(plan.tables)
    return pack(
        tables_of(plan), plan.tables, lambda table, ids: rows[names[table]][ids].clone(), dropped_vectors=vectors
    )


def masked(plan: CompressionPlan, rows: dict[str, Tensor], vectors: Tensor | None = None) -> dict[str, Tensor]:
    """What every id gets, value by value."""
    result = {}
    for index, (name, table) in enumerate(plan.tables.items()):
        keeps = table.mask()
        result[name] = torch.zeros_like(rows[name])
        for value in range(table.num_embeddings):
            for column in range(table.embedding_dim):
                if keeps[value, column]:
                    result[name][value, column] = rows[name][value, column]
            if not keeps[value].any() and vectors is not None:
                result[name][value] = vectors[index]
    return result


def every_id(plan: CompressionPlan) -> KeyedJaggedTensor:
    """All ids of the tables, one a sample; tables of fewer ids begin anew."""
    most = max(table.num_embeddings for table in plan.tables.values())
    return bags(
        [name.replace("t_", "f_") for name in plan.tables],
        [[[index % table.num_embeddings] for index in range(most)] for table in plan.tables.values()],
    )


@settings(max_examples=60, deadline=None)
@given(plan=plans(), with_vectors=st.booleans())
def test_every_id_gets_exactly_what_was_kept_of_it(plan: CompressionPlan, with_vectors: bool) -> None:
    rows = rows_of(plan)
    vectors = torch.randn(len(plan.tables), 8) if with_vectors else None
    output = packed(plan, rows, vectors)(every_id(plan))
    wanted = masked(plan, rows, vectors)
    for index, (name, part) in enumerate(zip(plan.tables, output.split(8, dim=1), strict=True)):
        size = plan.tables[name].num_embeddings
        # As bits, so that a zero with a sign would be another.
        assert torch.equal(part[:size].view(torch.int32), wanted[name].view(torch.int32)), (index, name)


@settings(max_examples=60, deadline=None)
@given(plan=plans(), with_vectors=st.booleans())
def test_bytes_are_known_before_packing_and_are_those_on_disk(
    tmp_path_factory: pytest.TempPathFactory, plan: CompressionPlan, with_vectors: bool
) -> None:
    dropped = "vector" if with_vectors else "zero"
    module = packed(plan, rows_of(plan), torch.randn(len(plan.tables), 8) if with_vectors else None)
    collection = CompressedEmbeddingBagCollection.of_groups(tables_of(plan), [module])
    memory = measure_memory(collection)
    assert plan_bytes(plan, dropped=dropped) == memory.serving_bytes
    assert estimate_memory(tables_of(plan), packed_method(plan, dropped=dropped)) == memory
    file = tmp_path_factory.mktemp("packed") / "tensors"
    save_file(module.state_dict(), str(file))
    header = int.from_bytes(file.read_bytes()[:8], "little")
    # safetensors pads nothing between tensors.
    assert file.stat().st_size == memory.serving_bytes + 8 + header


@settings(max_examples=30, deadline=None)
@given(plan=plans(embedding_dims=(4, 8, 12)))
def test_plans_of_several_widths_have_a_size_for_each(plan: CompressionPlan) -> None:
    tables = tables_of(plan)
    assert estimate_memory(tables, packed_method(plan)).serving_bytes == plan_bytes(plan)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("embedding_dim", [4, 256, 260])
def test_wide_and_narrow_tables_pack_alike(kind: str, embedding_dim: int) -> None:
    """Column numbers take one byte up to 256 columns, counts up to 255."""
    plan = CompressionPlan({"t_0": table_plan(40, embedding_dim, kind, 0.2, 0)}, source="by hand")
    full = CompressionPlan({"t_1": TablePlan(40, embedding_dim, kept_values=torch.rand(40, embedding_dim) < 2)}, "all")
    for each in (plan, full):
        rows = rows_of(each)
        module = packed(each, rows)
        assert torch.equal(module(every_id(each)), masked(each, rows)[next(iter(each.tables))])
        assert sum(tensor.nbytes for tensor in module.state_dict().values()) == plan_bytes(each)


def pooled_pair(
    plan: CompressionPlan, pooling: PoolingType, *, is_weighted: bool = False
) -> tuple[EmbeddingBagCollection, CompressedEmbeddingBagCollection]:
    """TorchRec's collection of masked full tables, and ours of packed ones; f_0 and again share a table."""
    rows = rows_of(plan)
    tables = tables_of(plan, shared="t_0")
    for table in tables:
        table.pooling = pooling
    reference = EmbeddingBagCollection(tables=tables, is_weighted=is_weighted)
    for name, values in masked(plan, rows).items():
        reference.embedding_bags[name].weight.data.copy_(values)
    names = list(plan.tables)
    module = pack(tables, plan.tables, lambda table, ids: rows[names[table]][ids])
    return reference, CompressedEmbeddingBagCollection.of_groups(tables, [module], is_weighted=is_weighted)


MIXED = CompressionPlan(
    {"t_0": table_plan(300, 8, "rows", 0.4, 0), "t_1": table_plan(90, 8, "values", 0.2, 1), "t_2": TablePlan(5, 8)},
    source="by hand",
)
FEATURES = ["f_0", "again", "f_1", "f_2"]
RAGGED = [[[1, 299, 1], [], [5]], [[7], [8], []], [[], [89, 0, 3, 4], [2]], [[4], [0], [1, 1]]]


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_bags_are_pooled_as_torchrec_pools_masked_tables(pooling: PoolingType) -> None:
    reference, ours = pooled_pair(MIXED, pooling)
    for ids in (RAGGED, [[[]] * 3] * 4, [[bag[:1] or [0] for bag in feature] for feature in RAGGED]):
        torch.testing.assert_close(ours(bags(FEATURES, ids)).values(), reference(bags(FEATURES, ids)).values())


def test_weights_of_ids_scale_their_vectors() -> None:
    reference, ours = pooled_pair(MIXED, PoolingType.SUM, is_weighted=True)
    plain = bags(FEATURES, RAGGED)
    features = KeyedJaggedTensor(
        plain.keys(), plain.values(), weights=torch.rand(plain.values().numel()), lengths=plain.lengths()
    )
    torch.testing.assert_close(ours(features).values(), reference(features).values())


def test_nothing_kept_at_all_takes_a_section_a_table() -> None:
    plan = CompressionPlan({"t_0": TablePlan(10_000, 8, kept_rows=torch.zeros(10_000, dtype=torch.bool))}, "nothing")
    module = packed(plan, rows_of(plan))
    assert not list(module.parameters())
    assert plan_bytes(plan) == 26
    assert not module(bags(["f_0"], [[[0], [9_999]]])).any()


def test_tables_that_would_not_shrink_stay_full() -> None:
    mask = torch.rand(500, 8, generator=torch.Generator().manual_seed(0)) < 0.98
    plan = CompressionPlan({"t_0": TablePlan(500, 8, kept_values=mask)}, source="hardly anything pruned")
    assert plan_bytes(plan) == 500 * 8 * 4 + 26 + 8
    collection = CompressedEmbeddingBagCollection.of_groups(tables_of(plan), [packed(plan, rows_of(plan))])
    [table] = measure_memory(collection).tables
    assert (table.name, table.num_embeddings, table.embedding_dim) == ("packed__dense8", 500, 8)


def test_a_sparse_value_takes_five_bytes_and_a_row_one_and_a_quarter() -> None:
    """One value of 64 in every fourth row: bitmaps and dense rows are dearer."""
    mask = torch.zeros(64_000, 64, dtype=torch.bool)
    mask[::4, 3] = True
    mask[1::4, 5] = True
    plan = CompressionPlan({"t_0": TablePlan(64_000, 64, kept_values=mask)}, source="by hand")
    per_row = 32_000 * 5 + 32_000 * 1.25
    assert plan_bytes(plan) == pytest.approx(per_row + 64_000 * 40 / 256, rel=0.001)


def test_a_row_of_many_values_takes_a_bit_and_a_quarter_a_column() -> None:
    """Four values of 16 in every row: a number each would be 4 bytes and more."""
    mask = (torch.arange(64_000).unsqueeze(1) * 5 + torch.arange(16)) % 4 == 0
    mask[:, :2] = ~mask[:, :2] & ~mask[:, 2:4]
    plan = CompressionPlan({"t_0": TablePlan(64_000, 16, kept_values=mask)}, source="by hand")
    assert plan_bytes(plan) == int(mask.sum()) * 4 + 64_000 * 16 * 40 / 256 + 26


def test_sizes_of_other_tables_are_refused() -> None:
    plan = CompressionPlan({"t_0": TablePlan(10, 8)}, source="by hand")
    two = [*tables_of(plan), EmbeddingBagConfig(name="b", num_embeddings=3, embedding_dim=8, feature_names=["g"])]
    with pytest.raises(ValueError, match=r"one entry for 2 tables of embedding_dim 8, got \[\(1, 8\)\]"):
        CompressedEmbeddingBagCollection(two, packed_method(plan))


def test_packed_tables_live_in_a_state_dict(tmp_path: Path) -> None:
    first = packed(MIXED, rows_of(MIXED))
    second = partial(PackedTables, sizes=[first.sizes])(tables_of(MIXED))
    torch.save(first.state_dict(), tmp_path / "packed.pt")
    second.load_state_dict(torch.load(tmp_path / "packed.pt", weights_only=True))
    assert torch.equal(first(every_id(MIXED)), second(every_id(MIXED)))
