"""From a run's folder to a folder that serves, as a user does it, and what stops it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recemb import exporting
from recemb.command_line import config_folder
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluate import spelled_out
from recemb.evaluation.metrics import auc
from recemb.exporting import RESULT_FILE, export
from recemb.methods.unified import Unified
from recemb.packed_tables import PackedTables
from recemb.run_folder import load_model
from recemb.saved_model import DESCRIPTION_FILE, TENSORS_FILE, load, read_description
from recemb.training.run import train
from recemb.vocabulary_reference import check_vocabulary
from tests.data.encoded import write_encoded


def composed(name: str, *overrides: str) -> dict:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return OmegaConf.to_container(compose(name, list(overrides)), resolve=True, throw_on_missing=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoded(tmp_path_factory.mktemp("log") / "encoded", rows=3000).root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    content = composed(
        "train",
        "data=parquet",
        f"data.path={data}",
        f"paths.run={folder}",
        "embedding=unified",
        "model.bottom_layers=[16,16]",
        "model.over_layers=[16,1]",
        "trainer.batch_size=64",
        "trainer.epochs=1",
        "trainer.threads=1",
    )
    train(content)
    return folder


def export_config(run: Path, output: Path, **changes: object) -> dict:
    return {**composed("export", f"run={run}", f"output={output}"), **changes}


def test_a_run_becomes_a_folder_that_predicts_the_same(run: Path, data: Path, tmp_path: Path) -> None:
    result = export(export_config(run, tmp_path / "out", batch_size=100))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        RESULT_FILE,
        TENSORS_FILE,
        DESCRIPTION_FILE,
    ]
    trained, _ = load_model(run)
    served = load(tmp_path / "out")
    assert isinstance(served.embeddings.groups[0], Unified)
    assert served.embeddings.checks_ids() and not trained.embeddings.checks_ids()
    logits, labels = [], []
    for batch in ParquetLoader(Manifest.load(data), "validation", batch_size=300):
        logits.append(served(batch.dense, batch.sparse).detach())
        labels.append(batch.labels)
        assert torch.equal(logits[-1], trained(batch.dense, batch.sparse).detach())
    content = json.loads((tmp_path / "out" / RESULT_FILE).read_text())
    assert content["max_difference"] == result.max_difference == 0
    assert content["rows"] == 300
    expected = auc(torch.cat(labels).numpy(), torch.cat(logits).numpy())
    assert content["metrics"]["auc"] == {"trained": pytest.approx(expected), "exported": pytest.approx(expected)}
    assert content["files"][TENSORS_FILE] == (tmp_path / "out" / TENSORS_FILE).stat().st_size
    assert content["serving_bytes"] == json.loads((run / "memory.json").read_text())["serving_bytes"]
    assert f"{content['serving_bytes']:,} bytes" in result.table()


def test_the_folder_knows_the_vocabulary_of_its_run(run: Path, data: Path, tmp_path: Path) -> None:
    export(export_config(run, tmp_path / "out"))
    description = read_description(tmp_path / "out")
    check_vocabulary(description["data"], Manifest.load(data))
    other = write_encoded(tmp_path / "other", rows=3000, seed=1)
    with pytest.raises(ValueError, match="of another vocabulary than the model's"):
        check_vocabulary(description["data"], other)


def test_a_part_of_the_rows_may_do(run: Path, tmp_path: Path) -> None:
    assert export(export_config(run, tmp_path / "out", batch_size=64, max_rows=100)).rows == 128


def test_predictions_that_differ_leave_nothing_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slightly_wrong(*arguments: object) -> torch.nn.Module:
        model = load(*arguments)
        with torch.no_grad():
            next(model.head.parameters()).add_(0.01)
        return model

    monkeypatch.setattr(exporting, "load", slightly_wrong)
    with pytest.raises(ValueError, match=r"must give the logits of the trained one within 1e-05; row \d+ of "):
        export(export_config(run, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_folder_is_never_written_over(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="export needs a new folder"):
        export(export_config(run, tmp_path))


def test_data_of_other_sizes_is_refused(run: Path, tmp_path: Path) -> None:
    write_encoded(tmp_path / "other", rows=1000, categorical=(20, 100, 999))
    with pytest.raises(ValueError, match="feature 'C3' has 999 ids"):
        export(export_config(run, tmp_path / "out", data={"path": str(tmp_path / "other")}))


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor the folder of a run"):
        export(export_config(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize(("key", "value"), [("max_rows", 0), ("batch_size", 0), ("tolerance", -1.0)])
def test_settings_out_of_range_are_named(run: Path, tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"export: {key} must be at least"):
        export(export_config(run, tmp_path / "out", **{key: value}))


def test_paths_may_hold_characters_that_mean_something_to_hydra() -> None:
    given = ["run=a=b", "output=c,d", "data=e f", "split=test"]
    quoted = spelled_out(given, short={"data": "data.path"}, paths=("run", "output", "data.path"))
    assert quoted == ["run='a=b'", "output='c,d'", "data.path='e f'", "split=test"]


def test_a_search_is_exported_packed(data: Path, tmp_path: Path) -> None:
    content = composed(
        "train",
        "data=parquet",
        f"data.path={data}",
        f"paths.run={tmp_path / 'run'}",
        "embedding=magnitude",
        "model.bottom_layers=[16,16]",
        "model.over_layers=[16,1]",
        "trainer.batch_size=64",
        "trainer.epochs=1",
        "trainer.threads=1",
    )
    train(content)
    result = export(export_config(tmp_path / "run", tmp_path / "out"))
    assert result.max_difference == 0
    assert result.serving_bytes <= 0.1 * result.full_bytes < result.trained_bytes
    assert isinstance(load(tmp_path / "out").embeddings.groups[0], PackedTables)
