"""Rows of all ranks on every rank, for metrics that must be exact: an AUC cannot be averaged over ranks.

Arrays travel as bytes, so every dtype does, ranks may hold different numbers of rows, and nothing is pickled.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from recemb.evaluation.checks import Array


def is_distributed() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(values: Array) -> Array:
    """(n of this rank,) numbers or strings -> (sum of n,) those of rank 0, then rank 1, ...; the same on every rank.

    Every rank must call it, with the same dtype. Without a process group it returns its argument. Peak memory is twice
    world_size times the longest rank's bytes.

    Raises:
        ValueError: on every rank, where dtypes differ between ranks.
    """
    if not is_distributed():
        return values
    if values.dtype.kind in "OUS":
        return _gather_strings(values)
    kinds = gather_texts(values.dtype.str)
    if len(set(kinds)) > 1:
        raise ValueError(f"gather_rows: one dtype on all ranks is required, got {kinds} by rank")
    parts = _gather_bytes(np.ascontiguousarray(values).view(np.uint8).reshape(-1))
    return np.concatenate([part.view(values.dtype) for part in parts])


def gather_texts(text: str) -> list[str]:
    """One string of each rank, in rank order; without a process group a list of one."""
    if not is_distributed():
        return [text]
    parts = _gather_bytes(np.frombuffer(text.encode(), np.uint8))
    return [part.tobytes().decode() for part in parts]


def _gather_strings(values: Array) -> Array:
    encoded = [None if value is None else str(value).encode() for value in values.tolist()]
    lengths = gather_rows(np.array([-1 if value is None else len(value) for value in encoded], np.int64))
    content = np.frombuffer(b"".join(value for value in encoded if value is not None), np.uint8)
    joined = gather_rows(content).tobytes()
    ends = np.cumsum(np.maximum(lengths, 0))
    result = np.empty(len(lengths), object)
    for row, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
        result[row] = None if length < 0 else joined[end - length : end].decode()
    return result


def _gather_bytes(content: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """Bytes of each rank; collectives want equal sizes, so all are padded to the longest and cut again."""
    device = torch.device("cpu") if "gloo" in dist.get_backend() else torch.device("cuda", torch.cuda.current_device())
    size = torch.tensor([len(content)], dtype=torch.int64, device=device)
    sizes = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather(list(sizes.split(1)), size)
    counts = sizes.tolist()
    longest = max(counts)
    if longest == 0:
        return [content for _ in counts]
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(content)] = torch.from_numpy(content.copy()).to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count].cpu().numpy() for part, count in zip(parts, counts, strict=True)]
