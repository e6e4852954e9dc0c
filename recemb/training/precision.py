"""Says when bfloat16 does not pay: most processors multiply it slower than float32."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Rows, inputs and outputs of the product that is timed: about a DLRM layer, 3 ms.
_SHAPE = (2048, 256, 256)
_REPETITIONS = 3


def bf16_speedup() -> float:
    """How much faster than float32 this processor multiplies bfloat16 matrices, on as many threads as torch uses.

    2 or more with AMX or on AMD since Zen 4; about 0.5 on Intel without AMX (also where a virtual machine hides it),
    whose bfloat16 instruction has half the rate; far less without any bfloat16 instruction.
    """
    return _seconds(torch.float32) / _seconds(torch.bfloat16)


def warn_where_bf16_is_slow(device: torch.device) -> None:
    """Log a warning where ``trainer.precision=bf16`` makes training slower. It trains in bfloat16 all the same."""
    if device.type != "cpu":
        return
    speedup = bf16_speedup()
    if speedup < 1.0:
        logger.warning(
            "trainer.precision=bf16: this processor multiplies bfloat16 at %.2f times the speed of float32, "
            "so trainer.precision=fp32 is both faster and more exact here",
            speedup,
        )


def _seconds(dtype: torch.dtype) -> float:
    rows, inputs, outputs = _SHAPE
    left, right = torch.ones(rows, inputs, dtype=dtype), torch.ones(inputs, outputs, dtype=dtype)
    return min(_time_product(left, right) for _ in range(1 + _REPETITIONS))


def _time_product(left: Tensor, right: Tensor) -> float:
    started = time.perf_counter()
    torch.mm(left, right)
    return time.perf_counter() - started
