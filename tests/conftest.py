"""One thread for every test: two OpenMP threads stall by 10 to 400 times when a neighbour holds a core."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
