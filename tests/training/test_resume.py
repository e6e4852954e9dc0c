from __future__ import annotations

import copy

import pytest
import yaml

from recemb.training.resume import config_to_train


@pytest.fixture
def config(tmp_path) -> dict:
    return {
        "seed": 0,
        "resume": None,
        "data": {
            "path": "data/criteo",
            "allow_synthetic": "data/criteo",
            "synthetic": {"path": "data/synthetic", "rows": 10},
        },
        "trainer": {"epochs": 1, "schedule": {"decay": "none"}},
        "paths": {"data": "data", "runs": "runs", "run": str(tmp_path / "run")},
    }


def stored(config: dict, tmp_path) -> dict:
    content = config_to_train(config, [])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(content))
    return content


def test_a_new_run_keeps_its_config_with_absolute_paths(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = config_to_train(config, ["seed=0"])
    assert content["data"]["path"] == str(tmp_path / "data" / "criteo")
    assert content["data"]["allow_synthetic"] == content["data"]["path"]
    assert content["data"]["synthetic"] == {"path": str(tmp_path / "data" / "synthetic"), "rows": 10}
    assert content["trainer"] == config["trainer"]


def test_a_continued_run_has_its_own_config_whatever_the_defaults_are_now(config, tmp_path):
    then = stored(config, tmp_path)
    now = copy.deepcopy(config)
    now["trainer"]["epochs"] = 9
    now["resume"] = str(tmp_path / "run")
    assert config_to_train(now, [f"resume={tmp_path / 'run'}"]) == then


def test_overrides_that_would_change_a_continued_run_are_errors(config, tmp_path):
    then = stored(config, tmp_path)
    now = copy.deepcopy(config)
    now["resume"] = str(tmp_path / "run")
    overrides = ["resume=run", "trainer.schedule.decay=none"]
    assert config_to_train(now, overrides) == then
    now["trainer"]["schedule"]["decay"] = "cosine"
    with pytest.raises(ValueError, match=r"trainer\.schedule\.decay was 'none', is 'cosine'\. Leave the other"):
        config_to_train(now, overrides)


def test_a_run_that_was_moved_is_continued_where_it_is(config, tmp_path):
    stored(config, tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    now = {**config, "resume": str(tmp_path / "moved")}
    assert config_to_train(now, ["resume=moved"])["paths"]["run"] == str(tmp_path / "moved")


def test_a_folder_without_a_run_is_an_error(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not the folder of a run .no config\.yaml"):
        config_to_train({**config, "resume": str(tmp_path)}, [])
