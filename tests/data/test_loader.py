"""Which rows the loader gives to which rank in which order, and where it goes on after an interruption."""

import itertools
import json
import threading

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recemb.data.parquet import ParquetLoader
from tests.data.encoded import replace_split, write_encoded
from tests.data.numbered import assert_same_batch, data_set, make, row_numbers


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    world_size=st.integers(1, 7),
    batch_size=st.sampled_from([1, 2, 3, 7, 50, 64, 100, 499, 500, 501, 2000]),
    layout=st.sampled_from([(500, 64, 2), (37, 5, 3), (101, 1, 1), (64, 1000, 1)]),
    shuffle=st.booleans(),
    buffer_rows=st.sampled_from([1, 10, 130, 10_000]),
    seed=st.integers(0, 3),
)
def test_every_row_comes_exactly_once_on_one_rank_in_equally_many_batches(
    world_size, batch_size, layout, shuffle, buffer_rows, seed
):
    manifest = data_set(*layout)
    seen, batches_per_rank = [], set()
    for rank in range(world_size):
        loader = make(
            manifest,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            shuffle_buffer_rows=buffer_rows,
        )
        batches = list(loader)
        sizes = [len(batch) for batch in batches]
        assert len(batches) == len(loader)
        assert sum(sizes) == loader.num_rows
        assert all(size == batch_size for size in sizes[:-1])
        assert 1 <= sizes[-1] <= batch_size + (world_size > 1)
        batches_per_rank.add(len(batches))
        seen += row_numbers(batches)
    assert len(batches_per_rank) == 1
    assert sorted(seen) == list(range(layout[0]))


def test_without_shuffling_ranks_read_consecutive_parts_of_the_files_in_order():
    manifest = data_set()
    ranks = [list(make(manifest, batch_size=64, rank=rank, world_size=3)) for rank in range(3)]
    assert [number for batches in ranks for number in row_numbers(batches)] == list(range(500))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    manifest = data_set()

    def epochs(seed: int) -> list[list[int]]:
        loader = make(manifest, batch_size=60, shuffle=True, seed=seed, shuffle_buffer_rows=200)
        return [row_numbers(list(loader)) for _ in range(2)]

    assert epochs(1) == epochs(1)
    assert len({tuple(order) for order in [*epochs(1), *epochs(2)]}) == 4


def test_a_window_mixes_rows_of_several_row_groups_and_files():
    order = row_numbers(list(make(data_set(), batch_size=500, shuffle=True, shuffle_buffer_rows=192)))
    row_groups = {number // 64 for number in order[:64]}
    assert len(row_groups) >= 3
    # Hardly any row is still followed by the one that follows it in the file.
    assert sum(b == a + 1 for a, b in itertools.pairwise(order)) < 10


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch_size=st.sampled_from([1, 7, 64, 130, 600]),
    world=st.sampled_from([(0, 1), (1, 3), (6, 7)]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2),
    share=st.floats(0, 1),
)
def test_a_resumed_loader_continues_the_uninterrupted_sequence(batch_size, world, shuffle, epoch, share):
    arguments = {
        "batch_size": batch_size,
        "rank": world[0],
        "world_size": world[1],
        "shuffle": shuffle,
        "shuffle_buffer_rows": 150,
    }
    manifest = data_set(101, 10, 2)
    uninterrupted = make(manifest, **arguments)
    uninterrupted.set_epoch(epoch)
    expected = [*uninterrupted, *uninterrupted]

    before = make(manifest, **arguments)
    before.set_epoch(epoch)
    taken = round(share * len(before))
    iterator = iter(before)
    found = [next(iterator) for _ in range(taken)]
    state = json.loads(json.dumps(before.state_dict()))
    iterator.close()

    after = make(manifest, **arguments)
    after.load_state_dict(state)
    assert after.epoch == epoch
    found += [*after]
    assert after.epoch == epoch + 1
    found += [*after]
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert_same_batch(left, right)


def test_the_state_counts_batches_consumed_not_those_read_ahead():
    loader = make(data_set(), batch_size=10, shuffle=True, shuffle_buffer_rows=10_000)
    iterator = iter(loader)
    for consumed in range(1, 6):
        next(iterator)
        assert loader.state_dict()["batch"] == consumed


def test_a_second_iterator_goes_on_where_the_first_was_left_and_voids_it():
    loader = make(data_set(), batch_size=100)
    first = iter(loader)
    assert row_numbers([next(first)]) == list(range(100))
    assert row_numbers([next(iter(loader))]) == list(range(100, 200))
    with pytest.raises(RuntimeError, match="this iterator is void"):
        next(first)


