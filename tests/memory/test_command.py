"""``python -m recemb.memory`` as people run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recemb.command_line import config_folder
from recemb.memory.job import Outcome, run
from recemb.memory.tables import as_text
from tests.data.encoded import write_encoded

CHECKOUT = Path(__file__).resolve().parents[2]


def memory(*overrides: str) -> Outcome:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("memory", ["data.synthetic.path=none", "paths.run=here", "paths.runs=r", *overrides])
    return run(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]


def test_criteo_terabyte_is_planned_within_a_gigabyte_of_memory(tmp_path: Path) -> None:
    arguments = [
        *("+experiment=criteo", "embedding=full", "embedding.embedding_dim=128", "shape=criteo_1tb"),
        *("world_size=8", "memory_per_gpu=80GB", "output=plan.json"),
    ]
    # The process asks for its own peak: what wait4 says of a child counts the memory of the test's process too, which
    # the child had between fork and exec.
    usage = tmp_path / "usage"
    program = (
        "import runpy, sys, time; from pathlib import Path; "
        f"sys.argv = ['recemb.memory', *{arguments!r}]; runpy.run_module('recemb.memory', run_name='__main__'); "
        "peak = [line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')]; "
        f"Path({str(usage)!r}).write_text(f'{{peak[0].split()[1]}} {{time.process_time()}}')"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    text = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    kilobytes, seconds = usage.read_text().split()
    usage.unlink()
    assert int(kilobytes) * 1024 < 10**9
    assert float(seconds) < 60
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert sum(table["num_embeddings"] for table in plan["memory"]["tables"]) == 882_774_559
    assert plan["memory"]["serving_bytes"] == 882_774_559 * 128 * 4
    assert sum(shard["num_rows"] for shard in plan["placement"]["shards"]) == 882_774_559
    assert max(rank["table_bytes"] for rank in plan["placement"]["ranks"]) < 80 * 10**9
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert "451,980,574,208" in text and "row_wise" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.png"]


def test_without_data_the_ids_are_those_of_the_criteo_log() -> None:
    outcome = memory("+experiment=criteo", "data.path=none", "embedding=unified", "embedding.budget=10x")
    assert outcome.memory.full_bytes == 33_762_577 * 16 * 4
    assert 9.99 < outcome.memory.ratio < 10.2
    assert outcome.placement is None
    text = as_text(outcome)
    assert "unified__0" in text and f"{outcome.memory.serving_bytes:,}" in text and "optimizer state" in text


def test_a_data_set_gives_its_ids(tmp_path: Path) -> None:
    write_encoded(tmp_path / "log", rows=100)
    outcome = memory("data=parquet", f"data.path={tmp_path / 'log'}", "embedding=full")
    assert outcome.memory.full_bytes == (20 + 100 + 1000) * 16 * 4
    assert outcome.source == str(tmp_path / "log")


def test_ids_may_be_given_and_the_figures_are_those_of_the_estimate() -> None:
    outcome = memory("shape.cardinalities=[1000,50]", "embedding=full", "optimizer=adagrad")
    assert [table.num_embeddings for table in outcome.memory.tables] == [1000, 50]
    assert outcome.memory.optimizer_bytes == outcome.memory.table_bytes == 1050 * 16 * 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["world_size=0"], "world_size must be at least 1, got 0"),
        (["world_size=8", "memory_per_gpu=80GB", "local_world_size=3"], "multiple of local_world_size=3, got 8"),
        (["local_world_size=1"], "give memory_per_gpu"),
        (["memory_per_gpu=lots"], "80GB, 24GiB, 1TB"),
        (["output=plan.txt"], "output must end in .json"),
        (["device=tpu"], "device must be cuda or cpu"),
        (["shape.cardinalities=[0]"], "whole numbers of at least 1"),
        (["world_size=2", "memory_per_gpu=1MB"], "tables cannot be placed on 2 cuda ranks"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory("shape.cardinalities=[100000]", "embedding=full", *overrides)


def test_a_shape_needs_no_data() -> None:
    assert memory("shape=avazu", "embedding=full").memory.full_bytes == 9_449_445 * 16 * 4
