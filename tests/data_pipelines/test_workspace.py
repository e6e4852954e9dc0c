"""Nothing that looks finished exists before everything is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import criteo
from data_pipelines.workspace import workspace
from recemb.data.manifest import Manifest
from tests.data_pipelines import truth

KILLED_WHILE_WRITING = """
import os, signal, sys
from data_pipelines import criteo, parts
writes = []
def stop(*arguments):
    if len(writes) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    writes.append(0)
    return describe(*arguments)
describe, parts.describe_file = parts.describe_file, stop
criteo.prepare(sys.argv[1], sys.argv[2], overwrite=True)
"""


def test_a_killed_preparation_leaves_no_data_set_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    raw = truth.write_tsv(tmp_path / "log.txt", truth.criteo_rows(100))
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(raw), str(out), "2"]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = tmp_path.glob("out.partial-*")
    assert list(left.rglob("*.parquet"))
    assert not out.exists()
    with pytest.raises(FileNotFoundError, match="did not finish"):
        Manifest.load(left)
    criteo.prepare(raw, out).verify(checksums=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "out"]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "test", "train", "validation", "vocabulary"]


def test_an_error_or_interrupt_leaves_nothing(tmp_path: Path) -> None:
    for error in (ValueError("wrong"), KeyboardInterrupt()):
        with pytest.raises(type(error)), workspace(tmp_path / "out", overwrite=False) as partial:
            (partial / "half").write_text("x")
            raise error
        assert list(tmp_path.iterdir()) == []


def test_a_running_preparation_is_left_alone(tmp_path: Path) -> None:
    with workspace(tmp_path / "out", overwrite=False) as first:
        (first / "manifest.json").write_text("first")
        running = first.rename(tmp_path / "out.partial-1")
        with workspace(tmp_path / "out", overwrite=False) as second:
            assert running.exists()
            (second / "manifest.json").write_text("second")
        running.rename(first)
        (tmp_path / "out").rename(tmp_path / "aside")
    assert (tmp_path / "out" / "manifest.json").read_text() == "first"


def test_a_data_set_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    raw = truth.write_tsv(tmp_path / "log.txt", truth.criteo_rows(100))
    criteo.prepare(raw, tmp_path / "out")
    before = truth.files_of(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out: exists already; choose another --out, or --overwrite"):
        criteo.prepare(raw, tmp_path / "out", min_count=1)
    assert truth.files_of(tmp_path / "out") == before
    criteo.prepare(raw, tmp_path / "out", min_count=1, overwrite=True).verify(checksums=True)
    assert truth.files_of(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "out"]


def test_a_failed_replacement_keeps_the_old_data_set(tmp_path: Path) -> None:
    raw = truth.write_tsv(tmp_path / "log.txt", truth.criteo_rows(100))
    criteo.prepare(raw, tmp_path / "out")
    before = truth.files_of(tmp_path / "out")
    raw.write_text(raw.read_text() + "broken line\n")
    with pytest.raises(ValueError, match="line 101"):
        criteo.prepare(raw, tmp_path / "out", overwrite=True)
    assert truth.files_of(tmp_path / "out") == before


def test_a_directory_that_is_no_data_set_is_never_replaced(tmp_path: Path) -> None:
    raw = truth.write_tsv(tmp_path / "log.txt", truth.criteo_rows(100))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not an encoded data set"):
        criteo.prepare(raw, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_two_preparations_at_once_end_with_one_data_set(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), workspace(tmp_path / "out", overwrite=False) as partial:
        (partial / "manifest.json").write_text("late")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "manifest.json").write_text("early")
    assert (tmp_path / "out" / "manifest.json").read_text() == "early"
    assert os.listdir(tmp_path) == ["out"]
