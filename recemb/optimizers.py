"""Optimizers of embedding tables, and the one object the training loop steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from recemb.fused import FusedTables

# Bytes of optimizer state per table, as (per value, per row).
_STATE_BYTES = {"rowwise_adagrad": (0, 4), "adagrad": (4, 0), "sgd": (0, 0), "adam": (8, 0), "dense_adam": (8, 0)}
_FUSED = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
}
# Those whose update depends on how many there were before it.
_COUNTING = {EmbOptimType.ADAM}


@dataclass(frozen=True)
class EmbeddingOptimizer:
    """How the rows of embedding tables are trained.

    Args:
        name: ``"rowwise_adagrad"`` (one accumulator a row: 4 bytes a row of state, the default of large tables),
            ``"adagrad"`` (one a value), ``"sgd"`` (no state) or ``"adam"`` (two a value; fused on CUDA, on CPU a sparse
            path several times slower, for reproducing papers). Rows that a batch does not touch never move. With
            ``"dense_adam"`` they do: torch.optim.Adam steps all rows of all tables each time, by their moments and by
            ``weight_decay``, as the code of OptEmbed and PEP does. That takes a gradient as large as the tables and 16
            to 400 times as long as a fused kernel (more for larger tables), so it is for reproducing papers on tables
            of up to some million rows; every rank of a process group holds and steps them whole.
        learning_rate: about 0.02 to 0.1 for the Adagrads, 0.1 to 1 for SGD, 1e-3 for Adam.
        eps: added to the root of the accumulator.
        weight_decay: for ``"dense_adam"`` alone: L2 coupled to Adam, ``weight_decay * row`` in the gradient of every
            row in every step, looked up or not. Papers search 1e-6 to 1e-3.

    Raises:
        ValueError: unknown name, a learning rate, eps or weight decay below 0, weight decay with another optimizer.
    """

    name: str = "rowwise_adagrad"
    learning_rate: float = 0.05
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _STATE_BYTES:
            raise ValueError(f"embedding optimizer must be one of {sorted(_STATE_BYTES)}, got {self.name!r}")
        if not self.learning_rate >= 0:
            raise ValueError(f"embedding optimizer: learning_rate must be at least 0, got {self.learning_rate}")
        if not self.eps >= 0:
            raise ValueError(f"embedding optimizer: eps must be at least 0, got {self.eps}")
        if not self.weight_decay >= 0:
            raise ValueError(f"embedding optimizer: weight_decay must be at least 0, got {self.weight_decay}")
        if self.weight_decay and not self.trains_all_rows:
            raise ValueError(
                f"embedding optimizer {self.name!r} moves the rows of the batch alone and has no weight_decay, got "
                f"{self.weight_decay}; 'dense_adam' decays all rows in every step, "
                "embedding.mini_batch_aware_decay those of the batch"
            )

    @property
    def trains_all_rows(self) -> bool:
        """Whether rows that a batch does not touch move too."""
        return self.name == "dense_adam"

    def is_fused(self, device: torch.device) -> bool:
        """Whether fbgemm updates the rows inside backward() on this device (it has no Adam on CPU)."""
        return self.name in _FUSED and (self.name != "adam" or device.type == "cuda")

    @property
    def fbgemm_type(self) -> EmbOptimType:
        return _FUSED[self.name]

    def state_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Bytes of optimizer state beside a table of this shape."""
        per_value, per_row = _STATE_BYTES[self.name]
        return num_embeddings * (per_value * embedding_dim + per_row)


def torch_optimizers(weights: Mapping[EmbeddingOptimizer, Sequence[nn.Parameter]]) -> dict[str, torch.optim.Optimizer]:
    """Those of the tables that no kernel trains: ``"sparse"`` (Adam on CPU) and ``"all_rows"`` (dense Adam).

    Args:
        weights: how tables are trained -> their weights, with gradients sparse or dense alike.
    """
    sparse, all_rows = (
        [
            {"params": list(tables), "lr": by.learning_rate, "eps": by.eps}
            | ({"weight_decay": by.weight_decay} if wanted else {})
            for by, tables in weights.items()
            if by.trains_all_rows == wanted
        ]
        for wanted in (False, True)
    )
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if sparse:
        optimizers["sparse"] = torch.optim.SparseAdam(sparse)
    if all_rows:
        optimizers["all_rows"] = torch.optim.Adam(all_rows, fused=True)
    return optimizers


