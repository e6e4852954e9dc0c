"""What a sequence model is told about its histories, and how they are cut and checked.

Shapes: B samples, N ids of all bags, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


@dataclass(frozen=True)
class History:
    """Parallel sequences of one list of events, and the target features they are attended with.

    Args:
        events: name of the list of events, ``"history"`` or ``"purchases"``.
        sequences: features, one for each property of an event (item, category, shop), entry i of each of event i.
        targets: the same properties of the target, single features, position by position of the same tables.

    Raises:
        ValueError: no sequence, not as many targets, or a feature twice.
    """

    events: str
    sequences: tuple[str, ...]
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        # From a config they are lists.
        object.__setattr__(self, "sequences", tuple(self.sequences))
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.sequences or len(self.sequences) != len(self.targets):
            raise ValueError(
                f"history {self.events!r}: one target a sequence and one sequence at least are required, "
                f"got sequences {list(self.sequences)} and targets {list(self.targets)}"
            )
        if len(set(self.sequences)) < len(self.sequences):
            raise ValueError(f"history {self.events!r}: sequences must differ, got {list(self.sequences)}")

    def check_parallel(self, vectors: dict[str, JaggedTensor]) -> None:
        """Raise ValueError where sequences differ in length, naming both and the first row.

        Args:
            vectors: by feature, as an unpooled collection gives them.
        """
        first, *others = self.sequences
        for other in others:
            lengths, found = vectors[first].lengths(), vectors[other].lengths()
            if not torch.equal(lengths, found):
                row = int((lengths != found).nonzero()[0])
                raise ValueError(
                    f"history {self.events!r}, row {row} of the batch: sequences {first!r} and {other!r} must be "
                    f"equally long (one entry an event), got {int(lengths[row])} and {int(found[row])} entries"
                )


def keep_latest(features: KeyedJaggedTensor, names: Sequence[str], max_length: int) -> KeyedJaggedTensor:
    """``features`` with the bags of ``names`` cut to their last ``max_length`` ids; itself where none is longer.

    Args:
        features: ids, oldest to newest.
        names: which keys; the others stay whole.
        max_length: in ids.
    """
    keys, batch_size = features.keys(), features.stride()
    lengths = features.lengths().view(len(keys), batch_size)
    limits = torch.tensor(
        [max_length if key in names else torch.iinfo(lengths.dtype).max for key in keys],
        dtype=lengths.dtype,
        device=lengths.device,
    ).unsqueeze(1)
    if not bool((lengths > limits).any()):
        return features
    kept = torch.minimum(lengths, limits).view(-1)
    ends = torch.repeat_interleave(features.offsets()[1:], features.lengths(), output_size=features.values().numel())
    from_end = ends - torch.arange(ends.numel(), device=ends.device)
    inside = from_end <= torch.repeat_interleave(kept, features.lengths(), output_size=ends.numel())
    weights = features.weights_or_none()
    return KeyedJaggedTensor(
        keys=keys,
        values=features.values()[inside],
        weights=None if weights is None else weights[inside],
        lengths=kept,
        stride=batch_size,
    )
