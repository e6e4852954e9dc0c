"""DLRM: the click model of Naumov et al., with the dot interaction or MLPerf's low-rank cross layers.

References: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
arXiv:1906.00091; the cross layers ("DLRM-DCNv2"): Wang et al., "DCN V2", arXiv:2008.13535, as in MLPerf training v3.

Shapes: B batch, I numeric features, F embedding vectors a sample (one a feature), D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recemb.arguments import remember_arguments
from recemb.models.layers import MLP, DotInteraction, LowRankCrossNet

Interaction = Literal["dot", "dcnv2"]


class EmbeddingBags(Protocol):
    """What a head asks of its embeddings: TorchRec's EmbeddingBagCollection has it, and ours."""

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The logical tables."""
        ...

    def __call__(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Ids -> one pooled vector a sample and feature."""
        ...


class DLRMHead(nn.Module):
    """Everything of DLRM but the tables: (numeric features, pooled vectors) -> logits.

    With T = [x; e_1; ...; e_F], x the bottom MLP's output: ``dot`` feeds the over MLP [x, strictly lower triangle of
    T T^T], ``dcnv2`` feeds it T flattened and passed through cross layers. Without numeric features there is no bottom
    MLP and no x.

    ``head.compile()`` (of nn.Module) compiles it in place with torch.compile; the keys of the state dict stay.

    Args:
        embedding_dims: D of every pooled vector, in their order; all equal for ``dot``.
        num_dense, bottom_layers, over_layers, interaction, cross_layers, cross_rank: see DLRM.

    Raises:
        ValueError: see DLRM.
    """

    def __init__(
        self,
        embedding_dims: Sequence[int],
        *,
        num_dense: int,
        bottom_layers: Sequence[int],
        over_layers: Sequence[int],
        interaction: Interaction = "dot",
        cross_layers: int | None = None,
        cross_rank: int | None = None,
    ) -> None:
        super().__init__()
        if num_dense < 0:
            raise ValueError(f"num_dense must be at least 0, got {num_dense}")
        if not embedding_dims:
            raise ValueError("DLRM needs at least one categorical feature, the embeddings have none")
        if not over_layers or over_layers[-1] != 1:
            raise ValueError(f"over_layers must end in 1 (the logit), got {list(over_layers)}")
        self.num_dense = num_dense
        self.num_embedding_values = sum(embedding_dims)
        self.bottom = MLP(num_dense, bottom_layers, relu_last=True) if num_dense else None
        numeric_width = bottom_layers[-1] if num_dense else 0
        self.dot: DotInteraction | None = None
        self.cross: LowRankCrossNet | None = None
        if interaction == "dot":
            if cross_layers is not None or cross_rank is not None:
                raise ValueError("cross_layers and cross_rank belong to interaction='dcnv2', got interaction='dot'")
            self.embedding_dim = _common_dim(embedding_dims, numeric_width)
            self.dot = DotInteraction(len(embedding_dims) + bool(num_dense))
            over_width = numeric_width + self.dot.num_pairs
        elif interaction == "dcnv2":
            if cross_layers is None or cross_rank is None:
                raise ValueError("interaction='dcnv2' needs cross_layers and cross_rank (MLPerf: 3 and 512)")
            over_width = numeric_width + self.num_embedding_values
            self.cross = LowRankCrossNet(over_width, num_layers=cross_layers, rank=cross_rank)
        else:
            raise ValueError(f"interaction must be 'dot' or 'dcnv2', got {interaction!r}")
        self.over = MLP(over_width, over_layers, relu_last=False)

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """(B, I) float32 and (B, sum of D) -> (B,) float32 logits, also under autocast.

        Raises:
            ValueError: a width differs from the one the head was built for.
        """
        if dense.shape[1] != self.num_dense or pooled.shape[1] != self.num_embedding_values:
            raise ValueError(
                f"the model was built for {self.num_dense} numeric features and {self.num_embedding_values} embedding "
                f"values a sample, got dense {tuple(dense.shape)} and embeddings {tuple(pooled.shape)}"
            )
        if self.bottom is None:
            parts, vectors = [], pooled
        else:
            numeric = self.bottom(dense)
            # Under autocast the bottom MLP gives bfloat16, the tables float32: one dtype for the products.
            parts, vectors = [numeric], torch.cat([numeric, pooled.to(numeric.dtype)], dim=1)
        if self.dot is not None:
            pairs = self.dot(vectors.view(len(vectors), self.dot.num_vectors, self.embedding_dim))
            crossed = torch.cat([*parts, pairs], dim=1)
        else:
            crossed = cast(LowRankCrossNet, self.cross)(vectors)
        logits: Tensor = self.over(crossed)
        return logits.squeeze(1).float()


