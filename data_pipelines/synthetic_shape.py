"""What a Criteo Display log looks like: cardinalities, popularity curves, nulls, counts. Constants only.

The cardinalities are the distinct values of the whole Criteo Kaggle log (33,762,577 ids over 45,840,617 rows). Null
shares, log means and popularity of the head were read off its first 80,000 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

# The largest cardinality that a table keeps unscaled, whatever the total: Criteo's mid-sized tables (thousands of ids,
# hundreds of rows each) are where most of the learnable signal is, and would vanish if all tables shrank alike.
LARGEST_FLOOR = 20_000
SMALLEST_TOTAL_IDS = 2_000
LARGEST_TOTAL_IDS = 2_000_000_000


@dataclass(frozen=True)
class CategoricalShape:
    """One categorical column.

    Args:
        name: column name.
        cardinality: distinct values in Criteo.
        exponent, offset: popularity of rank k (from 0) is the mass of ``x ** -exponent`` on
            [k + offset, k + offset + 1).
        null_fraction: share of rows without a value.
        null_group: columns of one group are null together.
        bias: weight of the per-id bias in the logit, before the biases are scaled as a whole. Few columns carry most of
            it, some with very many ids: spread over 26 columns no single id's bias could be estimated from 1M rows.
    """

    name: str
    cardinality: int
    exponent: float
    offset: float
    null_fraction: float
    null_group: str
    bias: float


@dataclass(frozen=True)
class NumericShape:
    """One numeric column: ``minimum + floor(exp(log_mean + log_std * logistic))``, at most ``maximum``.

    Args:
        name: column name.
        log_mean, log_std: of the logarithm of the count (natural, standard deviation).
        minimum: smallest value (Criteo's I2 has negatives).
        maximum: largest value.
        null_fraction: share of rows without a value.
        null_group: columns of one group are null together.
        effect: weight of the column in the logit, before the numeric effects are scaled as a whole.
    """

    name: str
    log_mean: float
    log_std: float
    minimum: int
    maximum: int
    null_fraction: float
    null_group: str
    effect: float


_ITEM = (0.039, "item")
_SITE = (0.414, "site")
_NEVER = (0.0, "")

CATEGORICAL = (
    CategoricalShape("C1", 1460, 2.0, 1.0, *_NEVER, 0.15),
    CategoricalShape("C2", 583, 1.1, 1.0, *_NEVER, 0.15),
    CategoricalShape("C3", 10_131_227, 1.1, 3.0, *_ITEM, 1.2),
    CategoricalShape("C4", 2_202_608, 1.1, 2.0, *_ITEM, 0.8),
    CategoricalShape("C5", 305, 2.0, 1.0, *_NEVER, 0.15),
    CategoricalShape("C6", 24, 2.0, 1.0, 0.137, "C6", 0.15),
    CategoricalShape("C7", 12_517, 1.05, 10.0, *_NEVER, 1.2),
    CategoricalShape("C8", 633, 2.0, 1.0, *_NEVER, 0.15),
    CategoricalShape("C9", 3, 2.0, 1.0, *_NEVER, 0.15),
    CategoricalShape("C10", 93_145, 1.1, 1.0, *_NEVER, 1.2),
    CategoricalShape("C11", 5683, 1.05, 10.0, *_NEVER, 0.15),
    CategoricalShape("C12", 8_351_593, 1.1, 3.0, *_ITEM, 0.8),
    CategoricalShape("C13", 3194, 1.05, 10.0, *_NEVER, 0.15),
    CategoricalShape("C14", 27, 1.5, 1.0, *_NEVER, 0.15),
    CategoricalShape("C15", 14_992, 1.05, 10.0, *_NEVER, 0.4),
    CategoricalShape("C16", 5_461_306, 1.1, 3.0, *_ITEM, 0.15),
    CategoricalShape("C17", 10, 1.5, 1.0, *_NEVER, 0.15),
    CategoricalShape("C18", 5652, 1.1, 3.0, *_NEVER, 0.15),
    CategoricalShape("C19", 2173, 1.5, 1.0, *_SITE, 0.15),
    CategoricalShape("C20", 4, 1.1, 2.0, *_SITE, 0.15),
    CategoricalShape("C21", 7_046_547, 1.1, 3.0, *_ITEM, 0.15),
    CategoricalShape("C22", 18, 2.0, 1.0, 0.817, "C22", 0.15),
    CategoricalShape("C23", 15, 1.5, 1.0, *_NEVER, 0.15),
    CategoricalShape("C24", 286_181, 1.1, 1.5, *_ITEM, 0.4),
    CategoricalShape("C25", 105, 1.5, 1.0, *_SITE, 0.15),
    CategoricalShape("C26", 142_572, 1.1, 1.5, *_SITE, 0.15),
)

NUMERIC = (
    NumericShape("I1", 0.6, 1.2, 0, 556, 0.445, "history", 1.0),
    NumericShape("I2", 2.0, 2.2, -2, 18_522, 0.0, "", 0.5),
    NumericShape("I3", 2.3, 1.3, 0, 65_535, 0.191, "I3", 0.5),
    NumericShape("I4", 1.8, 1.0, 0, 417, 0.194, "age", 0.5),
    NumericShape("I5", 7.2, 2.6, 0, 1_618_112, 0.048, "I5", 1.0),
    NumericShape("I6", 3.6, 1.7, 0, 16_290, 0.252, "I6", 1.0),
    NumericShape("I7", 1.4, 1.5, 0, 8807, 0.047, "visits", 1.0),
    NumericShape("I8", 2.1, 1.1, 0, 4352, 0.001, "I8", 0.3),
    NumericShape("I9", 3.6, 1.6, 0, 24_352, 0.047, "visits", 0.3),
    NumericShape("I10", 0.0, 0.7, 0, 6, 0.445, "history", 0.5),
    NumericShape("I11", 0.6, 0.9, 0, 104, 0.047, "visits", 1.0),
    NumericShape("I12", -0.5, 1.2, 0, 493, 0.772, "I12", 0.3),
    NumericShape("I13", 1.9, 1.0, 0, 6558, 0.194, "age", 0.5),
)

# Pairs of categorical columns whose latent vectors meet in a dot product, with the weight of the product. Each has a
# side with frequent ids, so that 1M rows suffice to learn the other side's vectors.
PAIRS = (("C3", "C2", 1.0), ("C12", "C14", 1.0), ("C7", "C10", 1.0), ("C4", "C1", 1.0))


def cardinalities(total_ids: int) -> dict[str, int]:
    """Ids alive at any one moment of each categorical column; they sum to ``total_ids`` up to rounding.

    A column of more than ``floor = min(20,000, total_ids / 50)`` values in Criteo gets Criteo's number times one
    common scale, but no less than ``floor``; the others keep Criteo's own number.

    Raises:
        ValueError: ``total_ids`` outside [2,000, 2,000,000,000].
    """
    if not SMALLEST_TOTAL_IDS <= total_ids <= LARGEST_TOTAL_IDS:
        raise ValueError(f"total_ids must be in [{SMALLEST_TOTAL_IDS}, {LARGEST_TOTAL_IDS}] ids, got {total_ids}")
    floor = min(LARGEST_FLOOR, total_ids // 50)

    def size(criteo: int, scale: float) -> int:
        return criteo if criteo <= floor else max(floor, round(criteo * scale))

    def scaled(scale: float) -> dict[str, int]:
        return {shape.name: size(shape.cardinality, scale) for shape in CATEGORICAL}

    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(scaled(middle).values()) < total_ids else (low, middle)
    return scaled(high)
