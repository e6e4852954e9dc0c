from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recemb.assembly import ModelInputs, TableInput, build_model, sized_method, with_train_counts
from recemb.config import EmbeddingConfig
from recemb.data.manifest import CategoricalFeature, Manifest, NumericFeature
from recemb.method import UNBOUNDED
from recemb.methods.dnis import Dnis
from recemb.methods.full import Full
from recemb.optimizers import EmbeddingOptimizer

HEAD = {
    "_target_": "recemb.models.dlrm.DLRM",
    "_partial_": True,
    "bottom_layers": [8, 8],
    "over_layers": [8, 1],
}


def manifest(*features: CategoricalFeature) -> Manifest:
    numeric = (NumericFeature("I1"), NumericFeature("I2"))
    return Manifest(Path("log"), "parquet", "label", numeric, features, splits={})


def embedding(method: str, budget: object = None, **options) -> EmbeddingConfig:
    target = {"_target_": f"recemb.methods.{method}", "_partial_": True, **options}
    return EmbeddingConfig(embedding_dim=8, budget=budget, method=target)


INPUTS = ModelInputs(("I1", "I2"), (TableInput("C1", 1000, ("C1",)), TableInput("C2", 3000, ("C2",))))


def test_features_of_one_id_space_share_one_table():
    inputs = ModelInputs.of(
        manifest(
            CategoricalFeature("ad", 100, table="ad"),
            CategoricalFeature("user", 50),
            CategoricalFeature("history", 100, kind="sequence", table="ad"),
        )
    )
    tables = inputs.logical_tables(8)
    assert [(table.name, table.num_embeddings, table.feature_names) for table in tables] == [
        ("t_ad", 100, ["ad", "history"]),
        ("t_user", 50, ["user"]),
    ]
    assert inputs.numeric == ("I1", "I2")


def test_hashed_ids_become_an_unbounded_table():
    inputs = ModelInputs.of(manifest(CategoricalFeature("ad", None)))
    assert inputs.logical_tables(8)[0].num_embeddings == UNBOUNDED


def test_features_that_disagree_about_their_table_are_an_error():
    with pytest.raises(ValueError, match="table 'ad' has 100 ids for feature 'ad' and 99 for 'history'"):
        ModelInputs.of(manifest(CategoricalFeature("ad", 100), CategoricalFeature("history", 99, table="ad")))


def test_inputs_survive_json():
    assert ModelInputs.from_dict(json.loads(json.dumps(INPUTS.to_dict()))) == INPUTS


def test_bytes_reported_are_those_of_the_built_tables_and_meet_the_budget():
    model, report = build_model(embedding("unified.Unified", "10x"), HEAD, INPUTS, EmbeddingOptimizer())
    assert report.full_bytes == 4000 * 8 * 4
    held = sum(tensor.nbytes for tensor in model.embeddings.state_dict().values())
    assert report.serving_bytes == held <= report.full_bytes / 10
    assert report.serving_bytes > 0.98 * report.full_bytes / 10


def test_a_budget_below_the_smallest_size_names_it():
    with pytest.raises(ValueError, match=r"budget of 5 bytes cannot be met: the smallest Unified"):
        build_model(embedding("unified.Unified", "5"), HEAD, INPUTS, EmbeddingOptimizer())


def test_a_method_of_fixed_size_above_the_budget_is_an_error():
    with pytest.raises(ValueError, match=r"Full takes 128,000 bytes and has no smaller form"):
        build_model(embedding("full.Full", "2x"), HEAD, INPUTS, EmbeddingOptimizer())


def test_neither_budget_nor_size_is_an_error_that_names_both_keys():
    with pytest.raises(ValueError, match=r"give embedding\.budget .* or embedding\.method\.num_embeddings"):
        sized_method(embedding("unified.Unified"), INPUTS.logical_tables(8))
    sized_method(embedding("unified.Unified", num_embeddings=100), INPUTS.logical_tables(8))


def test_tables_larger_than_the_memory_are_refused_before_they_are_built(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(MemoryError, match=r"the tables need 272,000 bytes .*100,000 are available"):
        build_model(embedding("full.Full"), HEAD, INPUTS, EmbeddingOptimizer())


def counted(folder: Path, counts: dict[str, list[int]]) -> Manifest:
    """A manifest whose vocabulary files say how often each id comes in the train split."""
    (folder / "vocabulary").mkdir()
    features = []
    for name, own in counts.items():
        path = f"vocabulary/{name}.parquet"
        content = {"value": [None, *map(str, range(1, len(own)))], "train_count": own}
        pq.write_table(pa.table(content), folder / path)
        features.append(CategoricalFeature(name, len(own), vocabulary=path))
    return Manifest(folder, "parquet", "label", (), tuple(features), splits={})


def test_methods_that_take_train_counts_get_those_of_the_vocabulary(tmp_path):
    data = counted(tmp_path, {"C1": [5, 90, 7], "C2": [1, 30]})
    method = with_train_counts(partial(Dnis, block_shares=[0.4, 0.6]), data)
    group = method(ModelInputs.of(data).logical_tables(8))
    # The two of 90 and 30 rows, out of vocabulary or not, are the frequent ones.
    assert group.blocks.tolist() == [1, 0, 1, 1, 0]
    own = {"t_C1": torch.tensor([9, 1, 1]), "t_C2": torch.tensor([9, 1])}
    group = with_train_counts(partial(Dnis, block_shares=[0.4, 0.6], train_counts=own), data)(group.tables)
    assert group.blocks.tolist() == [0, 1, 1, 0, 1]


def test_a_sized_method_gets_the_train_counts_of_a_data_set(tmp_path):
    data = counted(tmp_path, {"C1": [5, 90, 70, 3], "C2": [1, 30, 2]})
    # Four rows of 8 values: two own ones of 9 bytes, two shared ones of 5, and three integers a feature.
    config = embedding("tiered.Tiered", budget=78, num_lookups=1)
    for counted_by, own in ((None, [1, 1]), (data, [2, 0])):
        model, report = build_model(config, HEAD, ModelInputs.of(data), EmbeddingOptimizer(), counted_by=counted_by)
        assert report.serving_bytes == 2 * 9 + 2 * 5 + 3 * 2 * 8
        assert model.embeddings.groups[0].tiers.own.tolist() == own


def test_methods_without_need_of_train_counts_stay_as_they_are(tmp_path):
    data = counted(tmp_path, {"C1": [5, 90, 7]})
    assert with_train_counts(Full, data) is Full


def test_tables_that_nobody_counted_leave_methods_without_counts(caplog):
    method = partial(Dnis, block_shares=[1.0])
    assert with_train_counts(method, manifest(CategoricalFeature("ad", 10))) is method
    assert "Dnis does without train counts" in caplog.text and "feature 'ad' has no vocabulary" in caplog.text
