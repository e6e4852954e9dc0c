"""What a DIN looks at: the histories of a few samples, event by event, with the weights against their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torchrec.sparse.jagged_tensor import JaggedTensor

from recemb.data.batch import Batch
from recemb.data.manifest import Manifest
from recemb.models.din import DIN

# Latest events drawn of a longer history; more do not fit a page legibly.
MOST_EVENTS = 20


@dataclass(frozen=True)
class AttendedHistory:
    """One history of one sample, oldest event first.

    Args:
        target: its properties in words: the item, its category, and so on.
        events: of each event the same properties in words.
        weights: of each event.
        clicked: the label.
        probability: the model's.
    """

    target: tuple[str, ...]
    events: tuple[tuple[str, ...], ...]
    weights: tuple[float, ...]
    clicked: bool
    probability: float

    def same(self) -> list[bool]:
        """Which events share all but the first property of the target (its category); none where there is but one."""
        return [len(event) > 1 and event[1:] == self.target[1:] for event in self.events]


@torch.no_grad()
def attended_histories(
    model: DIN, batch: Batch, rows: Sequence[int], *, names: Mapping[str, Sequence[str]] | None = None, history: int = 0
) -> list[AttendedHistory]:
    """The weights that a model gives the histories of some rows of a batch.

    Args:
        model: a DIN with attention; it is put into evaluation mode for the while.
        batch: as the loader gives it, on the model's device.
        rows: positions in the batch.
        names: feature name -> what each of its ids is called, see ``value_names``; ids are shown where none are given.
        history: which of the model's histories.

    Raises:
        ValueError: the model pools by sum; a row that the batch does not have.
    """
    if bad := [row for row in rows if not 0 <= row < len(batch)]:
        raise ValueError(f"rows must be in [0, {len(batch)}) (rows of the batch), got {bad[0]}")
    training = model.training
    model.eval()
    try:
        probabilities = torch.sigmoid(model(batch.dense, batch.sparse)).tolist()
        described = model.histories[history]
        weights, offsets = model.attention_weights(batch.sparse)[described.events]
    finally:
        model.train(training)
    starts, values = offsets.tolist(), weights.tolist()
    ids = {name: batch.sparse[name] for name in (*described.sequences, *described.targets)}

    def words(feature: str, name_of: str, row: int) -> list[str]:
        known = (names or {}).get(name_of)
        return [str(i) if known is None else known[i] for i in _bag(ids[feature], row)]

    result = []
    for row in rows:
        count = starts[row + 1] - starts[row]
        # With max_history the model weighs the latest events only.
        properties = [
            words(sequence, name, row)[-count:] if count else []
            for sequence, name in zip(described.sequences, described.targets, strict=True)
        ]
        result.append(
            AttendedHistory(
                target=tuple(words(name, name, row)[0] for name in described.targets),
                events=tuple(zip(*properties, strict=True)),
                weights=tuple(values[starts[row] : starts[row + 1]]),
                clicked=bool(batch.labels[row]),
                probability=probabilities[row],
            )
        )
    return result


def value_names(manifest: Manifest) -> dict[str, list[str]]:
    """Single feature -> the raw value of each id, from the vocabularies; features without one are left out."""
    import pyarrow.parquet as pq

    result = {}
    for feature in manifest.categorical:
        if feature.kind == "single" and feature.vocabulary is not None:
            values = pq.read_table(manifest.root / feature.vocabulary, columns=["value"])["value"].to_pylist()
            result[feature.name] = ["(other)" if value is None else str(value) for value in values]
    return result


def attention_plot(histories: Sequence[AttendedHistory], path: Path, *, title: str = "") -> None:
    """Draw one panel a history: its latest events as bars of their weights, the newest at the top.

    Orange bars share the target's category (all properties but the first). Bars to the left are negative weights.

    Args:
        histories: one at least; up to six are legible.
        path: of the image, whose suffix decides the format.
        title: above all panels.

    Raises:
        ValueError: no history.
    """
    if not histories:
        raise ValueError("attention_plot: one history at least is required, got none")
    columns = min(3, len(histories))
    lines = -(-len(histories) // columns)
    figure = Figure(figsize=(5.2 * columns, 5.0 * lines))
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(histories) :]:
        axis.set_visible(False)
    for axis, item in zip(axes.flat, histories, strict=False):
        shown = slice(max(0, len(item.events) - MOST_EVENTS), None)
        places = np.arange(len(item.events[shown]))
        colours = ["#d95f02" if same else "#7f8fa6" for same in item.same()[shown]]
        axis.barh(places, item.weights[shown], color=colours)
        described = [", ".join(event) for event in item.events[shown]]
        axis.set_yticks(places, [text if len(text) <= 38 else f"{text[:37]}…" for text in described])
        axis.tick_params(labelsize=7)
        axis.axvline(0, color="black", linewidth=0.6)
        outcome = "clicked" if item.clicked else "not clicked"
        hidden = len(item.events) - len(places)
        older = f", {hidden} older events not shown" if hidden else ""
        axis.set_title(
            f"target: {', '.join(item.target)}\n{outcome}, predicted {item.probability:.2f}{older}", fontsize=8
        )
        axis.set_xlabel("attention weight", fontsize=7)
    if title:
        figure.suptitle(title)
    figure.text(0.01, 0.005, "orange: the category of the target; newest event at the top", fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=120)


def _bag(ids: JaggedTensor, row: int) -> list[int]:
    offsets = ids.offsets() - ids.offsets()[0]
    values: list[int] = ids.values()[offsets[row] : offsets[row + 1]].tolist()
    return values
