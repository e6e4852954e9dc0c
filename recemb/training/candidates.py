"""AUC of many widths of one supernet in a single pass over the data.

Rows are read once a batch, at full width; a candidate's narrower vectors are those with their last columns set to zero,
which commutes with pooling. So only the dense layers are run for every candidate.

Shapes: B batch, C candidates, D embedding_dim of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.data.batch import Batch, keyed_bags
from recemb.evaluation import metrics
from recemb.evaluation.gather import gather_rows

Collection = CompressedEmbeddingBagCollection | CompressedEmbeddingCollection


class CandidateScores:
    """Scores widths of the tables of a frozen model.

    Args:
        model: ``model(dense, sparse)`` -> (B,) logits, whose collections are recemb's. It must read ids through them
            alone, and in the same order in every call.
        tables: names of the searched tables, in the order of a candidate's widths; the others keep all columns.
        batches: called for every pass: the batches of this rank, the same every time.
        device: where the model lies.
        every: the sample is every so many rows of each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        tables: Sequence[str],
        batches: Callable[[], Iterable[Batch]],
        *,
        device: torch.device,
        every: int = 1,
    ) -> None:
        self.model = model
        self.tables = list(tables)
        self.batches = batches
        self.device = device
        self.every = every
        self.passes = 0

    def __call__(self, candidates: Sequence[Sequence[int]], sample: bool = False) -> list[float]:
        """AUC of each candidate over the rows of all ranks, equal on every rank.

        Args:
            candidates: widths, one a table of ``tables``.
            sample: on the sample only.
        """
        self.passes += 1
        widths = [dict(zip(self.tables, candidate, strict=True)) for candidate in candidates]
        labels: list[np.ndarray] = []
        logits: list[list[np.ndarray]] = [[] for _ in candidates]
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), _remembering(self.model) as collections:
                for batch in self.batches():
                    part = _every(batch, self.every) if sample and self.every > 1 else batch
                    part = part.to(self.device)
                    labels.append(part.labels.cpu().numpy())
                    for index, chosen in enumerate(widths):
                        for collection in collections:
                            collection.use(chosen, is_first=index == 0)
                        logits[index].append(self.model(part.dense, part.sparse).float().cpu().numpy())
        finally:
            self.model.train(was_training)
        whole = gather_rows(np.concatenate(labels))
        return [metrics.auc(whole, gather_rows(np.concatenate(parts))) for parts in logits]


class _Remembered(nn.Module):
    """A collection that looks a batch up once and gives it out again with other widths."""

    def __init__(self, collection: Collection) -> None:
        super().__init__()
        self.collection = collection
        self._outputs: list[KeyedTensor | dict[str, JaggedTensor]] = []
        self._calls = 0
        self._widths: Mapping[str, int] = {}

    def use(self, widths: Mapping[str, int], *, is_first: bool) -> None:
        """Before a call of the model: the widths of its candidate, and whether the batch is a new one."""
        self._widths = widths
        self._calls = 0
        if is_first:
            self._outputs.clear()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor | dict[str, JaggedTensor]:
        if self._calls == len(self._outputs):
            self._outputs.append(self.collection(features))
        output = self._outputs[self._calls]
        self._calls += 1
        masks = self._masks()
        if isinstance(output, KeyedTensor):
            keys = output.keys()
            mask = torch.cat([masks[key] for key in keys]).to(output.values().device)
            return KeyedTensor(keys, output.length_per_key(), output.values() * mask)
        return {
            key: JaggedTensor(
                tensor.values() * masks[key].to(tensor.values().device),
                lengths=tensor.lengths(),
                offsets=tensor.offsets(),
            )
            for key, tensor in output.items()
        }

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return cast(CompressedEmbeddingBagCollection, self.collection).embedding_bag_configs()

    def __getattr__(self, name: str) -> Any:
        # What else a model asks its collection for.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("collection"), name)

    def _masks(self) -> dict[str, Tensor]:
        """Feature -> (D,) float32, 1 for its table's first columns."""
        collection = self.collection
        tables = (
            collection.embedding_bag_configs()
            if isinstance(collection, CompressedEmbeddingBagCollection)
            else collection.embedding_configs()
        )
        masks = {}
        for table in tables:
            mask = torch.zeros(table.embedding_dim)
            mask[: self._widths.get(table.name, table.embedding_dim)] = 1
            masks.update(dict.fromkeys(table.feature_names, mask))
        return masks


@contextmanager
def _remembering(model: nn.Module) -> Iterator[list[_Remembered]]:
    """Inside, every collection of ``model`` is wrapped; the model itself must not be one."""
    kinds = (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)
    paths = {path: child for path, child in model.named_modules() if isinstance(child, kinds)}
    wrapped = {path: _Remembered(child) for path, child in paths.items()}
    for path, module in wrapped.items():
        _put(model, path, module)
    try:
        yield list(wrapped.values())
    finally:
        for path, child in paths.items():
            _put(model, path, child)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _every(batch: Batch, every: int) -> Batch:
    """Rows 0, every, 2 * every, ... of a batch, without the extra columns."""
    sparse = batch.sparse
    num_features, batch_size = len(sparse.keys()), sparse.stride()
    lengths_FB = sparse.lengths().view(num_features, batch_size)
    chosen = torch.zeros(batch_size, dtype=torch.bool)
    chosen[::every] = True
    kept = torch.repeat_interleave(
        chosen.repeat(num_features), lengths_FB.view(-1), output_size=sparse.values().numel()
    )
    rows = keyed_bags(sparse.keys(), lengths_FB[:, ::every].contiguous(), sparse.values()[kept])
    return Batch(dense=batch.dense[::every], sparse=rows, labels=batch.labels[::every], extra={})
