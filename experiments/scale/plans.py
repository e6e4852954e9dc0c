"""Ten billion ids: what ``python -m recemb.memory`` says of them, from tensors without memory.

Each question is the command as people give it, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]

SHAPE = ["+experiment=criteo", "shape=ten_billion", "embedding.embedding_dim=128"]
GPU = "memory_per_gpu=80GB"
NODES_OF_8 = "local_world_size=8"
PLANS: dict[str, list[str]] = {
    "full tables, 64 GPUs": ["embedding=full", "world_size=64", NODES_OF_8],
    "full tables, 80 GPUs": ["embedding=full", "world_size=80", NODES_OF_8],
    "full tables, 128 GPUs": ["embedding=full", "world_size=128", NODES_OF_8],
    "full tables, 128 GPUs, Adagrad": ["embedding=full", "world_size=128", NODES_OF_8, "optimizer=adagrad"],
    "unified 10x, 8 GPUs": ["embedding=unified", "embedding.budget=10x", "world_size=8"],
    "unified 100x, 8 GPUs": ["embedding=unified", "embedding.budget=100x", "world_size=8"],
    "unified 1000x, 1 GPU": ["embedding=unified", "embedding.budget=1000x", "world_size=1"],
    "quotient_remainder 10x, 8 GPUs": ["embedding=quotient_remainder", "embedding.budget=10x", "world_size=8"],
    "quotient_remainder 100x, 8 GPUs": ["embedding=quotient_remainder", "embedding.budget=100x", "world_size=8"],
    "quotient_remainder 100x, 8 GPUs, row-wise": [
        *("embedding=quotient_remainder", "embedding.budget=100x", "world_size=8"),
        "+trainer.placement={partition_0:[row_wise]}",
    ],
}


def plan(arguments: list[str]) -> dict[str, Any]:
    """What the command says, its CPU time and memory; a refusal is an answer too."""
    command = ["recemb.memory", *SHAPE, *arguments, GPU]
    with tempfile.TemporaryDirectory() as folder:
        usage, output = Path(folder) / "usage.json", Path(folder) / "plan.json"
        process = [sys.executable, str(FOLDER / "usage.py"), str(usage), *command, f"output={output}"]
        finished = subprocess.run(process, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        answer = {"command": ["python", "-m", *command], **json.loads(usage.read_text())}
        if finished.returncode:
            refusals = [line for line in finished.stderr.splitlines() if line.startswith("ValueError: ")]
            if not refusals:
                raise RuntimeError(f"{' '.join(process)}\n{finished.stderr[-3000:]}")
            return {**answer, "refused": refusals[-1].removeprefix("ValueError: ")}
        return {**answer, "screen": finished.stdout, **_summary(json.loads(output.read_text()))}


def _summary(document: dict[str, Any]) -> dict[str, Any]:
    memory, placement = document["memory"], document["placement"]
    shards = placement["shards"]
    ranks = [rank["table_bytes"] + rank["optimizer_bytes"] for rank in placement["ranks"]]
    kinds = {shard["table"]: shard["sharding_type"] for shard in shards}
    return {
        "serving_bytes": memory["serving_bytes"],
        "optimizer_bytes": memory["optimizer_bytes"],
        "ratio": memory["ratio"],
        "placements": dict(Counter(kinds.values())),
        "row_wise_tables": [table for table, kind in kinds.items() if kind == "row_wise"],
        "largest_table_rows": max(table["num_embeddings"] for table in memory["tables"]),
        "largest_shard_rows": max(shard["num_rows"] for shard in shards),
        "largest_rank_bytes": max(ranks),
        "smallest_rank_bytes": min(ranks),
    }
