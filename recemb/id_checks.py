"""Refuse ids that a table does not have, naming the feature: fbgemm would read row 0 or fail without saying whose.

Shapes: F features, B batch, N ids in all bags.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.method import UNBOUNDED


class IdChecks:
    """The ranges of the features of some tables.

    Args:
        tables: logical tables; features in their order.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig]) -> None:
        self._names = [name for table in tables for name in table.feature_names]
        self._tables = [table.name for table in tables for _ in table.feature_names]
        sizes = [table.num_embeddings for table in tables for _ in table.feature_names]
        # The last valid id, because the number of 64-bit hashes, 2**63, is no int64.
        self._last = torch.tensor([size if size == UNBOUNDED else size - 1 for size in sizes], device="cpu")

    def check(self, features: KeyedJaggedTensor) -> None:
        """Raise unless every id of feature f is an integer in [0, num_embeddings of its table).

        Args:
            features: keys in the order of the tables' features.

        Raises:
            ValueError: naming feature, table, position in the batch, the range and the value that came.
        """
        values = features.values()
        if values.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"KeyedJaggedTensor: ids must be int64 (or int32), got {values.dtype}; floats lose ids above 2**24"
            )
        if values.numel() == 0:
            return
        last = self._last.to(values.device)
        num_features = len(self._names)
        lengths = features.length_per_key()
        if len(set(lengths)) == 1:
            low, high = torch.aminmax(values.view(num_features, -1), dim=1)
            wrong = (low < 0) | (high > last)
        else:
            limits = torch.repeat_interleave(
                last, torch.tensor(lengths, device=values.device), output_size=values.numel()
            )
            wrong = (values < 0) | (values > limits)
        if bool(wrong.any()):
            self._fail(features)

    def _fail(self, features: KeyedJaggedTensor) -> None:
        for name, table, last in zip(self._names, self._tables, self._last.tolist(), strict=True):
            bags = features[name]
            ids = bags.values()
            bad = torch.nonzero((ids < 0) | (ids > last)).view(-1)
            if bad.numel():
                position = int(bad[0])
                sample = int(torch.searchsorted(bags.offsets().to(ids.device), position, right=True)) - 1
                raise ValueError(
                    f"feature {name!r} (table {table!r}): ids must be in [0, {last + 1}), got {int(ids[position])} "
                    f"in sample {sample} of the batch ({bad.numel()} of {ids.numel()} ids are out of range)"
                )
        raise AssertionError("an id was out of range, and no feature owns it")
