"""One global threshold on the size of values: which of them a budget keeps.

Shapes: n rows of a table, D its width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from recemb.budget import BudgetOutOfReach
from recemb.plan import CompressionPlan, TablePlan
from recemb.pruned_bytes import plan_bytes

# Of float32: the bit patterns of numbers from 0 on are in the order of the numbers.
_INFINITY_BITS = 0x7F800000


def magnitude_plan(
    values: Mapping[str, Tensor],
    budget_bytes: int | None,
    *,
    source: str,
    size: Callable[[CompressionPlan], int] = plan_bytes,
) -> CompressionPlan:
    """Keep the values of largest magnitude, over all tables alike, and no zero.

    Args:
        values: logical table name -> (n, D) float32.
        budget_bytes: of the converted tables, index included; None: every value that is not zero.
        source: see ``CompressionPlan``.
        size: bytes of a plan; grows with what is kept.

    Raises:
        BudgetOutOfReach: tables without a single value take more than the budget; the least is named.
    """

    def plan(bits: int) -> CompressionPlan:
        threshold = float(torch.tensor(bits, dtype=torch.int32, device="cpu").view(torch.float32))
        tables = {
            name: TablePlan(part.shape[0], part.shape[1], kept_values=(part.abs() > threshold).cpu())
            for name, part in values.items()
        }
        return CompressionPlan(tables, source)

    everything = plan(0)
    if budget_bytes is None or size(everything) <= budget_bytes:
        return everything
    # Invariant: the values above the number of pattern ``high`` fit, those above that of ``low`` do not.
    low, high = 0, _INFINITY_BITS
    if (least := size(plan(high))) > budget_bytes:
        raise BudgetOutOfReach(
            f"budget of {budget_bytes:,} bytes cannot be met: empty tables take {least:,} bytes already"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if size(plan(middle)) <= budget_bytes:
            high = middle
        else:
            low = middle
    return plan(high)
