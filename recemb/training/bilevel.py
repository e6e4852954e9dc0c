"""Who moves when: weights and architecture together, weights alone, or by turns on rows of their own (bilevel)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from recemb.collection import compressed_groups
from recemb.data.batch import Batch
from recemb.method import frozen_tables


class BatchSource(Protocol):
    """A loader, as far as an endless stream of its batches is concerned."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class SearchOptimizer(Protocol):
    """What ``recemb.prepare`` returns, as far as steps are concerned."""

    def zero_grad(self) -> None: ...
    def step(self) -> None: ...
    def step_weights(self, *, dense: bool = True) -> None: ...
    def step_architecture(self) -> None: ...


class Steps(Protocol):
    """How gradients of a train batch become a step, and what follows it."""

    def step(self, optimizer: SearchOptimizer) -> None:
        """After ``backward()`` of a train batch."""
        ...

    def after_step(self, step: int, model: nn.Module, optimizer: SearchOptimizer) -> None:
        """After step ``step`` (1 is the first)."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Together:
    """Everything learns from train batches.

    Args:
        architecture: what a search learns too; False leaves it as it is (a warm start).
    """

    def __init__(self, *, architecture: bool = True) -> None:
        self.architecture = architecture

    def step(self, optimizer: SearchOptimizer) -> None:
        if self.architecture:
            optimizer.step()
        else:
            optimizer.step_weights()

    def after_step(self, step: int, model: nn.Module, optimizer: SearchOptimizer) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class ByTurns:
    """Between two steps of the weights, one of the architecture: first order, with the weights as they are.

    Args:
        loader: batches of the architecture split; begun again at its end, for as long as there are steps.
        device: where batches go.
        precision: as in ``LoopSettings``.
        every_steps: steps of the weights for one of the architecture.
        train_dense: let the dense layers train with the tables on train batches; False leaves them as they are.
    """

    def __init__(
        self,
        loader: BatchSource,
        *,
        device: torch.device,
        precision: str = "fp32",
        every_steps: int = 1,
        train_dense: bool = True,
    ) -> None:
        self.loader = loader
        self.device = device
        self.precision = precision
        self.every_steps = every_steps
        self.train_dense = train_dense
        self._batches = iter(loader)

    def step(self, optimizer: SearchOptimizer) -> None:
        optimizer.step_weights(dense=self.train_dense)

    def after_step(self, step: int, model: nn.Module, optimizer: SearchOptimizer) -> None:
        """One batch of the architecture's."""
        if step % self.every_steps:
            return
        batch = self._next().to(self.device)
        optimizer.zero_grad()
        with frozen_tables(model), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = model(batch.dense, batch.sparse)
        loss = binary_cross_entropy_with_logits(logits.float(), batch.labels)
        with frozen_tables(model):
            for group in compressed_groups(model):
                if (penalty := group.penalty()) is not None:
                    loss = loss + penalty
        loss.backward()
        optimizer.step_architecture()

    def _next(self) -> Batch:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self.loader)
            batch = next(self._batches)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self._batches = iter(self.loader)
