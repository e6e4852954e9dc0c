"""OptEmbed on two gloo ranks: the evolution finds what one process finds, and all stages end in one served model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import recemb
from recemb.comparison.cells import composed
from recemb.plan import CompressionPlan
from recemb.run_folder import load_model
from recemb.training.resume import config_to_train
from recemb.training.run import train
from tests.data.encoded import write_encoded
from tests.histories import write_behaviour_log
from tests.training.test_stages import OVERRIDES, config_of
from tests.training.test_two_ranks import finish, start

SEARCH = [
    "embedding=optembed",
    "embedding.stages.1.generations=3",
    "embedding.stages.1.mutants=4",
    "embedding.stages.1.children=4",
    "embedding.stages.1.parents=4",
    "trainer.batch_size=32",
]


def train_on_two_ranks(content: dict[str, Any], output: Path, *, continues: bool = False) -> list[dict[str, Any]]:
    """What each rank returns."""
    codes = finish(start(content, output, continues=continues))
    assert codes == [0, 0], [path.read_text() for path in output.glob("error-*")]
    return [json.loads((output / f"results-{rank}.json").read_text()) for rank in range(2)]


def test_the_same_candidates_score_alike_and_the_same_one_wins(tmp_path: Path) -> None:
    data, one, two = (tmp_path / name for name in ("encoded", "one", "two"))
    # The architecture rows are 301: one rank has a row more than the other.
    write_encoded(data, rows=6020)
    train(config_of(data, one, *SEARCH, "trainer.max_steps=40"))
    shutil.copytree(one, two, symlinks=True)
    arguments = {
        "resume": str(two),
        "stage": "search",
        "data": {"path": None, "allow_synthetic": False, "synthetic": {"path": "log"}},
    }
    content = config_to_train({**arguments, "paths": {}}, [f"resume={two}", "+stage=search"])
    train_on_two_ranks(content, tmp_path, continues=True)
    folders = [run / "stages" / "1-search" for run in (one, two)]
    states = [json.loads((folder / "evolution.json").read_text()) for folder in folders]
    for state in states:
        assert state.pop("seconds") > 0 and state.pop("cpu_seconds") > 0
    assert states[0] == states[1]
    assert len(states[0]["scores"]) > 15 and len({score for _, score in states[0]["scores"]}) > 10
    figures = [json.loads((folder / "stage.json").read_text())["figures"] for folder in folders]
    for name in ("widths", "auc", "full_width_auc", "kept_rows", "bytes"):
        assert figures[0][name] == figures[1][name], name
    assert figures[0]["validation"]["auc"] == figures[1]["validation"]["auc"]


def config(kind: str, folder: Path) -> dict[str, Any]:
    """Of DLRM, or of DIN over tables that dense Adam trains."""
    if kind == "pooled":
        write_encoded(folder / "encoded", rows=3000)
        return config_of(folder / "encoded", folder / "run", *SEARCH)
    write_behaviour_log(folder / "encoded", rows=1500)
    kept = [item for item in OVERRIDES if not item.startswith("model.")]
    adam = ["model=din", "optimizer=dense_adam", "optimizer.embedding.learning_rate=0.01"]
    return composed([*kept, *SEARCH, *adam, f"data.path={folder / 'encoded'}", f"paths.run={folder / 'run'}"])


@pytest.mark.parametrize("kind", ["pooled", "sequences, dense Adam"])
def test_all_stages_end_in_one_model_that_serves(kind: str, tmp_path: Path) -> None:
    first, second = train_on_two_ranks(config(kind, tmp_path), tmp_path)
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    assert first == second == results
    assert [stage["name"] for stage in results["stages"]] == ["supernet", "search", "retrain"]
    assert results["train"]["ranks"] == 2
    assert results["test"]["auc"] > 0.55
    assert results["embedding"]["bytes"] == results["stages"][1]["bytes"] < results["embedding"]["full_bytes"]
    served, (masked, _) = recemb.load(run / "model"), load_model(run)
    assert sum(tensor.nbytes for tensor in served.embeddings.state_dict().values()) == results["embedding"]["bytes"]
    plan = CompressionPlan.load(run / "stages" / "1-search" / "plan")
    kept = torch.cat([table.mask() for table in plan.tables.values()])
    [rows] = [tensor for name, tensor in masked.state_dict().items() if name.endswith("embedding_bags.pruned.weight")]
    assert bool((rows[kept] != 0).all())
