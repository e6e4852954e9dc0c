"""The generative model of the synthetic log: which values a row has, and the probability of its click.

Every number is a hash of (seed, what it is, row or id), never the state of a random stream: any range of rows can be
made alone, in any order, in chunks of any size, and comes out the same; an id's parameters need no table, so memory is
that of one chunk whatever the number of ids.

Shapes: B rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from data_pipelines.synthetic_shape import CATEGORICAL, NUMERIC, PAIRS, CategoricalShape, NumericShape, cardinalities

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
UInt32 = npt.NDArray[np.uint32]
Bool = npt.NDArray[np.bool_]

GOLDEN = 0x9E3779B97F4A7C15
MASK64 = (1 << 64) - 1
LOGISTIC_STD = math.pi / math.sqrt(3)

BASE_RATE = 0.25
# Standard deviation over rows of each part of the logit.
BIAS_STD = 1.2
INTERACTION_STD = 0.9
NUMERIC_STD = 0.7
# Size of each dimension of a latent vector. The first one is the id's bias over again: effects that interact are mostly
# strong ones, and a model can find a product whose factors it already knows.
LATENT_WEIGHTS = (1.0, 0.7)
# Rank at which an id's bias and vector are smaller by sqrt(2). Without this, ids that occur a few times in a million
# rows would hold most of the optimum, and its distance would say nothing about a model.
TAIL_RANK = 300.0
# Radians of a numeric effect's wave per standard deviation of the logarithm.
WAVE = 0.7
# Share of the slots whose id is replaced by a new one at some moment of the log, in columns of at least CHURN_FROM_IDS
# slots, from rank CHURN_FROM_RANK on: replacing the head would move the base rate from day to day.
CHURN = 0.25
CHURN_FROM_IDS = 1000
CHURN_FROM_RANK = 20
PILOT_ROWS = 1 << 16


def mix(value: int) -> int:
    """SplitMix64's finaliser, a bijection of 64-bit integers, on a Python integer."""
    value &= MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def key(seed: int, *path: str) -> int:
    """A 64-bit key for one purpose, e.g. ``key(0, "C3", "latent")``; other purposes get unrelated keys."""
    state = mix(seed + GOLDEN)
    for part in path:
        for byte in part.encode() + b"/":
            state = mix(state ^ byte)
    return state


def hash_counters(stream: int, counters: UInt64) -> UInt64:
    """(B,) SplitMix64 outputs number ``counters`` of the stream that starts at key ``stream``."""
    value = counters * np.uint64(GOLDEN)
    value += np.uint64(stream)
    shifted = value >> np.uint64(30)
    value ^= shifted
    value *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(value, np.uint64(27), out=shifted)
    value ^= shifted
    value *= np.uint64(0x94D049BB133111EB)
    np.right_shift(value, np.uint64(31), out=shifted)
    value ^= shifted
    return value


def uniform(stream: int, counters: UInt64) -> Float64:
    """(B,) draws from (0, 1), never 0 or 1: 52 bits of the hash, in the middle of their interval."""
    bits = hash_counters(stream, counters)
    bits >>= np.uint64(12)
    # Through int64: processors convert signed integers to float several times faster.
    draws = bits.view(np.int64).astype(np.float64)
    draws += 0.5
    draws *= 2.0**-52
    return draws


def standardised(hashes: UInt64, lane: int) -> Float64:
    """(B,) uniform numbers of mean 0 and variance 1 from the 16-bit lane ``lane`` (0 to 3) of the hashes."""
    values = hashes.view("<u2")[lane::4].astype(np.float64)
    values += 0.5
    values *= math.sqrt(12.0) / 65536
    values -= math.sqrt(12.0) / 2
    return values


def raw_values(seed: int, name: str, identifiers: UInt64) -> UInt32:
    """(B,) the 32-bit raw values of identifiers below 2**32: one to one, and in no order, so that rank stays hidden."""
    value = identifiers.astype(np.uint32)
    value ^= np.uint32(key(seed, name, "value") & 0xFFFFFFFF)
    for multiplier, shift in ((0x7FEB352D, 16), (0x846CA68B, 15)):
        value ^= value >> np.uint32(shift)
        value *= np.uint32(multiplier)
    return value ^ (value >> np.uint32(16))


