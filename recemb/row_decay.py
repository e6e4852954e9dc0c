"""Mini-batch aware regularisation: L2 decay of exactly the physical rows that a batch reads, rare rows more.

Reference: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv:1706.06978 (section
5.2). A penalty on all rows would cost a pass over the tables every step; this one touches what the step touches anyway.

Shapes: B bags a key, K keys of a lookup, M rows appended to every key, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.collection import compressed_groups
from recemb.method import UNBOUNDED, CompressedTables

# Ids whose slots are found at once while rows are counted.
_CHUNK = 65_536


def decay_rows(model: nn.Module, train_counts: Mapping[str, Tensor], strength: float) -> None:
    """Add ``strength / n_j * w_j`` to the gradient of every physical row j that a training batch reads, once a batch.

    n_j is the number of occurrences in the training data that read row j: of its id for full tables, of all ids that
    share it for hashed ones. A row that is read often is decayed little each time, so that over an epoch frequent and
    rare rows are decayed by about ``strength * batches with the row / n_j``. Works with every method and with fused
    kernels: the row is looked up once more in the same kernel call, with this gradient.

    Call it before or after ``recemb.prepare``. Only ``train()`` with gradients decays.

    Args:
        model: holds recemb's collections.
        train_counts: logical table name -> (num_embeddings,) integer occurrences of each id in the training data.
        strength: lambda. The paper's 0.01 goes with gradients of the mean loss, as here; 0.001 to 0.1 is worth trying.

    Raises:
        ValueError: a strength below 0, a table without counts (hashed ids have none), counts of another length.

    Differs from the paper: counts are of physical rows. A method that gives ids other rows while it trains keeps the
    counts of its first assignment. With several ranks, each decays the rows of its own batch and the mean counts.
    """
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength}")
    for group in compressed_groups(model):
        group.reader = RowDecay(
            [
                {name: (strength / counts.clamp(min=1)).float() for name, counts in tables.items()}
                for tables in count_rows(group, train_counts)
            ]
        )


@torch.no_grad()
def count_rows(group: CompressedTables, train_counts: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Occurrences in the training data that read each physical row, float64, for each lookup by table name.

    Found by letting the method look all ids up, with the reading replaced by counting: once for the ids whose count
    has its lowest bit set, once for the second lowest, and so on, which is exact and needs at most 63 passes.

    Args:
        group: any method.
        train_counts: logical table name -> (num_embeddings,) integer occurrences of each id.

    Raises:
        ValueError: see ``decay_rows``.
    """
    totals = [
        {config.name: torch.zeros(config.num_embeddings, dtype=torch.float64) for config in tables}
        for tables in group.physical_tables
    ]
    counter = _Counter(totals)
    reader, training = group.reader, group.training
    # Methods that read rows which several ids of a batch need once (tensor train) must read them for every id here.
    merge = getattr(group, "merge_ids", None)
    group.reader = counter
    group.eval()
    if merge is not None:
        group.merge_ids = False  # type: ignore[assignment]
    try:
        for table in group.tables:
            counts = _checked_counts(table.name, table.num_embeddings, train_counts)
            for bit in range(int(counts.max()).bit_length()):
                counter.weight = float(2**bit)
                for ids in ((counts >> bit) & 1).nonzero().view(-1).split(_CHUNK):
                    lengths = torch.zeros(len(group.feature_names), dtype=torch.int64)
                    lengths[group.feature_names.index(table.feature_names[0])] = ids.numel()
                    group.vectors(KeyedJaggedTensor(keys=group.feature_names, values=ids, lengths=lengths, stride=1))
    finally:
        group.reader = reader
        group.train(training)
        if merge is not None:
            group.merge_ids = merge
    return totals


def _checked_counts(name: str, num_embeddings: int, train_counts: Mapping[str, Tensor]) -> Tensor:
    if name not in train_counts:
        reason = "its ids are hashes, which nobody counts" if num_embeddings == UNBOUNDED else "none were given"
        raise ValueError(f"table {name!r}: mini-batch aware decay needs the train count of every id, and {reason}")
    counts = train_counts[name]
    if counts.shape != (num_embeddings,):
        raise ValueError(f"table {name!r}: {num_embeddings} train counts are required, got {tuple(counts.shape)}")
    return counts.long()


