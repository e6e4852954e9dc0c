"""A loop written by hand for this one model: raw fbgemm kernel, eager or compiled dense part, batches from RAM.

An upper reference: no library, no checks, no streaming, no checkpoints.
"""

from __future__ import annotations

import itertools

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
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


def mlp(sizes: list[int]) -> nn.Sequential:
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers)


class Dense(nn.Module):
    """Everything but the tables."""

    def __init__(self) -> None:
        super().__init__()
        num_vectors = len(CATEGORICAL) + 1
        row, column = torch.tril_indices(num_vectors, num_vectors, -1)
        self.register_buffer("pairs", row * num_vectors + column)
        self.bottom = mlp([len(NUMERIC), *BOTTOM_LAYERS])
        self.over = mlp([EMBEDDING_DIM + len(row), *OVER_LAYERS])[:-1]

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        numeric = self.bottom(dense)
        vectors = torch.cat([numeric, pooled.to(numeric.dtype)], dim=1).view(len(dense), -1, EMBEDDING_DIM)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return self.over(torch.cat([numeric, products.index_select(1, self.pairs)], dim=1)).squeeze(1)


def main() -> None:
    options = parse_options("fp32", "fp32-compile", "bf16", "bf16-compile")
    kernel, model = raw_kernel(cardinalities(options.data)), Dense()
    optimizer = torch.optim.Adam(model.parameters(), lr=DENSE_LEARNING_RATE, fused=True)
    forward = torch.compile(model) if "compile" in options.variant else model
    train = list(stream(options.data, "train", options.batch_size))
    validation = list(stream(options.data, "validation", options.batch_size))
    offsets = torch.arange(len(CATEGORICAL) * options.batch_size + 1)

    def logits(dense: Tensor, ids: Tensor, *, call: nn.Module) -> Tensor:
        pooled = kernel(ids.view(-1), offsets[: ids.numel() + 1])
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options.variant):
            return call(dense, pooled).float()

    clock = EpochClock()
    for epoch in range(options.epochs):
        clock.start()
        for dense, ids, target in train:
            optimizer.zero_grad(set_to_none=True)
            binary_cross_entropy_with_logits(logits(dense, ids, call=forward), target).backward()
            optimizer.step()
        clock.stop(sum(len(target) for *_, target in train))
        if epoch == 0:
            with torch.no_grad():
                scores = torch.cat([logits(dense, ids, call=model) for dense, ids, _ in validation])
    report(options, clock, labels(options.data, "validation"), scores.numpy())


if __name__ == "__main__":
    main()
