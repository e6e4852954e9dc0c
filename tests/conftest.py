"""One thread for every test, and no limit on the time of a generated example: neighbours on the machine cost either.

Two OpenMP threads stall by 10 to 400 times when one holds a core.
"""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("untimed")
settings.load_profile("untimed")
