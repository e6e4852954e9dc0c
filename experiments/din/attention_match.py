"""How much more attention events get that match the target than others, over the test split.

    python -m recemb.train +experiment=movielens_din data=behaviour seed=1 hydra.run.dir=RUN1
    python experiments/din/attention_match.py NAME RUN1 RUN2 RUN3

Takes trainings of one log, DIN with attention, and writes results/attention_NAME.json: for each property of an event
(item, category, style where the log is the synthetic one) the mean weight of the events that share it with the target
and of those that do not, and the same of the weights' sizes: what sign all weights have together is chance, since the
layer behind them may have the other. Sizes have no fixed scale, so also in what share of the histories that have both
kinds the matching events have the larger ones on average: one half by chance. Targets without an id of their own are
left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interests import item_styles

from data_pipelines.behaviour import SOURCE
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluation.attention_plot import value_names
from recemb.files import write_json
from recemb.models.din import DIN
from recemb.run_folder import load_model

BATCH_SIZE = 4096


class Sums:
    """Weights of matching and of other events, over histories."""

    def __init__(self) -> None:
        self.counts = np.zeros(2, np.int64)
        self.weights = np.zeros(2)
        self.sizes = np.zeros(2)
        self.histories = 0
        self.larger = 0.0

    def add(self, weights: np.ndarray, matches: np.ndarray, owners: np.ndarray, num_histories: int) -> None:
        """Take in the events of some histories: (N,) weights, whether each matches, and whose it is."""

        def by_history(values: np.ndarray) -> np.ndarray:
            kinds = (matches, ~matches)
            return np.stack([np.bincount(owners[kind], values[kind], num_histories) for kind in kinds])

        counts, sizes = by_history(np.ones_like(weights)), by_history(np.abs(weights))
        self.counts += counts.sum(1).astype(np.int64)
        self.weights += by_history(weights).sum(1)
        self.sizes += sizes.sum(1)
        both = (counts > 0).all(0)
        means = sizes[:, both] / counts[:, both]
        self.histories += int(both.sum())
        self.larger += float((means[0] > means[1]).sum() + 0.5 * (means[0] == means[1]).sum())

    def result(self) -> dict[str, Any]:
        """Figures for the JSON; kinds: events that match, others."""
        kinds = ("same", "other")
        return {
            **{f"mean_weight_{kind}": value for kind, value in zip(kinds, self.weights / self.counts, strict=True)},
            **{f"mean_size_{kind}": value for kind, value in zip(kinds, self.sizes / self.counts, strict=True)},
            **{f"events_{kind}": int(value) for kind, value in zip(kinds, self.counts, strict=True)},
            "histories_with_both": self.histories,
            "same_larger_in": self.larger / self.histories,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("name", help="of the log, for the file")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of trainings")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    runs = [measure(run) for run in arguments.runs]
    write_json(arguments.out / f"attention_{arguments.name}.json", {"log": arguments.name, "runs": runs})
    for property_, first in runs[0]["properties"].items():
        columns = {key: [run["properties"][property_][key] for run in runs] for key in first}
        print(property_, {key: round(float(statistics.mean(values)), 4) for key, values in columns.items()})


def measure(run: Path) -> dict[str, Any]:
    """What one training attends to, with where it comes from."""
    model, config = load_model(run)
    assert isinstance(model, DIN) and config.data.path is not None
    manifest = Manifest.load(config.data.path)
    results = json.loads((run / "results.json").read_text())
    kept = {key: results[key] for key in ("seed", "git", "test")}
    return {**kept, "rows": results["data"]["rows"], "properties": by_property(model.eval(), manifest)}


@torch.no_grad()
def by_property(model: DIN, manifest: Manifest) -> dict[str, Any]:
    """Property -> its ``Sums`` over the first history of the test split; left out where none or all events match."""
    described = model.histories[0]
    unknown = {feature.name: feature.out_of_vocabulary for feature in manifest.categorical}
    styles = styles_of_ids(manifest) if manifest.source == SOURCE else None
    sums: dict[str, Sums] = defaultdict(Sums)
    for batch in ParquetLoader(manifest, "test", batch_size=BATCH_SIZE):
        found, offsets = model.attention_weights(batch.sparse)[described.events]
        weights, lengths = found.double().numpy(), offsets.diff().numpy()
        owners = np.repeat(np.arange(len(lengths)), lengths)
        same: dict[str, np.ndarray] = {}
        for sequence, name in zip(described.sequences, described.targets, strict=True):
            targets, events = batch.sparse[name].values().numpy()[owners], batch.sparse[sequence].values().numpy()
            known = targets != (-1 if unknown[name] is None else unknown[name])
            same[name] = events == targets
            sums[name].add(weights[known], same[name][known], owners[known], len(lengths))
            if name == "item" and styles is not None:
                same["style"] = styles[events] == styles[targets]
        if styles is not None:
            sums["style"].add(weights, same["category"] & same["style"], owners, len(lengths))
    return {name: found.result() for name, found in sums.items() if found.counts.all()}


def styles_of_ids(manifest: Manifest) -> np.ndarray:
    """(ids of items,) the style of each in the synthetic log."""
    styles = item_styles(manifest)
    return np.array([styles.get(name, -1) for name in value_names(manifest)["item"]])


if __name__ == "__main__":
    main()
