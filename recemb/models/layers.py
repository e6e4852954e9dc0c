"""Dense layers of CTR models: the MLP with DLRM's initialisation, the dot interaction, the low-rank cross network.

References: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
arXiv:1906.00091 (MLP, dot interaction); Wang et al., "DCN V2: Improved Deep & Cross Network and Practical Lessons for
Web-scale Learning to Rank Systems", arXiv:2008.13535 (cross network).

Shapes: B batch, F features, D embedding_dim, N vectors that interact (F, plus 1 where there are numeric features),
P = N(N-1)/2 pairs, W width of a cross network's input, R its rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def initialise_linear(layer: nn.Linear) -> None:
    """Draws a layer's parameters as DLRM does, in place: W ~ N(0, sqrt(2 / (in + out))), b ~ N(0, sqrt(1 / out)).

    The second argument of N is the standard deviation. Uses torch's global generator: seed it before building a model.
    """
    nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / (layer.in_features + layer.out_features)))
    nn.init.normal_(layer.bias, 0.0, math.sqrt(1.0 / layer.out_features))


class MLP(nn.Sequential):
    """Linear layers with ReLU between them, (B, in_features) -> (B, widths[-1]).

    Args:
        in_features: width of the input.
        widths: output width of each layer, at least one.
        relu_last: whether a ReLU follows the last layer too (DLRM: yes for the bottom MLP, no for the over MLP).

    Raises:
        ValueError: no layer, or a width below 1.
    """

    def __init__(self, in_features: int, widths: Sequence[int], *, relu_last: bool) -> None:
        sizes = [in_features, *widths]
        if not widths or min(sizes) < 1:
            raise ValueError(
                f"an MLP needs in_features >= 1 and at least one layer of width >= 1, "
                f"got in_features {in_features} and widths {list(widths)}"
            )
        layers: list[nn.Module] = []
        for size_in, size_out in zip(sizes, widths, strict=False):
            linear = nn.Linear(size_in, size_out)
            initialise_linear(linear)
            # In place: the backward of a Linear does not need its output, the backward of ReLU needs only its own.
            layers += [linear, nn.ReLU(inplace=True)]
        super().__init__(*(layers if relu_last else layers[:-1]))


# Samples whose (N, N) products are formed at once: 27 vectors take 0.75 MB, which stays in a core's cache between the
# product and the copy of its triangle. Whole batches (12 MB at 4096) make a training step of the head about 5% slower.
_CHUNK = 256


class _LowerTriangle(torch.autograd.Function):
    """(B, N, D) vectors -> (B, P) dot products of all pairs i > j, for CPU.

    Autograd's own backward of the selection scatters element by element, or fills a (B, N, N) gradient for each row of
    the triangle. Here the gradient is gathered into the symmetric matrix G + G^T (G its lower triangle) of a sample,
    and the result is one batched product with V. Half precision computes in float32 and rounds the result, which is as
    fast on CPU.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, pairs: Tensor, mirror: Tensor) -> Tensor:
        """Products of ``vectors``.

        Args:
            vectors: (B, N, D).
            pairs: (P,) where pair p lies in a flat (N, N) matrix.
            mirror: (N * N,) the pair at each place of that matrix, on both sides; P on the diagonal.
        """
        ctx.save_for_backward(vectors, mirror)
        batch, num_vectors, _ = vectors.shape
        dtype = _compute_dtype(vectors)
        result = vectors.new_empty(batch, len(pairs))
        workspace = vectors.new_empty(min(batch, _CHUNK), num_vectors, num_vectors, dtype=dtype)
        for start in range(0, batch, _CHUNK):
            chunk, out = vectors[start : start + _CHUNK].to(dtype), result[start : start + _CHUNK]
            products = torch.bmm(chunk, chunk.transpose(1, 2), out=workspace[: len(chunk)]).flatten(1)
            if dtype == result.dtype:
                torch.index_select(products, 1, pairs, out=out)
            else:
                out.copy_(products.index_select(1, pairs))
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        vectors, mirror = ctx.saved_tensors
        batch, num_vectors, _ = vectors.shape
        dtype = _compute_dtype(vectors)
        result = torch.empty_like(vectors)
        # One column more than pairs, which stays zero: the diagonal.
        padded = vectors.new_zeros(min(batch, _CHUNK), gradient.shape[1] + 1, dtype=dtype)
        workspace = vectors.new_empty(min(batch, _CHUNK), num_vectors**2, dtype=dtype)
        for start in range(0, batch, _CHUNK):
            chunk = vectors[start : start + _CHUNK].to(dtype)
            rows = len(chunk)
            padded[:rows, :-1] = gradient[start : start + _CHUNK]
            symmetric = torch.index_select(padded[:rows], 1, mirror, out=workspace[:rows])
            symmetric = symmetric.view(rows, num_vectors, num_vectors)
            if dtype == result.dtype:
                torch.bmm(symmetric, chunk, out=result[start : start + _CHUNK])
            else:
                result[start : start + _CHUNK] = torch.bmm(symmetric, chunk)
        return result, None, None


