"""Initial rows of a shard, filled without the rest of its table."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.initial_rows import UniformRanges, fill_rows, fills_any_rows, unfilled_tables
from recemb.methods.full import Full
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import KEYS, bags, embedding_configs, quarter_sized, small_tables
from tests.gloo import WORLD_SIZE, run_ranks

DENSE = partial(torch.optim.SGD, lr=0.1)
SINGLE = [[[3], [7]], [[5], [0]], [[1], [2]], [[499], [0]], [[0], [0]]]


def config(start: object, rows: int = 12) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=4, feature_names=["f"], init_fn=start)  # type: ignore[arg-type]


def test_a_whole_table_is_its_ranges_one_after_the_other() -> None:
    torch.manual_seed(2)
    weight = torch.full((9, 4), 9.0)
    UniformRanges([(4, 0.5), (0, 1.0), (5, 0.01)])(weight)
    torch.manual_seed(2)
    assert torch.equal(
        weight, torch.cat([torch.empty(4, 4).uniform_(-0.5, 0.5), torch.empty(5, 4).uniform_(-0.01, 0.01)])
    )


@given(st.data())
def test_every_row_of_a_shard_starts_within_the_bound_of_its_range(data: st.DataObject) -> None:
    ranges = data.draw(
        st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1e-3, 0.1, 10.0])), min_size=1, max_size=6)
    )
    bounds = [bound for rows, bound in ranges for _ in range(rows)]
    first = data.draw(st.integers(0, len(bounds)))
    count = data.draw(st.integers(0, len(bounds) - first))
    weight = torch.full((count, 8), 99.0)
    fill_rows(config(UniformRanges(ranges), rows=max(len(bounds), 1)), weight, first, seed=1)
    for row, bound in zip(weight, bounds[first : first + count], strict=True):
        # Of 8 values of U(-1, 1) the largest is below a thousandth once in 10^24.
        assert bound / 1000 < row.abs().max() <= bound


@pytest.mark.parametrize("start", [None, UniformRanges([(100_000, 0.5), (50_000, 0.1), (1, 1.0)])])
def test_a_row_starts_alike_in_whatever_shard_it_lies(start: object) -> None:
    table = config(start, rows=150_001)
    whole, other = torch.empty(150_001, 4), torch.empty(150_001, 4)
    before = torch.get_rng_state()
    fill_rows(table, whole, 0, seed=5)
    fill_rows(table, other, 0, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.isclose(whole, other, rtol=0, atol=1e-6).any(dim=1).float().mean() < 0.01
    # Blocks have 2^16 rows; no two of them are alike either.
    assert not torch.equal(whole[:30_000], whole[65_536:95_536])
    for first, count in ((0, 3), (65_535, 2), (65_536, 65_536), (131_000, 19_001), (150_000, 1), (7, 0)):
        shard = torch.empty(count, 4)
        fill_rows(table, shard, first, seed=5)
        assert torch.equal(shard, whole[first : first + count])


def test_what_fills_by_the_number_of_a_row_needs_the_whole_table() -> None:
    assert fills_any_rows(config(None)) and fills_any_rows(config(partial(nn.init.normal_, std=0.1)))
    assert fills_any_rows(config(UniformRanges([(12, 0.5)])))
    assert not fills_any_rows(config(lambda weight: weight.copy_(torch.arange(48.0).view(12, 4))))
    assert not fills_any_rows(config(partial(nn.init.xavier_uniform_)))


def tables_of(name: str, *, unfilled: bool) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(0)
    if not unfilled:
        return CompressedEmbeddingBagCollection(small_tables(), quarter_sized(name))
    with unfilled_tables():
        return CompressedEmbeddingBagCollection(small_tables(), quarter_sized(name))


def run_rank(rank: int, folder: Path) -> None:
    for name in embedding_configs():
        for placement in ("table_wise", "row_wise"):
            sharded, _ = prepare(
                tables_of(name, unfilled=True), EmbeddingOptimizer(), DENSE, placement={"*": [placement]}
            )
            held = {
                key: [(piece.metadata.shard_offsets[0], piece.tensor) for piece in value.local_shards()]
                for key, value in sharded.state_dict().items()
                if isinstance(value, ShardedTensor)
            }
            output = sharded.eval()(bags(KEYS, SINGLE)).values().detach()
            torch.save((held, output), folder / f"{name}-{placement}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, path)
    return path


@pytest.mark.parametrize("placement", ["table_wise", "row_wise"])
@pytest.mark.parametrize("name", embedding_configs())
def test_shards_that_ranks_fill_are_distributed_as_a_whole_table_is(folder: Path, name: str, placement: str) -> None:
    ranks = [torch.load(folder / f"{name}-{placement}-{rank}.pt") for rank in range(WORLD_SIZE)]
    for key, whole in tables_of(name, unfilled=False).state_dict().items():
        pieces = sorted((piece for held, _ in ranks for piece in held.get(key, [])), key=lambda piece: piece[0])
        if not pieces:
            continue
        rows = torch.cat([piece for _, piece in pieces])
        assert rows.shape == whole.shape and torch.isfinite(rows).all()
        # Medians: the one row of the table of one id is as large as nothing else.
        for ours, expected in zip(rows.chunk(4), whole.chunk(4), strict=True):
            tolerance = 6 / expected.numel() ** 0.5
            assert float(ours.abs().median()) == pytest.approx(float(expected.abs().median()), rel=tolerance, abs=1e-12)
        if len(pieces) == 2 and pieces[0][1].shape == pieces[1][1].shape and whole.std() > 0:
            assert not torch.equal(pieces[0][1], pieces[1][1])
    # Where tables lie changes no value.
    other = [torch.load(folder / f"{name}-table_wise-{rank}.pt")[1] for rank in range(WORLD_SIZE)]
    torch.testing.assert_close([output for _, output in ranks], other, rtol=2e-6, atol=1e-7)
    assert all(torch.isfinite(output).all() for _, output in ranks)


@pytest.mark.parametrize("name", ["full", "unified", "quotient_remainder", "robe", "tiered", "mixed_dimension"])
def test_no_rank_builds_the_tables_of(name: str) -> None:
    collections = [
        child for child in tables_of(name, unfilled=True).modules() if isinstance(child, EmbeddingBagCollection)
    ]
    assert collections and all(child.device.type == "meta" for child in collections)


@pytest.mark.parametrize("name", embedding_configs())
def test_one_process_fills_them_in_the_kernels(name: str) -> None:
    torch.manual_seed(0)
    model, _ = prepare(tables_of(name, unfilled=True), EmbeddingOptimizer(), DENSE)
    for key, whole in tables_of(name, unfilled=False).state_dict().items():
        ours = model.state_dict()[key]
        assert ours.shape == whole.shape
        if "embedding_bags" in key:
            tolerance = 6 / whole.numel() ** 0.5
            assert float(ours.abs().median()) == pytest.approx(float(whole.abs().median()), rel=tolerance, abs=1e-9)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Table name -> its rows."""
    return {key.split(".")[-2]: rows.detach().clone() for key, rows in model.named_parameters()}


