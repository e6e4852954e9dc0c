"""One bit a position, and how many are set before it: which ids of a table are kept, and as which row.

Shapes: N positions asked for, P positions there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK_BITS = 256
_WORDS = BLOCK_BITS // 64
# Four words, a count before the block and one before each of its words.
BLOCK_BYTES = BLOCK_BITS // 8 + 4 + _WORDS


class RankBitmap(nn.Module):
    """Answers for positions whether they are set, and how many are set before them.

    Memory: 40 bytes for every 256 positions, 1.25 bits each: the bits, an int32 count before each block, and a byte for
    each word of 64 in it, so that one word has to be counted and not four.

    Args:
        num_blocks: of 256 positions; nothing is set until ``set_bits``.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.words: Tensor
        self.register_buffer("words", torch.zeros(num_blocks, _WORDS, dtype=torch.int64))
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(num_blocks, dtype=torch.int32))
        self.word_counts: Tensor
        self.register_buffer("word_counts", torch.zeros(num_blocks, _WORDS, dtype=torch.uint8))

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
        per_word = padded.sum(dim=1).view(-1, _WORDS)
        self.word_counts.copy_(per_word.cumsum(dim=1) - per_word)
        per_block = per_word.sum(dim=1)
        before = per_block.cumsum(0) - per_block
        if len(before) and int(before[-1]) >= 2**31:
            raise ValueError(f"a bitmap counts up to 2**31 kept rows in int32, got {int(per_block.sum())}")
        self.counts.copy_(before)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) int64 positions -> (N,) bool whether each is set, (N,) int64 how many are set before it."""
        words = positions >> 6
        inside = positions & 63
        word = self.words.view(-1).index_select(0, words)
        is_set = (word >> inside).bitwise_and_(1).bool()
        # All bits below the position; the shift is at most 63, whose result, the sign alone, minus 1 is right too.
        below = word.bitwise_and_((torch.ones_like(inside) << inside).sub_(1))
        rank = _count_ones_(below).add_(self.word_counts.view(-1).index_select(0, words))
        return is_set, rank.add_(self.counts.index_select(0, positions >> 8))


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
