"""One bit a position, and how many are set before it: which ids of a table are kept, and as which row.

Shapes: N positions asked for, P positions there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK_BITS = 256
_WORDS = BLOCK_BITS // 64
# Four words and a count.
BLOCK_BYTES = BLOCK_BITS // 8 + 4


class RankBitmap(nn.Module):
    """Answers for positions whether they are set, and how many are set before them.

    Memory: 36 bytes for every 256 positions, 1.125 bits each: the bits, and an int32 count before each block.

    Args:
        num_blocks: of 256 positions; nothing is set until ``set_bits``.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.words: Tensor
        self.register_buffer("words", torch.zeros(num_blocks, _WORDS, dtype=torch.int64))
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(num_blocks, dtype=torch.int32))
        # Bits before a position inside each word of its block: position * 4 + word.
        before = torch.arange(BLOCK_BITS).unsqueeze(1) - torch.arange(0, BLOCK_BITS, 64)
        ones = (torch.ones((), dtype=torch.int64) << before.clamp(0, 63)) - 1
        self._before: Tensor
        self.register_buffer("_before", torch.where(before >= 64, -1, ones), persistent=False)

    @torch.no_grad()
    def set_bits(self, bits: Tensor) -> None:
        """Set the positions where ``bits`` ((P,) bool, P at most 256 times ``num_blocks``) is True, no others.

        Raises:
            ValueError: 2**31 positions are set, or more.
        """
        padded = nn.functional.pad(bits, (0, self.words.numel() * 64 - bits.numel())).view(-1, 64)
        for shift in range(64):
            word = padded[:, shift].to(torch.int64) << shift
            self.words.view(-1).copy_(word) if shift == 0 else self.words.view(-1).bitwise_or_(word)
        per_block = padded.view(-1, BLOCK_BITS).sum(dim=1)
        before = per_block.cumsum(0) - per_block
        if len(before) and int(before[-1]) >= 2**31:
            raise ValueError(f"a bitmap counts up to 2**31 kept rows in int32, got {int(per_block.sum())}")
        self.counts.copy_(before)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) int64 positions -> (N,) bool whether each is set, (N,) int64 how many are set before it."""
        blocks, inside = positions >> 8, positions & (BLOCK_BITS - 1)
        words = self.words.index_select(0, blocks)
        word = words.gather(1, (inside >> 6).unsqueeze(1)).squeeze(1)
        is_set = ((word >> (inside & 63)) & 1).bool()
        before = _count_ones_(words.bitwise_and_(self._before.index_select(0, inside))).sum(dim=1)
        return is_set, before.add_(self.counts.index_select(0, blocks))


def blocks_for(num_positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-num_positions // BLOCK_BITS)


def _count_ones_(words: Tensor) -> Tensor:
    """Number of set bits of each int64, in place: torch has no population count."""
    # Sums of neighbouring fields of 1, 2 and 4 bits; masks after shifts make them logical.
    words.sub_((words >> 1).bitwise_and_(0x5555555555555555))
    words = (words >> 2).bitwise_and_(0x3333333333333333).add_(words.bitwise_and_(0x3333333333333333))
    words = (words >> 4).add_(words).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    # The product's top byte is the sum of all bytes, at most 64, so the shift sees no sign.
    return words.mul_(0x0101010101010101).bitwise_right_shift_(56)
