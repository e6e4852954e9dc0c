"""A model, its optimizer and a loader small enough to train in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.data.batch import Batch, keyed_one_id
from recemb.models.dlrm import DLRM
from recemb.optimizers import EmbeddingOptimizer, TrainingOptimizer
from recemb.preparation import prepare

FEATURES = ("C1", "C2")
NUM_EMBEDDINGS = 50


class ListLoader:
    """Batches from memory, with the state of a ParquetLoader: the same batches each epoch."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        while self.batch < len(self.batches):
            self.batch += 1
            yield self.batches[self.batch - 1]
        self.epoch, self.batch = self.epoch + 1, 0

    @property
    def batches_left(self) -> int:
        return len(self.batches) - self.batch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


def batches(count: int, *, rows: int = 16, seed: int = 0) -> list[Batch]:
    """``count`` batches whose labels follow the ids and numbers."""
    generator = torch.Generator().manual_seed(seed)
    effects = torch.randn(len(FEATURES), NUM_EMBEDDINGS, generator=generator)
    result = []
    for _ in range(count):
        ids = torch.randint(NUM_EMBEDDINGS, (len(FEATURES), rows), generator=generator)
        dense = torch.randn(rows, 3, generator=generator)
        logits = effects.gather(1, ids).sum(0) + dense[:, 0]
        labels = torch.bernoulli(logits.sigmoid(), generator=generator)
        result.append(Batch(dense, keyed_one_id(FEATURES, ids), labels, {}))
    return result


def model_and_optimizer(
    name: str = "rowwise_adagrad", *, learning_rate: float = 0.05, seed: int = 0
) -> tuple[DLRM, TrainingOptimizer]:
    """A DLRM on two tables, prepared with the embedding optimizer ``name`` and Adam for the rest."""
    torch.manual_seed(seed)
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=NUM_EMBEDDINGS, embedding_dim=4, feature_names=[name])
        for name in FEATURES
    ]
    model = DLRM(EmbeddingBagCollection(tables=tables), num_dense=3, bottom_layers=[8, 4], over_layers=[8, 1])
    prepared, optimizer = prepare(
        model, EmbeddingOptimizer(name=name, learning_rate=learning_rate), partial(torch.optim.Adam, lr=1e-2)
    )
    assert isinstance(prepared, DLRM)
    return prepared, optimizer
