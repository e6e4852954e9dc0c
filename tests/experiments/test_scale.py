"""The scale study still runs against the library as it is; its ids are as popular as it says, beyond int32 too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_pipelines.synthetic_shape import CATEGORICAL
from recemb.command_line import config_folder

SCALE = Path(__file__).resolve().parents[2] / "experiments" / "scale"
TEN_BILLION = 10**10


@pytest.fixture(autouse=True)
def study_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCALE))


def test_every_part_runs_and_peaks_are_no_less_than_the_estimate(tmp_path: Path) -> None:
    command = [sys.executable, str(SCALE / "run.py"), "--small", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    parts = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.iterdir()}
    measured = [row for row in parts["ids"] + parts["batches"] if row.get("measured", True)]
    assert {row["total_ids"] for row in measured} == {10**5, TEN_BILLION}
    for row in measured:
        # Pages are 4 kB; what the allocator had free before the case began may serve small tables.
        assert row["training_peak_bytes"] > row["serving_bytes"] + row["optimizer_bytes"] - 2**20
        assert row["cpu_ms"]["scattered"]["median"] > 0
    (full,) = [row for row in parts["ids"] if row["name"] == "full" and row["total_ids"] == TEN_BILLION]
    assert full == {
        **full,
        "measured": False,
        "serving_bytes": TEN_BILLION * 16 * 4,
        "optimizer_bytes": TEN_BILLION * 4,
    }
    for row in parts["ranks"]:
        assert sum(row["table_bytes_of_ranks"]) == pytest.approx(row["serving_bytes"], abs=2000)
        assert len(row["table_bytes_of_ranks"]) == 2 and row["wall_ms"]["median"] > 0
    (plan,) = parts["plans"]
    assert plan["largest_rank_bytes"] < 80 * 10**9 and "partition_0" in plan["screen"]
    clusters, hashing = parts["methods"]
    assert "cannot be met" in clusters["cannot"]
    assert 99.9 < hashing["ratio"] < 101


def test_shape_of_ten_billion_ids_is_the_studys() -> None:
    import shape

    written = yaml.safe_load((config_folder() / "shape" / "ten_billion.yaml").read_text())["cardinalities"]
    assert tuple(written) == shape.sizes(TEN_BILLION)
    assert sum(written) == TEN_BILLION
    assert sum(size > 2**31 for size in written) == 2


def test_ids_follow_the_popularity_and_scattering_permutes_them() -> None:
    import shape

    ids_FB = shape.draw(np.random.default_rng(0), TEN_BILLION, 50_000)
    for row, column, size in zip(ids_FB, CATEGORICAL, shape.sizes(TEN_BILLION), strict=True):
        assert int(row.min()) >= 0 and int(row.max()) < size
        power = 1 - column.exponent
        bounds = np.array([column.offset, column.offset + 1, size + column.offset], dtype=float) ** power
        head = float((bounds[1] - bounds[0]) / (bounds[2] - bounds[0]))
        assert float((row == 0).double().mean()) == pytest.approx(head, abs=4 * (head / 50_000) ** 0.5)
    size = shape.sizes(2000)[2]
    every = torch.arange(size).expand(26, size) % torch.tensor(shape.sizes(2000)).unsqueeze(1)
    for row, count in zip(shape.scatter(every, 2000), shape.sizes(2000), strict=True):
        assert sorted(set(row.tolist())) == list(range(min(count, size)))


def test_quotients_of_ids_beyond_int32_are_exact() -> None:
    import cases
    import shape

    collection = cases.Case("quotient_remainder", "64MB", TEN_BILLION, 1).collection()
    (group,) = collection.groups
    sizes = shape.sizes(TEN_BILLION)
    largest = sizes.index(max(sizes))
    assert max(sizes) > 3 * 10**9
    ids = [size - 1 for size in sizes]
    features = KeyedJaggedTensor(
        [column.name for column in CATEGORICAL], torch.tensor(ids), lengths=torch.ones(26, dtype=torch.int64)
    )
    vectors = collection(features).values().view(26, 16)
    remainder_rows = group.get_parameter("lookups.0.embedding_bags.partition_0.weight")
    quotient_rows = group.get_parameter("lookups.1.embedding_bags.partition_1.weight")
    first = [sum(partitions.sizes[part] for partitions in group.partitions[:largest]) for part in (0, 1)]
    quotient, remainder = divmod(ids[largest], group.partitions[largest].sizes[0])
    assert quotient > 100 and remainder > 100
    expected = remainder_rows[first[0] + remainder] * quotient_rows[first[1] + quotient]
    assert torch.equal(vectors[largest], expected)
    features = KeyedJaggedTensor(
        [column.name for column in CATEGORICAL],
        torch.tensor([*ids[:largest], ids[largest] + 1, *ids[largest + 1 :]]),
        lengths=torch.ones(26, dtype=torch.int64),
    )
    with pytest.raises(ValueError, match=r"feature 'C3' .*\[0, 3004931096\), got 3004931096"):
        collection(features)
