"""Run a module as ``python -m`` does, then write its CPU seconds and peak memory to a file.

    python experiments/scale/usage.py FILE.json recemb.memory ARGUMENTS...

The process asks for its own peak: what its parent is told of it counts the memory of the parent too, which the child
had between fork and exec.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
import time
from pathlib import Path


def main() -> None:
    target, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    finally:
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert peak is not None
        usage = {"cpu_seconds": time.process_time(), "peak_bytes": 1024 * int(peak[1])}
        Path(target).write_text(json.dumps(usage))


if __name__ == "__main__":
    main()
