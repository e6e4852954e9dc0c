"""What a model said about rows, and the labels: from a model and its batches, from a Parquet file, and to one.

Shapes: n rows, B rows of a batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from recemb.evaluation.checks import Array, Booleans, Floats, check_labels, check_probabilities, check_scores
from recemb.evaluation.gather import gather_rows, gather_texts
from recemb.evaluation.metrics import row_losses, row_losses_from_logits, sigmoid

if TYPE_CHECKING:
    # Importing it imports TorchRec: seconds, and nothing that metrics of a Parquet file need.
    from recemb.data.batch import Batch

ROW_GROUP_ROWS = 65_536


class Diverged(ValueError):
    """A model's numbers are no longer finite: a finding about its settings, where other errors are mistakes."""


# Comparing arrays has no one answer, so no generated ==.
@dataclass(frozen=True, eq=False)
class Predictions:
    """Labels and scores of the same rows.

    Args:
        labels: (n,) bool.
        scores: (n,) logits, or probabilities.
        are_logits: which of the two.
        columns: other columns of the same rows: users, slices, ``true_probability``; (n,) each.

    Raises:
        ValueError: labels or scores as in ``metrics``; a column of another length.
    """

    labels: Booleans
    scores: Array
    are_logits: bool
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_labels(self.labels)
        check = check_scores if self.are_logits else check_probabilities
        check(self.scores, len(self.labels))
        for name, values in self.columns.items():
            if len(values) != len(self.labels):
                raise ValueError(f"column {name!r}: {len(self.labels)} rows are required, got {len(values)}")

    def column(self, name: str) -> Array:
        """The column called ``name``; ValueError with the names there are."""
        if name not in self.columns:
            raise ValueError(f"no column {name!r} among the predictions; they have {sorted(self.columns)}")
        return self.columns[name]

    def probabilities(self) -> Floats:
        """(n,) float64 in [0, 1]."""
        return sigmoid(self.scores) if self.are_logits else self.scores.astype(np.float64, copy=False)

    def losses(self) -> Floats:
        """(n,) log loss of each row, from logits where there are logits: no margin at probabilities of 0 and 1."""
        if self.are_logits:
            return row_losses_from_logits(self.labels, self.scores)
        return row_losses(self.labels, self.probabilities())


