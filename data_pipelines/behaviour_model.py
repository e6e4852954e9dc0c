"""The generative model of the behaviour log: users with interests, what they did, what they were shown and clicked.

The log is made in blocks of BLOCK_USERS users, each from its own random stream (seed, block), so memory is that of a
block, and a log of more rows begins with the same users.

Shapes: U users of a block, E past events of the block, N rows of the block, L entries of all its histories.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from data_pipelines.histories import entries, past

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

BLOCK_USERS = 1_000
ROWS_PER_USER = 40
# Past events of a user are geometric with this mean: most histories are short, and 1% are beyond 230 events.
MEAN_EVENTS = 50.0
LONGEST_PAST = 500
SECONDS = 30 * 86_400
FIRST_SECOND = 1_600_000_000
NUM_CATEGORIES = 200
STYLES = 4
ITEMS_PER_STYLE = 5
NUM_ITEMS = NUM_CATEGORIES * STYLES * ITEMS_PER_STYLE
NUM_DEVICES = 4
INTEREST_SHARES = (0.4, 0.25, 0.2, 0.15)
# Share of a user's events in an interest that are of the style preferred there.
PREFERRED_STYLE = 0.7
# Share of past events, and of targets, that have nothing to do with the user's interests.
STRAY_EVENTS = 0.2
STRAY_TARGETS = 0.5
BASE_RATE = 0.25
# What an event in the target's category, and in its style besides, adds to the match; and the match at which affinity
# reaches 1 - 1/e.
STYLE_WEIGHT = 2.0
MATCH_SCALE = 3.0
AFFINITY_WEIGHT = 3.0
QUALITY_WEIGHT = 0.5
DEVICE_WEIGHT = 0.4
_PILOT_BLOCK = 2**31
_PARAMETERS = 2**31 + 1


@dataclass(frozen=True)
class Block:
    """The rows of some users.

    Args:
        user, time, item, device, label: (N,) int64; users are numbered over the whole log.
        probability: (N,) of a click.
        starts, ends: (N,) the entries of event_items (E,) and event_times (E,) that are each row's history.
    """

    user: Int64
    time: Int64
    item: Int64
    device: Int64
    label: Int64
    probability: Float64
    starts: Int64
    ends: Int64
    event_items: Int64
    event_times: Int64


class BehaviourModel:
    """Everything that decides the log but the number of its rows.

    Args:
        seed: of all parameters and draws.
        max_history: events of a history, the latest; the click depends on these alone.
    """

    def __init__(self, *, seed: int, max_history: int) -> None:
        self.seed = seed
        self.max_history = max_history
        parameters = np.random.default_rng([seed, _PARAMETERS])
        # Items are numbered at random: neither category nor style shows in an item's name.
        self.names = parameters.permutation(NUM_ITEMS)
        self.quality = parameters.standard_normal(NUM_ITEMS)
        self.device_effect = np.linspace(-1.0, 1.0, NUM_DEVICES)
        self._category_shares = _zipf(NUM_CATEGORIES, 0.5)
        self._item_shares = _zipf(ITEMS_PER_STYLE, 1.0)

    @staticmethod
    def category(items: Int64) -> Int64:
        """Category of items (numbered by category, style and popularity)."""
        return items // (STYLES * ITEMS_PER_STYLE)

    @staticmethod
    def style(items: Int64) -> Int64:
        """Style within the category, 0 to STYLES - 1: known to nobody, but the items of one style go together."""
        return items // ITEMS_PER_STYLE % STYLES

    def affinity(self, target: Int64, history: Int64, lengths: Int64) -> Float64:
        """(N,) targets and their (L,) histories -> (N,) in [0, 1): 1 - exp(-(c + 2 s) / 3) for c events in the target's
        category and s of them in its style."""
        owners = np.repeat(np.arange(len(target)), lengths)
        wanted = target[owners]
        same_category = self.category(history) == self.category(wanted)
        same_style = same_category & (self.style(history) == self.style(wanted))
        match = np.bincount(owners, same_category + STYLE_WEIGHT * same_style, len(target))
        return 1.0 - np.exp(-match / MATCH_SCALE)

    def effect(self, target: Int64, device: Int64, affinity: Float64) -> Float64:
        """(N,) logits but for the constant."""
        return (
            AFFINITY_WEIGHT * affinity
            + QUALITY_WEIGHT * self.quality[target]
            + DEVICE_WEIGHT * self.device_effect[device]
        )

    @cached_property
    def constant(self) -> float:
        """The logit's constant: gives BASE_RATE on a pilot block."""
        pilot = self._draw(_PILOT_BLOCK)
        low, high = -20.0, 20.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if _sigmoid(pilot[-1] + middle).mean() < BASE_RATE else (low, middle)
        return low

    def block(self, number: int) -> Block:
        """The rows of users number * BLOCK_USERS and on, by user, then time."""
        user, time, target, device, starts, ends, items, times, effect = self._draw(number)
        probability = _sigmoid(effect + self.constant)
        draws = np.random.default_rng([self.seed, number, 1]).random(len(user))
        label = (draws < probability).astype(np.int64)
        user = user + number * BLOCK_USERS
        return Block(user, time, target, device, label, probability, starts, ends, items, times)

    def _draw(self, number: int) -> tuple[Int64, Int64, Int64, Int64, Int64, Int64, Int64, Int64, Float64]:
        random = np.random.default_rng([self.seed, number, 0])
        shape = (BLOCK_USERS, len(INTEREST_SHARES))
        interests = random.choice(NUM_CATEGORIES, shape, p=self._category_shares)
        preferred = random.integers(0, STYLES, shape)

        lengths = np.minimum(random.geometric(1 / MEAN_EVENTS, BLOCK_USERS) - 1, LONGEST_PAST)
        event_user = np.repeat(np.arange(BLOCK_USERS), lengths)
        events = self._items(random, event_user, interests, preferred, STRAY_EVENTS)
        event_time = FIRST_SECOND + random.integers(0, SECONDS, len(event_user))
        order = np.lexsort((event_time, event_user))
        event_user, events, event_time = event_user[order], events[order], event_time[order]

        user = np.repeat(np.arange(BLOCK_USERS), ROWS_PER_USER)
        time = FIRST_SECOND + random.integers(0, SECONDS, len(user))
        order = np.lexsort((time, user))
        time = time[order]
        target = self._items(random, user, interests, None, STRAY_TARGETS)
        device = random.integers(0, NUM_DEVICES, len(user))
        starts, ends = past(event_user, event_time, user, time, self.max_history)
        affinity = self.affinity(target, events[entries(starts, ends)[1]], ends - starts)
        effect = self.effect(target, device, affinity)
        return user, time, target, device, starts, ends, events, event_time, effect

    def _items(
        self, random: np.random.Generator, users: Int64, interests: Int64, preferred: Int64 | None, stray: float
    ) -> Int64:
        """An item for each of (N,) users: of an interest (and mostly its preferred style), or of any category."""
        which = random.choice(len(INTEREST_SHARES), len(users), p=INTEREST_SHARES)
        category = interests[users, which]
        strays = random.random(len(users)) < stray
        category = np.where(strays, random.choice(NUM_CATEGORIES, len(users), p=self._category_shares), category)
        style = random.integers(0, STYLES, len(users))
        if preferred is not None:
            keeps = ~strays & (random.random(len(users)) < PREFERRED_STYLE)
            style = np.where(keeps, preferred[users, which], style)
        place = random.choice(ITEMS_PER_STYLE, len(users), p=self._item_shares)
        return (category * STYLES + style) * ITEMS_PER_STYLE + place


def _zipf(size: int, exponent: float) -> Float64:
    shares = np.arange(1, size + 1) ** -exponent
    return np.asarray(shares / shares.sum(), np.float64)


def _sigmoid(values: Float64) -> Float64:
    return np.asarray(1.0 / (1.0 + np.exp(-values)), np.float64)