class _Counter:
    """Reads zeros, and adds ``weight`` to the total of every row that is read."""

    def __init__(self, totals: Sequence[Mapping[str, Tensor]]) -> None:
        self.totals = totals
        self.weight = 0.0

    def __call__(self, group: CompressedTables, index: int, features: KeyedJaggedTensor) -> Tensor:
        width = 0
        for config in group.physical_tables[index]:
            total = self.totals[index][config.name]
            for rows in _rows_by_key(features, config.feature_names):
                total += self.weight * torch.bincount(rows, minlength=config.num_embeddings)
            width += config.embedding_dim * len(config.feature_names)
        return torch.zeros(features.stride(), width)


class RowDecay:
    """Reads rows so that backward adds coefficient times row to the gradient of each distinct row that was read.

    Args:
        coefficients: for each lookup, physical table name -> (rows,) float32.
    """

    def __init__(self, coefficients: Sequence[Mapping[str, Tensor]]) -> None:
        self.coefficients = [dict(tables) for tables in coefficients]

    def __call__(self, group: CompressedTables, index: int, features: KeyedJaggedTensor) -> Tensor:
        """As ``CompressedTables.read_rows``."""
        if not (group.training and torch.is_grad_enabled()) or features.values().numel() == 0:
            return group.read_rows(index, features)
        if group.lookup_optimizers[index] is not None:
            # State of the method, such as thresholds: no vectors.
            return group.read_rows(index, features)
        tables = group.physical_tables[index]
        device = features.values().device
        distinct = [torch.cat(_rows_by_key(features, config.feature_names)).unique() for config in tables]
        num_appended = max(
            -(-rows.numel() // len(config.feature_names)) for config, rows in zip(tables, distinct, strict=True)
        )
        rows_by_key: dict[str, Tensor] = {}
        columns: list[Tensor] = []
        for config, rows in zip(tables, distinct, strict=True):
            coefficients = self.coefficients[index][config.name].to(device)
            self.coefficients[index][config.name] = coefficients
            num_keys = len(config.feature_names)
            # Filled up to bags of one id everywhere, for which kernels have a fast path; what fills has coefficient 0.
            padded = coefficients.new_zeros(num_appended * num_keys)
            padded[: rows.numel()] = coefficients[rows]
            if rows.numel():
                rows = torch.cat([rows, rows[:1].expand(padded.numel() - rows.numel())])
            for number, name in enumerate(config.feature_names):
                rows_by_key[name] = rows[number * num_appended : (number + 1) * num_appended]
            columns.append(padded.view(num_keys, num_appended).t().repeat_interleave(config.embedding_dim, dim=1))
        longer = _with_bags_appended(features, rows_by_key, num_appended)
        output: Tensor = _DecayedRows.apply(
            group.read_rows(index, longer), torch.cat(columns, dim=1), features.stride()
        )
        return output


class _DecayedRows(torch.autograd.Function):
    """(B + M, sum of D) -> its first B rows; the gradient of the M others is coefficient times value."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, coefficients: Tensor, num_bags: int) -> Tensor:
        ctx.save_for_backward(values[num_bags:] * coefficients)
        return values[:num_bags]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (decay,) = ctx.saved_tensors
        return torch.cat([gradient, decay]), None, None


def _rows_by_key(features: KeyedJaggedTensor, names: Sequence[str]) -> list[Tensor]:
    """The ids of each key of ``names``."""
    keys, starts = features.keys(), features.offset_per_key()
    positions = [keys.index(name) for name in names]
    return [features.values()[starts[position] : starts[position + 1]] for position in positions]


def _with_bags_appended(
    features: KeyedJaggedTensor, rows_by_key: Mapping[str, Tensor], num_appended: int
) -> KeyedJaggedTensor:
    """``features`` with ``num_appended`` bags more under every key: of one row each, or empty where there are none."""
    keys, stride = features.keys(), features.stride()
    before = features.lengths().view(len(keys), stride)
    appended = torch.stack(
        [torch.full_like(before[0, :1], int(rows_by_key[key].numel() > 0)).expand(num_appended) for key in keys]
    )
    parts = zip(_rows_by_key(features, keys), [rows_by_key[key] for key in keys], strict=True)
    weights = None
    if features.weights_or_none() is not None:
        starts = features.offset_per_key()
        weights = torch.cat(
            [
                part
                for number, key in enumerate(keys)
                for part in (
                    features.weights()[starts[number] : starts[number + 1]],
                    torch.ones(rows_by_key[key].numel(), device=before.device),
                )
            ]
        )
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([part for pair in parts for part in pair]),
        weights=weights,
        lengths=torch.cat([before, appended], dim=1).view(-1),
        stride=stride + num_appended,
    )
