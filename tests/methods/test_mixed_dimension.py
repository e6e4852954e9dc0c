"""Mixed dimensions against a plain product per id, the popularity rule against a plain search, and their traps."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.compression import compress_
from recemb.memory import estimate_memory
from recemb.methods.mixed_dimension import MixedDimension, choose_widths
from tests.embedding_cases import MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of


def plain_vectors(method: MixedDimension) -> dict[str, Tensor]:
    """Table name -> (num_embeddings, D): its rows, cut from the stored ones, times its matrix."""
    vectors = {}
    for number, width in enumerate(sorted(set(method.widths))):
        stored = rows_of(method, number)
        owners = [t for t, own in zip(method.tables, method.widths, strict=True) if own == width]
        for index, owner in enumerate(owners):
            ids_per_row = {1: 4, 2: 2}.get(width, 1)
            count = (owner.num_embeddings + ids_per_row - 1) // ids_per_row
            rows = torch.cat([row.view(ids_per_row, width) for row in stored[:count]])[: owner.num_embeddings]
            stored = stored[count:]
            vectors[owner.name] = rows
            if width < owner.embedding_dim:
                vectors[owner.name] = rows @ method.get_parameter(f"parts.{number}.projection")[index].detach()
        assert stored.shape[0] == 0
    return vectors


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("num_parameters", [1, 21_000, 40_000, 60_000, 84_008])
@pytest.mark.parametrize("rounding", ["nearest", "power_of_two"])
def test_vectors_equal_rows_times_their_tables_matrix(
    ids: list[list[list[int]]], num_parameters: int, rounding: str
) -> None:
    method = partial(MixedDimension, num_parameters=num_parameters, rounding=rounding)
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    group = group_of(collection)
    assert isinstance(group, MixedDimension)
    vectors = plain_vectors(group)

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        return vectors[config.name][value]

    check_batch(collection, vector, ids)


def test_unpooled_vectors_and_weighted_bags_equal_rows_times_matrix() -> None:
    tables = [table("ad", 400), table("item", 600, features=["target", "history"]), table("site", 50)]
    method = partial(MixedDimension, num_parameters=3500)
    weighted = CompressedEmbeddingBagCollection(tables, method, is_weighted=True)
    group = group_of(weighted)
    assert isinstance(group, MixedDimension) and len(set(group.widths)) == 3
    vectors = plain_vectors(group)
    ids = [[[3, 399], []], [[0], [599]], [[599, 0, 7], [1]], [[], [49, 49]]]
    features = bags(["ad", "target", "history", "site"], ids)
    features._weights = torch.rand(features.values().numel())
    scale = dict(zip(features.keys(), features.weights().split(features.length_per_key()), strict=True))
    output = weighted(features)
    for key, name in (("ad", "t_ad"), ("history", "t_item"), ("site", "t_site")):
        flat = [value for bag in ids[features.keys().index(key)] for value in bag]
        parts = (vectors[name][flat] * scale[key].unsqueeze(1)).split(features[key].lengths().tolist())
        torch.testing.assert_close(output[key], torch.stack([part.sum(dim=0) for part in parts]))
    sequences = CompressedEmbeddingCollection(
        [
            EmbeddingConfig(
                name=t.name, num_embeddings=t.num_embeddings, embedding_dim=8, feature_names=t.feature_names
            )
            for t in tables
        ],
        method,
    )
    sequences.load_state_dict(weighted.state_dict())
    unpooled = sequences(bags(features.keys(), ids))
    torch.testing.assert_close(unpooled["history"].values(), vectors["t_item"][[599, 0, 7, 1]])
    torch.testing.assert_close(unpooled["site"].values(), vectors["t_site"][[49, 49]])


@given(
    sizes=st.lists(st.integers(1, 10**7), min_size=1, max_size=8),
    dim=st.sampled_from([4, 8, 16, 20, 64]),
    temperature=st.floats(0, 1),
    rounding=st.sampled_from(["nearest", "power_of_two"]),
    shares=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
)
def test_widths_follow_popularity_and_grow_with_the_budget(
    sizes: list[int], dim: int, temperature: float, rounding: str, shares: tuple[float, float]
) -> None:
    full = sum(sizes) * dim
    small, large = sorted(max(int(full * share), 1) for share in shares)
    less, more = (
        choose_widths(sizes, dim, budget, temperature=temperature, rounding=rounding) for budget in (small, large)
    )
    taken = []
    for widths, budget in ((less, small), (more, large)):
        floats = sum(
            size * dim if width == dim else -(-size * width // max(width, 4)) * max(width, 4) + width * dim
            for size, width in zip(sizes, widths, strict=True)
        )
        least = sum(min(-(-size // 4) * 4 + dim, size * dim) for size in sizes)
        assert floats <= max(budget, least)
        taken.append(floats)
        # Larger tables are never wider, but for tables that a matrix would not make smaller.
        ordered = sorted(zip(sizes, widths, strict=True))
        projected = [(size, width) for size, width in ordered if width < dim]
        for (smaller, wide), (larger, narrow) in itertools.pairwise(projected):
            assert wide >= narrow or smaller == larger
    assert taken[0] <= taken[1]
    assert choose_widths(sizes, dim, full, temperature=temperature, rounding=rounding) == [dim] * len(sizes)


def test_widths_equal_the_papers_rule_by_hand() -> None:
    # lambda = 16 * 100 ** 0.5 = 160: exact widths 16, 5.06, 1.6, 0.16; matrices take 16 floats a width.
    sizes = [100, 1000, 10_000, 1_000_000]
    floats = 100 * 16 + 1000 * 4 + 4 * 16 + 10_000 * 2 + 2 * 16 + 1_000_000 + 16
    for rounding in ("nearest", "power_of_two"):
        assert choose_widths(sizes, 16, floats, temperature=0.5, rounding=rounding) == [16, 4, 2, 1]


def test_projection_is_shared_by_the_features_of_a_table_and_trains() -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), partial(MixedDimension, num_parameters=40_000))
    dense = [p for name, p in collection.named_parameters() if "projection" in name]
    assert dense and all(isinstance(p, nn.Parameter) and p.requires_grad for p in dense)
    report = estimate_memory(small_tables(), partial(MixedDimension, num_parameters=40_000))
    assert report.dense_bytes == sum(p.numel() * 4 for p in dense)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_projected_vectors_start_with_a_full_tables_variance(width: int) -> None:
    torch.manual_seed(0)
    tables = [table(f"t{index}", 2000, dim=16) for index in range(40)]
    floats = 40 * (2000 * width + width * 16)
    collection = CompressedEmbeddingBagCollection(tables, partial(MixedDimension, num_parameters=floats))
    group = group_of(collection)
    assert isinstance(group, MixedDimension) and set(group.widths) == {width}
    variance = torch.stack([all_vectors(collection, f"t{index}", 2000).var() for index in range(40)]).mean()
    assert 0.7 < float(variance) * 3 * 2000 < 1.4


def test_trained_tables_seed_their_best_approximation_of_low_rank() -> None:
    full = EmbeddingBagCollection(tables=[table("a", 301), table("b", 40)])
    left, right = torch.randn(301, 2), torch.randn(2, 8)
    with torch.no_grad():
        full.embedding_bags["t_a"].weight.copy_(left @ right)
    small = full.embedding_bags["t_b"].weight.detach().clone()
    method = partial(MixedDimension, num_parameters=302 * 2 + 16 + 320, temperature=1.0)
    compressed = compress_(full, method, seed_from_weights=True)
    assert isinstance(compressed, CompressedEmbeddingBagCollection)
    group = group_of(compressed)
    assert isinstance(group, MixedDimension) and group.widths == [2, 8]
    torch.testing.assert_close(all_vectors(compressed, "a", 301), left @ right, rtol=1e-3, atol=1e-4)
    assert torch.equal(all_vectors(compressed, "b", 40), small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parameters": 0}, "num_parameters must be at least 1 float, got 0"),
        ({"num_parameters": 10, "temperature": 2.0}, r"temperature must be in \[0, 1\], got 2.0"),
        ({"num_parameters": 10, "rounding": "up"}, "rounding must be one of .*, got 'up'"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedDimension([table("a", 10)], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
def test_widths_may_be_given(ids: list[list[list[int]]]) -> None:
    method = partial(MixedDimension, widths={"t_site": 1, "t_ad": 4, "t_item": 2, "t_one": 4, "t_other": 3})
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    group = group_of(collection)
    assert isinstance(group, MixedDimension)
    # A projection would take more than the one row of the last table.
    assert group.widths == [4, 2, 1, 8]
    vectors = plain_vectors(group)

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        return vectors[config.name][value]

    check_batch(collection, vector, ids)
    estimate = estimate_memory(small_tables(), method)
    stored = 4000 * 4 + 4 * 8 + 3000 * 4 + 2 * 8 + 125 * 4 + 8 + 8
    assert estimate.serving_bytes - estimate.index_bytes == stored * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a budget .num_parameters. or widths, one of them"),
        ({"num_parameters": 10, "widths": {}}, "or widths, one of them"),
        ({"widths": {"t_ad": 4}}, r"'t_item': width must be one of \[1, 2, 4, 8\], got None of tables \['t_ad'\]"),
        ({"widths": {"t_ad": 3}}, r"'t_ad': width must be one of \[1, 2, 4, 8\], got 3"),
    ],
)
def test_bad_widths_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedDimension(small_tables(), **options)  # type: ignore[arg-type]
