"""The stages of OptEmbed on a small log: what they write, a budget, and going on after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.collection import compressed_groups
from recemb.conversion import convert
from recemb.plan import CompressionPlan
from recemb.pruned_bytes import plan_bytes
from recemb.run_folder import load_model
from recemb.training.metrics_log import read_metrics
from recemb.training.resume import config_to_train
from recemb.training.run import train
from recemb.training.search_report import search_points, stage_curves
from tests.data.encoded import write_encoded
from tests.training.test_stages import config_of

TABLES = 3
FULL_BYTES = (20 + 100 + 1000) * 8 * 4
OPTIONS = ["embedding=optembed", "embedding.stages.1.generations=4", "embedding.method.thresholds.alpha=1e-2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "encoded"
    write_encoded(root, rows=6000)
    return root


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(config_of(data, run, *OPTIONS))
    return run


def figures_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "stages" / "1-search" / "stage.json").read_text())["figures"]


def test_supernet_search_and_retraining_end_in_smaller_tables(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["supernet", "search", "retrain"]
    figures = figures_of(finished)
    # What was planned is what is served.
    assert figures["bytes"] == results["embedding"]["bytes"] < FULL_BYTES
    plan = CompressionPlan.load(finished / "stages" / "1-search" / "plan")
    assert len(plan.tables) == TABLES
    for name, table in plan.tables.items():
        widths = table.mask().sum(1).unique().tolist()
        assert set(widths) <= {0, figures["widths"][name]}
    assert sum(table.num_rows() for table in plan.tables.values()) == figures["kept_rows"]
    lines = [line for line in read_metrics(finished / "stages" / "1-search") if line["split"] == "architecture"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in ("auc", "bytes", "kept_rows", "mean_dim"):
        assert figures[name] == pytest.approx(lines[-1][name], abs=1e-12), name


def test_plots_keep_what_different_rows_say_apart(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    outcomes, paths = search_points(finished / "stages", results)
    assert outcomes == {stage["name"]: (stage["bytes"], stage["validation"]["auc"]) for stage in results["stages"]}
    assert list(paths) == ["search"] and len(paths["search"]) == 4
    assert paths["search"][-1] == (figures_of(finished)["bytes"], pytest.approx(figures_of(finished)["auc"]))
    plan = CompressionPlan.load(finished / "stages" / "1-search" / "plan")
    supernet, search, retrain = stage_curves(finished / "stages", results, plan)
    assert [curve.unit for curve in (supernet, search, retrain)] == ["step", "generation", "step"]
    assert search.positions == [1, 2, 3, 4]
    assert {name: shares[-1] for name, shares in search.kept.items()} == pytest.approx(
        {
            "rows": figures_of(finished)["kept_rows"] / 1120,
            "mean width": figures_of(finished)["mean_dim"] / 8,
            "bytes": figures_of(finished)["bytes"] / FULL_BYTES,
        }
    )
    assert list(supernet.kept) == ["rows"] and 0 < supernet.kept["rows"][-1] <= 1
    assert not retrain.kept
    assert all((finished / f"{name}.png").is_file() for name in ("progress", "search", "fields"))


def test_a_killed_search_goes_on_to_the_same_plan(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    (run / "results.json").unlink()
    shutil.rmtree(run / "stages" / "2-retrain")
    folder = run / "stages" / "1-search"
    state = json.loads((folder / "evolution.json").read_text())
    for name in ("seconds", "cpu_seconds"):
        assert 0 < state[name] <= figures_of(finished)[name]
    shutil.rmtree(folder)
    folder.mkdir()
    # As it was after the first generation, whose candidates were scored first; it took long.
    state.update(generation=1, scores=state["scores"][:20], history=state["history"][:1])
    state.update(seconds=1e6, cpu_seconds=2e6)
    (folder / "evolution.json").write_text(json.dumps(state))
    arguments = {
        "resume": str(run),
        "stage": "search",
        "data": {"path": None, "allow_synthetic": False, "synthetic": {"path": "log"}},
    }
    train(config_to_train({**arguments, "paths": {}}, [f"resume={run}", "+stage=search"]), continues=True)
    assert figures_of(run)["widths"] == figures_of(finished)["widths"]
    assert 1e6 < figures_of(run)["seconds"] < 1e6 + 600
    assert 2e6 < figures_of(run)["cpu_seconds"] < 2e6 + 600
    again, before = (CompressionPlan.load(path / "stages" / "1-search" / "plan") for path in (run, finished))
    for name, table in before.tables.items():
        assert torch.equal(again.tables[name].mask(), table.mask())


def test_most_candidates_are_dropped_on_a_sample(data: Path, tmp_path: Path) -> None:
    train(config_of(data, tmp_path / "run", *OPTIONS, "embedding.stages.1.sample_rows=100", "trainer.max_steps=10"))
    figures = figures_of(tmp_path / "run")
    # At most 20 a generation, of which a quarter see all of the 300 rows or so.
    assert 40 < figures["candidates"] <= 80
    assert figures["candidates_on_all_rows"] == pytest.approx(figures["candidates"] / 4, abs=2)


@pytest.mark.parametrize("name", ["optembed", "optembed_d"])
def test_a_budget_is_met_closely(name: str, data: Path, tmp_path: Path) -> None:
    options = [f"embedding={name}", "embedding.budget=5x", "embedding.stages.1.generations=2", "trainer.max_steps=10"]
    train(config_of(data, tmp_path / "run", *options))
    figures = figures_of(tmp_path / "run")
    # A column of the largest table is 4,000 bytes.
    assert FULL_BYTES / 5 - 4000 < figures["bytes"] <= FULL_BYTES / 5


def test_dropped_ids_may_share_a_learnt_vector_within_the_budget(data: Path, tmp_path: Path) -> None:
    options = [*OPTIONS[:1], "embedding.budget=5x", "embedding.stages.1.generations=1", "trainer.max_steps=10"]
    results = train(config_of(data, tmp_path / "run", *options, "embedding.method.dropped=vector"))
    plan = CompressionPlan.load(tmp_path / "run" / "stages" / "1-search" / "plan")
    assert results["embedding"]["bytes"] == plan_bytes(plan) == figures_of(tmp_path / "run")["bytes"] <= FULL_BYTES / 5
    # A vector of 8 floats for each table that dropped an id.
    dropping = {name for name, table in plan.tables.items() if table.num_rows() < table.num_embeddings}
    assert plan_bytes(plan) >= plan_bytes(plan, dropped="zero") + 4 * 8 * len(dropping)
    model, _ = load_model(tmp_path / "run")
    [group] = compressed_groups(convert(model))
    assert dropping
    for feature, (name, table) in enumerate(plan.tables.items()):
        if name in dropping:
            ids = (~table.mask().any(1)).nonzero().view(-1)
            lengths = torch.zeros(len(plan.tables), len(ids), dtype=torch.int64)
            lengths[feature] = 1
            features = KeyedJaggedTensor(group.feature_names, ids, lengths=lengths.view(-1))
            vectors = group.vectors(features)
            assert vectors[0].abs().sum() > 0 and torch.equal(vectors, vectors[:1].expand_as(vectors))
