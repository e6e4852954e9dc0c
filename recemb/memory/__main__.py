"""Bytes of compressed tables, and their places on GPUs, before anything is allocated.

    python -m recemb.memory +experiment=criteo embedding=unified embedding.budget=10x
    python -m recemb.memory +experiment=criteo embedding=full embedding.embedding_dim=128 \\
        shape=criteo_1tb world_size=8 memory_per_gpu=80GB output=plan.json

Every key: ``configs/memory.yaml`` beside those of ``configs/train.yaml``.
"""

from __future__ import annotations

import sys
from typing import Any

from recemb import command_line


def task(config: dict[str, Any]) -> None:
    # Here, because they import torch: `--help` need not wait for it.
    from recemb.memory.job import run
    from recemb.memory.tables import as_text

    print(as_text(run(config)))


def main() -> None:
    arguments = (f"shape.{text}" if text.startswith("cardinalities=") else text for text in sys.argv[1:])
    sys.argv[1:] = list(arguments)
    command_line.run(task, "memory")


if __name__ == "__main__":
    main()