class DLRM(nn.Module):
    """Click logits from numeric features and a TorchRec-like collection of embedding tables.

    No sigmoid at the end: train with ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Choosing widths: with ``dot`` the first over layer reads D + F(F+1)/2 values (367 for Criteo at D=16) and holds most
    of the dense parameters and of the dense time: shrink it first. Sizes in use are 256-128 for both MLPs (comparisons
    on one machine), 512-256-64 and 512-256 (the paper, Criteo Kaggle, 34 million rows), 512-256 and 1024-1024-512-256
    (MLPerf, Criteo Terabyte). embedding_dim costs table bytes in proportion and, with ``dot``, little time here.

    Args:
        embeddings: KeyedJaggedTensor -> KeyedTensor, with ``embedding_bag_configs()``: TorchRec's
            EmbeddingBagCollection, recemb's CompressedEmbeddingBagCollection, or either after ``recemb.prepare``.
        num_dense: I, numeric features; 0 for none, then only the F vectors interact.
        bottom_layers: widths of the bottom MLP after its input, ReLU after each, the last one included. With ``dot``
            the last must equal D. Unused where num_dense is 0.
        over_layers: widths of the over MLP after its input; the last is 1.
        interaction: ``"dot"`` (the paper) or ``"dcnv2"`` (cross layers; better where the tables are large, and several
            times slower; tables may then differ in width).
        cross_layers: number of cross layers, for ``dcnv2`` only. MLPerf: 3.
        cross_rank: their rank, for ``dcnv2`` only. MLPerf: 512, at an input of 27 x 128 values.

    Raises:
        ValueError: no table, tables of unequal width or a bottom MLP that does not end in that width (with ``dot``), an
            over MLP that does not end in 1, an argument of the other interaction.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> table = EmbeddingBagConfig(name="ad", embedding_dim=16, num_embeddings=1000, feature_names=["ad"])
        >>> model = DLRM(EmbeddingBagCollection([table]), num_dense=13, bottom_layers=[64, 16], over_layers=[64, 1])

    Differs from the paper: the over MLP's last sigmoid is left to the loss, which is exact for large logits.
    """

    @remember_arguments
    def __init__(
        self,
        embeddings: nn.Module,
        *,
        num_dense: int,
        bottom_layers: Sequence[int],
        over_layers: Sequence[int],
        interaction: Interaction = "dot",
        cross_layers: int | None = None,
        cross_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        tables = cast(EmbeddingBags, embeddings).embedding_bag_configs()
        names = get_embedding_names_by_table(tables)
        self._embedding_names = [name for table_names in names for name in table_names]
        self.head = DLRMHead(
            [table.embedding_dim for table, table_names in zip(tables, names, strict=True) for _ in table_names],
            num_dense=num_dense,
            bottom_layers=bottom_layers,
            over_layers=over_layers,
            interaction=interaction,
            cross_layers=cross_layers,
            cross_rank=cross_rank,
        )

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """(B, I) float32 numeric features and the ids of B samples -> (B,) float32 logits."""
        pooled: KeyedTensor = self.embeddings(sparse)
        if list(pooled.keys()) == self._embedding_names:
            return cast(Tensor, self.head(dense, pooled.values()))
        # A sharded collection orders its output by sharding plan; the weights of the head stand in the tables' order.
        return cast(Tensor, self.head(dense, torch.cat([pooled[name] for name in self._embedding_names], dim=1)))


def _common_dim(embedding_dims: Sequence[int], numeric_width: int) -> int:
    """D, if every vector has it; ``numeric_width`` is that of the bottom MLP's output, 0 without one."""
    dims = sorted(set(embedding_dims))
    if len(dims) > 1:
        raise ValueError(f"interaction='dot' needs one embedding_dim for all tables, got {dims}; 'dcnv2' takes any")
    if numeric_width not in (0, dims[0]):
        raise ValueError(
            f"bottom_layers must end in the tables' embedding_dim ({dims[0]}) for 'dot', got {numeric_width}"
        )
    return dims[0]