class TrainingOptimizer:
    """Dense optimizers and fused tables behind one ``step``.

    Fused tables are updated inside ``backward()`` already; ``step`` moves the rest. So a second ``backward()`` is a
    second update: gradients cannot be accumulated, nor clipped over the whole model. Call ``zero_grad`` before each
    step's lookups: it tells fused Adam, which corrects its bias by them, how many updates there were.

    Args:
        fused: module path -> tables that fbgemm trains.
        optimizers: name -> torch optimizer of everything else (``"dense"``, and those of ``torch_optimizers``).
        sharded: TorchRec's optimizer of tables spread over ranks, where there is a process group.
        architecture: those of ``CompressedTables.architecture_optimizer``, which no schedule of learning rates
            touches: what they step is not a weight.
    """

    def __init__(
        self,
        fused: Mapping[str, FusedTables],
        optimizers: Mapping[str, torch.optim.Optimizer],
        sharded: KeyedOptimizer | None = None,
        architecture: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        self.fused = dict(fused)
        self.architecture = {f"architecture{index}": optimizer for index, optimizer in enumerate(architecture)}
        self.optimizers = {**optimizers, **self.architecture}
        self.sharded = sharded
        self._sharded_rates = [group["lr"] for group in sharded.param_groups] if sharded is not None else []
        self._base_rates = {
            name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()
        }
        kernels = [kernel for tables in fused.values() for kernel in tables.kernels] + _sharded_kernels(sharded)
        self._counting = [kernel for kernel in kernels if kernel.optimizer in _COUNTING]
        self._updates = 0

    def zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self._set_updates(self._updates)

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()
        self._set_updates(self._updates + 1)

    def step_weights(self, *, dense: bool = True) -> None:
        """``step`` but for architectures; without ``dense``, tables alone."""
        for name, optimizer in self.optimizers.items():
            if name not in self.architecture and (dense or name != "dense"):
                optimizer.step()
        self._set_updates(self._updates + 1)

    def step_architecture(self) -> None:
        """``step`` for architectures alone."""
        for optimizer in self.architecture.values():
            optimizer.step()

    def set_learning_rate_factor(self, factor: float) -> None:
        """Train all weights at ``factor`` times the learning rates they began with, from the next backward on."""
        for name, rates in self._base_rates.items():
            for group, base in zip(self.optimizers[name].param_groups, rates, strict=True):
                group["lr"] = base * factor
        for tables in self.fused.values():
            tables.set_learning_rate_factor(factor)
        if self.sharded is not None:
            for group, base in zip(self.sharded.param_groups, self._sharded_rates, strict=True):
                group["lr"] = base * factor
            # Hands the rates to the kernels; rows move in backward().
            self.sharded.step()

    def state_dict(self) -> dict[str, Any]:
        """Tensors are the live ones, not copies; the same keys whether tables are sharded or not.

        With fused Adam ``updates``, () int64, besides: how many there were.
        """
        return {
            "fused": self._table_states(),
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            **({"updates": torch.tensor(self._updates)} if self._counting else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: state of other tables or optimizers.
        """
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(f"optimizer state must have {sorted(expected)}, got {sorted(state)}")
        current = expected["fused"]
        if set(state["fused"]) != set(current):
            raise ValueError(f"optimizer state must be of tables {sorted(current)}, got {sorted(state['fused'])}")
        for path, tables in self.fused.items():
            tables.load_optimizer_state(state["fused"][path])
        if self.sharded is not None:
            _load_sharded_states(current, state["fused"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
        if self._counting:
            self._set_updates(int(state["updates"]))

    def _set_updates(self, updates: int) -> None:
        """fbgemm counts lookups, those of validations too, and saves no count: the next lookup is made to go on here.

        Its own ``set_optimizer_step`` leaves the number alone that a kernel in use goes by.
        """
        self._updates = updates
        for kernel in self._counting:
            for count in (kernel.iter, kernel.iter_cpu):
                count.fill_(updates)

    def _table_states(self) -> dict[str, dict[str, list[Tensor]]]:
        """Collection path -> table -> its state tensors, of all ranks where tables are sharded."""
        if self.sharded is None:
            return {path: tables.optimizer_state() for path, tables in self.fused.items()}
        states: dict[str, dict[str, list[Tensor]]] = {}
        for key, state in self.sharded.state_dict()["state"].items():
            path, _, table = key.removesuffix(".weight").rpartition("embedding_bags.")
            # In the order of the kernel's states, as those of fused tables; TorchRec's names sort otherwise.
            states.setdefault(path.rstrip("."), {})[table] = list(state.values())
        return states


def _sharded_kernels(optimizer: KeyedOptimizer | None) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """The kernels of this rank behind TorchRec's optimizer of sharded tables."""
    if isinstance(optimizer, CombinedOptimizer):
        return [kernel for _, part in optimizer.optimizers for kernel in _sharded_kernels(part)]
    return [optimizer._emb_module] if isinstance(optimizer, EmbeddingFusedOptimizer) else []


@torch.no_grad()
def _load_sharded_states(
    current: Mapping[str, Mapping[str, Sequence[Tensor]]], state: Mapping[str, Mapping[str, Sequence[Tensor]]]
) -> None:
    """Copy optimizer state of the same sharding into the shards of this rank.

    Raises:
        ValueError: other tables, numbers of tensors or shapes.
    """
    for path, tables in current.items():
        shapes = {name: [tuple(tensor.size()) for tensor in tensors] for name, tensors in tables.items()}
        came = {name: [tuple(tensor.size()) for tensor in tensors] for name, tensors in state[path].items()}
        if shapes != came:
            raise ValueError(f"optimizer state of {path!r} must have shapes {shapes}, got {came}")
        for name, tensors in tables.items():
            for old, new in zip(tensors, state[path][name], strict=True):
                if isinstance(old, ShardedTensor) and isinstance(new, ShardedTensor):
                    for shard, source in zip(old.local_shards(), new.local_shards(), strict=True):
                        shard.tensor.copy_(source.tensor)
                else:
                    old.copy_(new)
