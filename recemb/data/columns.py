"""What every column of an encoded data set must hold, and the check of decoded values against it.

A value that breaks its rule stops the run with its file, row group, column and row. Nothing is repaired: an id out of
range never becomes another id, a NaN never becomes 0.

Shapes: N rows of a read, L entries of all its lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from recemb.data.manifest import Manifest

Role = Literal["label", "numeric", "single", "jagged", "extra"]
# Turns a position in the rows of a read into "file: row group .., column .., row ..".
Locate = Callable[[int], str]

ADVICE = "prepare the data set again"


@dataclass(frozen=True)
class Column:
    """One column to read.

    Args:
        name: its name in the file.
        role: what it is for; decides type and rule.
        num_embeddings: ids must be below it; None: any id that is not negative.
        max_length: entries of a list that are kept, the latest; None: all.
    """

    name: str
    role: Role
    num_embeddings: int | None = None
    max_length: int | None = None

    @property
    def required_type(self) -> str:
        """Its Arrow type in words."""
        return {
            "label": "int8",
            "numeric": "float",
            "single": "int32 or int64",
            "jagged": "list<int32> or list<int64>",
            "extra": "integer, float, boolean, string, date or timestamp",
        }[self.role]

    def accepts(self, kind: pa.DataType) -> bool:
        """Whether a column of Arrow type ``kind`` can be read."""
        types = pa.types
        if self.role == "label":
            return types.is_int8(kind)
        if self.role == "numeric":
            return types.is_float32(kind)
        if self.role == "single":
            return types.is_int32(kind) or types.is_int64(kind)
        if self.role == "jagged":
            is_list = types.is_list(kind) or types.is_large_list(kind)
            return is_list and (types.is_int32(kind.value_type) or types.is_int64(kind.value_type))
        plain = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        return plain or types.is_string(kind) or types.is_large_string(kind) or types.is_temporal(kind)


def model_columns(manifest: Manifest) -> list[Column]:
    """Label, numeric and categorical columns in the order models see them."""
    columns = [Column(manifest.label, "label")]
    columns += [Column(feature.name, "numeric") for feature in manifest.numeric]
    for feature in manifest.categorical:
        role: Role = "single" if feature.kind == "single" else "jagged"
        columns.append(Column(feature.name, role, feature.num_embeddings, feature.max_length))
    return columns


def check_schema(schema: pa.Schema, columns: Sequence[Column], path: Path) -> None:
    """Check that ``path`` holds every column with a type that fits.

    Raises:
        ValueError: naming the file, the column, the type it must have and the one found.
    """
    for column in columns:
        positions = schema.get_all_field_indices(column.name)
        if len(positions) != 1:
            raise ValueError(
                f"{path}: column {column.name!r} ({column.role}) must be there once, found {len(positions)} times; "
                f"the file has {schema.names}"
            )
        found = schema.field(positions[0]).type
        if not column.accepts(found):
            raise ValueError(
                f"{path}: column {column.name!r} ({column.role}) must be {column.required_type}, got {found}; {ADVICE}"
            )


def check_no_nulls(array: pa.Array, locate: Locate) -> None:
    """Raise ValueError at the first null row of ``array``."""
    if array.null_count:
        row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(f"{locate(row)}: must not be null, got null; {ADVICE}")


def check_values(column: Column, values_N: np.ndarray, locate: Locate) -> None:
    """Check a label, numeric or single id column.

    One or two reductions over the column; the row is looked for only when they fail.

    Raises:
        ValueError: with the first bad row, the value it must have and the one it has.
    """
    if not len(values_N):
        return
    if column.role == "numeric":
        # A NaN anywhere makes both of them NaN.
        if not (np.isfinite(values_N.min()) and np.isfinite(values_N.max())):
            row = int(np.argmin(np.isfinite(values_N)))
            raise ValueError(f"{locate(row)}: numeric values must be finite, got {values_N[row]}; {ADVICE}")
    elif column.role == "label":
        if largest_unsigned(values_N) > 1:
            row = int(np.argmax((values_N < 0) | (values_N > 1)))
            raise ValueError(f"{locate(row)}: a label must be 0 or 1, got {values_N[row]}; {ADVICE}")
    elif not ids_in_range(column, values_N):
        row = first_bad_id(column, values_N)
        raise ValueError(f"{locate(row)}: {id_rule(column)}, got {values_N[row]}; {ADVICE}")


def check_list_ids(column: Column, ids_L: np.ndarray, starts_N: np.ndarray, locate: Locate) -> None:
    """Check the ids of a list column whose row i begins at entry ``starts_N[i]``.

    Raises:
        ValueError: with the first bad row, its entry, the range and the id.
    """
    if not len(ids_L) or ids_in_range(column, ids_L):
        return
    entry = first_bad_id(column, ids_L)
    # Empty lists begin where the next one does: the last row that begins at or before the entry owns it.
    row = int(np.searchsorted(starts_N, entry, side="right")) - 1
    raise ValueError(
        f"{locate(row)}, entry {entry - int(starts_N[row])}: {id_rule(column)}, got {ids_L[entry]}; {ADVICE}"
    )


def largest_unsigned(values: np.ndarray) -> int:
    """The largest value of signed integers when negative ones are read as huge: bounds both ends in one reduction."""
    return int(values.view(f"u{values.dtype.itemsize}").max())


def ids_in_range(column: Column, ids: np.ndarray) -> bool:
    """Whether all ids (one at least) keep the rule of the column."""
    bound = np.iinfo(ids.dtype).max + 1
    return largest_unsigned(ids) < min(bound, bound if column.num_embeddings is None else column.num_embeddings)


def id_rule(column: Column) -> str:
    """The rule of an id column in words."""
    if column.num_embeddings is None:
        return "a hashed id must not be negative"
    return f"an id must be in [0, {column.num_embeddings}) (num_embeddings)"


def first_bad_id(column: Column, ids: np.ndarray) -> int:
    bad = ids < 0
    if column.num_embeddings is not None:
        bad |= ids >= column.num_embeddings
    return int(np.argmax(bad))
