from __future__ import annotations

import logging
from pathlib import Path

import pytest

from data_pipelines import behaviour, synthetic
from recemb.comparison.cells import composed
from recemb.config import DataConfig, SyntheticConfig, TrainConfig
from recemb.data.manifest import Manifest
from recemb.data_source import open_data_set
from recemb.training.resume import config_to_train
from tests.data.encoded import write_encoded


def config(tmp_path: Path, path: str | None, **changes) -> DataConfig:
    values = {"allow_synthetic": True, "shuffle": True, "verify_checksums": False, **changes}
    where = None if path is None else str(tmp_path / path)
    return DataConfig(path=where, synthetic=SyntheticConfig(str(tmp_path / "made"), 2000, 5), **values)


@pytest.fixture
def prepared(monkeypatch) -> list[tuple]:
    """Calls of the synthetic preparation, which is replaced by a small data set."""
    calls: list[tuple] = []

    def prepare(out, *, rows, seed):
        calls.append((Path(out).name, rows, seed))
        return write_encoded(Path(out), rows=300)

    monkeypatch.setattr(synthetic, "prepare_synthetic", prepare)
    return calls


def test_a_prepared_log_is_taken(tmp_path, prepared):
    manifest = write_encoded(tmp_path / "log", rows=300)
    assert open_data_set(config(tmp_path, "log")) == manifest
    assert not prepared


def test_where_no_log_lies_a_synthetic_one_stands_in_and_one_loud_line_says_so(tmp_path, prepared, caplog):
    with caplog.at_level(logging.WARNING, logger="recemb"):
        manifest = open_data_set(config(tmp_path, "log"))
    assert manifest.root == tmp_path / "made"
    assert prepared == [("made", 2000, 5)]
    assert len(caplog.records) == 1
    assert f"NO LOG AT data.path={tmp_path / 'log'}: TRAINING ON A SYNTHETIC LOG of 2,000 rows" in caplog.text


def test_asked_for_by_name_the_synthetic_log_is_nothing_to_be_loud_about(tmp_path, prepared, caplog):
    open_data_set(config(tmp_path, None))
    assert prepared and not caplog.records


def test_absence_is_an_error_where_synthetic_is_not_allowed(tmp_path, prepared):
    with pytest.raises(FileNotFoundError, match=r"log: no such folder, and data\.allow_synthetic is false"):
        open_data_set(config(tmp_path, "log", allow_synthetic=False))
    assert not prepared


@pytest.mark.parametrize("group", ["criteo", "movielens"])
def test_the_stand_in_is_for_the_path_of_the_config_and_not_for_a_mistyped_one(group, tmp_path, monkeypatch, prepared):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(behaviour, "prepare_behaviour", synthetic.prepare_synthetic)

    def opened(*overrides: str) -> Manifest:
        content = composed([f"data={group}", "paths.run=run", *overrides])
        # As the entry points do, which make data.path absolute.
        return open_data_set(TrainConfig.parse(config_to_train(content, [])).data)

    assert opened().root.is_relative_to(tmp_path / "data")
    assert opened("paths.data=elsewhere").root.is_relative_to(tmp_path / "elsewhere")
    assert opened("data.path=critoe", "data.allow_synthetic=true").root.is_relative_to(tmp_path / "data")
    made = len(prepared)
    with pytest.raises(FileNotFoundError, match=rf"critoe: no such folder, .*allow_synthetic is .*data/{group}, not"):
        opened("data.path=critoe")
    with pytest.raises(FileNotFoundError, match=r"no such folder, and data\.allow_synthetic is false"):
        opened("data.allow_synthetic=false")
    assert len(prepared) == made == 3


@pytest.mark.parametrize("group", ["synthetic", "behaviour"])
def test_a_synthetic_log_that_was_asked_for_by_name_stands_in_for_any_path(group):
    data = TrainConfig.parse(composed([f"data={group}", "paths.run=run"])).data
    assert (data.path, data.allow_synthetic) == (None, True)


def test_the_config_of_any_log_has_no_path_of_its_own_and_without_one_nothing_is_opened(prepared):
    content = composed(["data=parquet", "paths.run=run"])
    assert content["data"]["path"] is None
    with pytest.raises(ValueError, match=r"data\.path=DIR is required: the folder of a log that was prepared with"):
        open_data_set(TrainConfig.parse(content).data)
    assert not prepared


def test_a_raw_log_or_an_unfinished_preparation_is_never_replaced_by_a_synthetic_one(tmp_path, prepared):
    (tmp_path / "day_0.tsv").write_text("0\t1\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "day_0.tsv").write_text("0\t1\n")
    for name in ("day_0.tsv", "folder"):
        with pytest.raises(FileNotFoundError, match=r"is no prepared data set .*data_pipelines\.criteo"):
            open_data_set(config(tmp_path, name))
    assert not prepared


def test_files_are_verified_before_anything_is_trained(tmp_path):
    manifest = write_encoded(tmp_path / "log", rows=300)
    file = manifest.files("train")[0]
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    open_data_set(config(tmp_path, "log"))
    with pytest.raises(ValueError, match="the content changed"):
        open_data_set(config(tmp_path, "log", verify_checksums=True))
    file.write_bytes(content[:-50])
    with pytest.raises(ValueError, match="truncated or replaced"):
        open_data_set(config(tmp_path, "log"))


def test_the_stand_in_of_logs_with_histories_is_the_behaviour_log(tmp_path, caplog):
    settings = SyntheticConfig(str(tmp_path / "made"), 1000, 0, log="behaviour")
    with caplog.at_level(logging.WARNING, logger="recemb"):
        manifest = open_data_set(
            DataConfig(str(tmp_path / "log"), True, settings, shuffle=True, verify_checksums=False)
        )
    assert manifest.source == "synthetic behaviour"
    assert [feature.name for feature in manifest.categorical if feature.kind == "sequence"] == [
        *("item_history", "category_history")
    ]
    assert "TRAINING ON A SYNTHETIC LOG of 1,000 rows" in caplog.text
