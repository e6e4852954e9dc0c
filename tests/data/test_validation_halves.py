"""The two halves of the validation rows: disjoint, complete, the same in every run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.data.validation_halves import split_validation
from tests.data.encoded import write_encoded


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("log") / "encoded"
    return write_encoded(root, rows=5000, lists=(30,), files_per_split=2, row_group_rows=64)


def rows_of(manifest: Manifest, split: str) -> list[str]:
    return [str(row) for path in manifest.files(split) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_every_row_is_in_one_half(manifest: Manifest, tmp_path: Path, fraction: float) -> None:
    halves = split_validation(manifest, tmp_path / "halves", fraction)
    architecture, validation = (rows_of(halves, name) for name in ("architecture", "validation"))
    assert sorted([*architecture, *validation]) == sorted(rows_of(manifest, "validation"))
    # 500 draws: four standard deviations.
    assert abs(len(architecture) / 500 - fraction) < 4 * (fraction * (1 - fraction) / 500) ** 0.5
    # Not the first so many: the order of a log is often its time.
    order = rows_of(manifest, "validation")
    positions = [order.index(row) for row in architecture]
    assert abs(sum(positions) / len(positions) - 250) < 40


def test_a_loader_reads_the_halves(manifest: Manifest, tmp_path: Path) -> None:
    halves = split_validation(manifest, tmp_path / "halves", 0.5)
    for name in ("architecture", "validation"):
        batches = list(ParquetLoader(halves, name, batch_size=100))
        assert sum(len(batch.labels) for batch in batches) == halves.split(name).rows
        assert batches[0].sparse.keys() == manifest.feature_names


def test_halves_that_are_there_are_taken_and_checked(manifest: Manifest, tmp_path: Path) -> None:
    first = split_validation(manifest, tmp_path / "halves", 0.5)
    again = split_validation(manifest, tmp_path / "halves", 0.5)
    elsewhere = split_validation(manifest, tmp_path / "others", 0.5)
    assert again.splits == first.splits == elsewhere.splits
    path = first.files("validation")[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or replaced"):
        split_validation(manifest, tmp_path / "halves", 0.5)


def test_a_split_of_its_own_is_left_as_it_is(manifest: Manifest, tmp_path: Path) -> None:
    own = dataclasses.replace(manifest, splits={**manifest.splits, "architecture": manifest.splits["test"]})
    assert split_validation(own, tmp_path / "halves", 0.5) is own
    assert not (tmp_path / "halves").exists()


def test_what_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=rf"data.architecture_fraction must be in \(0, 1\), got {fraction}"):
            split_validation(manifest, tmp_path / "halves", fraction)
    with pytest.raises(ValueError, match=r"=1e-09 of 500 validation rows leaves none for architecture"):
        split_validation(manifest, tmp_path / "none", 1e-9)
