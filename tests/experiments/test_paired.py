"""Differences of runs of one seed, and the READMEs that show them."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from paired import MARKER, differences, standard_error, with_pairs

from recemb.comparison.study import Study

ROOT = Path(__file__).resolve().parents[2]
READMES = sorted(path for path in (ROOT / "experiments").glob("*/README.md") if MARKER.search(path.read_text()))


def cell(seed: int, auc: float) -> dict[str, Any]:
    return {"seed": seed, "test": {"auc": auc}, "embedding": {"bytes": 50 * seed, "full_bytes": 400}}


def test_runs_are_paired_by_seed_whatever_their_order() -> None:
    run, reference = [cell(3, 0.7), cell(1, 0.6), {"refused": "budget"}], [cell(1, 0.5), cell(2, 0.9), cell(3, 0.75)]
    assert differences(run, reference) == pytest.approx([0.1, -0.05])


def test_the_standard_error_is_the_spread_of_many_means() -> None:
    generator = random.Random(0)
    drawn = [[generator.gauss(0, 1) for _ in range(9)] for _ in range(4000)]
    assert statistics.mean(standard_error(values) ** 2 for values in drawn) ** 0.5 == pytest.approx(1 / 3, rel=0.05)
    assert statistics.stdev(statistics.mean(values) for values in drawn) == pytest.approx(1 / 3, rel=0.05)


def test_a_marker_gets_the_runs_that_it_names_and_the_rest_stays() -> None:
    cells = {"full": [cell(1, 0.5), cell(2, 0.6)], "a-10x": [cell(1, 0.51), cell(2, 0.63)], "b": [cell(1, 1.0)]}
    text = "before\n<!-- paired: full .*-10x -->\nold\n<!-- end of pairs -->\nafter"
    lines = with_pairs(text, cells).split("\n")
    assert [lines[0], *lines[-2:]] == ["before", "<!-- end of pairs -->", "after"]
    assert lines[4:-2] == ["| a-10x | 5.3x | +0.0200 ± 0.0100 | +0.0100, +0.0300 |"]


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_readmes_show_what_the_committed_cells_say(readme: Path) -> None:
    text = readme.read_text()
    assert with_pairs(text, dict(Study.open(readme.parent).cells())) == text
