"""What a search decided to keep: the file that one stage writes and the next builds its tables from.

A search never turns its own model into a smaller one. It writes a plan, so that every stage can be run again alone,
resumed, or tested from a plan written by hand.

Shapes: n num_embeddings of a table, D its embedding_dim, G groups of rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from recemb.files import write_json
from recemb.tensor_files import save_tensors

PLAN_FILE = "plan.json"
TENSORS_FILE = "plan.safetensors"
_TENSORS = ("kept_rows", "kept_columns", "row_groups", "kept_values")


@dataclass(frozen=True)
class TablePlan:
    """What is kept of one logical table; every None keeps all.

    A value stays where all three masks let it.

    Args:
        num_embeddings: n.
        embedding_dim: D, the width that the model sees; dropped values read as zero.
        kept_rows: (n,) bool.
        kept_columns: (G, D) bool, the columns that rows of each group keep, G at least 1. One group is a width for the
            whole table.
        row_groups: (n,) int16 group of every row; None: all rows are of group 0.
        kept_values: (n, D) bool, for unstructured pruning.

    Raises:
        ValueError: a mask of another shape or dtype, or a group that ``kept_columns`` has not.
    """

    num_embeddings: int
    embedding_dim: int
    kept_rows: Tensor | None = None
    kept_columns: Tensor | None = None
    row_groups: Tensor | None = None
    kept_values: Tensor | None = None

    def __post_init__(self) -> None:
        n, width = self.num_embeddings, self.embedding_dim
        groups = 0 if self.kept_columns is None else self.kept_columns.shape[0]
        if self.kept_columns is not None and groups < 1:
            raise ValueError(f"kept_columns must have at least one group, got shape {tuple(self.kept_columns.shape)}")
        for name, shape, dtype in (
            ("kept_rows", (n,), torch.bool),
            ("kept_columns", (groups, width), torch.bool),
            ("row_groups", (n,), torch.int16),
            ("kept_values", (n, width), torch.bool),
        ):
            tensor = getattr(self, name)
            if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
                raise ValueError(
                    f"{name} must be {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        if self.row_groups is not None:
            if self.kept_columns is None:
                raise ValueError("row_groups say which kept_columns a row has, got no kept_columns")
            if n and not (int(self.row_groups.min()) >= 0 and int(self.row_groups.max()) < groups):
                raise ValueError(f"row_groups must be in [0, {groups}) (rows of kept_columns)")
        elif groups > 1:
            raise ValueError(f"kept_columns has {groups} groups, so row_groups must say which row is of which")

    def mask(self) -> Tensor:
        """(n, D) bool: True where a value is kept."""
        mask = torch.ones(self.num_embeddings, self.embedding_dim, dtype=torch.bool)
        if self.kept_rows is not None:
            mask &= self.kept_rows.unsqueeze(1)
        if self.kept_columns is not None:
            columns = self.kept_columns
            mask &= columns if self.row_groups is None else columns[self.row_groups.long()]
        if self.kept_values is not None:
            mask &= self.kept_values
        return mask

    def mask_of(self, ids: Tensor) -> Tensor:
        """(R, D) bool rows of ``mask`` for (R,) int64 ids."""
        mask = torch.ones(len(ids), self.embedding_dim, dtype=torch.bool, device=ids.device)
        if self.kept_rows is not None:
            mask &= self.kept_rows[ids].unsqueeze(1)
        if self.kept_columns is not None:
            mask &= self.kept_columns if self.row_groups is None else self.kept_columns[self.row_groups[ids].long()]
        if self.kept_values is not None:
            mask &= self.kept_values[ids]
        return mask

    def num_values(self) -> int:
        """Values kept, the parameters papers count."""
        return int(self.mask().sum())

    def num_rows(self) -> int:
        """Rows of which at least one value is kept."""
        return int(self.mask().any(1).sum())


@dataclass(frozen=True)
class CompressionPlan:
    """What is kept of every table.

    Args:
        tables: logical table name -> its plan, in the tables' order.
        source: which search, fit for people.
        options: what the builder of the next stage needs besides, fit for JSON; ``dropped``: see ``Pruned``.
    """

    tables: Mapping[str, TablePlan]
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dropped(self) -> str:
        """What ids get of which nothing is kept: ``"zero"`` or ``"vector"``."""
        return str(self.options.get("dropped", "zero"))

    def num_values(self) -> int:
        return sum(table.num_values() for table in self.tables.values())

    def kept_fraction(self) -> float:
        """Of the values of full tables; 1 - this is what papers call sparsity."""
        full = sum(table.num_embeddings * table.embedding_dim for table in self.tables.values())
        return self.num_values() / full

    def save(self, folder: Path) -> None:
        """Write ``plan.safetensors``, then ``plan.json``, without which the folder holds no plan."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            # A copy each: tables may share masks, and safetensors takes no tensor twice.
            f"{name}.{part}": tensor.clone(memory_format=torch.contiguous_format)
            for name, table in self.tables.items()
            for part in _TENSORS
            if (tensor := getattr(table, part)) is not None
        }
        temporary = folder / f".{TENSORS_FILE}.partial"
        save_tensors(temporary, tensors)
        temporary.replace(folder / TENSORS_FILE)
        content = {
            "source": self.source,
            "options": dict(self.options),
            "tables": [
                {"name": name, "num_embeddings": table.num_embeddings, "embedding_dim": table.embedding_dim}
                for name, table in self.tables.items()
            ],
        }
        write_json(folder / PLAN_FILE, content)

    @staticmethod
    def load(folder: Path) -> CompressionPlan:
        """The plan in ``folder``.

        Raises:
            FileNotFoundError: no plan there.
            ValueError: see ``TablePlan``.
        """
        if not (folder / PLAN_FILE).is_file():
            raise FileNotFoundError(f"{folder}: holds no plan (no {PLAN_FILE})")
        content = json.loads((folder / PLAN_FILE).read_text())
        tensors = load_file(str(folder / TENSORS_FILE))
        tables = {
            item["name"]: TablePlan(
                item["num_embeddings"],
                item["embedding_dim"],
                **{part: tensors[key] for part in _TENSORS if (key := f"{item['name']}.{part}") in tensors},
            )
            for item in content["tables"]
        }
        return CompressionPlan(tables, content["source"], content["options"])
