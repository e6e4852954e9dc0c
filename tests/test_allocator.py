"""Freed memory stays with the process: the next step does not fault it in again."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own, because malloc cannot be set back.
PROGRAM = """
import resource, sys
import numpy as np
from recemb.allocator import tune_allocators

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = np.ones(2_000_000)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert tune_allocators()
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_blocks_of_16_megabytes_are_reused_without_page_faults() -> None:
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    # 20 blocks of 3,907 pages each would be 78,000.
    assert int(finished.stdout) < 4000
