from __future__ import annotations

import multiprocessing
import subprocess
from pathlib import Path

import pytest
import yaml

from recemb import run_folder
from recemb.run_folder import RunFolder, git_state, load_model


def hold(path: Path, held, release) -> None:
    with RunFolder(path).locked():
        held.set()
        release.wait(20)


def test_two_processes_never_write_one_run(tmp_path):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(20)
    with pytest.raises(RuntimeError, match="another process is writing this run"), RunFolder(tmp_path).locked():
        pass
    # Killed, not ended: the lock must not outlive its process.
    process.kill()
    process.join()
    with RunFolder(tmp_path).locked():
        pass


def test_a_run_begins_once(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin({"seed": 1})
    assert folder.config() == yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"seed": 1}
    assert folder.results() is None
    with pytest.raises(FileExistsError, match="already holds a run: continue it with resume="):
        folder.begin({"seed": 2})
    assert folder.config() == {"seed": 1}


def test_what_is_no_run_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor the folder of a run"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        RunFolder(tmp_path).config()


def test_git_state_is_that_of_our_own_checkout_only(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "recemb"
    package.mkdir(parents=True)
    monkeypatch.setattr(run_folder, "__file__", str(package / "run_folder.py"))
    # The wheel lies in the virtual environment of somebody's repository.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert git_state() is None
    root = package.parent
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / "file").write_text("1")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    subprocess.run(["git", "-C", str(root), "add", "file"], check=True)
    subprocess.run(["git", "-C", str(root), *identity, "commit", "-qm", "m"], check=True)
    state = git_state()
    assert state is not None and len(state["sha"]) == 40 and not state["dirty"]
    (root / "file").write_text("2")
    assert git_state() == {"sha": state["sha"], "dirty": True}
