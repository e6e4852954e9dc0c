"""A run of DIN from an encoded log with histories to results, and its checkpoint back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recemb.assembly import ModelInputs
from recemb.command_line import config_folder
from recemb.data.manifest import CategoricalFeature, Manifest
from recemb.data.parquet import ParquetLoader
from recemb.models.histories import History
from recemb.run_folder import load_model
from recemb.training.run import train
from tests.data.encoded import write_encoded
from tests.histories import write_behaviour_log

OVERRIDES = ("data=parquet", "model=din", "trainer.device=cpu", "trainer.batch_size=256", "embedding.embedding_dim=8")


def config(data: Path, run: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        content = compose("train", [*OVERRIDES, f"data.path={data}", f"paths.run={run}", "paths.runs=r", *overrides])
    return OmegaConf.to_container(content, resolve=True)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_behaviour_log(tmp_path_factory.mktemp("behaviour") / "log", rows=4000)


@pytest.mark.parametrize("method", ["full", "unified"])
def test_a_run_with_decay_stops_by_gauc_and_its_checkpoint_serves(tmp_path: Path, log: Manifest, method: str) -> None:
    overrides = [f"embedding={method}", "trainer.epochs=2", "trainer.stopping.metric=gauc"]
    overrides += ["+embedding.mini_batch_aware_decay=0.001"]
    results = train(config(log.root, tmp_path / "run", *overrides))
    users = results["test"]["users"]
    assert users["num_users"] == 40 and 0.5 < users["gauc"] < 1
    assert 0.5 < results["validation"]["gauc"] < 1
    assert "test GAUC" in (tmp_path / "run" / "report.md").read_text()
    model, _ = load_model(tmp_path / "run")
    batch = next(iter(ParquetLoader(log, "test", batch_size=100)))
    logits = model(batch.dense, batch.sparse)
    one = next(iter(ParquetLoader(log, "test", batch_size=1)))
    torch.testing.assert_close(model(one.dense, one.sparse), logits[:1])


def test_dlrm_sums_histories_of_the_same_log(tmp_path: Path, log: Manifest) -> None:
    small = ["model=dlrm", "trainer.max_steps=5", "model.bottom_layers=[8,8]", "model.over_layers=[8,1]"]
    assert train(config(log.root, tmp_path / "run", *small))["test"]["rows"] == 400


def test_a_log_without_histories_or_users_is_refused(tmp_path: Path) -> None:
    manifest = write_encoded(tmp_path / "log", rows=1000)
    with pytest.raises(ValueError, match=r"recemb\.models\.din\.DIN needs histories, and the data set has no sequence"):
        train(config(manifest.root, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"trainer\.stopping\.metric=gauc: .* has no user column"):
        train(config(manifest.root, tmp_path / "run_2", "model=dlrm", "trainer.stopping.metric=gauc"))


def inputs_of(*features: CategoricalFeature) -> ModelInputs:
    return ModelInputs.of(Manifest(Path("log"), "parquet", "label", (), features, splits={}))


def test_sequences_find_their_targets_by_their_table() -> None:
    inputs = inputs_of(
        CategoricalFeature("item", 100),
        CategoricalFeature("shop", 10, table="shops"),
        CategoricalFeature("items_seen", 100, "sequence", table="item"),
        CategoricalFeature("shops_seen", 10, "sequence", table="shops"),
        CategoricalFeature("items_bought", 100, "sequence", table="item", events="purchases"),
        CategoricalFeature("words", 50, "sequence"),
        CategoricalFeature("tags", 5, "list"),
    )
    assert inputs.histories == (
        History("history", ("items_seen", "shops_seen"), ("item", "shop")),
        History("purchases", ("items_bought",), ("item",)),
    )
    assert inputs.bags == ("words", "tags")
    assert ModelInputs.from_dict(inputs.to_dict()) == inputs


def test_of_two_possible_targets_the_one_named_like_the_table_is_taken() -> None:
    sequence = CategoricalFeature("seen", 100, "sequence", table="item")
    other = CategoricalFeature("last_item", 100, table="item")
    assert inputs_of(CategoricalFeature("item", 100), other, sequence).histories[0].targets == ("item",)
    third = CategoricalFeature("first_item", 100, table="item")
    with pytest.raises(ValueError, match=r"'seen' shares table 'item' with \['last_item', 'first_item'\]"):
        inputs_of(other, third, sequence)
