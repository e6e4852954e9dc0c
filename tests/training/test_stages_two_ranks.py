"""A search on two gloo ranks: a plan, and the test split once, on both alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import recemb
from recemb.plan import CompressionPlan
from recemb.run_folder import load_model
from tests.data.encoded import write_encoded
from tests.training.test_two_ranks import config, finish, start

FULL = (20 + 100 + 1000) * 16 * 4
SETTINGS = (
    "trainer.batch_size=64",
    "+trainer.placement={magnitude:[row_wise],pruned:[row_wise],dnis:[row_wise]}",
)


@pytest.mark.parametrize("method", ["magnitude", "deeplight", "dnis"])
def test_two_ranks_search_as_one_and_end_with_one_plan(method: str, tmp_path: Path) -> None:
    data = tmp_path / "encoded"
    write_encoded(data, rows=4000)
    run = tmp_path / "run"
    content = config(data, run, f"embedding={method}", *SETTINGS)
    codes = finish(start(content, tmp_path))
    assert codes == [0, 0], [path.read_text() for path in tmp_path.glob("error-*")]
    results = json.loads((run / "results.json").read_text())
    assert all(json.loads((tmp_path / f"results-{rank}.json").read_text()) == results for rank in range(2))
    assert results["test"]["auc"] > 0.55
    assert results["test"]["rows"] == 400
    assert results["train"]["ranks"] == 2
    assert 0.95 * FULL / 10 < results["embedding"]["bytes"] <= FULL / 10
    [folder] = (run / "stages").glob("*-prune")
    plan = CompressionPlan.load(folder / "plan")
    masked, _ = load_model(run)
    served = recemb.load(run / "model")
    assert sum(tensor.nbytes for tensor in served.embeddings.state_dict().values()) == results["embedding"]["bytes"]
    kept = torch.cat([table.mask() for table in plan.tables.values()])
    rows = masked.state_dict()["embeddings.groups.0.lookups.0.embedding_bags.pruned.weight"]
    assert rows[kept].abs().min() > 0
