"""Ids of another vocabulary are told from a model's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recemb.data.manifest import CategoricalFeature, Manifest, NumericFeature
from recemb.vocabulary_reference import check_vocabulary, describe_data


def data_set(root: Path, words: list[str]) -> Manifest:
    """Two features, one with a vocabulary of ``words``; no rows."""
    (root / "vocabulary").mkdir(parents=True)
    table = pa.table({"value": [None, *words], "train_count": [0, *range(len(words), 0, -1)]})
    pq.write_table(table, root / "vocabulary" / "word.parquet")
    manifest = Manifest(
        root=root,
        source="parquet",
        label="label",
        numeric=(NumericFeature("length", "log1p"),),
        categorical=(
            CategoricalFeature("word", len(words) + 1, vocabulary="vocabulary/word.parquet", out_of_vocabulary=0),
            CategoricalFeature("hashed", None),
        ),
        splits={},
    )
    manifest.save()
    return manifest


def test_the_same_vocabulary_elsewhere_passes(tmp_path: Path) -> None:
    data = json.loads(json.dumps(describe_data(data_set(tmp_path / "a", ["x", "y"]))))
    check_vocabulary(data, data_set(tmp_path / "b", ["x", "y"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "z"], r"feature 'word' must have vocabulary_checksum \w+, got \w+: its ids are of another vocabulary"),
        (["y", "x"], "feature 'word' must have vocabulary_checksum"),
        (["x", "y", "z"], "feature 'word' must have num_embeddings 3, got 4"),
    ],
)
def test_another_vocabulary_is_named(tmp_path: Path, words: list[str], message: str) -> None:
    data = describe_data(data_set(tmp_path / "a", ["x", "y"]))
    with pytest.raises(ValueError, match=message):
        check_vocabulary(data, data_set(tmp_path / "b", words))


def test_features_must_be_the_models(tmp_path: Path) -> None:
    manifest = data_set(tmp_path / "a", ["x", "y"])
    data = describe_data(manifest)
    with pytest.raises(ValueError, match="feature 'hashed' must have table hashed, got None"):
        check_vocabulary(data, dataclasses.replace(manifest, categorical=manifest.categorical[:1]))
    with pytest.raises(ValueError, match="numeric features must be"):
        check_vocabulary(data, dataclasses.replace(manifest, numeric=(NumericFeature("length"),)))
    with pytest.raises(ValueError, match="saved without a manifest"):
        check_vocabulary(None, manifest)
