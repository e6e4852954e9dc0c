"""One evaluation from end to end: from a model over an encoded data set, and from a Parquet file."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics
import torch
import yaml
from omegaconf import OmegaConf

from recemb.evaluate import spelled_out
from recemb.evaluation import job
from recemb.run_folder import load_model
from recemb.training.run import train
from tests.data.encoded import rewrite_column, write_encoded

ROOT = Path(__file__).parents[2]


def config(**changes):
    """configs/evaluate.yaml with some keys set."""
    values = yaml.safe_load((ROOT / "configs" / "evaluate.yaml").read_text())
    del values["defaults"]
    assert set(changes) <= set(values)
    return {**values, **changes}


class Tables(torch.nn.Module):
    """The tables of ``write_encoded``'s data: what the model says it was trained with."""

    def __init__(self, num_embeddings):
        super().__init__()
        self.num_embeddings = num_embeddings

    def embedding_bag_configs(self):
        return [
            SimpleNamespace(num_embeddings=rows, feature_names=[name]) for name, rows in self.num_embeddings.items()
        ]


class DenseSum(torch.nn.Module):
    """A model whose logit anybody can compute."""

    def __init__(self, num_embeddings):
        super().__init__()
        self.embeddings = Tables(num_embeddings)

    def forward(self, dense, sparse):
        return dense.sum(dim=1) - 0.5


def loader_of(root, num_embeddings=types.MappingProxyType({"C1": 20, "C2": 100, "C3": 1000})):
    """What ``run_folder.load_model`` does: a model, and the config of its run."""

    def load_model(path, device):
        return DenseSum(num_embeddings), SimpleNamespace(data=SimpleNamespace(path=None if root is None else str(root)))

    return load_model


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


def no_model(path, device):
    raise AssertionError("no model is needed for a file of predictions")


def write_scores(path, rows=500):
    generator = np.random.default_rng(0)
    probabilities = generator.random(rows)
    labels = (generator.random(rows) < probabilities).astype(np.int8)
    users = np.array([f"u{user}" for user in generator.integers(0, 40, rows)])
    pq.write_table(pa.table({"click": labels, "p": probabilities, "who": users}), path)
    return labels, probabilities


