"""TorchRec's DLRM as released, its tables in one raw fbgemm kernel, streamed from Parquet in file order."""

from __future__ import annotations

from pathlib import Path

import torch
from protocol import (
    BOTTOM_LAYERS,
    CATEGORICAL,
    DENSE_LEARNING_RATE,
    EMBEDDING_DIM,
    NUMERIC,
    OVER_LAYERS,
    EpochClock,
    cardinalities,
    labels,
    parse_options,
    report,
)
from raw_kernel import raw_kernel, stream
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


class KernelCollection(EmbeddingBagCollection):
    """DLRM checks for an EmbeddingBagCollection, so this is one in name, its tables on the meta device."""

    def __init__(self, sizes: list[int]) -> None:
        tables = [
            EmbeddingBagConfig(name=f"t_{name}", num_embeddings=n, embedding_dim=EMBEDDING_DIM, feature_names=[name])
            for name, n in zip(CATEGORICAL, sizes, strict=True)
        ]
        super().__init__(tables=tables, device=torch.device("meta"))
        self.embedding_bags = torch.nn.ModuleDict()
        self.kernel = raw_kernel(sizes)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        values = self.kernel(features.values(), features.offsets())
        return KeyedTensor(CATEGORICAL, [EMBEDDING_DIM] * len(CATEGORICAL), values)


def keyed(ids: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=CATEGORICAL,
        values=ids.reshape(-1),
        lengths=torch.ones(ids.numel(), dtype=torch.int32),
        offsets=torch.arange(ids.numel() + 1),
        stride=ids.shape[1],
    )


def predict(model: DLRM, data: Path, batch_size: int) -> Tensor:
    model.eval()
    with torch.no_grad():
        scores = [model(dense, keyed(ids)).squeeze(1) for dense, ids, _ in stream(data, "validation", batch_size)]
    model.train()
    return torch.cat(scores)


def main() -> None:
    options = parse_options("fp32")
    model = DLRM(KernelCollection(cardinalities(options.data)), len(NUMERIC), BOTTOM_LAYERS, OVER_LAYERS)
    kernel = model.sparse_arch.embedding_bag_collection.kernel
    tables = {id(parameter) for parameter in kernel.parameters()}
    dense_parameters = [parameter for parameter in model.parameters() if id(parameter) not in tables]
    optimizer = torch.optim.Adam(dense_parameters, lr=DENSE_LEARNING_RATE)
    clock = EpochClock()
    for epoch in range(options.epochs):
        clock.start()
        rows = 0
        for dense, ids, target in stream(options.data, "train", options.batch_size):
            optimizer.zero_grad()
            loss = binary_cross_entropy_with_logits(model(dense, keyed(ids)).squeeze(1), target)
            loss.backward()
            optimizer.step()
            rows += len(target)
        clock.stop(rows)
        if epoch == 0:
            scores = predict(model, options.data, options.batch_size)
    report(options, clock, labels(options.data, "validation"), scores.numpy())


if __name__ == "__main__":
    main()
