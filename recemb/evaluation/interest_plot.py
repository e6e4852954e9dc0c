"""What a DIN looks at in one history when it is shown different targets: a row a user, a column a target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from recemb.evaluation.attention_plot import AttendedHistory

# Told apart without full colour vision too (after Okabe and Ito); what is left of the categories is grey.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_REST, _TEXT = "#b5bac1", "#24292f"


def interest_plot(
    users: Sequence[Sequence[AttendedHistory]],
    path: Path,
    *,
    title: str,
    marked: Callable[[AttendedHistory], Sequence[bool]] | None = None,
    mark_meaning: str = "",
) -> None:
    """Draw the weights of each user's events against several targets, as bars in the colour of their category.

    Categories are all properties but the first. The four most frequent ones of a user's histories have a colour each,
    the same in all of the user's panels; the others are grey. Above a panel stands what the target is, in its colour.

    Args:
        users: for each row of panels the histories of one user, one a target, as many for each; up to 4 times 3 are
            legible.
        path: of the image, whose suffix decides the format.
        title: above all panels.
        marked: history -> which of its events get a dot under their bar.
        mark_meaning: what the dot says, for the legend.

    Raises:
        ValueError: no user, no target, or not as many targets for each user.
    """
    columns = {len(targets) for targets in users}
    if not users or len(columns) != 1 or 0 in columns:
        raise ValueError(
            "interest_plot: one user at least, and as many targets for each are required, "
            f"got {[len(targets) for targets in users]} targets"
        )
    width, height = 3.4 * len(users[0]) + 1.9, 2.2 * len(users) + 1.6
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(users), len(users[0]), squeeze=False, sharey=True)
    # In inches: title above, legends at the right, words about the dots below.
    edges = {"left": 0.9 / width, "right": 1 - 1.0 / width, "bottom": 0.85 / height, "top": 1 - 1.0 / height}
    figure.subplots_adjust(**edges, hspace=0.42, wspace=0.12)
    for number, (line, targets) in enumerate(zip(axes, users, strict=True)):
        colours = _colours_of(targets)
        for axis, item in zip(line, targets, strict=True):
            _panel(axis, item, colours, [] if marked is None else marked(item))
        handles = [Patch(color=colour, label=category) for category, colour in colours.items()]
        line[-1].legend(
            handles=[*handles, Patch(color=_REST, label="others")],
            title="category",
            fontsize=8,
            title_fontsize=8,
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
        line[0].set_ylabel(f"user {number + 1}\nattention weight", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("events of the history, oldest to newest", fontsize=9)
    figure.suptitle(title, fontsize=12, color=_TEXT)
    if mark_meaning:
        figure.text(0.5, 0.1 / height, mark_meaning, fontsize=9, color=_TEXT, ha="center")
    figure.savefig(path, dpi=110)


def _category(properties: Sequence[str]) -> str:
    return ", ".join(properties[1:])


def _colours_of(targets: Sequence[AttendedHistory]) -> dict[str, str]:
    """Category -> colour, the most frequent first; equally frequent ones in the order in which they come."""
    counts = Counter(_category(event) for item in targets for event in item.events)
    return {category: colour for (category, _), colour in zip(counts.most_common(), _COLOURS, strict=False)}


def _panel(axis: Axes, item: AttendedHistory, colours: Mapping[str, str], marked: Sequence[bool]) -> None:
    places = np.arange(len(item.events))
    categories = [_category(event) for event in item.events]
    axis.bar(places, item.weights, width=0.8, color=[colours.get(category, _REST) for category in categories])
    axis.axhline(0, color=_TEXT, linewidth=0.7)
    dots = [place for place, flag in zip(places, marked, strict=False) if flag]
    axis.plot(dots, [0.0] * len(dots), "o", color=_TEXT, markeredgecolor="white", markersize=5, clip_on=False)
    wanted = _category(item.target)
    matches = categories.count(wanted)
    outcome = "clicked" if item.clicked else "not clicked"
    axis.set_title(
        f"target of category {wanted} ({matches} of {len(places)} events)\n{outcome}, predicted {item.probability:.2f}",
        fontsize=9,
        color=colours.get(wanted, _TEXT),
        loc="left",
    )
    axis.set_xticks([])
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
