"""What plans refuse."""

from __future__ import annotations

import pytest
import torch

from recemb.plan import TablePlan


def test_kept_columns_of_no_group_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kept_columns must have at least one group, got shape \(0, 4\)"):
        TablePlan(10, 4, kept_columns=torch.zeros(0, 4, dtype=torch.bool))
