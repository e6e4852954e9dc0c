"""A level of compression for each table, so that all tables together come as near to a size as their levels allow.

Methods have coarse options: ids that share a row, units of a network. The same value for all tables would leave up to a
third of a budget unused; one more or less in some of the tables fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def spend(total: int, sizes: Sequence[int], num_levels: int, cost: Callable[[int, int], int]) -> list[int]:
    """The level of every table: the highest common one that ``total`` pays, some tables higher to use up the rest.

    In order of size, the largest first, a table takes one level more if that is paid yet; then each takes what is paid
    yet. What is spent never exceeds ``total``, unless the lowest levels do, and never falls when ``total`` grows: where
    a choice changes, it changes because exactly all is spent.

    Args:
        total: what may be spent, in the unit of ``cost``.
        sizes: num_embeddings of the tables, for their order.
        num_levels: levels are 0 to num_levels - 1.
        cost: (index of a table, level) -> what it costs; must not fall with the level.

    Raises:
        ValueError: a total below 1.
    """
    if total < 1:
        raise ValueError(f"num_parameters must be at least 1 float, got {total}")
    tables = range(len(sizes))

    def highest(last: int, affordable: Callable[[int], bool]) -> int:
        """The highest level up to ``last`` that is affordable, 0 where none is."""
        low, high = 0, last
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if affordable(middle) else (low, middle - 1)
        return low

    common = highest(num_levels - 1, lambda level: sum(cost(index, level) for index in tables) <= total)
    levels = [common] * len(sizes)
    left = total - sum(cost(index, common) for index in tables)
    for limit in (min(common + 1, num_levels - 1), num_levels - 1):
        left = raise_levels(levels, left, sizes, limit, cost)
    return levels


def raise_levels(
    levels: list[int], left: int, sizes: Sequence[int], limit: int, cost: Callable[[int, int], int]
) -> int:
    """Raise each of ``levels`` in place as far as ``left`` pays, but not above ``limit``; what is left after.

    Args:
        levels: of the tables.
        left: what may be spent beyond what they cost.
        sizes: num_embeddings of the tables: the largest comes first.
        limit: the highest level.
        cost: as for ``spend``.
    """
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        low, high, paid = levels[index], max(limit, levels[index]), cost(index, levels[index])
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(index, middle) - paid <= left else (low, middle - 1)
        left -= cost(index, low) - paid
        levels[index] = low
    return left
