"""A feature that several tables name is, to each of them, a feature of its own: TorchRec's ``feature@table``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Table = TypeVar("Table", EmbeddingBagConfig, EmbeddingConfig)


def with_own_features(tables: Sequence[Table]) -> list[Table]:
    """``tables`` with feature names that no two of them share, which are those of TorchRec's outputs."""
    names = get_embedding_names_by_table(list(tables))
    return [
        table if own == table.feature_names else dataclasses.replace(table, feature_names=own)
        for table, own in zip(tables, names, strict=True)
    ]


def select_keys(features: KeyedJaggedTensor, names: list[str], own_names: list[str] | None = None) -> KeyedJaggedTensor:
    """``features`` with exactly the keys ``names`` in that order; free where it has them already.

    Args:
        features: ids under at least these keys.
        names: keys to take; one may come several times.
        own_names: what to call them then; ``names`` where None.

    Raises:
        ValueError: naming the keys that are missing and those that came.
    """
    keys = features.keys()
    if keys != names:
        positions = {key: position for position, key in enumerate(keys)}
        if missing := [name for name in dict.fromkeys(names) if name not in positions]:
            raise ValueError(f"KeyedJaggedTensor: keys {missing} are required by the tables, got {keys}")
        features = features.permute([positions[name] for name in names])
    if own_names is None or own_names == names:
        return features
    return KeyedJaggedTensor(
        keys=own_names,
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        offsets=features.offsets(),
        stride=features.stride(),
    )
