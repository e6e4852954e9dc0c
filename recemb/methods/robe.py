"""ROBE: embeddings as windows at random offsets of one array that all tables share.

Reference: Desai et al., "Random Offset Block Embedding Array (ROBE) for CriteoTB Benchmark MLPerf DLRM Model: 1000x
Compression and 3.1x Faster Inference", MLSys 2022, arXiv:2108.02191.

Differs from the paper: the hash is a frozen 64-bit mixer with multiply-shift reduction where the paper takes a
polynomial modulo a prime; blocks shorter than a vector are hashed by id, with a salt for each, instead of by their
number in the flattened table (equally random, and defined for 64-bit ids). A row-wise optimizer keeps one accumulator
for every W floats of the array, at places of its own: blocks start anywhere.

Shapes: N ids, F features, D embedding_dim, Z block_length, M array length, W = min(D, Z) floats that are read in one
piece, K = D / W pieces of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.hashing import MAX_SLOTS, hash_to_slots, mix, salt
from recemb.method import UNBOUNDED, CompressedTables, full_table_variance, physical_table, uniform_bound
from recemb.stacked import has_unbounded

_SEED_IDS = 1 << 16


class Robe(CompressedTables):
    """Cuts the flattened table into blocks of Z floats and puts each at a hashed offset of one array, wrapping around.

    Float ``e`` of table ``t`` laid out row after row (element ``i`` of id ``x`` is ``e = x * D + i``) is
    ``array[(hash_t(e // Z) + e % Z) mod M]``. Blocks overlap, so no two ids share more than their blocks happen to.

    Memory: ``array_length * 4`` bytes, whatever the vocabularies. It is stored as rows of W floats, and a piece of a
    vector lies in two neighbouring ones: two lookups a piece, done once for each distinct id of a batch.

    Args:
        tables: the logical tables; ids may be unbounded 64-bit hashes.
        array_length: M in floats, rounded up to a multiple of W; what a byte budget turns.
        block_length: Z in floats, as in the paper; a multiple of embedding_dim or a divisor of it, and of 4. At least
            embedding_dim (the paper's fastest) reads a vector in one piece, and ids that follow each other share a
            block; smaller blocks mix better and cost ``embedding_dim / block_length`` times as much. None is
            embedding_dim.
        signs: multiply each element by a hashed sign, so that shared floats cancel on average. The paper leaves it
            open; it takes about as long as one more lookup.
        seed: changes every hash at once.

    Raises:
        ValueError: array_length not in [1, 2**40], a block_length that neither divides embedding_dim nor is divided by
            it, or no multiple of 4.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> Robe(tables, array_length=16_000, block_length=32)
        Robe(...)
    """

    budget_knob: ClassVar[str | None] = "array_length"
    supports_unbounded: ClassVar[bool] = True
    merges_ids: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        array_length: int,
        block_length: int | None = None,
        signs: bool = False,
        seed: int = 0,
    ) -> None:
        dim = tables[0].embedding_dim
        block = dim if block_length is None else block_length
        if block < 4 or block % 4 or (dim % block and block % dim):
            raise ValueError(
                f"block_length must be a multiple of 4 that divides embedding_dim ({dim}) or is divided by it, "
                f"got {block}"
            )
        if not 1 <= array_length <= MAX_SLOTS:
            raise ValueError(f"array_length must be in [1, {MAX_SLOTS}] floats, got {array_length}")
        self.width = min(dim, block)
        self.num_rows = -(-array_length // self.width)
        bound = uniform_bound(full_table_variance(tables))
        super().__init__(tables, [[physical_table("robe", self.num_rows, self.width, bound)]])
        self.array_length = self.num_rows * self.width
        # Where Z >= D, this many ids share a block; where Z < D, an id has this many blocks, each hashed with a salt.
        self._ids_per_block = max(block // dim, 1)
        self._pieces = dim // self.width
        self.salts: Tensor
        names = [table.name for table in tables for _ in table.feature_names]
        self.register_buffer(
            "salts", torch.tensor([[salt(name, piece, seed) for name in names] for piece in range(self._pieces)])
        )
        self.sign_salts: Tensor | None
        # Numbered after every block's salt, so that signs are independent of offsets.
        numbers = range(self._pieces, self._pieces + -(-dim // 64))
        sign_salts = torch.tensor([[salt(name, number, seed) for name in names] for number in numbers])
        self.register_buffer("sign_salts", sign_salts if signs else None)

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        """[[(..., K, 2)]]: the two neighbouring rows that hold each piece."""
        return [[self._rows(self._starts(bags.ids, _per_id(bags, self.salts)))[0]]]

    def embed_each(self, bags: Bags) -> Tensor:
        starts = self._starts(bags.ids, _per_id(bags, self.salts))
        rows, shifts = self._rows(starts.view(-1))
        pairs = self.lookup_rows(0, [rows])[0].view(-1, 2 * self.width)
        vectors = _Windows.apply(pairs, shifts).view(bags.ids.numel(), self.salts.shape[0] * self.width)
        if self.sign_salts is not None:
            vectors = vectors * _signs(bags.ids, _per_id(bags, self.sign_salts), vectors.shape[1])
        return vectors

    def _starts(self, ids: Tensor, salts: Sequence[Tensor]) -> Tensor:
        """Offsets in [0, M) of the K pieces of every id: (..., K)."""
        if self._ids_per_block == 1:
            return torch.stack([hash_to_slots(ids, piece, self.array_length) for piece in salts], dim=-1)
        blocks = torch.div(ids, self._ids_per_block, rounding_mode="floor")
        starts = hash_to_slots(blocks, salts[0], self.array_length)
        starts += (ids - blocks * self._ids_per_block) * self.width
        # The remainder and not one subtraction, because a block may be longer than the array.
        return (starts % self.array_length).unsqueeze(-1)

    def _rows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets -> the rows a piece begins and may end in, (..., 2), and how far into the first one it begins."""
        first = torch.div(starts, self.width, rounding_mode="floor")
        second = first + 1
        # The array wraps around.
        second *= second < self.num_rows
        return torch.stack([first, second], dim=-1), starts - first * self.width

    @torch.no_grad()
    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every bounded table, approximately: a float starts at the mean of what the full tables hold there."""
        weight = self.get_parameter("lookups.0.embedding_bags.robe.weight")
        sums, counts = torch.zeros_like(weight).view(-1), torch.zeros_like(weight).view(-1)
        seeded, feature = [], 0
        for table in self.tables:
            if table.num_embeddings < UNBOUNDED:
                for start in range(0, table.num_embeddings, _SEED_IDS):
                    ids = torch.arange(start, min(start + _SEED_IDS, table.num_embeddings), device=weight.device)
                    starts = self._starts(ids, list(self.salts[:, feature]))
                    places = starts.unsqueeze(-1) + torch.arange(self.width, device=weight.device)
                    values = full_tables[table.name][start : start + len(ids)].to(weight.device, torch.float32)
                    if self.sign_salts is not None:
                        values = values * _signs(ids, list(self.sign_salts[:, feature]), values.shape[1])
                    places = places.view(-1) % self.array_length
                    sums.index_add_(0, places, values.reshape(-1))
                    counts.index_add_(0, places, torch.ones_like(sums[:1]).expand(places.numel()))
                seeded.append(table.name)
            feature += len(table.feature_names)
        means = (sums / counts.clamp(min=1)).view_as(weight)
        weight.copy_(torch.where(counts.view_as(weight) > 0, means, weight))
        return seeded

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        if has_unbounded(tables):
            return 1, 1 << 37
        return 1, min(sum(table.num_embeddings * table.embedding_dim for table in tables), MAX_SLOTS)


class _Windows(torch.autograd.Function):
    """(N, 2 * W) pairs of rows and (N,) shifts in [0, W) -> (N, W): W floats from ``shift`` on, copied as a piece.

    A gather with an index per float takes four times as long.
    """

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, shifts: Tensor) -> Tensor:
        ctx.save_for_backward(shifts)
        return _read_windows(pairs.reshape(-1), pairs.shape[0], pairs.shape[1], pairs.shape[1] // 2, shifts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [gradient] = gradients
        [shifts] = ctx.saved_tensors
        count, width = gradient.shape
        # Every gradient between zeros: the gradient of a pair is a window of it too, which begins before by its shift.
        padded = gradient.new_zeros((2 * count + 1) * width)
        padded[width:].view(count, 2 * width)[:, :width] = gradient
        return _read_windows(padded, count, 2 * width, 2 * width, width - shifts), None


def _read_windows(flat: Tensor, count: int, stride: int, length: int, shifts: Tensor) -> Tensor:
    """(count, length): row n is ``flat[n * stride + shifts[n]:]``, ``length`` floats of it."""
    if count == 0:
        return flat.new_zeros(0, length)
    windows = flat.as_strided((flat.numel() - length + 1, length), (1, 1))
    return windows.index_select(0, torch.arange(count, device=flat.device) * stride + shifts)


def _per_id(bags: Bags, constants_KF: Tensor) -> list[Tensor]:
    return [bags.per_id(constants) for constants in constants_KF]


def _signs(ids: Tensor, salts: Sequence[Tensor], dim: int) -> Tensor:
    """(N, D) of -1 and 1: element ``i`` of an id takes bit ``i % 64`` of its hash number ``i // 64``."""
    words = torch.stack([mix(ids, word) for word in salts], dim=-1).view(ids.numel(), len(salts))
    # Eight signs at a time, by a table: bits as 64-bit integers take five times as long. Bytes of a word
    # are in the order of its bits on little-endian processors, x86, ARM and GPUs.
    chosen = words.view(torch.uint8)[:, : -(-dim // 8)].to(torch.int32)
    byte = torch.arange(256, device=ids.device).unsqueeze(1)
    signs = 1 - 2 * ((byte >> torch.arange(8, device=ids.device)) & 1).to(torch.float32)
    return signs.index_select(0, chosen.reshape(-1)).view(ids.numel(), 8 * chosen.shape[1])[:, :dim]
