"""Committed studies still run against the library as it is: their settings are valid, their runs train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recemb.comparison.cells import composed
from recemb.comparison.study import Study
from recemb.config import TrainConfig
from tests.data.encoded import write_encoded

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/study.json"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_settings_of_a_study_are_still_valid(folder: Path) -> None:
    study = json.loads((folder / "study.json").read_text())
    # Budgets change no key: one run a method.
    kinds: dict[tuple[str, ...], list[str]] = {}
    for overrides in study["runs"].values():
        kinds.setdefault(tuple(text for text in overrides if "budget=" not in text), overrides)
    for overrides in kinds.values():
        TrainConfig.parse(composed([*study["common"], *overrides, "paths.run=none"]))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_every_cell_is_of_its_study(folder: Path) -> None:
    study = Study.open(folder)
    cells = dict(study.cells())
    assert set(cells) == set(study.spec.runs)
    for name, found in cells.items():
        for cell in found:
            overrides = [*study.spec.common, *study.spec.runs[name], *study.best_setting(name)]
            assert cell["overrides"] == overrides, name
        assert "refused" in found[0] or len({cell["seed"] for cell in found}) == len(found), name


@pytest.mark.parametrize(
    ("study", "only"),
    [
        ("frontier_criteo", "^(full|robe-10x)$"),
        ("frontier_synthetic", "^(full|tiered-10x)$"),
        ("search_methods", "^(magnitude-10x|deeplight-10x)$"),
    ],
)
def test_the_small_variant_of_a_study_trains_and_keeps_nothing(tmp_path: Path, study: str, only: str) -> None:
    write_encoded(tmp_path / "log", rows=3000, categorical=(300, 5000, 8000))
    command = [sys.executable, "experiments/run_study.py", f"experiments/{study}", "--small", "--only", only]
    before = sorted((ROOT / "experiments" / study).rglob("*"))
    done = subprocess.run(
        [*command, f"data.path={tmp_path / 'log'}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]]
    assert rows == [name for name in only.strip("^()$").split("|")]
    assert sorted((ROOT / "experiments" / study).rglob("*")) == before