def test_a_model_is_evaluated_on_the_test_split_of_the_data_it_was_trained_on(tmp_path, run_folder):
    manifest = write_encoded(tmp_path / "data", 3000, num_users=20)
    settings = config(checkpoint=str(run_folder), slices=["C1"], bootstrap=10, write_predictions=True)
    outcome = job.run(settings, loader_of(tmp_path / "data"))
    assert outcome.folder == run_folder / "evaluation_test"
    written = {path.name for path in outcome.folder.iterdir()}
    assert written == {"evaluation.json", "reliability.png", "slices_C1.png", "predictions.parquet"}

    table = pq.read_table(manifest.files("test")[0])
    logits = sum(table[name].to_numpy().astype(np.float64) for name in manifest.numeric_names) - 0.5
    labels = table["label"].to_numpy()
    content = json.loads((outcome.folder / "evaluation.json").read_text())
    assert content["rows"] == 300
    assert content["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, logits), abs=1e-6)
    optimum = sklearn.metrics.roc_auc_score(labels, table["true_probability"].to_numpy())
    assert content["optimum"]["auc"] == pytest.approx(optimum, abs=1e-12)
    # The manifest's user column is taken where none is named.
    assert content["users"]["num_users"] == len(set(table["user"].to_pylist()))
    assert content["source"]["split"] == "test" and content["source"]["data_source"] == "synthetic"

    again = config(
        predictions=str(outcome.folder / "predictions.parquet"),
        label_column="label",
        score_column="logit",
        score_kind="logit",
        user_column="user",
        slices=["C1"],
        bootstrap=10,
    )
    second = job.run(again, no_model)
    assert second.evaluation.to_dict()["bootstrap"] == outcome.evaluation.to_dict()["bootstrap"]
    assert second.evaluation.to_dict()["slices"] == outcome.evaluation.to_dict()["slices"]


def test_the_model_that_training_saved_has_the_test_metrics_that_training_reported(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    write_encoded(data, 2000, num_users=20)
    overrides = ["data=parquet", f"data.path={data}", f"paths.run={run}", "embedding=full", "trainer.threads=1"]
    overrides += ["model.bottom_layers=[8,16]", "model.over_layers=[8,1]", "trainer.batch_size=256"]
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose("train", overrides), resolve=True)
    results = train(composed)
    outcome = job.run(config(checkpoint=str(run), bootstrap=0), load_model)
    assert outcome.evaluation.rows == 200
    assert outcome.evaluation.auc == results["test"]["auc"]
    assert outcome.evaluation.logloss == pytest.approx(results["test"]["logloss"], rel=1e-6)


def test_another_split_and_a_single_checkpoint_have_folders_of_their_own(tmp_path):
    write_encoded(tmp_path / "data", 1000)
    (tmp_path / "step-10").mkdir()
    settings = config(
        checkpoint=str(tmp_path / "step-10"),
        data={"path": str(tmp_path / "data")},
        split="validation",
        bootstrap=0,
        batch_size=7,
    )
    outcome = job.run(settings, loader_of(None))
    assert outcome.folder == tmp_path / "step-10_evaluation_validation"
    assert outcome.evaluation.rows == 100
    assert "bootstrap" not in json.loads((outcome.folder / "evaluation.json").read_text())


def test_a_checkpoint_of_a_run_is_evaluated_into_the_run_folder(tmp_path, run_folder):
    write_encoded(tmp_path / "data", 1000)
    settings = config(checkpoint=str(run_folder / "checkpoints" / "last"), bootstrap=0)
    outcome = job.run(settings, loader_of(tmp_path / "data"))
    assert outcome.folder == run_folder / "evaluation_last_test"


def test_failures_write_nothing(tmp_path, run_folder):
    write_encoded(tmp_path / "data", 1000)
    with pytest.raises(ValueError, match="no split 'holdout'"):
        job.run(config(checkpoint=str(run_folder), split="holdout"), loader_of(tmp_path / "data"))
    with pytest.raises(ValueError, match="give data=DIR"):
        job.run(config(checkpoint=str(run_folder)), loader_of(None))
    with pytest.raises(ValueError, match="nowhere"):
        job.run(config(checkpoint=str(run_folder), user_column="nowhere"), loader_of(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match="needs a manifest"):
        job.run(config(checkpoint=str(run_folder), data={"path": "missing"}), loader_of(None))
    assert [path.name for path in run_folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("num_embeddings", "message"),
    [
        ({"C1": 20, "C2": 99, "C3": 1000}, "feature 'C2' has 100 ids, the model of .* was trained with 99"),
        ({"C1": 20, "C2": 100}, "feature 'C3' has 1000 ids, the model of .* was trained with no"),
        ({"C1": 20, "C2": 100, "C3": 1000, "C4": 5}, "feature 'C4' has no ids, the model of .* was trained with 5"),
    ],
)
def test_a_data_set_with_other_features_or_vocabularies_is_an_error(tmp_path, run_folder, num_embeddings, message):
    write_encoded(tmp_path / "data", 500)
    with pytest.raises(ValueError, match=message):
        job.run(config(checkpoint=str(run_folder)), loader_of(tmp_path / "data", num_embeddings))
    assert [path.name for path in run_folder.iterdir()] == ["config.yaml"]


def test_results_go_to_output(tmp_path):
    labels, probabilities = write_scores(tmp_path / "p.parquet")
    settings = config(
        predictions=str(tmp_path / "p.parquet"),
        label_column="click",
        score_column="p",
        output=str(tmp_path / "a" / "b"),
        bootstrap=0,
        baseline_auc=0.6,
    )
    outcome = job.run(settings, no_model)
    content = json.loads((tmp_path / "a" / "b" / "evaluation.json").read_text())
    expected = sklearn.metrics.roc_auc_score(labels, probabilities)
    assert content["auc"] == pytest.approx(expected, abs=1e-12)
    assert content["relative_improvement"] == pytest.approx(100 * ((expected - 0.5) / 0.1 - 1))
    assert "users" not in content and outcome.folder == tmp_path / "a" / "b"


def test_an_output_that_cannot_be_a_folder_is_an_error_before_the_work(tmp_path):
    write_scores(tmp_path / "p.parquet")
    settings = config(
        predictions="never read", label_column="click", score_column="p", output=str(tmp_path / "p.parquet" / "x")
    )
    with pytest.raises(NotADirectoryError, match="is a file; give output=FOLDER"):
        job.run(settings, no_model)


MODEL = {"checkpoint": "run"}
SCORES = {"predictions": "p.parquet", "label_column": "y", "score_column": "p"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give either checkpoint=RUN_FOLDER"),
        ({**MODEL, **SCORES}, "give either checkpoint=RUN_FOLDER"),
        ({**MODEL, "score_column": "p"}, r"score_column is for predictions=..., nothing reads it with checkpoint=..."),
        ({**SCORES, "split": "test"}, r"split is for checkpoint=..., nothing reads it with predictions=..."),
        ({**SCORES, "write_predictions": True}, "write_predictions is for checkpoint"),
        ({**SCORES, "data": {"path": "d"}}, "data.path is for checkpoint"),
        ({"predictions": "p.parquet"}, "needs label=COLUMN and score=COLUMN"),
        ({**SCORES, "score_kind": "odds"}, "score_kind must be probability or logit, got 'odds'"),
        ({**MODEL, "bootstrap": -1}, "bootstrap must be at least 0, got -1"),
        ({**MODEL, "bootstrap": 1}, "bootstrap 0 or at least 2"),
        ({**MODEL, "confidence": 95.0}, r"confidence must be in \(0, 1\)"),
        ({**MODEL, "slices": "C1"}, "slices must be list, got 'C1'"),
        ({**MODEL, "max_slices": 0}, "max_slices must be at least 1"),
        ({**MODEL, "baseline_auc": 78.5}, r"evaluate: baseline_auc must be in \(0\.5, 1\], got 78\.5"),
        ({**SCORES, "baseline_auc": 0.5}, r"evaluate: baseline_auc must be in \(0\.5, 1\], got 0\.5"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        job.run(config(**changes), no_model)


def test_labels_of_one_class_are_named_with_their_file_or_split(tmp_path, run_folder):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"y": [1, 1, 1], "p": [0.1, 0.2, 0.3]}), path)
    with pytest.raises(
        ValueError, match=r"p\.parquet, column 'y': labels of both classes are required, got 3 rows with"
    ):
        job.run(config(**{**SCORES, "predictions": str(path)}), no_model)
    manifest = write_encoded(tmp_path / "data", 1000)
    rewrite_column(manifest, "test", "label", pa.array([0] * 100, pa.int8()))
    with pytest.raises(
        ValueError, match=r"data: split 'test': labels of both classes .* got 0 rows with label 1 and 100"
    ):
        job.run(config(checkpoint=str(run_folder)), loader_of(tmp_path / "data"))


def test_an_unknown_key_is_an_error():
    with pytest.raises(ValueError, match="nothing reads bootstraps"):
        job.run({**config(**MODEL), "bootstraps": 3}, no_model)


def test_short_keys_are_spelled_out_and_paths_quoted():
    arguments = ["data=a b", "user=u", "label=y", "score=p", "checkpoint=runs/lr=0.1,x", "split=test", "output=null"]
    assert spelled_out(arguments) == [
        "data.path='a b'",
        "user_column=u",
        "label_column=y",
        "score_column=p",
        "checkpoint='runs/lr=0.1,x'",
        "split=test",
        "output=null",
    ]
    assert spelled_out(["--help", "data.path='done'", "output=a'b"]) == [
        "--help",
        "data.path='done'",
        "output='a\\'b'",
    ]


def test_the_command_evaluates_a_file_from_any_working_directory(tmp_path):
    labels, probabilities = write_scores(tmp_path / "scores=1.parquet")
    command = [sys.executable, "-m", "recemb.evaluate", "predictions=scores=1.parquet", "label=click", "score=p"]
    done = subprocess.run(
        [*command, "user=who", "bootstrap=10"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{sklearn.metrics.roc_auc_score(labels, probabilities):.6f}" in done.stdout
    assert "users left out of gauc" in done.stdout
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["scores=1.parquet", "scores=1_evaluation"]
