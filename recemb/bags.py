"""The ids of one batch as a method sees them: bags of several features.

Shapes: F features, B batch, N ids in all bags, P probes (one feature may be probed several times), D embedding_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def one_empty_sample(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """A batch of no samples as one of empty bags: neither TorchRec nor its kernels have a batch of none."""
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=torch.zeros(len(features.keys()), dtype=torch.int32, device=features.values().device),
        stride=1,
    )


@dataclass(frozen=True)
class Bags:
    """Ids of F features for B samples.

    Two layouts, so that a method is one integer expression over all ids of the batch either way:

    * ``single``: every bag holds exactly one id. ``ids`` is (B, F), sample after sample: rows looked up in this order
      already are the (B, F * D) output, with nothing to pool or transpose.
    * otherwise ``ids`` is (N,), feature after feature, with ``lengths`` per bag.

    Args:
        ids: int64, see above.
        lengths: (F, B) int32 or int64, number of ids in each bag.
        single: which layout.
        weights: (N,) float32 weight of each id in its bag (feature after feature), or None.
    """

    ids: Tensor
    lengths: Tensor
    single: bool
    weights: Tensor | None = None

    @staticmethod
    def of(features: KeyedJaggedTensor, *, allow_single: bool = True) -> Bags:
        """The bags of a KeyedJaggedTensor whose keys are already in the method's order.

        Args:
            features: int64 or int32 ids.
            allow_single: use the ``single`` layout where it applies; False keeps ids feature after feature.
        """
        num_features, batch_size = len(features.keys()), features.stride()
        values, lengths = features.values(), features.lengths().view(num_features, batch_size)
        weights = features.weights_or_none()
        values = values.to(torch.int64) if values.dtype == torch.int32 else values
        single = allow_single and weights is None and values.numel() == lengths.numel() and bool((lengths == 1).all())
        if single:
            values = values.view(num_features, batch_size).t().contiguous()
        return Bags(values, lengths, single, weights)

    @property
    def num_features(self) -> int:
        return self.lengths.shape[0]

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[1]

    def per_id(self, constants: Tensor) -> Tensor:
        """(F,) constants -> a tensor that broadcasts against ``ids``: (F,) where single, else (N,)."""
        if self.single:
            return constants
        return torch.repeat_interleave(constants, self.lengths.sum(dim=1), output_size=self.ids.numel())

    def select(self, probes: Tensor) -> Bags:
        """The bags of features ``probes`` ((P,) int64 feature indices, repeats allowed), in that order."""
        if self.single:
            return Bags(self.ids.index_select(1, probes), self.lengths.index_select(0, probes), single=True)
        lengths, ids, weights = torch.ops.fbgemm.permute_2D_sparse_data(
            probes.to(torch.int32), self.lengths, self.ids, self.weights, None
        )
        return Bags(ids, lengths, single=False, weights=weights)

    def offsets(self) -> Tensor:
        """(F * B + 1,) int64 start of each bag in ``ids``; the layout that is not single."""
        offsets = torch.zeros(self.lengths.numel() + 1, dtype=torch.int64, device=self.lengths.device)
        torch.cumsum(self.lengths.view(-1), dim=0, out=offsets[1:])
        return offsets

    def pool(self, vectors_ND: Tensor, mean: Tensor | None) -> Tensor:
        """Reduce one vector per id to one per bag and lay them out as TorchRec does: (N, D) -> (B, F * D).

        Args:
            vectors_ND: (N, D) in the order of ``ids.view(-1)``.
            mean: (F,) bool, which features are averaged (over the number of ids in the bag) instead of summed.
        """
        if self.single:
            return vectors_ND.view(self.batch_size, -1)
        if self.weights is not None:
            vectors_ND = vectors_ND * self.weights.unsqueeze(1)
        # segment_reduce is undefined for no segments at all and for empty data with some torch releases.
        if vectors_ND.shape[0] == 0:
            return vectors_ND.new_zeros(self.batch_size, self.num_features * vectors_ND.shape[1]) + vectors_ND.sum()
        pooled = torch.segment_reduce(
            vectors_ND, "sum", lengths=self.lengths.view(-1).to(torch.int64), unsafe=True, initial=0
        )
        return self.lay_out(pooled, mean)

    def lay_out(self, pooled: Tensor, mean: Tensor | None) -> Tensor:
        """(F * B, D) sums over bags -> (B, F * D), with the sums of ``mean`` features divided by the bag's length."""
        pooled = pooled.view(self.num_features, self.batch_size, -1)
        if mean is not None and bool(mean.any()):
            lengths = self.lengths.clamp(min=1).to(pooled.dtype)
            pooled = pooled / torch.where(mean.unsqueeze(1), lengths, torch.ones_like(lengths)).unsqueeze(2)
        return pooled.permute(1, 0, 2).reshape(self.batch_size, -1)