@dataclass(frozen=True)
class Rows:
    """A chunk of the log.

    Args:
        categorical: column to (B,) uint32 raw values; undefined where null.
        numeric: column to (B,) int64 values; undefined where null.
        null: column to (B,) bool, only of columns that have nulls.
        day: (B,) int8, from 0.
        probability: (B,) float64 true click probability.
        label: (B,) int8, drawn from it.
    """

    categorical: Mapping[str, UInt32]
    numeric: Mapping[str, Int64]
    null: Mapping[str, Bool]
    day: npt.NDArray[np.int8]
    probability: Float64
    label: npt.NDArray[np.int8]


@dataclass(frozen=True)
class Parts:
    """The three parts of the logit before scaling, each (B,) float64."""

    bias: Float64
    interaction: Float64
    numeric: Float64


@dataclass(frozen=True)
class Scales:
    """What turns Parts into a logit: ``intercept + bias * b + interaction * i + numeric * n``."""

    intercept: float
    bias: float
    interaction: float
    numeric: float

    def logit(self, parts: Parts) -> Float64:
        """(B,) logit of the true probability."""
        return (
            self.intercept
            + self.bias * parts.bias
            + self.interaction * parts.interaction
            + self.numeric * parts.numeric
        )


@dataclass(frozen=True)
class ClickModel:
    """Makes any rows of a log of given seed and number of ids.

    Args:
        seed: of everything.
        total_ids: ids alive at any one moment, over all columns.
    """

    seed: int
    total_ids: int

    @cached_property
    def cardinalities(self) -> dict[str, int]:
        """Slots of each categorical column."""
        return cardinalities(self.total_ids)

    @cached_property
    def scales(self) -> Scales:
        """Scales that give each part its standard deviation and the clicks their base rate, on pilot rows.

        The pilot rows have a stream of their own and cover the whole log, so the model does not depend on its length.
        """
        counters = np.arange(PILOT_ROWS, dtype=np.uint64)
        time = (np.arange(PILOT_ROWS) + 0.5) / PILOT_ROWS
        _, parts = self._draw("pilot", counters, time)
        scales = Scales(
            intercept=0.0,
            bias=BIAS_STD / float(parts.bias.std()),
            interaction=INTERACTION_STD / float(parts.interaction.std()),
            numeric=NUMERIC_STD / float(parts.numeric.std()),
        )
        logits = scales.logit(parts)
        low, high = -20.0, 20.0
        for _ in range(50):
            middle = (low + high) / 2
            too_few = float(sigmoid(logits + middle).mean()) < BASE_RATE
            low, high = (middle, high) if too_few else (low, middle)
        return Scales(intercept=low, bias=scales.bias, interaction=scales.interaction, numeric=scales.numeric)

    def rows(self, start: int, stop: int, *, total_rows: int, days: int) -> Rows:
        """Rows ``start`` to ``stop`` of a log of ``total_rows`` rows spread evenly over ``days`` days."""
        index = np.arange(start, stop, dtype=np.int64)
        counters = index.astype(np.uint64)
        columns, parts = self._draw("row", counters, (index + 0.5) / total_rows)
        probability = sigmoid(self.scales.logit(parts))
        label = (uniform(key(self.seed, "row", "label"), counters) < probability).astype(np.int8)
        return Rows(
            categorical={name: raw_values(self.seed, name, ids) for name, ids in columns.identifiers.items()},
            numeric=columns.numeric,
            null=columns.null,
            day=(index * days // total_rows).astype(np.int8),
            probability=probability,
            label=label,
        )

    def _draw(self, stream: str, counters: UInt64, time: Float64) -> tuple[_Columns, Parts]:
        columns = _Columns(identifiers={}, numeric={}, null={})
        parts = Parts(*(np.zeros(len(counters)) for _ in range(3)))
        nulls = self._null_groups(stream, counters)
        latents: dict[str, list[Float64]] = {}
        paired = {name for left, right, _ in PAIRS for name in (left, right)}
        for shape in CATEGORICAL:
            null = nulls.get(shape.null_group)
            identifiers = self._identifiers(stream, shape, counters, time)
            if null is not None:
                columns.null[shape.name] = null
                # A missing value is a value like any other: one slot past the last, never replaced.
                identifiers[null] = np.uint64(2 * self.cardinalities[shape.name])
            columns.identifiers[shape.name] = identifiers
            vector = self.latent_vectors(shape, identifiers, len(LATENT_WEIGHTS) if shape.name in paired else 1)
            parts.bias[:] += shape.bias * vector[0]
            latents[shape.name] = vector
        for left, right, weight in PAIRS:
            for size, a, b in zip(LATENT_WEIGHTS, latents[left], latents[right], strict=True):
                parts.interaction[:] += (weight * size * size) * a * b
        for number in NUMERIC:
            null = nulls.get(number.null_group)
            values = self._numbers(stream, number, counters)
            columns.numeric[number.name] = values
            effect = self.numeric_effect(number, values)
            if null is not None:
                columns.null[number.name] = null
                effect[null] = number.effect * self.null_effect(number)
            parts.numeric[:] += effect
        return columns, parts

    def latent_vectors(self, shape: CategoricalShape, identifiers: UInt64, dimensions: int) -> list[Float64]:
        """``dimensions`` arrays (B,): each id's vector before LATENT_WEIGHTS; the first dimension is its bias."""
        hashes = hash_counters(key(self.seed, shape.name, "latent"), identifiers)
        slots = (identifiers >> np.uint64(1)).view(np.int64)
        strength = slots / TAIL_RANK
        strength += 1.0
        strength = 1.0 / np.sqrt(strength, out=strength)
        strength[slots == self.cardinalities[shape.name]] = 1.0  # the missing value is frequent
        return [strength * standardised(hashes, lane) for lane in range(dimensions)]

    def _null_groups(self, stream: str, counters: UInt64) -> dict[str, Bool]:
        fractions = {shape.null_group: shape.null_fraction for shape in (*CATEGORICAL, *NUMERIC) if shape.null_group}
        return {
            group: uniform(key(self.seed, stream, "null", group), counters) < fraction
            for group, fraction in fractions.items()
        }

    def _identifiers(self, stream: str, shape: CategoricalShape, counters: UInt64, time: Float64) -> UInt64:
        """(B,) ``2 * slot + generation``: slot = popularity rank, generation 1 once the slot's id has been replaced."""
        size = self.cardinalities[shape.name]
        power = 1.0 - shape.exponent
        first, last = shape.offset**power, (size + shape.offset) ** power
        draws = uniform(key(self.seed, stream, shape.name), counters)
        draws *= last - first
        draws += first
        slots = np.power(draws, 1.0 / power, out=draws)
        slots -= shape.offset
        identifiers = np.clip(slots, 0, size - 1, out=slots).astype(np.int64).view(np.uint64)
        if size >= CHURN_FROM_IDS:
            moment = uniform(key(self.seed, shape.name, "churn"), identifiers)
            replaced = (moment < CHURN * time) & (identifiers >= CHURN_FROM_RANK)
            identifiers <<= np.uint64(1)
            identifiers += replaced
        else:
            identifiers <<= np.uint64(1)
        return identifiers

    def _numbers(self, stream: str, shape: NumericShape, counters: UInt64) -> Int64:
        draws = uniform(key(self.seed, stream, shape.name), counters)
        logistic = np.log(draws / (1.0 - draws))
        logistic *= shape.log_std / LOGISTIC_STD
        logistic += shape.log_mean
        # Bounded before exp: the tail of I5 would leave the range of int64.
        np.minimum(logistic, math.log(shape.maximum - shape.minimum + 1), out=logistic)
        counts = np.exp(logistic, out=logistic).astype(np.int64)
        counts += shape.minimum
        return np.minimum(counts, shape.maximum, out=counts)

    def numeric_effect(self, shape: NumericShape, values: Int64) -> Float64:
        """(B,) contribution of non-null values to the numeric part: a smooth wave over the standardised logarithm."""
        logarithm = np.log1p(np.maximum(values, 0))
        logarithm -= shape.log_mean
        logarithm *= WAVE / shape.log_std
        logarithm += self.phase(shape)
        effect = np.sin(logarithm, out=logarithm)
        effect *= shape.effect
        return effect

    def phase(self, shape: NumericShape) -> float:
        """Phase of the column's wave, in radians in [-pi, pi)."""
        return (key(self.seed, shape.name, "phase") / 2**64 - 0.5) * 2 * math.pi

    def null_effect(self, shape: NumericShape) -> float:
        """What a missing value of the column contributes, in [-1, 1)."""
        return key(self.seed, shape.name, "null") / 2**63 - 1.0


@dataclass(frozen=True)
class _Columns:
    identifiers: dict[str, UInt64]
    numeric: dict[str, Int64]
    null: dict[str, Bool]


def sigmoid(logits: Float64) -> Float64:
    """1 / (1 + exp(-logit)), element by element."""
    return 1.0 / (1.0 + np.exp(-logits))
