"""Deep hash embeddings (DHE): no table; many hashes of an id are decoded to its vector by a network.

Reference: Kang et al., "Learning to Embed Categorical Features without Embedding Tables for Recommendation", KDD 2021,
arXiv:2010.10784.

Differs from the paper: hashes are 64-bit multiply-add hashes of the mixed id, kept to 24 bits, where the paper takes
polynomials modulo primes of 32 bits; a table that its decoder would not make smaller stays full; linear layers before
a batch normalisation have no bias, which it would cancel; decoders start with running statistics of random encodings
and an output as wide as a full table's rows.

Shapes: N ids, U distinct ids of a table in the batch, k num_hashes, w width, D embedding_dim, L num_layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.distinct import Distinct
from recemb.hashing import mix, salt
from recemb.method import UNBOUNDED, CompressedTables
from recemb.ranks import differentiable_sum
from recemb.spending import spend
from recemb.stacked import first_rows, per_feature, stacked_table, start_variance

ENCODINGS = ("uniform", "normal")
# (rows, k) int64 hashes are made in pieces of this many values: 32 MB.
_HASHES_AT_ONCE = 1 << 22
_PROBE_IDS = 512
# More than a decoder of 32,768 units, the largest that a budget makes where ids have no bound.
_UNBOUNDED_FLOATS = 1 << 33


class DeepHash(CompressedTables):
    """Gives id ``i`` of table ``t`` the output of a network for k hashes of ``(t, i)``, scaled to real numbers.

    The network is L hidden layers of w units with batch normalisation and Mish, then a linear layer. A step costs
    hundreds of times a lookup for every distinct id.

    Memory: a decoder takes ``(k + (L - 1) * w + 4 * L + D) * w + D`` floats, the hashes 16 k bytes for all tables.

    Training normalises with the statistics of the batch, of all ids however often they come (and over all ranks, which
    must run the same steps), evaluation with running ones: ``eval()`` before serving.

    Args:
        tables: the logical tables; ids may be unbounded 64-bit hashes.
        width: w, in units, of every decoder. The paper uses 1,800 or so for its largest.
        num_parameters: floats of decoders (running statistics included) and full tables in all, instead of width; what
            a byte budget turns. All decoders take the largest width that this pays, and some more, which uses up the
            rest (``recemb.spending``).
        num_hashes: k; even where the encoding is normal. The paper's choice is 1,024.
        num_layers: L, at least 1; the paper uses 5. More layers at less width train slower.
        encoding: ``"uniform"`` in [-1, 1) or standard ``"normal"`` by Box-Muller; the paper finds them alike.
        shared: one decoder for all tables of the group (the table is hashed with the id) instead of one for each.
        merge_ids: decode each distinct id of a batch once. False decodes every id, with the same result; for measuring
            what merging saves.

    Raises:
        ValueError: both or neither of width and num_parameters, a width, number of hashes or of layers below 1,
            an odd number of normal hashes, an unknown encoding.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> DeepHash(tables, width=64)
        DeepHash(...)
    """

    budget_knob: ClassVar[str | None] = "num_parameters"
    supports_unbounded: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        width: int | None = None,
        num_parameters: int | None = None,
        num_hashes: int = 1024,
        num_layers: int = 5,
        encoding: str = "uniform",
        shared: bool = False,
        merge_ids: bool = True,
    ) -> None:
        if (width is None) == (num_parameters is None):
            raise ValueError(
                f"DeepHash: give width or a budget (num_parameters), one of them; "
                f"got width={width}, num_parameters={num_parameters}"
            )
        for name, value in (("width", width), ("num_hashes", num_hashes), ("num_layers", num_layers)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {ENCODINGS}, got {encoding!r}")
        if encoding == "normal" and num_hashes % 2:
            raise ValueError(f"num_hashes must be even where the encoding is normal (pairs), got {num_hashes}")
        dim = tables[0].embedding_dim
        # Tables of one decoder count as one.
        ids = [table.num_embeddings for table in tables]
        ids = [sum(ids)] if shared else ids
        if width is not None:
            widths = [width] * len(ids)
        else:
            widths = choose_decoder_widths(ids, dim, num_parameters or 0, num_hashes, num_layers)
        pays = [
            _decoder_floats(num_hashes, units, num_layers, dim) < size * dim
            for size, units in zip(ids, widths, strict=True)
        ] * (len(tables) if shared else 1)
        widths = [units for units, yes in zip(widths, pays, strict=False) if yes]
        self.decoded = [table for table, yes in zip(tables, pays, strict=True) if yes]
        self.full = [table for table, yes in zip(tables, pays, strict=True) if not yes]
        sizes = [table.num_embeddings for table in self.full]
        full = stacked_table("deep_hash__full", sizes, dim, [start_variance(table) for table in self.full])
        super().__init__(tables, [[full]] if self.full else [])
        self._encoding, self._shared, self.merge_ids = encoding, shared, merge_ids
        owners = [table.name for table in tables for _ in table.feature_names]
        self._features_of = [[f for f, owner in enumerate(owners) if owner == table.name] for table in self.decoded]
        full_names = {table.name for table in self.full}
        self._full_features = [feature for feature, owner in enumerate(owners) if owner in full_names]
        self._full_index: Tensor
        self.register_buffer("_full_index", torch.tensor(self._full_features, dtype=torch.int64), persistent=False)
        self.starts: Tensor
        self.register_buffer("starts", per_feature(self.full, first_rows(sizes) if sizes else []))
        # Fixed random coefficients; multipliers must be odd to lose no bit of the id.
        coefficients = mix(torch.arange(2 * num_hashes), torch.tensor(salt("deep_hash"))).view(2, num_hashes)
        coefficients |= torch.tensor([[1], [0]])
        self.hashes: Tensor
        self.register_buffer("hashes", coefficients if self.decoded else coefficients[:, :0])
        self.salts: Tensor
        self.register_buffer("salts", torch.tensor([salt(table.name) for table in self.decoded], dtype=torch.int64))
        groups = [self.decoded] if shared and self.decoded else [[table] for table in self.decoded]
        self.decoders = nn.ModuleList(
            _Decoder(num_hashes, units, num_layers, dim, self._start_deviation(group))
            for group, units in zip(groups, widths, strict=True)
        )
        # Nothing to calibrate where only sizes are asked for.
        for decoder in [] if self.hashes.is_meta else self.decoders:
            bits = torch.randint(-(2**23), 2**23, (_PROBE_IDS, num_hashes)).to(torch.float32)
            cast(_Decoder, decoder).calibrate(self._to_reals(bits))

    @staticmethod
    def _start_deviation(tables: Sequence[EmbeddingBagConfig]) -> float:
        return math.sqrt(sum(start_variance(table) for table in tables) / len(tables))

    def embed(self, bags: Bags) -> Tensor:
        lengths = bags.lengths.sum(dim=1).tolist()
        ids = bags.ids.unbind(1) if bags.single else bags.ids.split(lengths)
        columns: dict[int, Tensor] = {}
        if self.full:
            chosen = bags.select(self._full_index)
            rows = self.lookup_rows(0, [chosen.ids + chosen.per_id(self.starts)])[0]
            kept = [lengths[feature] for feature in self._full_features]
            parts = rows.view(bags.batch_size, len(kept), -1).unbind(1) if bags.single else rows.split(kept)
            columns.update(zip(self._full_features, parts, strict=True))
        columns.update(self._decoded_columns(ids))
        if bags.single:
            return torch.stack([columns[feature] for feature in range(len(ids))], dim=1).flatten(0, 1)
        return torch.cat([columns[feature] for feature in range(len(ids))])

    def _decoded_columns(self, ids: Sequence[Tensor]) -> dict[int, Tensor]:
        """Feature -> (its ids, D), for all features of decoded tables."""
        distinct = [
            Distinct.of(torch.cat([ids[feature] for feature in features]), table.num_embeddings, merge=self.merge_ids)
            for table, features in zip(self.decoded, self._features_of, strict=True)
        ]
        inputs = [self._encode(mix(keys.keys, salts)) for keys, salts in zip(distinct, self.salts, strict=True)]
        counts = [keys.counts for keys in distinct]
        if self._shared and distinct:
            decoded = self.decoders[0](torch.cat(inputs), torch.cat(counts)).split([len(part) for part in inputs])
        else:
            decoded = [decoder(*part) for decoder, *part in zip(self.decoders, inputs, counts, strict=True)]
        columns: dict[int, Tensor] = {}
        for features, keys, vectors in zip(self._features_of, distinct, decoded, strict=True):
            parts = keys.expand(vectors).split([ids[feature].numel() for feature in features])
            columns.update(zip(features, parts, strict=True))
        return columns

    @torch.no_grad()
    def _encode(self, mixed: Tensor) -> Tensor:
        """(U,) mixed ids -> (U, k) real numbers."""
        times, plus = self.hashes
        encoded = torch.empty(mixed.numel(), times.numel(), device=mixed.device)
        at_once = max(_HASHES_AT_ONCE // times.numel(), 1)
        for part, target in zip(mixed.split(at_once), encoded.split(at_once), strict=True):
            # The upper bits are the random ones of a product; 24 of them are exact in float32.
            target.copy_((part.unsqueeze(1) * times).add_(plus).bitwise_right_shift_(40))
        return self._to_reals(encoded)

    def _to_reals(self, bits: Tensor) -> Tensor:
        """(U, k) float32 integers in [-2**23, 2**23) -> the encoding."""
        uniform = bits.mul_(2**-23)
        if self._encoding == "uniform":
            return uniform
        # Box-Muller on pairs: (1 - u) / 2 is in (0, 1], pi * u an angle.
        radius, angle = uniform.chunk(2, dim=1)
        radius, angle = (-2 * torch.log((1 - radius) / 2)).sqrt(), math.pi * angle
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        bounded = [table.num_embeddings for table in tables if table.num_embeddings < UNBOUNDED]
        full = sum(bounded) * tables[0].embedding_dim
        return 1, full if len(bounded) == len(tables) else full + _UNBOUNDED_FLOATS


class _Decoder(nn.Module):
    """Linear, normalisation, Mish, L times, and a linear layer to D."""

    def __init__(self, num_inputs: int, width: int, num_layers: int, dim: int, deviation: float) -> None:
        super().__init__()
        sizes = [num_inputs] + [width] * (num_layers - 1)
        self.hidden = nn.ModuleList(nn.Linear(size, width, bias=False) for size in sizes)
        self.norms = nn.ModuleList(_BatchNorm(width) for _ in sizes)
        self.output = nn.Linear(width, dim)
        self._deviation = deviation

    def forward(self, inputs_Uk: Tensor, counts: Tensor) -> Tensor:
        """(U, k) encodings of ids that come ``counts`` (U,) times -> (U, D)."""
        values = inputs_Uk
        weights = counts.to(values.dtype).unsqueeze(1)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            values = nn.functional.mish(norm(linear(values), weights))
        return self.output(values)

    @torch.no_grad()
    def calibrate(self, probe_Uk: Tensor) -> None:
        """Start running statistics at those of a probe, and the output at a standard deviation."""
        values = probe_Uk
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            values = nn.functional.mish(cast(_BatchNorm, norm).calibrate(linear(values)))
        nn.init.zeros_(self.output.bias)
        self.output.weight.mul_(self._deviation / self.output(values).square().mean().sqrt())


class _BatchNorm(nn.Module):
    """Batch normalisation of distinct rows, each weighing as often as it comes: that of the batch before merging.

    In training over ranks the statistics are those of all of them. Where only one id came, running ones serve.
    """

    eps = 1e-5
    momentum = 0.1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, values_UW: Tensor, weights_U1: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            total = differentiable_sum(weights_U1.sum())
            count = total.clamp(min=1)
            batch_mean = differentiable_sum((values_UW * weights_U1).sum(dim=0)) / count
            batch_var = differentiable_sum(((values_UW - batch_mean).square() * weights_U1).sum(dim=0)) / count
            enough = total > 1
            mean, var = torch.where(enough, batch_mean, mean), torch.where(enough, batch_var, var)
            with torch.no_grad():
                rate = self.momentum * enough
                self.running_mean.add_(rate * (batch_mean - self.running_mean))
                self.running_var.add_(rate * (batch_var * count / (count - 1).clamp(min=1) - self.running_var))
        return (values_UW - mean) * (var + self.eps).rsqrt() * self.weight + self.bias

    def calibrate(self, values_UW: Tensor) -> Tensor:
        """Take the running statistics from a batch; the batch normalised by them."""
        self.running_mean.copy_(values_UW.mean(dim=0))
        self.running_var.copy_(values_UW.var(dim=0))
        return (values_UW - self.running_mean) * (self.running_var + self.eps).rsqrt()


def choose_decoder_widths(
    ids: Sequence[int], dim: int, num_parameters: int, num_hashes: int, num_layers: int
) -> list[int]:
    """Units of the decoder of each table (or of all, as one of all their ids) that ``num_parameters`` floats pay.

    Args:
        ids: num_embeddings of the tables.
        dim: embedding_dim.
        num_parameters: floats in all; a table that its decoder would not make smaller counts as full.
        num_hashes, num_layers: see ``DeepHash``.
    """

    def cost(index: int, level: int) -> int:
        return min(_decoder_floats(num_hashes, level + 1, num_layers, dim), ids[index] * dim)

    # A decoder of w units takes more than w floats: full tables by then.
    return [level + 1 for level in spend(num_parameters, ids, num_parameters + 1, cost)]


def _decoder_floats(num_hashes: int, width: int, num_layers: int, dim: int) -> int:
    """Parameters and running statistics."""
    return (num_hashes + (num_layers - 1) * width + 4 * num_layers + dim) * width + dim
