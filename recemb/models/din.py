"""DIN: click logits from a user's histories, each attended by what it is a history of.

Reference: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv:1706.06978.

Shapes: B batch, I numeric features, N events of all histories of the batch, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from recemb.arguments import remember_arguments
from recemb.models.activations import ActivatedMLP, Activation
from recemb.models.attention import ActivationUnit
from recemb.models.histories import History, keep_latest
from recemb.models.jagged import segment_sum, segments_of

Pooling = Literal["attention", "softmax", "sum"]


class UnpooledEmbeddings(Protocol):
    """What DIN asks of its embeddings: TorchRec's EmbeddingCollection has it, and ours."""

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The logical tables."""
        ...

    def __call__(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Ids -> one vector an id, by feature."""
        ...


class DINHead(nn.Module):
    """Everything of DIN but the tables: pools the histories and scores the sample.

    Args:
        history_widths: width of an event of each history, the sum over its parallel sequences.
        plain_width: values a sample besides, numeric features included.
        pooling, attention_layers, layers, activation: see DIN.

    Raises:
        ValueError: see DIN.
    """

    def __init__(
        self,
        history_widths: Sequence[int],
        *,
        plain_width: int,
        pooling: Pooling,
        attention_layers: Sequence[int],
        layers: Sequence[int],
        activation: Activation,
    ) -> None:
        super().__init__()
        if not layers or layers[-1] != 1:
            raise ValueError(f"layers must end in 1 (the logit), got {list(layers)}")
        if pooling not in ("attention", "softmax", "sum"):
            raise ValueError(f"pooling must be 'attention', 'softmax' or 'sum', got {pooling!r}")
        self.attention = nn.ModuleList(
            ActivationUnit(width, hidden_layers=attention_layers, activation=activation, softmax=pooling == "softmax")
            for width in (history_widths if pooling != "sum" else ())
        )
        self.pooling = pooling
        self.mlp = ActivatedMLP(plain_width + sum(history_widths), layers, activation=activation)

    def forward(
        self, plain: Tensor, targets: Sequence[Tensor], events: Sequence[Tensor], offsets: Sequence[Tensor]
    ) -> Tensor:
        """Logits (B,) float32, also under autocast.

        Args:
            plain: (B, plain_width): numeric values and vectors of everything that is no history.
            targets: for each history (B, D).
            events: for each history (N, D).
            offsets: for each history (B + 1,) int64.
        """
        if self.pooling == "sum":
            pooled = [
                segment_sum(values, segments_of(cuts, values.shape[0]), cuts)
                for values, cuts in zip(events, offsets, strict=True)
            ]
        else:
            pooled = [
                unit(target, values, cuts)
                for unit, target, values, cuts in zip(self.attention, targets, events, offsets, strict=True)
            ]
        logits: Tensor = self.mlp(torch.cat([*pooled, plain], dim=1))
        return logits.squeeze(1).float()


