"""From a byte budget to a method's options: the only bisection there is."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.memory import estimate_memory
from recemb.method import Method, method_class

_UNITS = {
    **{"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40},
}


class BudgetOutOfReach(ValueError):
    """No form of a method is as small as its budget: a finding about the method, where other errors are mistakes."""


def parse_budget(budget: float | int | str, full_bytes: int) -> int:
    """Bytes that a budget means.

    Args:
        budget: ``"10x"`` (a tenth of full tables), a fraction in (0, 1] of them (``0.1``), or bytes: an integer above 1
            or a string with a unit (``"50MB"``, ``"64MiB"``).
        full_bytes: bytes of the uncompressed tables.

    Raises:
        ValueError: anything else, or a ratio or fraction where no full table has a size (unbounded ids).
    """
    text = str(budget).strip().lower()
    if (size := _with_unit(text)) is not None:
        return size
    if match := re.fullmatch(r"([0-9.]+)\s*x", text):
        return _share(1 / max(float(match[1]), 0.5), full_bytes, budget)
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if 0 < number <= 1:
        return _share(number, full_bytes, budget)
    if number > 1 and number.is_integer():
        return int(number)
    raise ValueError(
        "budget must be a ratio of at least 1 ('10x'), a fraction in (0, 1] (0.1) or bytes (50000000, '50MB'), "
        f"got {budget!r}"
    )


def parse_bytes(size: int | str) -> int:
    """Bytes that a size means: an integer, or a string with a unit (``"80GB"``, ``"24GiB"``).

    Raises:
        ValueError: anything else, or less than 1.
    """
    text = str(size).strip().lower()
    value = int(text) if text.isdigit() else _with_unit(text)
    if value is None or value < 1:
        raise ValueError(f"a size must be bytes (80000000000) or have a unit (80GB, 24GiB, 1TB), got {size!r}")
    return value


def _with_unit(text: str) -> int | None:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmgt]i?b)", text)
    return int(size) if match and math.isfinite(size := float(match[1]) * _UNITS[match[2]]) else None


def _share(fraction: float, full_bytes: int, budget: float | int | str) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(f"budget must be a ratio of at least 1 ('10x') or a fraction in (0, 1], got {budget!r}")
    if full_bytes == 0:
        raise ValueError(
            f"budget {budget!r} is relative to full tables, and unbounded ids have none; give bytes ('50MB')"
        )
    return int(full_bytes * fraction)


def fit_to_budget(
    tables: Sequence[EmbeddingBagConfig], method: Method, budget_bytes: int, *, full_below_rows: int = 0
) -> Method:
    """``method`` with its budget knob at the value whose serving bytes are the most that fit.

    Args:
        tables: the logical tables.
        method: a class of ``recemb.methods`` or a functools.partial of one, with the knob left open.
        budget_bytes: bytes for everything serving needs, tables that stay full included.
        full_below_rows: as for the collection.

    Returns:
        A functools.partial with the knob bound; ``method`` itself where its size is fixed and fits.

    Raises:
        BudgetOutOfReach: the budget is below the smallest size the method can reach (named).
        ValueError: the knob is bound already.
    """

    def size(candidate: Method) -> int:
        return estimate_memory(tables, candidate, full_below_rows=full_below_rows).serving_bytes

    cls = method_class(method)
    knob = cls.budget_knob
    large = [table for table in tables if table.num_embeddings >= full_below_rows]
    if knob is None or not large:
        if (fixed := size(method)) > budget_bytes:
            raise BudgetOutOfReach(
                f"budget of {budget_bytes:,} bytes: {cls.__name__} takes {fixed:,} bytes and has no smaller form"
            )
        return method
    if isinstance(method, functools.partial) and knob in method.keywords:
        raise ValueError(f"{cls.__name__}: give {knob} or a budget, not both; got {knob}={method.keywords[knob]}")

    def at(value: int) -> Method:
        return functools.partial(method, **{knob: value})

    low, high = cls.budget_range(large)
    if size(at(low)) > size(at(high)):
        low, high = high, low
    if (smallest := size(at(low))) > budget_bytes:
        raise BudgetOutOfReach(
            f"budget of {budget_bytes:,} bytes cannot be met: the smallest {cls.__name__} of these tables takes "
            f"{smallest:,} bytes ({knob}={low})"
        )
    # Invariant: at(low) fits. ``high`` may lie on either side of ``low``.
    if size(at(high)) <= budget_bytes:
        return at(high)
    while abs(high - low) > 1:
        middle = (low + high) // 2
        if size(at(middle)) <= budget_bytes:
            low = middle
        else:
            high = middle
    return at(low)