def collect(
    model: Callable[..., torch.Tensor],
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
    in_lockstep: bool = False,
) -> Predictions:
    """Run ``model`` over ``batches`` without gradients; with a process group, the rows of all ranks, on every rank.

    A module is in eval mode meanwhile and gets its mode back. Host memory: 5 bytes a row and the extra columns.

    Args:
        model: ``model(dense, sparse)`` -> (B,) logits.
        batches: a ParquetLoader of this rank; its ``extra_columns`` become columns of the result.
        device: where the model lives.
        on_batch: called with the rows of each finished batch, for a progress bar.
        in_lockstep: the model communicates in every batch, as sharded tables do: ranks must have equally many batches.

    Raises:
        Diverged: NaN/inf logits of numeric columns that are finite; batch and row are named.
        ValueError: NaN/inf in numeric columns, logits of another shape, no batch at all. With a process
            group, an error of one rank is raised on all of them, where otherwise the others would wait for ever; in
            lockstep it is raised on that rank only, because the others are inside the model and cannot be told.
    """
    error: Exception | None = None
    rows = _Rows()
    training = model.training if isinstance(model, torch.nn.Module) else False
    try:
        if isinstance(model, torch.nn.Module):
            model.eval()
        # Not inference_mode: fbgemm's training kernels are registered under autograd only.
        with torch.no_grad():
            for number, batch in enumerate(batches):
                moved = batch.to(device)
                rows.add(number, model(moved.dense, moved.sparse), batch)
                if on_batch is not None:
                    on_batch(len(batch.labels))
    except Exception as caught:
        error = caught
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(training)
    if error is not None and in_lockstep:
        raise error
    failures = gather_texts("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure:
            raise ValueError(f"evaluation failed on rank {rank}: {failure}")
    return rows.gathered()


class _Rows:
    """Batches of one rank, appended."""

    def __init__(self) -> None:
        self.count = 0
        self.logits: list[Array] = []
        self.labels: list[Array] = []
        self.columns: dict[str, list[Array]] = {}

    def add(self, number: int, logits: torch.Tensor, batch: Batch) -> None:
        size = len(batch.labels)
        if logits.shape != (size,):
            raise ValueError(
                f"batch {number}: one logit a row, shape ({size},), is required, got {tuple(logits.shape)}"
            )
        values = logits.float().cpu().numpy()
        finite = np.isfinite(values)
        if not finite.all():
            row = int((~finite).argmax())
            text = (
                f"batch {number}: logit of its row {row} (row {self.count + row} of the split on this rank) is "
                f"{values[row]}; {int((~finite).sum())} of {size} logits are NaN or inf: "
            )
            if not bool(torch.isfinite(batch.dense).all()):
                raise ValueError(f"{text}so is a numeric column of the batch")
            raise Diverged(f"{text}the model has diverged")
        self.logits.append(values)
        self.labels.append(check_labels(batch.labels.cpu().numpy()))
        for name, column in batch.extra.items():
            self.columns.setdefault(name, []).append(column)
        self.count += size

    def gathered(self) -> Predictions:
        """The rows of all ranks; a rank without a row takes names and dtypes from the others, to gather as they do."""
        arrays = {_LABELS: np.concatenate(self.labels), _SCORES: np.concatenate(self.logits)} if self.count else {}
        arrays |= {name: np.concatenate(self.columns[name]) for name in sorted(self.columns)}
        specifications = [
            text
            for text in gather_texts(json.dumps({name: array.dtype.str for name, array in arrays.items()}))
            if text != "{}"
        ]
        if not specifications:
            raise ValueError("evaluation: at least one row is required, the loader gave none")
        whole = {
            name: gather_rows(arrays.get(name, np.empty(0, np.dtype(kind))))
            for name, kind in json.loads(specifications[0]).items()
        }
        return Predictions(labels=whole.pop(_LABELS), scores=whole.pop(_SCORES), are_logits=True, columns=whole)


# Keys beside the extra columns; no Parquet column can be called so.
_LABELS, _SCORES = "\0labels", "\0scores"


def write_predictions(predictions: Predictions, path: Path, *, label: str = "label") -> None:
    """Write label (int8), ``logit`` (where there are logits), ``probability`` (float64) and the columns.

    The file appears whole or not at all. ``read_predictions(path, label=label, score="probability")`` reads it back.
    """
    arrays: dict[str, Array] = {label: predictions.labels.astype(np.int8)}
    if predictions.are_logits:
        arrays["logit"] = predictions.scores
    arrays["probability"] = predictions.probabilities()
    if taken := sorted(set(arrays) & set(predictions.columns)):
        raise ValueError(f"{path}: columns {taken} would be written twice")
    table = pa.table({name: pa.array(values) for name, values in {**arrays, **predictions.columns}.items()})
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP_ROWS, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_predictions(
    path: Path, *, label: str, score: str, are_logits: bool = False, columns: Sequence[str] = ()
) -> Predictions:
    """Predictions of any system from a Parquet file.

    Args:
        path: one file.
        label: column of 0/1 (integers, floats or bool).
        score: column of probabilities, or of logits.
        are_logits: which of the two.
        columns: further columns to keep (users, slices): integers, strings, bool or floats; not lists.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not Parquet; a column missing, of another type or with nulls; labels outside {0, 1}; scores that are
            NaN, inf or no probabilities. File and column are named, with row group and row where there is one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Parquet file of predictions is required")
    wanted = list(dict.fromkeys([label, score, *columns]))
    try:
        source = pq.ParquetFile(path)
        names = source.schema_arrow.names
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(f"{path}: no column {missing[0]!r}; the file has {names}")
        table = source.read(columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
    for name in wanted:
        _check_type(path, table.schema.field(name), is_number=name in (label, score))
    for name in (label, score):
        _check_no_null(path, source, table[name], name)
    arrays = {name: _to_numpy(table[name]) for name in wanted}
    try:
        return Predictions(
            labels=check_labels(arrays[label]),
            scores=arrays[score],
            are_logits=are_logits,
            columns={name: arrays[name] for name in columns},
        )
    except ValueError as error:
        raise ValueError(f"{path}, columns {label!r} (labels) and {score!r} (scores): {error}") from error


def _check_type(path: Path, field: pa.Field, is_number: bool) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (number or (text and not is_number)):
        wanted = "numbers" if is_number else "one number or string a row"
        raise ValueError(f"{path}, column {field.name!r}: {wanted} required, got {field.type}")


def _check_no_null(path: Path, source: pq.ParquetFile, values: pa.ChunkedArray, name: str) -> None:
    if values.null_count == 0:
        return
    row = pc.index(pc.is_null(values), True).as_py()
    group, first = 0, 0
    while row >= first + source.metadata.row_group(group).num_rows:
        first += source.metadata.row_group(group).num_rows
        group += 1
    raise ValueError(
        f"{path}, row group {group}, column {name!r}, row {row - first}: a value is required, got null "
        f"({values.null_count} of {len(values)} rows are null)"
    )


def _to_numpy(values: pa.ChunkedArray) -> Array:
    """Numbers keep their dtype; integers with nulls become objects, because float64 would merge ids above 2**53."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if values.null_count and pa.types.is_integer(values.type):
        return np.array(values.to_pylist(), dtype=object)
    return values.to_numpy()