class DIN(nn.Module):
    """Click logits from numeric features, ids and histories of ids over an unpooled collection of tables.

    Every history becomes one vector, the sum of its events weighted by how much each matters for the target; an empty
    one becomes zeros. That, the vectors of all single features (the target among them), the sums of the bags and the
    numeric features go through one MLP. Histories stay jagged: time is in proportion to the events there are.

    No sigmoid at the end: train with ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Args:
        embeddings: KeyedJaggedTensor -> vectors by feature, with ``embedding_configs()``: recemb's
            CompressedEmbeddingCollection (before or after ``recemb.prepare``) or TorchRec's EmbeddingCollection. A
            sequence and its target must read one table.
        num_dense: I, numeric features; may be 0.
        histories: which features are histories, and of what.
        bags: features of any number of ids a sample whose vectors are summed; all others have exactly one.
        layers: widths of the MLP after its input; the last is 1. The paper's 200-80-1.
        attention_layers: hidden widths of the activation unit, see ActivationUnit.
        activation: of all hidden layers: ``"dice"`` (the paper's best), ``"prelu"``, ``"relu"`` or ``"sigmoid"``.
        pooling: ``"attention"`` (the paper's, unbounded weights), ``"softmax"`` (weights of a history sum to 1) or
            ``"sum"``: the paper's base model, which does not look at the target, for comparison.
        max_history: latest events kept of a longer history; None keeps all. Data sets with a cap come cut already.

    Raises:
        ValueError: a history that names a feature without a table, a target of another table than its sequence, a
            feature that is both history and bag, layers that do not end in 1, a name that is none of the choices.

    Example:
        >>> from recemb.collection import CompressedEmbeddingCollection
        >>> from recemb.methods.full import Full
        >>> items = EmbeddingConfig(
        ...     name="t_item", num_embeddings=100, embedding_dim=8, feature_names=["item", "item_history"]
        ... )
        >>> tables = CompressedEmbeddingCollection([items], Full)
        >>> model = DIN(tables, num_dense=0, histories=[History("history", ("item_history",), ("item",))])
    """

    @remember_arguments
    def __init__(
        self,
        embeddings: nn.Module,
        *,
        num_dense: int,
        histories: Sequence[History],
        bags: Sequence[str] = (),
        layers: Sequence[int] = (200, 80, 1),
        attention_layers: Sequence[int] = (36,),
        activation: Activation = "dice",
        pooling: Pooling = "attention",
        max_history: int | None = None,
    ) -> None:
        super().__init__()
        if num_dense < 0:
            raise ValueError(f"num_dense must be at least 0, got {num_dense}")
        if max_history is not None and max_history < 1:
            raise ValueError(f"max_history must be at least 1 event, or None for all, got {max_history}")
        self.embeddings = embeddings
        self.num_dense = num_dense
        self.max_history = max_history
        self.histories = tuple(histories)
        tables = cast(UnpooledEmbeddings, embeddings).embedding_configs()
        widths = {name: table.embedding_dim for table in tables for name in table.feature_names}
        sequences = {name for history in self.histories for name in history.sequences}
        self._sequences = sorted(sequences)
        self._bags = frozenset(bags)
        _check_features(tables, self.histories, self._bags)
        self._plain = [name for name in widths if name not in sequences]
        self.head = DINHead(
            [sum(widths[name] for name in history.sequences) for history in self.histories],
            plain_width=num_dense + sum(widths[name] for name in self._plain),
            pooling=pooling,
            attention_layers=attention_layers,
            layers=layers,
            activation=activation,
        )

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """(B, I) float32 numeric features and the ids of B samples -> (B,) float32 logits.

        Raises:
            ValueError: another number of numeric features; a single feature without exactly one id in every row;
                parallel sequences that differ in length; what the collection refuses (ids outside their table).
        """
        if dense.shape[1] != self.num_dense:
            raise ValueError(f"the model was built for {self.num_dense} numeric features, got {tuple(dense.shape)}")
        vectors = self._vectors(sparse)
        plain = [dense, *(self._one_vector(name, vectors[name]) for name in self._plain)]
        logits: Tensor = self.head(torch.cat(plain, dim=1), *self._history_inputs(vectors))
        return logits

    @torch.no_grad()
    def attention_weights(self, sparse: KeyedJaggedTensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By name of each history: (N,) weight of each event and (B + 1,) int64 offsets of the samples.

        Call it in ``eval()``. With ``max_history`` the weights are of the latest events only.

        Raises:
            ValueError: the model pools by sum, so has no weights; as ``forward``.
        """
        if not self.head.attention:
            raise ValueError(
                "attention_weights: this model was built with pooling='sum', which weighs all events alike"
            )
        targets, events, offsets = self._history_inputs(self._vectors(sparse))
        return {
            history.events: (cast(ActivationUnit, unit).weights(target, values, cuts), cuts)
            for history, unit, target, values, cuts in zip(
                self.histories, self.head.attention, targets, events, offsets, strict=True
            )
        }

    def _vectors(self, sparse: KeyedJaggedTensor) -> Mapping[str, JaggedTensor]:
        if self.max_history is not None:
            sparse = keep_latest(sparse, self._sequences, self.max_history)
        vectors: dict[str, JaggedTensor] = self.embeddings(sparse)
        for history in self.histories:
            history.check_parallel(vectors)
        return vectors

    def _one_vector(self, name: str, vectors: JaggedTensor) -> Tensor:
        """(B, D) of a feature that is no history."""
        values, lengths = vectors.values(), vectors.lengths()
        if name in self._bags:
            offsets = vectors.offsets().long()
            offsets = offsets - offsets[0]
            return segment_sum(values, segments_of(offsets, values.shape[0]), offsets)
        if values.shape[0] != lengths.numel() or not bool((lengths == 1).all()):
            row = int((lengths != 1).nonzero()[0])
            raise ValueError(
                f"feature {name!r}, row {row} of the batch: exactly one id is required (it is neither a history nor "
                f"one of bags), got {int(lengths[row])}"
            )
        return values

    def _history_inputs(self, vectors: Mapping[str, JaggedTensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Targets (B, D), events (N, D) and offsets (B + 1,) of each history."""
        targets, events, offsets = [], [], []
        for history in self.histories:
            targets.append(_beside([self._one_vector(name, vectors[name]) for name in history.targets]))
            events.append(_beside([vectors[name].values() for name in history.sequences]))
            cuts = vectors[history.sequences[0]].offsets().long()
            offsets.append(cuts - cuts[0])
        return targets, events, offsets


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _check_features(tables: Sequence[EmbeddingConfig], histories: Sequence[History], bags: frozenset[str]) -> None:
    """Raise ValueError where histories, targets and bags do not fit the tables."""
    owners = {name: table.name for table in tables for name in table.feature_names}
    if not histories:
        raise ValueError("DIN needs at least one history, got none; models without any are DLRM's task")
    seen: set[str] = set(bags)
    if missing := sorted(bags - set(owners)):
        raise ValueError(f"bags: {missing[0]!r} has no table; the tables' features are {list(owners)}")
    for history in histories:
        for sequence, target in zip(history.sequences, history.targets, strict=True):
            for name in (sequence, target):
                if name not in owners:
                    raise ValueError(
                        f"history {history.events!r}: feature {name!r} has no table; the tables' features are "
                        f"{list(owners)}"
                    )
            if owners[sequence] != owners[target]:
                raise ValueError(
                    f"history {history.events!r}: {sequence!r} and its target {target!r} must read one table, "
                    f"got {owners[sequence]!r} and {owners[target]!r}"
                )
            if sequence in seen:
                raise ValueError(f"feature {sequence!r}: a sequence belongs to one history and is no bag")
            seen.add(sequence)
            if target in bags:
                raise ValueError(f"history {history.events!r}: target {target!r} must be a single feature, got a bag")
