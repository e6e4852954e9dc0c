"""From ids to packed rows in a few numbers: runs of ids of one kind, with a bitmap where a run has holes.

Ids are in order of frequency, so what a search keeps often is a prefix of them, and blocks of them are runs: then a
section, 26 bytes, says it all. Where rows are kept here and there, a bitmap with ranks says which.

Shapes: n ids of a table, S sections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recemb.rank_bitmap import BLOCK_BITS, BLOCK_BYTES

# Start, first row and first bit as int64, code as int16.
SECTION_BYTES = 8 + 8 + 8 + 2
DROPPED = -1


@dataclass(frozen=True)
class RowSections:
    """Where the ids of one table lie.

    Ids of a section with a bit each have a row where their bit is set; where it is not, the section before says, if it
    starts with the same id, else they have none. Rows of one code are counted in the order of ids.

    Args:
        starts: (S,) int64 first id of each section, ascending from 0; a section ends where one of another id starts.
        codes: (S,) int64 code of the ids' rows, ``DROPPED`` (-1) where they have none.
        first_rows: (S,) int64 number of rows of the same code before the section.
        num_bits: (S,) int64 bits of the section, one an id; 0 where all its ids have the code.
        num_layers: how many sections start with the same id at most.
    """

    starts: Tensor
    codes: Tensor
    first_rows: Tensor
    num_bits: Tensor
    num_layers: int = 1

    def num_bytes(self) -> float:
        """Bytes of sections and bits; these share blocks with other tables', so it need not be whole."""
        return len(self.starts) * SECTION_BYTES + int(self.num_bits.sum()) * BLOCK_BYTES / BLOCK_BITS

    def bits(self, codes: Tensor) -> Tensor:
        """(sum of num_bits,) bool: the bits of all sections, one after the other.

        Args:
            codes: as the sections were made from.
        """
        parts = [
            codes[start : start + length] == code
            for start, code, length in zip(
                self.starts.tolist(), self.codes.tolist(), self.num_bits.tolist(), strict=True
            )
            if length
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def row_sections(codes: Tensor) -> RowSections:
    """The smallest sections that say which code an id has, and as which of its rows.

    Args:
        codes: (n,) integers, ``DROPPED`` for ids without a row, codes from 0 for the others.
    """
    num_runs = 1 + int((codes[1:] != codes[:-1]).count_nonzero())
    candidates = []
    # Runs alone: worth a look only where they are no more than a bitmap at least takes.
    if num_runs * SECTION_BYTES <= len(codes) * BLOCK_BYTES / BLOCK_BITS + 3 * SECTION_BYTES:
        candidates.append(_runs(codes))
    if num_runs > 3 and int(codes.max()) == 0:
        candidates.append(_holes(codes >= 0))
    elif num_runs > 3:
        kept = (codes >= 0).nonzero().view(-1)
        kept_codes = codes[kept]
        changes = int((kept_codes[1:] != kept_codes[:-1]).sum())
        if changes * SECTION_BYTES <= len(codes):
            candidates.append(_runs_of_kept(len(codes), kept, kept_codes))
        if changes:
            candidates.append(_layers(len(codes), kept, kept_codes))
    return min(candidates, key=RowSections.num_bytes)


def one_section() -> RowSections:
    """Every id has a row, in the order of ids."""
    zero = torch.zeros(1, dtype=torch.int64)
    return RowSections(zero, zero, zero, zero)


def _holes(is_kept: Tensor) -> RowSections:
    """Bits from the first kept id to the last, of one code: ``_runs_of_kept`` of it, without a list of ids."""
    start = int(is_kept.to(torch.uint8).argmax())
    end = len(is_kept) - int(is_kept.flip(0).to(torch.uint8).argmax())
    parts = [(0, DROPPED, 0)] * (start > 0) + [(start, 0, end - start)] + [(end, DROPPED, 0)] * (end < len(is_kept))
    starts, values, bits = torch.tensor(parts).unbind(dim=1)
    return RowSections(starts, values, torch.zeros_like(starts), bits)


def _runs(codes: Tensor) -> RowSections:
    """One section for each run of equal codes."""
    starts = _starts_of_runs(codes)
    lengths = torch.diff(starts, append=torch.tensor([len(codes)]))
    values = codes[starts].to(torch.int64)
    return RowSections(starts, values, _rows_before(values, lengths), torch.zeros_like(starts))


def _runs_of_kept(num_ids: int, kept: Tensor, codes: Tensor) -> RowSections:
    """One section for each run of equal codes among kept ids, with bits where dropped ids lie between them."""
    firsts = _starts_of_runs(codes)
    counts = torch.diff(firsts, append=torch.tensor([len(codes)]))
    starts = kept[firsts]
    ends = kept[firsts + counts - 1] + 1
    lengths = ends - starts
    values = codes[firsts].to(torch.int64)
    # What lies between sections is dropped.
    gaps = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    gaps = gaps[gaps < torch.cat([starts, torch.tensor([num_ids])])]
    none = torch.zeros_like(gaps)
    order = torch.cat([starts, gaps]).argsort()
    return RowSections(
        torch.cat([starts, gaps])[order],
        torch.cat([values, none + DROPPED])[order],
        torch.cat([_rows_before(values, counts), none])[order],
        torch.cat([torch.where(counts == lengths, 0, lengths), none])[order],
    )


def _layers(num_ids: int, kept: Tensor, codes: Tensor) -> RowSections:
    """One section for each code, all over the same ids: for codes that alternate."""
    first, last = int(kept[0]), int(kept[-1])
    values = torch.unique(codes).to(torch.int64)
    outside = [start for start in (0, last + 1) if start not in (first, num_ids)]
    starts = torch.tensor([first] * len(values) + outside)
    bits = torch.tensor([last + 1 - first] * len(values) + [0] * len(outside))
    all_codes = torch.cat([values, torch.full((len(outside),), DROPPED)])
    order = starts.argsort(stable=True)
    return RowSections(starts[order], all_codes[order], torch.zeros_like(starts), bits[order], num_layers=len(values))


def _starts_of_runs(values: Tensor) -> Tensor:
    changes = (values[1:] != values[:-1]).nonzero().view(-1) + 1
    return torch.cat([torch.zeros(1, dtype=torch.int64), changes])


def _rows_before(codes: Tensor, counts: Tensor) -> Tensor:
    """Rows of a section's own code in the sections before it."""
    order = torch.sort(codes, stable=True).indices
    sorted_codes, sorted_counts = codes[order], counts[order]
    before = sorted_counts.cumsum(0) - sorted_counts
    first_of_code = _starts_of_runs(sorted_codes)
    length = torch.diff(first_of_code, append=torch.tensor([len(codes)]))
    before -= torch.repeat_interleave(before[first_of_code], length)
    result = torch.empty_like(before)
    result[order] = before
    return result
