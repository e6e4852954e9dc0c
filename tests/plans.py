"""Compression plans of every kind, drawn at random, for tests of what is built from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.plan import CompressionPlan, TablePlan
from tests.embedding_cases import small_tables

KINDS = ("all", "rows", "prefix", "width", "columns", "blocks", "groups", "values", "values and rows", "all four")


def table_plan(num_embeddings: int, embedding_dim: int, kind: str, share: float, seed: int) -> TablePlan:
    """A plan that keeps about ``share`` in the way its kind says; from nothing to everything."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < share

    masks: dict[str, Tensor] = {}
    if kind in ("rows", "values and rows", "all four"):
        masks["kept_rows"] = some(num_embeddings)
    if kind == "prefix":
        masks["kept_rows"] = torch.arange(num_embeddings) < int(share * num_embeddings)
    if kind == "width":
        masks["kept_columns"] = torch.arange(embedding_dim).unsqueeze(0) < int(share * embedding_dim)
    if kind == "columns":
        masks["kept_columns"] = some(1, embedding_dim)
    if kind in ("blocks", "groups", "all four"):
        masks["kept_columns"] = some(3, embedding_dim)
        groups = torch.arange(num_embeddings) * 3 // num_embeddings
        if kind != "blocks":
            groups = torch.randint(0, 3, (num_embeddings,), generator=generator)
        masks["row_groups"] = groups.to(torch.int16)
    if kind in ("values", "values and rows", "all four"):
        masks["kept_values"] = some(num_embeddings, embedding_dim)
    return TablePlan(num_embeddings, embedding_dim, **masks)


@st.composite
def table_plans(draw: st.DrawFn, embedding_dim: int = 8) -> TablePlan:
    rows = draw(st.sampled_from((1, 2, 15, 16, 17, 100, 300, 700)))
    share = draw(st.sampled_from((0.0, 0.02, 0.3, 0.8, 1.0)))
    return table_plan(rows, embedding_dim, draw(st.sampled_from(KINDS)), share, draw(st.integers(0, 1000)))


@st.composite
def plans(draw: st.DrawFn, embedding_dims: Sequence[int] = (8,)) -> CompressionPlan:
    """One to three tables, of one of the widths each."""
    count = draw(st.integers(1, 3))
    tables = {f"t_{index}": draw(table_plans(draw(st.sampled_from(embedding_dims)))) for index in range(count)}
    return CompressionPlan(tables, source="random")


def tables_of(plan: CompressionPlan, *, shared: str | None = None) -> list[EmbeddingBagConfig]:
    """The logical tables of a plan, one feature each; two for the table called ``shared``."""
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=[name.replace("t_", "f_"), *(["again"] if name == shared else [])],
        )
        for name, table in plan.tables.items()
    ]


def pruned_plan(kind: str) -> CompressionPlan:
    """A plan of ``small_tables`` that keeps three tenths."""
    return CompressionPlan(
        {each.name: table_plan(each.num_embeddings, 8, kind, 0.3, seed) for seed, each in enumerate(small_tables())},
        source="by hand",
    )
