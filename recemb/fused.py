"""TorchRec's EmbeddingBagCollection on fbgemm's table-batched kernels, without a process group.

The plain collection trains with dense gradients, 16 to 400 times slower. TorchRec's own FusedEmbeddingBagCollection
takes 1.5 to 2 times as long as the kernel alone; this wrapper adds a few microseconds.

Shapes: F features, B batch, N ids in all bags.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recemb.method import WIDEST_ROW
from recemb.row_update import RowwiseAdagrad, UpdatingLookup, fbgemm_stalls, occurrence_gradients

if TYPE_CHECKING:
    from recemb.optimizers import EmbeddingOptimizer

_POOLING = {PoolingType.SUM: PoolingMode.SUM, PoolingType.MEAN: PoolingMode.MEAN}


class FusedTables(nn.Module):
    """Same call, same state-dict keys as the collection it replaces; backward() updates the rows in place.

    Args:
        collection: what to replace; its weights are copied (float32). Where they lie on the meta device, rows are
            initialised in the kernel's memory by each table's ``init_fn``, and exist once instead of twice meanwhile.
        optimizer: how rows are trained.
        device: where the tables lie.

    Raises:
        ValueError: a width that is no multiple of 4 or above ``WIDEST_ROW``, tables that are not float32, per-id
            weights with mean pooling.
    """

    def __init__(self, collection: EmbeddingBagCollection, optimizer: EmbeddingOptimizer, device: torch.device) -> None:
        super().__init__()
        self._configs = list(collection.embedding_bag_configs())
        self._is_weighted = collection.is_weighted()
        for config in self._configs:
            if self._is_weighted and config.pooling == PoolingType.MEAN:
                # TorchRec's plain collection refuses it at the first call, and fbgemm's gradient is another function's.
                raise ValueError(f"table {config.name!r}: per-id weights need sum pooling, got mean")
            if config.embedding_dim % 4 or config.embedding_dim > WIDEST_ROW:
                raise ValueError(
                    f"table {config.name!r}: embedding_dim must be a multiple of 4 up to {WIDEST_ROW:,} "
                    f"(fused kernels), got {config.embedding_dim:,}"
                )
        self._base_rate = optimizer.learning_rate
        self._keys = [name for config in self._configs for name in config.feature_names]
        self._dims = [config.embedding_dim for config in self._configs for _ in config.feature_names]
        in_torch = device.type == "cpu" and optimizer.name == "rowwise_adagrad" and fbgemm_stalls()
        # A kernel has one pooling mode, and one width where torch updates its rows; kept in a plain list, because its
        # flat weights are the tables seen once more.
        kinds = {(config.pooling, config.embedding_dim if in_torch else 0) for config in self._configs}
        self._kernels = [
            _Kernel(
                [c for c in self._configs if c.pooling == pooling and width in (0, c.embedding_dim)],
                optimizer,
                device,
                in_torch=in_torch,
            )
            for pooling, width in sorted(kinds, key=lambda kind: (kind[0].value, kind[1]))
        ]
        self.embedding_bags = nn.ModuleDict()
        weights = {name: weight for kernel in self._kernels for name, weight in kernel.weights().items()}
        for config in self._configs:
            source = collection.embedding_bags[config.name].weight
            if source.dtype != torch.float32:
                raise ValueError(f"table {config.name!r}: fused training needs float32 weights, got {source.dtype}")
            if source.is_meta:
                assert config.init_fn is not None, "TorchRec's collection sets it"
                config.init_fn(weights[config.name])
            else:
                weights[config.name].copy_(source.detach())
            self.embedding_bags[config.name] = _Weight(weights[config.name])

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._configs

    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def kernels(self) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
        return [kernel.batched for kernel in self._kernels]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """As TorchRec's collection: values (B, sum of embedding_dims) float32 in table order."""
        if features.keys() != self._keys:
            positions = {key: index for index, key in enumerate(features.keys())}
            features = features.permute([positions[key] for key in self._keys])
        weights = features.weights() if self._is_weighted else None
        if len(self._kernels) == 1:
            values = self._kernels[0].lookup(features.values(), features.offsets(), weights)
        else:
            values = self._lookup_by_pooling(features)
        return KeyedTensor(self._keys, self._dims, values)

    def _lookup_by_pooling(self, features: KeyedJaggedTensor) -> Tensor:
        positions = {key: index for index, key in enumerate(self._keys)}
        columns: dict[str, Tensor] = {}
        for kernel in self._kernels:
            part = features.permute([positions[key] for key in kernel.keys])
            values = kernel.lookup(part.values(), part.offsets(), part.weights() if self._is_weighted else None)
            columns.update(zip(kernel.keys, values.split(kernel.dims, dim=1), strict=True))
        return torch.cat([columns[key] for key in self._keys], dim=1)

    def set_learning_rate_factor(self, factor: float) -> None:
        """Train at ``factor`` times the optimizer's learning rate."""
        for kernel in self._kernels:
            kernel.set_learning_rate(self._base_rate * factor)

    def optimizer_state(self) -> dict[str, list[Tensor]]:
        """Live optimizer state by table name, e.g. the (num_embeddings,) row-wise accumulators; empty for SGD."""
        return {name: state for kernel in self._kernels for name, state in kernel.states().items()}

    def load_optimizer_state(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy ``state`` (as ``optimizer_state`` returned it) into the kernels.

        Raises:
            ValueError: other tables or shapes.
        """
        current = self.optimizer_state()
        if set(current) != set(state):
            raise ValueError(f"optimizer state must be of tables {sorted(current)}, got {sorted(state)}")
        for name, tensors in current.items():
            shapes, came = [tuple(t.shape) for t in tensors], [tuple(t.shape) for t in state[name]]
            if shapes != came:
                raise ValueError(f"optimizer state of table {name!r} must have shapes {shapes}, got {came}")
            for old, new in zip(tensors, state[name], strict=True):
                old.copy_(new)


class _Weight(nn.Module):
    """A table's rows inside the kernel's memory, under the state-dict key TorchRec gives them."""

    def __init__(self, view: Tensor) -> None:
        super().__init__()
        # The kernel trains it; no other optimizer may.
        self.weight = nn.Parameter(view, requires_grad=False)


class _Kernel:
    """One table-batched kernel: all tables of one pooling mode, and of one width if ``in_torch`` updates their rows."""

    def __init__(
        self,
        configs: Sequence[EmbeddingBagConfig],
        optimizer: EmbeddingOptimizer,
        device: torch.device,
        *,
        in_torch: bool,
    ) -> None:
        self.configs = list(configs)
        self._mean = configs[0].pooling == PoolingType.MEAN
        self.keys = [name for config in configs for name in config.feature_names]
        self.dims = [config.embedding_dim for config in configs for _ in config.feature_names]
        on_cuda = device.type == "cuda"
        location = EmbeddingLocation.DEVICE if on_cuda else EmbeddingLocation.HOST
        compute = ComputeDevice.CUDA if on_cuda else ComputeDevice.CPU
        self.batched = SplitTableBatchedEmbeddingBagsCodegen(
            [(config.num_embeddings, config.embedding_dim, location, compute) for config in configs],
            feature_table_map=[index for index, config in enumerate(configs) for _ in config.feature_names],
            optimizer=optimizer.fbgemm_type,
            learning_rate=optimizer.learning_rate,
            eps=optimizer.eps,
            pooling_mode=_POOLING[configs[0].pooling],
            device=device,
            # recemb names feature and value where it checks ids; for other callers the kernel must at least fail.
            bounds_check_mode=BoundsCheckMode.FATAL,
        )

        self._learning_rate = optimizer.learning_rate
        self._adagrad: RowwiseAdagrad | None = None
        if in_torch:
            width, rows = configs[0].embedding_dim, sum(config.num_embeddings for config in configs)
            self._flat = self.batched.weights_host.detach().view(rows, width)
            self._adagrad = RowwiseAdagrad(self._flat, self.batched.momentum1_host, optimizer.eps)
            starts = [0, *itertools.accumulate(config.num_embeddings for config in configs)]
            self._first_rows = torch.tensor(
                [start for start, config in zip(starts, configs, strict=False) for _ in config.feature_names]
            )
            self._last_ids = torch.tensor([c.num_embeddings - 1 for c in configs for _ in c.feature_names])
            self._counter = torch.arange(0)
            self._trigger = torch.zeros((), requires_grad=True)

    def lookup(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        ids, offsets = ids.long(), offsets.long()
        learned_weights = weights is not None and weights.requires_grad
        if self._adagrad is None or learned_weights or not torch.is_grad_enabled():
            return self.batched(ids, offsets, weights)
        if (
            weights is None
            and ids.numel() == offsets.numel() - 1
            and torch.equal(offsets, self._count(offsets.numel()))
        ):
            return self._lookup_single(ids, offsets)
        return UpdatingLookup.apply(
            self._trigger,
            lambda: self.batched(ids, offsets, weights),
            lambda gradient: self._update(gradient, ids, offsets, weights),
        )

    def _lookup_single(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Bags of one id each: in the order of the output their rows need no pooling, nor their gradients turning."""
        ids_FB = ids.view(len(self.keys), -1)
        if ids.numel():
            low, high = torch.aminmax(ids_FB, dim=1)
            if bool(((low < 0) | (high > self._last_ids)).any()):
                # For its error.
                return self.batched(ids, offsets)
        rows = (ids_FB + self._first_rows.unsqueeze(1)).t().reshape(-1)
        flat, adagrad = self._flat, self._adagrad
        assert adagrad is not None
        pooled: Tensor = UpdatingLookup.apply(
            self._trigger,
            lambda: flat.index_select(0, rows).view(ids_FB.shape[1], -1),
            lambda gradient: adagrad.update(rows, gradient.reshape(-1, flat.shape[1]), self._learning_rate),
        )
        return pooled

    def _count(self, length: int) -> Tensor:
        """0, 1, 2, ... (length,), kept between batches."""
        if self._counter.numel() < length:
            self._counter = torch.arange(length)
        return self._counter[:length]

    def _update(self, gradient: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> None:
        assert self._adagrad is not None
        num_features = len(self.keys)
        batch_size = (offsets.numel() - 1) // num_features
        # Rows of the stacked tables: the id plus its table's first row.
        if num_features > 1:
            counts = offsets[::batch_size].diff() if batch_size else offsets.new_zeros(num_features)
            ids = ids + torch.repeat_interleave(self._first_rows, counts, output_size=ids.numel())
        rows, gradients = occurrence_gradients(gradient, ids, offsets, num_features, self._mean, weights)
        self._adagrad.update(rows, gradients, self._learning_rate)

    def set_learning_rate(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self.batched.set_learning_rate(learning_rate)

    def weights(self) -> dict[str, Tensor]:
        views = self.batched.split_embedding_weights()
        return {config.name: view.detach() for config, view in zip(self.configs, views, strict=True)}

    def states(self) -> dict[str, list[Tensor]]:
        states = self.batched.split_optimizer_states()
        if not states:
            return {config.name: [] for config in self.configs}
        return {config.name: list(state) for config, state in zip(self.configs, states, strict=True)}
