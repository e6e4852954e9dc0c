"""Weights of one model taken over by another of the same dense layers and logical tables, whatever tables they have."""

from __future__ import annotations

from torch import Tensor, nn

from recemb.collection import compressed_groups


def carry_over(source: nn.Module, target: nn.Module, *, folded: bool) -> None:
    """Start ``target`` from the weights of ``source``, in place.

    Dense layers are copied; each group of ``target`` takes the full tables it can (see ``CompressedTables.seed_from``).

    Args:
        source: a whole model, not sharded, whose methods have a row for every id.
        target: likewise, on the same device.
        folded: the vectors as the search made them (``folded_tables``); else the rows below (``stored_tables``).

    Raises:
        ValueError: dense layers of other names or shapes, or a table that the source has not or the target cannot take.
    """
    inside = {id(tensor) for group in compressed_groups(source) for tensor in group.state_dict(keep_vars=True).values()}
    dense = {key: tensor for key, tensor in source.state_dict(keep_vars=True).items() if id(tensor) not in inside}
    own = target.state_dict(keep_vars=True)
    for key, tensor in dense.items():
        if key not in own or own[key].shape != tensor.shape:
            raise ValueError(f"dense layers differ: {key} of shape {tuple(tensor.shape)} has no counterpart")
        own[key].data.copy_(tensor.data)
    rows: dict[str, Tensor] = {}
    for group in compressed_groups(source):
        rows.update(group.folded_tables() if folded else group.stored_tables())
    for group in compressed_groups(target):
        names = [table.name for table in group.tables]
        if missing := [name for name in names if name not in rows]:
            raise ValueError(f"tables {missing} have no row for every id to start from")
        if missing := sorted(set(names) - set(group.seed_from(rows))):
            raise ValueError(f"tables {missing} of {type(group).__name__} cannot start from the rows of others")