def keep_whole(rank: int, folder: Path) -> None:
    optimizer = EmbeddingOptimizer("dense_adam", 0.1)
    torch.manual_seed(0)
    model, trained = prepare(nn.Sequential(tables_of("full", unfilled=True)), optimizer, DENSE)
    torch.save(weights_of(model), folder / f"start-{rank}.pt")
    model(bags(KEYS, SINGLE)).values().square().sum().backward()
    trained.step()
    torch.save(weights_of(model), folder / f"end-{rank}.pt")


def test_tables_that_every_rank_holds_whole_start_alike_and_train(tmp_path: Path) -> None:
    run_ranks(keep_whole, tmp_path)
    start, other, end, other_end = (
        torch.load(tmp_path / f"{when}-{rank}.pt") for when in ("start", "end") for rank in range(WORLD_SIZE)
    )
    assert len(start) == len(small_tables())
    for table in small_tables():
        name, bound = table.name, table.num_embeddings**-0.5
        assert torch.equal(start[name], other[name]) and bound / 2 < float(start[name].abs().max()) <= bound
        assert torch.equal(end[name], other_end[name]) and not torch.equal(end[name], start[name])


def refuse(rank: int, folder: Path) -> None:
    by_number = config(lambda weight: weight.copy_(torch.arange(float(weight.numel())).view_as(weight)))
    collection = EmbeddingBagCollection(tables=[by_number], device=torch.device("meta"))
    with pytest.raises(ValueError, match=r"table 't' is on the meta device, and its init_fn, .* may not know"):
        prepare(collection, EmbeddingOptimizer(), DENSE)


def test_a_table_that_no_shard_can_fill_is_refused_by_name(tmp_path: Path) -> None:
    run_ranks(refuse, tmp_path)


def test_tables_are_filled_where_they_are_built_outside() -> None:
    with unfilled_tables():
        pass
    assert CompressedEmbeddingBagCollection(small_tables(), Full).device.type == "cpu"