class _GatheredPairs(torch.autograd.Function):
    """The same for compilers and GPUs: whole batch at once, few kernels, and a backward that gathers too."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, pairs: Tensor, mirror: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, mirror)
        return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, pairs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        vectors, mirror = ctx.saved_tensors
        num_vectors = vectors.shape[1]
        symmetric = nn.functional.pad(gradient, (0, 1)).index_select(1, mirror)
        return torch.bmm(symmetric.view(-1, num_vectors, num_vectors), vectors), None, None


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype


class DotInteraction(nn.Module):
    """Dot products of all pairs of a sample's vectors, (B, N, D) -> (B, P), P = N(N-1)/2, without self-interaction.

    Order: (1,0), (2,0), (2,1), (3,0) ...: row i of the strictly lower triangle of V V^T after row i - 1. TorchRec's
    InteractionArch lists the same products as (0,1), (0,2), ...: a head trained there needs its columns permuted.

    Args:
        num_vectors: N, at least 2.

    Raises:
        ValueError: fewer than two vectors.
    """

    pairs: Tensor
    mirror: Tensor

    def __init__(self, num_vectors: int) -> None:
        super().__init__()
        if num_vectors < 2:
            raise ValueError(f"a dot interaction needs at least 2 vectors a sample, got {num_vectors}")
        self.num_vectors = num_vectors
        row, column = torch.tril_indices(num_vectors, num_vectors, offset=-1)
        self.register_buffer("pairs", row * num_vectors + column, persistent=False)
        mirror = torch.full((num_vectors, num_vectors), len(row))
        mirror[row, column] = mirror[column, row] = torch.arange(len(row))
        self.register_buffer("mirror", mirror.view(-1), persistent=False)

    @property
    def num_pairs(self) -> int:
        """P, the width of the output."""
        return self.num_vectors * (self.num_vectors - 1) // 2

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, N, D) -> (B, P) of the same dtype, also under autocast."""
        with torch.autocast(vectors.device.type, enabled=False):
            # The CPU form is dozens of small kernels: too many launches for a GPU, too many nodes for a compiler.
            in_chunks = vectors.device.type == "cpu" and not torch.compiler.is_compiling()
            function = _LowerTriangle if in_chunks else _GatheredPairs
            pairs: Tensor = function.apply(vectors, self.pairs, self.mirror)
            return pairs


class LowRankCrossNet(nn.Module):
    """DCN V2's cross layers of low rank, (B, W) -> (B, W): x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l.

    V_l is (R, W), U_l is (W, R), * is elementwise; 2 W R + W parameters a layer. U and V start Xavier normal, b at 0,
    as in TorchRec's LowRankCrossNet (which MLPerf's DLRM-DCNv2 uses).

    Args:
        in_features: W.
        num_layers: cross layers, at least 1; k layers model feature crosses up to degree k + 1. Two or three are usual.
        rank: R, at least 1. Saves time against full matrices below W / 2; about W / 4 usually keeps their accuracy.

    Raises:
        ValueError: an argument below 1.
    """

    def __init__(self, in_features: int, *, num_layers: int, rank: int) -> None:
        super().__init__()
        if min(in_features, num_layers, rank) < 1:
            raise ValueError(
                f"in_features, num_layers and rank must be at least 1, got {in_features}, {num_layers} and {rank}"
            )
        downs = [nn.Linear(in_features, rank, bias=False) for _ in range(num_layers)]
        ups = [nn.Linear(rank, in_features) for _ in range(num_layers)]
        for down, up in zip(downs, ups, strict=True):
            nn.init.xavier_normal_(down.weight)
            nn.init.xavier_normal_(up.weight)
            nn.init.zeros_(up.bias)
        self.down = nn.ModuleList(downs)
        self.up = nn.ModuleList(ups)

    def forward(self, x_0: Tensor) -> Tensor:
        """(B, W) -> (B, W)."""
        x = x_0
        for down, up in zip(self.down, self.up, strict=True):
            x = torch.addcmul(x, x_0, up(down(x)))
        return x
