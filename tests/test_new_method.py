"""A new method is one file and one config: one from outside the package trains within its budget and is evaluated."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.data.encoded import write_encoded

CHECKOUT = Path(__file__).resolve().parents[1]

METHOD = '''
from recemb.method import CompressedTables, physical_table


class LastDigits(CompressedTables):
    """Gives id i row i mod num_embeddings of one table that all features share."""

    budget_knob = "num_embeddings"

    def __init__(self, tables, *, num_embeddings):
        width = tables[0].embedding_dim
        super().__init__(tables, [[physical_table("last_digits", num_embeddings, width, 0.01)]])
        self.num_embeddings = num_embeddings

    def remap(self, bags):
        return [[bags.ids % self.num_embeddings]]

    def compose(self, rows, bags):
        return rows[0][0]
'''


def printed_config() -> str:
    """The config that the README prints, of the method above and at another width and budget."""
    [block] = re.findall(
        r"`configs/embedding/mymethod\.yaml`.*?\n\n(.*?)\n\n", (CHECKOUT / "README.md").read_text(), re.S
    )
    config = textwrap.dedent(block)
    for printed, ours in (
        ("embedding_dim: 16", "embedding_dim: 8"),
        ("budget: 10x", "budget: 5x"),
        ("recemb.methods.mymethod.MyMethod", "mine.LastDigits"),
    ):
        assert config.count(printed) == 1
        config = config.replace(printed, ours)
    return config


def test_a_method_needs_one_file_and_one_config_and_no_other_edit(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    (tmp_path / "configs" / "embedding").mkdir(parents=True)
    (tmp_path / "configs" / "embedding" / "last_digits.yaml").write_text(printed_config())
    write_encoded(tmp_path / "encoded", rows=2000)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "recemb.train", "--config-dir", "configs", "data=parquet", "data.path=encoded"]
    command += ["embedding=last_digits", "trainer.batch_size=128", "trainer.threads=1", f"hydra.run.dir={run}"]
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{tmp_path}"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    results = json.loads((run / "results.json").read_text())
    assert results["embedding"]["method"] == "mine.LastDigits"
    assert 0.98 < 5 * results["embedding"]["bytes"] / results["embedding"]["full_bytes"] <= 1
    assert 0 < results["test"]["auc"] < 1
