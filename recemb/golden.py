"""A few answers a model gave when it was saved, to be given again when it is loaded.

Checksums tell whether a file is whole. These tell whether the code that reads it still means the same: hash functions,
salts, layouts of maps.

Shapes: F features, B golden samples of one id a feature, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.hashing import hash_to_slots, salt
from recemb.shared_features import with_own_features

_IDS = (0, 1, 2**24 + 1, 2**40 + 7, 2**62 + 11)
_SLOTS = 1_000_003
_SAMPLES = 8
# Of a vector's length. Another row differs by about all of it, another device or kernel by some 1e-6.
_TOLERANCE = 1e-3


def hash_answers() -> dict[str, list[int]]:
    """Slots of a few ids, and the salts they were hashed with."""
    salts = torch.tensor([salt("golden", index, seed=index) for index in range(len(_IDS))], device="cpu")
    slots = hash_to_slots(torch.tensor(_IDS, device="cpu"), salts, _SLOTS)
    return {"ids": list(_IDS), "salts": salts.tolist(), "slots": slots.tolist()}


def check_hash(answers: Mapping[str, Sequence[int]]) -> None:
    """Compare ``hash_answers`` of the time of saving with today's.

    Raises:
        ValueError: the hash function is another one.
    """
    now = hash_answers()
    if dict(answers) != now:
        raise ValueError(
            f"recemb.hashing must hash as it did when the model was saved, ids {list(answers.get('ids', []))} to slots "
            f"{list(answers.get('slots', []))}; it gives {now['slots']}: every row would belong to other ids. Load the "
            "model with the recemb that saved it"
        )


def vector_answers(collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection) -> dict[str, Any]:
    """Sums and lengths of the vectors of a few ids, in eval mode: ``{feature: {ids, sums, lengths}}``."""
    tables = (
        collection.embedding_bag_configs()
        if isinstance(collection, CompressedEmbeddingBagCollection)
        else collection.embedding_configs()
    )
    sizes: dict[str, int] = {}
    for table in tables:
        for name in table.feature_names:
            # Ids that every table of the feature has.
            sizes[name] = min(table.num_embeddings, sizes.get(name, table.num_embeddings))
    ids = {name: _golden_ids(size) for name, size in sizes.items()}
    outputs = {
        own: name
        for table, with_own in zip(tables, with_own_features(tables), strict=True)
        for name, own in zip(table.feature_names, with_own.feature_names, strict=True)
    }
    answers = {}
    for name, vectors in _vectors(collection, ids).items():
        double = vectors.to(torch.float64)
        answers[name] = {
            "ids": ids[outputs[name]],
            "sums": double.sum(dim=1).tolist(),
            "lengths": torch.linalg.vector_norm(double, dim=1).tolist(),
        }
    return answers


def check_vectors(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection, answers: Mapping[str, Any]
) -> None:
    """Compare ``vector_answers`` of the time of saving with those of the model as it was loaded.

    Raises:
        ValueError: naming feature and id.
    """
    now = vector_answers(collection)
    if set(now) != set(answers):
        raise ValueError(f"golden vectors must be of features {sorted(now)}, got {sorted(answers)}")
    for name, expected in answers.items():
        for number, (value, length) in enumerate(zip(expected["ids"], expected["lengths"], strict=True)):
            differences = [abs(now[name][key][number] - expected[key][number]) for key in ("sums", "lengths")]
            if max(differences) > _TOLERANCE * length:
                raise ValueError(
                    f"feature {name!r}: the vector of id {value} must have sum {expected['sums'][number]:.7g} and "
                    f"length {length:.7g}, as when the model was saved; got {now[name]['sums'][number]:.7g} and "
                    f"{now[name]['lengths'][number]:.7g}: another hash seed, or code that reads its maps differently"
                )


def _golden_ids(num_embeddings: int) -> list[int]:
    """The first and last ids, and some between."""
    step = max(num_embeddings // (_SAMPLES - 1), 1)
    return [min(index * step, num_embeddings - 1) for index in range(_SAMPLES - 1)] + [num_embeddings - 1]


@torch.no_grad()
def _vectors(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection, ids: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Feature -> (B, D)."""
    modes = {module: module.training for module in collection.modules()}
    device = next(iter([*collection.parameters(), *collection.buffers()])).device
    pooled = isinstance(collection, CompressedEmbeddingBagCollection)
    features = KeyedJaggedTensor(
        keys=list(ids),
        values=torch.tensor([value for column in ids.values() for value in column], device=device),
        lengths=torch.ones(len(ids) * _SAMPLES, dtype=torch.int64, device=device),
        weights=torch.ones(len(ids) * _SAMPLES, device=device) if pooled and _is_weighted(collection) else None,
    )
    try:
        output = collection.eval()(features)
    finally:
        for module, training in modes.items():
            module.training = training
    if isinstance(output, KeyedTensor):
        return {name: output[name] for name in output.keys()}  # noqa: SIM118
    return {name: vectors.values() for name, vectors in output.items()}


def _is_weighted(collection: nn.Module) -> bool:
    return isinstance(collection, CompressedEmbeddingBagCollection) and collection.is_weighted()