def test_resuming_does_not_read_windows_that_are_finished(monkeypatch):
    read = []
    original = pq.ParquetFile.read_row_groups

    def counted(self, row_groups, *args, **kwargs):
        read.extend(row_groups)
        return original(self, row_groups, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    monkeypatch.setattr("recemb.data.parquet.READ_ROWS", 64)
    loader = make(data_set(), batch_size=64)
    loader.load_state_dict({**loader.state_dict(), "batch": 6})
    assert row_numbers(list(loader)) == list(range(384, 500))
    # Two files of 250 rows have row groups of 64, 64, 64 and 58 rows: row 384 lies in the third of the second file.
    assert set(read) == {2, 3}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 11}, "batch_size was 10, is 11"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"shuffle_buffer_rows": 64}, "window_rows was 128, is 64"),
    ],
)
def test_resuming_with_another_order_is_an_error(changed, message):
    arguments = {"batch_size": 10, "shuffle": True, "shuffle_buffer_rows": 128}
    state = make(data_set(), **arguments).state_dict()
    with pytest.raises(ValueError, match=f"cannot resume the loader of split 'train'.*{message}"):
        make(data_set(), **{**arguments, **changed}).load_state_dict(state)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    worlds=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    batch_sizes=st.lists(st.sampled_from([1, 2, 3, 7, 16, 60]), min_size=5, max_size=5),
    shares=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    layout=st.sampled_from([(101, 10, 2), (64, 1000, 1), (37, 5, 3)]),
    shuffle=st.booleans(),
    buffer_rows=st.sampled_from([1, 25, 10_000]),
    epoch=st.integers(0, 1),
)
def test_other_ranks_go_on_with_the_rows_that_were_left_each_exactly_once(
    worlds, batch_sizes, shares, layout, shuffle, buffer_rows, epoch
):
    manifest, rows = data_set(*layout), layout[0]
    seen, state = [], None
    for turn, (world_size, batch_size) in enumerate(zip(worlds, batch_sizes, strict=False)):
        # As many ranks go on with their own batch size only.
        batch_size = batch_size if state is None or state["world_size"] != world_size else state["batch_size"]
        arguments = {"batch_size": batch_size, "shuffle": shuffle, "shuffle_buffer_rows": buffer_rows}
        loaders = [make(manifest, rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]
        for loader in loaders:
            loader.set_epoch(epoch)
            if state is not None and state["world_size"] != world_size and 0 < rows - len(seen) < world_size:
                with pytest.raises(ValueError, match=f"has {rows - len(seen)} rows left, it needs one at least for"):
                    loader.load_state_dict(state)
                return
            if state is not None:
                loader.load_state_dict(state)
        [left] = {loader.batches_left for loader in loaders}
        is_last = turn == len(worlds) - 1
        taken = left if is_last else round(shares[turn] * left)
        iterators = [iter(loader) for loader in loaders]
        batches = [[next(iterator) for _ in range(taken)] for iterator in iterators]
        assert all(1 <= len(batch) <= batch_size + 1 for mine in batches for batch in mine)
        seen += [number for mine in batches for number in row_numbers(mine)]
        state, *others = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert all(other == state for other in others)
        assert not is_last or [next(iterator, None) for iterator in iterators] == [None] * world_size
        for iterator in iterators:
            iterator.close()
    assert sorted(seen) == list(range(rows))
    # The next epoch is that of the present ranks.
    following = [row_numbers(list(loader)) for loader in loaders]
    for loader, order in zip(loaders, following, strict=True):
        loader.set_epoch(epoch + 1)
        assert row_numbers(list(loader)) == order
    assert sorted(itertools.chain(*following)) == list(range(rows))


def test_other_ranks_take_up_the_orders_of_the_first_where_these_ended():
    manifest = data_set(101, 10, 2)
    arguments = {"batch_size": 7, "shuffle": True, "shuffle_buffer_rows": 30}
    before = [make(manifest, rank=rank, world_size=2, **arguments) for rank in range(2)]
    state = {**before[0].state_dict(), "batch": 3}
    orders = [row_numbers(list(loader)) for loader in before]
    loader = make(manifest, **arguments)
    loader.load_state_dict(state)
    assert loader.batches_left == -(-(101 - 2 * 21) // 7)
    assert row_numbers(list(loader)) == orders[0][21:] + orders[1][21:]


def test_resuming_on_other_files_or_with_a_foreign_state_is_an_error(tmp_path):
    state = make(data_set(), batch_size=10).state_dict()
    with pytest.raises(ValueError, match="files was"):
        make(data_set(37, 5, 3), batch_size=10).load_state_dict(state)
    with pytest.raises(ValueError, match=r"must have \['epoch', 'batch'\]"):
        loader = make(data_set(), batch_size=10)
        loader.load_state_dict({key: state[key] for key in state if key not in ("epoch", "batch")})
    with pytest.raises(ValueError, match=r"batch must be in \[0, 50\], got 51"):
        make(data_set(), batch_size=10).load_state_dict({**state, "batch": 51})


def test_an_abandoned_iterator_stops_its_thread():
    def loader_threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "recemb-loader"]

    iterator = iter(make(data_set(), batch_size=10, shuffle=True, shuffle_buffer_rows=64))
    next(iterator)
    assert loader_threads()
    iterator.close()
    assert not loader_threads()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\) \(world_size\), got 2"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"shuffle_buffer_rows": 0}, "shuffle_buffer_rows must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParquetLoader(data_set(), "train", **{"batch_size": 10, **arguments})


def test_a_split_that_is_unknown_empty_or_smaller_than_the_ranks_is_an_error(tmp_path):
    manifest = write_encoded(tmp_path / "encoded", 30)
    with pytest.raises(ValueError, match="no split 'holdout'; it has"):
        ParquetLoader(manifest, "holdout", batch_size=10)
    with pytest.raises(ValueError, match="split 'test' has 3 rows; it needs one at least for each of world_size=4"):
        ParquetLoader(manifest, "test", batch_size=10, world_size=4)
    with pytest.raises(ValueError, match="split 'test' has 0 rows"):
        ParquetLoader(replace_split(manifest, "test", []), "test", batch_size=10)
