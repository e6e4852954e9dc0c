"""Plans on the meta device: every row once, nothing allocated."""

from __future__ import annotations

from functools import partial

import pytest
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.memory import estimate_memory
from recemb.memory.job import Outcome
from recemb.memory.placement import Placement, plan_placement
from recemb.memory.tables import as_text
from recemb.method import Method
from recemb.methods.full import Full
from recemb.methods.hashing import Hashing
from recemb.methods.optembed import OptEmbed, Thresholds
from recemb.methods.pep import Pep
from recemb.methods.unified import Unified
from recemb.optimizers import EmbeddingOptimizer

OPTIMIZER = EmbeddingOptimizer("rowwise_adagrad")


def tables(*sizes: int, dim: int = 128) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=f"t{n}", num_embeddings=size, embedding_dim=dim, feature_names=[f"f{n}"])
        for n, size in enumerate(sizes)
    ]


def assert_every_row_once(placement: Placement, sizes: dict[str, int]) -> None:
    shards = {name: [s for s in placement.shards if s.table == name] for name in sizes}
    assert sum(len(part) for part in shards.values()) == len(placement.shards)
    for name, size in sizes.items():
        position = 0
        for shard in sorted(shards[name], key=lambda shard: shard.first_row):
            assert shard.first_row == position and shard.num_rows > 0
            position += shard.num_rows
        assert position == size


def test_a_plan_covers_every_row_once_and_fits_the_memory() -> None:
    sizes = (300_000_000, 100_000_000, 40_000, 5, 3)
    placement = plan_placement(
        tables(*sizes), Full, optimizer=OPTIMIZER, world_size=8, device_bytes=80 * 10**9, local_world_size=4
    )
    assert_every_row_once(placement, {f"t{n}": size for n, size in enumerate(sizes)})
    ranks = [placement.bytes_of_rank(rank) for rank in range(8)]
    assert max(sum(pair) for pair in ranks) < 80 * 10**9
    report = estimate_memory(tables(*sizes), Full, optimizer=OPTIMIZER)
    assert sum(pair[0] for pair in ranks) == report.table_bytes
    assert sum(pair[1] for pair in ranks) == report.optimizer_bytes
    assert placement.to_dict()["ranks"][0]["table_bytes"] == ranks[0][0]


def test_placement_is_that_of_the_physical_tables() -> None:
    method = partial(Unified, num_embeddings=1001)
    kinds = {"*": ["row_wise"]}
    placement = plan_placement(
        tables(10_000, 20_000, dim=16), method, optimizer=OPTIMIZER, world_size=2, placement=kinds
    )
    assert_every_row_once(placement, {"unified__0": 1001})
    assert {(shard.rank, shard.sharding_type) for shard in placement.shards} == {(0, "row_wise"), (1, "row_wise")}


@pytest.mark.parametrize(
    "method", [Pep, partial(OptEmbed, thresholds=Thresholds(per="value"))], ids=["pep", "optembed"]
)
def test_tables_with_an_optimizer_of_their_own_have_its_state(method: Method) -> None:
    logical = tables(10_000, 300, dim=16)
    placement = plan_placement(logical, method, optimizer=OPTIMIZER, world_size=2, device_bytes=10**9)
    found: dict[str, tuple[int, int]] = {}
    for shard in placement.shards:
        rows, state = found.get(shard.table, (0, 0))
        found[shard.table] = rows + shard.table_bytes, state + shard.optimizer_bytes
    report = estimate_memory(logical, method, optimizer=OPTIMIZER)
    assert found == {part.name: (part.bytes, part.optimizer_bytes) for part in report.tables}


def test_tables_of_one_name_keep_to_themselves() -> None:
    logical = [tables(10**8, dim=8)[0], tables(1, 3, dim=16)[1]]
    method = partial(Hashing, num_embeddings=10**8)
    placement = plan_placement(logical, method, optimizer=OPTIMIZER, world_size=4, device_bytes=2 * 10**9)
    # Too large for one rank, and too small for four.
    rows: dict[str, list[int]] = {shard.collection: [] for shard in placement.shards}
    for shard in placement.shards:
        assert shard.table == "hashing"
        rows[shard.collection].append(shard.num_rows)
    assert rows == {"groups.0.lookups.0": [25_000_000] * 4, "groups.1.lookups.0": [3]}
    report = estimate_memory(logical, method, optimizer=OPTIMIZER)
    lines = as_text(Outcome(report, "two widths", "hashing", placement)).splitlines()
    placed = sorted(line.split() for line in lines if "_wise" in line)
    assert [line[:3] for line in placed] == [["hashing", "row_wise", "25,000,000"], ["hashing", "table_wise", "3"]]


def test_tables_too_large_for_the_gpus_fit_into_host_memory_with_caching() -> None:
    arguments = {"optimizer": OPTIMIZER, "world_size": 2, "device_bytes": 10**10}
    # 10**8 rows of 128 floats against twice 10 GB.
    message = "tables cannot be placed on 2 cuda ranks.* take 51,200,000,000 bytes .* have 20,000,000,000 bytes, of "
    with pytest.raises(ValueError, match=message):
        plan_placement(tables(100_000_000), Full, **arguments)
    placement = plan_placement(tables(100_000_000), Full, host_bytes=200 * 10**9, caching=True, **arguments)
    assert placement.in_host_memory
    assert_every_row_once(placement, {"t0": 100_000_000})


def test_tables_that_every_rank_holds_whole_are_not_placed() -> None:
    with pytest.raises(ValueError, match="'dense_adam' keeps all tables whole on every rank"):
        plan_placement(tables(100), Full, optimizer=EmbeddingOptimizer("dense_adam"), world_size=2)
