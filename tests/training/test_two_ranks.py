"""Two ranks on gloo, as torchrun starts them, from an encoded log to results."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recemb.assembly import build_model
from recemb.command_line import config_folder
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluation import metrics
from recemb.ranks import joined_ranks
from recemb.run_folder import RunFolder, load_model
from recemb.training import run
from recemb.training.metrics_log import read_metrics
from recemb.training.run import train
from tests.data.encoded import write_encoded

ROWS = 12_000
OVERRIDES = (
    "data=parquet",
    "trainer.device=cpu",
    "trainer.log_every_steps=5",
    "trainer.validate_every_steps=25",
    "trainer.checkpoint_every_steps=10",
    "trainer.stopping.patience=null",
    "model.bottom_layers=[16,16]",
    "model.over_layers=[16,1]",
)

# Forked from a process that has imported everything: starting a rank costs milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["recemb.training.run", "recemb.ranks", "torchrec.distributed.model_parallel"])


def config(data: Path, run: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        content = compose("train", [*OVERRIDES, f"data.path={data}", f"paths.run={run}", "paths.runs=r", *overrides])
    return OmegaConf.to_container(content, resolve=True)  # type: ignore[return-value]


def run_rank(rank: int, port: int, content: dict[str, Any], continues: bool, output: Path, whole: bool) -> None:
    if whole:
        # Tables that are built before they are cut start as those of one process.
        run.build_model = lambda *arguments, spread, **options: build_model(*arguments, **options)
    # As torchrun: the store outlives every rank.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2", TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    # Only the first rank's config counts.
    mine = content if rank == 0 else {**content, "paths": {"run": "elsewhere"}}
    try:
        with joined_ranks() as ranks:
            results = train(mine, continues=continues, ranks=ranks)
        (output / f"results-{rank}.json").write_text(json.dumps(results))
    except Exception as error:
        (output / f"error-{rank}").write_text(f"{type(error).__name__}: {error} {error.__notes__}")
        raise SystemExit(2) from None


def start(content: dict[str, Any], output: Path, *, continues: bool = False, whole: bool = False) -> list[Any]:
    output.mkdir(exist_ok=True)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (store.port, content, continues, output, whole)
    processes = [_CONTEXT.Process(target=run_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
        process.store = store
    return processes


def finish(processes: list[Any]) -> list[int]:
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "a rank hangs"
    return [process.exitcode for process in processes]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "encoded"
    write_encoded(root, rows=ROWS, num_users=100)
    return root


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    assert finish(start(config(data, folder / "run", "trainer.batch_size=64"), folder)) == [0, 0]
    return folder


def test_both_ranks_return_the_results_that_the_first_wrote(finished: Path) -> None:
    results = json.loads((finished / "run" / "results.json").read_text())
    assert all(json.loads((finished / f"results-{rank}.json").read_text()) == results for rank in range(2))
    assert not Path("elsewhere").exists()
    assert results["train"]["ranks"] == 2
    assert results["train"]["samples"] == 0.8 * ROWS
    assert results["train"]["steps"] == 0.8 * ROWS / 128
    assert results["test"]["rows"] == 0.1 * ROWS
    assert results["test"]["users"]["num_users"] == 100
    assert [line["step"] for line in read_metrics(finished / "run") if line["split"] == "validation"] == [25, 50, 75]


def test_two_ranks_learn_what_one_does(finished: Path, data: Path, tmp_path: Path) -> None:
    one = train(config(data, tmp_path / "run", "trainer.batch_size=128"))
    assert finish(start(config(data, tmp_path / "two", "trainer.batch_size=64"), tmp_path / "out", whole=True)) == [
        0,
        0,
    ]
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    # 1200 test rows: the standard error of an AUC is about 0.014; the two orders of the rows differ by less.
    assert two["test"]["auc"] == pytest.approx(one["test"]["auc"], abs=0.02)
    # Other starts are other seeds, which spread by .012.
    filled = json.loads((finished / "run" / "results.json").read_text())
    assert filled["test"]["auc"] == pytest.approx(one["test"]["auc"], abs=0.05)
    assert min(two["test"]["auc"], filled["test"]["auc"]) > 0.7
    assert two["train"]["samples"] == one["train"]["samples"]
    assert two["embedding"] == one["embedding"]


def test_one_process_evaluates_what_two_ranks_trained(finished: Path, data: Path) -> None:
    model, _ = load_model(finished / "run")
    loader = ParquetLoader(Manifest.load(data), "test", batch_size=300)
    with torch.no_grad():
        pairs = [(batch.labels, model(batch.dense, batch.sparse)) for batch in loader]
    labels, logits = (torch.cat(tensors).numpy() for tensors in zip(*pairs, strict=True))
    results = json.loads((finished / "run" / "results.json").read_text())
    assert metrics.auc(labels, logits) == pytest.approx(results["test"]["auc"], abs=1e-9)


def test_killed_with_signal_9_and_resumed_two_ranks_end_with_the_same_metrics_and_one_goes_on_too(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    processes = start(config(data, run, "trainer.batch_size=64"), tmp_path)
    log = run / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"step": 35,' in log.read_text())
    os.kill(processes[1].pid, signal.SIGKILL)
    # The other notices, and leaves without a word: its peer is gone.
    finish(processes)
    assert not (run / "results.json").exists()

    for_one = tmp_path / "for-one"
    shutil.copytree(run, for_one, symlinks=True)
    assert finish(start(RunFolder(run).config(), tmp_path, continues=True)) == [0, 0]
    whole, resumed = (json.loads((path / "results.json").read_text()) for path in (finished / "run", run))
    assert resumed["test"] == whole["test"]
    assert resumed["validation"] == whole["validation"]
    lines = [
        [{key: value for key, value in line.items() if key != "samples_per_second"} for line in read_metrics(path)]
        for path in (finished / "run", run)
    ]
    assert lines[0] == lines[1]

    alone = train(
        RunFolder(for_one).config() | {"paths": {"run": str(for_one), "runs": "r", "data": "d"}}, continues=True
    )
    # As many rows a step as both had taken, and each row of the epoch once.
    assert (alone["train"]["ranks"], alone["train"]["steps"], alone["train"]["epochs"]) == (1, 75, 1)
    assert alone["train"]["samples"] == 0.8 * ROWS
    assert alone["test"]["auc"] == pytest.approx(whole["test"]["auc"], abs=0.02)
    [lengths] = {len(read_metrics(path)) for path in (run, for_one)}
    assert lengths == len(lines[0])


def test_ranks_that_cannot_share_the_rows_of_a_step_are_refused(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("trainer.batch_size=65", "trainer.max_steps=5")
    with pytest.MonkeyPatch.context() as patch:
        # Stopped before its results are written.
        patch.setattr("recemb.training.run.write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config(data, run, *settings))
    assert set(finish(start(RunFolder(run).config(), tmp_path, continues=True))) == {1, 2}
    [message] = [path.read_text() for path in tmp_path.glob("error-*")]
    assert "step-00000005: a step takes 65 rows, which 2 ranks cannot share equally; it was trained by 1" in message


def test_an_error_of_one_rank_ends_both_with_one_message(data: Path, tmp_path: Path) -> None:
    exit_codes = finish(start(config(data, tmp_path / "run", "trainer.batch_size=0"), tmp_path))
    # The first to fail tells why, the other says nothing.
    assert sorted(exit_codes) == [1, 2]
    messages = [path.read_text() for path in tmp_path.glob("error-*")]
    assert len(messages) == 1
    assert "trainer.batch_size must be at least 1, got 0" in messages[0]
    assert "of 2, which ends the others" in messages[0]


def test_other_ranks_than_the_first_leave_the_folder_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from recemb import command_line

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["train", "hydra.run.dir=mine"])
    seen = []
    command_line.run(lambda content: seen.append(content["paths"]["run"]), "train")
    assert seen == [str(tmp_path)]
    assert list(tmp_path.iterdir()) == []
