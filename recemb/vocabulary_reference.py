"""Which ids a saved model takes: enough of its data set to tell a foreign vocabulary from its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recemb.data.manifest import FILE_NAME, CategoricalFeature, Manifest, checksum


def describe_data(manifest: Manifest) -> dict[str, Any]:
    """Features in the order that models read them, ids and checksum of each vocabulary, and where the data set lay."""
    return {
        "path": str(manifest.root),
        "source": manifest.source,
        "manifest_checksum": checksum(manifest.root / FILE_NAME),
        "label": manifest.label,
        "numeric": [{"name": feature.name, "transform": feature.transform} for feature in manifest.numeric],
        "categorical": [_describe_feature(manifest, feature) for feature in manifest.categorical],
    }


def check_vocabulary(data: Mapping[str, Any] | None, manifest: Manifest) -> None:
    """Check that ``manifest`` numbers ids as the data set did that a model was trained on.

    Args:
        data: ``recemb.saved_model.read_description(folder)["data"]``.
        manifest: of the data the model is to serve; it may lie elsewhere and hold other rows.

    Raises:
        ValueError: the model says nothing about its data, or naming the feature, what is required and what came.
    """
    if data is None:
        raise ValueError("the model was saved without a manifest, so nobody can tell whether ids are its own")
    numeric = [{"name": feature.name, "transform": feature.transform} for feature in manifest.numeric]
    if numeric != data["numeric"]:
        raise ValueError(
            f"{manifest.root / FILE_NAME}: numeric features must be {data['numeric']}, in this order, got {numeric}"
        )
    wanted = {item["name"]: item for item in data["categorical"]}
    found = {feature.name: _describe_feature(manifest, feature) for feature in manifest.categorical}
    for name in [*wanted, *found]:
        for key in ("num_embeddings", "table", "kind", "vocabulary_checksum"):
            expected, came = wanted.get(name, {}).get(key), found.get(name, {}).get(key)
            if expected != came:
                raise ValueError(
                    f"{manifest.root / FILE_NAME}: feature {name!r} must have {key} {expected}, got {came}: its ids "
                    "are of another vocabulary than the model's"
                )


def _describe_feature(manifest: Manifest, feature: CategoricalFeature) -> dict[str, Any]:
    return {
        "name": feature.name,
        "table": feature.table,
        "kind": feature.kind,
        "num_embeddings": feature.num_embeddings,
        "out_of_vocabulary": feature.out_of_vocabulary,
        "vocabulary": feature.vocabulary,
        "vocabulary_checksum": None if feature.vocabulary is None else checksum(manifest.root / feature.vocabulary),
    }
