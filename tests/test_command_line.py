from __future__ import annotations

import pytest

from recemb import command_line
from recemb.command_line import config_folder, rewrite


def test_a_bare_experiment_is_rewritten_and_nothing_else():
    arguments = ["experiment=criteo", "seed=1", "+experiment=criteo", "--cfg", "job", "data.path=experiment=x"]
    assert rewrite(arguments) == ["+experiment=criteo", "seed=1", "+experiment=criteo", *arguments[3:]]


def test_resume_writes_where_the_run_began_also_in_a_folder_with_an_equals_sign(tmp_path):
    run = tmp_path / "lr=1,b"
    run.mkdir()
    (run / "config.yaml").touch()
    assert rewrite([f"resume={run}"]) == [f"resume='{run}'", f"hydra.run.dir='{run}'"]
    assert rewrite(["resume=null"]) == ["resume=null"]


def test_resuming_what_is_no_run_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume=.*nowhere: not the folder of a run"):
        rewrite([f"resume={tmp_path / 'nowhere'}"])
    assert not (tmp_path / "nowhere").exists()


def test_configs_are_found_beside_the_package_or_inside_it(tmp_path, monkeypatch):
    assert (config_folder() / "train.yaml").is_file()
    installed = tmp_path / "site-packages" / "recemb"
    (installed / "configs").mkdir(parents=True)
    monkeypatch.setattr(command_line, "PACKAGE", installed)
    with pytest.raises(FileNotFoundError, match=r"no configs: looked for train\.yaml in"):
        config_folder()
    (installed / "configs" / "train.yaml").touch()
    assert config_folder() == installed / "configs"


def test_a_stage_is_named_with_or_without_a_plus() -> None:
    assert rewrite(["stage=prune", "+stage=prune"]) == ["+stage=prune", "+stage=prune"]
