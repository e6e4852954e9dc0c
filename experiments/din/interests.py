"""Draw what a trained DIN attends to where the truth is known: users of the synthetic log and their interests.

    python -m recemb.train +experiment=movielens_din data=behaviour hydra.run.dir=RUN
    python experiments/din/interests.py RUN

The first users of the test split who were shown items of two of their interests and one that no event has to do with,
with histories of 12 to 30 events. What the log's model says: an event counts for the click where it is of the target's
category, and three times as much where it is of its style besides; style is in no column.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipelines.behaviour import SOURCE
from data_pipelines.behaviour_model import NUM_ITEMS, BehaviourModel
from recemb.data.batch import Batch
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluation.attention_plot import AttendedHistory, attended_histories, value_names
from recemb.evaluation.interest_plot import interest_plot
from recemb.models.din import DIN
from recemb.run_folder import load_model

SHORTEST, LONGEST = 12, 30
# Events that make a category an interest.
FEWEST_EVENTS = 3
USERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", type=Path, help="folder of the training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention_behaviour.png")
    arguments = parser.parse_args()
    model, config = load_model(arguments.run)
    assert isinstance(model, DIN) and config.data.path is not None
    manifest = Manifest.load(config.data.path)
    if manifest.source != SOURCE or manifest.user is None:
        parser.error(f"{config.data.path}: the synthetic behaviour log is required, got a log of {manifest.source!r}")
    styles = item_styles(manifest)
    batch = next(iter(ParquetLoader(manifest, "test", batch_size=32_768, extra_columns=[manifest.user])))
    names = value_names(manifest)
    users = [
        attended_histories(model, batch, rows, names=names)
        for rows in rows_of_users(batch, batch.extra[manifest.user])[:USERS]
    ]

    def same_style(history: AttendedHistory) -> Sequence[bool]:
        same = zip(history.events, history.same(), strict=True)
        return [category and styles[event[0]] == styles[history.target[0]] for event, category in same]

    interest_plot(
        oriented(users),
        arguments.out,
        title="DIN weighs the events of the interest that the target belongs to\n"
        "(synthetic log; a row: one user, shown items of two interests and of none)",
        marked=same_style,
        mark_meaning="Long bars are events that matter for the target; a negative weight counts by its size.\n"
        "Dot: also of the target's style, which counts three times as much in the log's model and is in no column.",
    )


def oriented(users: Sequence[Sequence[AttendedHistory]]) -> list[list[AttendedHistory]]:
    """The histories with all weights times 1 or -1, so that events of the targets' categories weigh more on average.

    What sign all weights have together is chance: the layer behind them may have the other.
    """
    drawn = [history for targets in users for history in targets]
    weights, same = (
        np.concatenate([np.asarray(values) for values in found])
        for found in ([item.weights for item in drawn], [item.same() for item in drawn])
    )
    sign = 1 if weights[same].mean() >= weights[~same].mean() else -1
    return [[replace(item, weights=tuple(sign * weight for weight in item.weights)) for item in line] for line in users]


def item_styles(manifest: Manifest) -> dict[str, int]:
    """Name of an item -> its style, which the log keeps to itself."""
    options = manifest.preparation[SOURCE]
    model = BehaviourModel(seed=options["seed"], max_history=options["max_history"])
    styles = model.style(np.arange(NUM_ITEMS))
    return {str(name): int(style) for name, style in zip(model.names, styles, strict=True)}


def rows_of_users(batch: Batch, users: np.ndarray) -> list[list[int]]:
    """For each user who has them, in order: rows with targets of two interests, and one of no event's category."""
    histories = batch.sparse["category_history"].to_dense()
    targets = batch.sparse["category"].values().tolist()
    # User -> category of a target -> (its events in the history, row).
    found: dict[object, dict[int, tuple[int, int]]] = {}
    for row, (events, target) in enumerate(zip(histories, targets, strict=True)):
        if SHORTEST <= len(events) <= LONGEST:
            found.setdefault(users[row], {}).setdefault(target, (int((events == target).sum()), row))
    result = []
    for by_category in found.values():
        matched = sorted(by_category.values(), reverse=True)
        if len(matched) > 2 and matched[1][0] >= FEWEST_EVENTS and matched[-1][0] == 0:
            result.append([matched[0][1], matched[1][1], matched[-1][1]])
    return result


if __name__ == "__main__":
    main()
