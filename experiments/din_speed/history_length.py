"""CPU time of a DIN training step against the total length of its histories: it should grow in proportion.

python experiments/din_speed/history_length.py       # results/history_length.json and .png
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER / "contenders")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from settings import ATTENTION_LAYERS, EMBEDDING_DIM, LAYERS  # noqa: E402
from torch.nn.functional import binary_cross_entropy_with_logits  # noqa: E402
from torchrec.modules.embedding_configs import EmbeddingConfig  # noqa: E402

from recemb.allocator import tune_allocators  # noqa: E402
from recemb.collection import CompressedEmbeddingCollection  # noqa: E402
from recemb.data.batch import keyed_bags  # noqa: E402
from recemb.methods.full import Full  # noqa: E402
from recemb.models.din import DIN  # noqa: E402
from recemb.models.histories import History  # noqa: E402
from recemb.optimizers import EmbeddingOptimizer  # noqa: E402
from recemb.preparation import prepare  # noqa: E402

SAMPLES, ITEMS, CATEGORIES = 512, 63_001, 801
MEAN_LENGTHS = (0, 12, 25, 50, 100, 200, 400)
ROUNDS = 12


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tune_allocators()
    tables = [
        EmbeddingConfig(
            name=f"t_{name}", num_embeddings=rows, embedding_dim=EMBEDDING_DIM, feature_names=[name, f"{name}_history"]
        )
        for name, rows in (("item", ITEMS), ("category", CATEGORIES))
    ]
    model = DIN(
        CompressedEmbeddingCollection(tables, Full, check_ids=False),
        num_dense=0,
        histories=[History("history", ("item_history", "category_history"), ("item", "category"))],
        layers=[*LAYERS, 1],
        attention_layers=ATTENTION_LAYERS,
    )
    model, optimizer = prepare(model, EmbeddingOptimizer(learning_rate=0.01), partial(torch.optim.Adam, fused=True))
    keys = [name for table in tables for name in table.feature_names]

    def batch(length: int):
        # Half of the samples hold nearly all events: padded models would pay for the longest one.
        lengths = torch.full((SAMPLES,), length, dtype=torch.int32)
        lengths[::2] = lengths[::2] * 19 // 10
        lengths[1::2] = 2 * length - lengths[::2]
        ones = torch.ones(SAMPLES, dtype=torch.int32)
        sizes = [SAMPLES, int(lengths.sum()), SAMPLES, int(lengths.sum())]
        ids = [torch.randint(n, (size,)) for size, n in zip(sizes, (ITEMS, ITEMS, CATEGORIES, CATEGORIES), strict=True)]
        return keyed_bags(keys, torch.stack([ones, lengths, ones, lengths]), torch.cat(ids))

    batches = {length: batch(length) for length in MEAN_LENGTHS}
    dense, labels = torch.zeros(SAMPLES, 0), torch.randint(2, (SAMPLES,)).float()
    seconds: dict[int, list[float]] = {length: [] for length in MEAN_LENGTHS}
    for _ in range(ROUNDS):
        for length, features in batches.items():
            started = time.process_time()
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(model(dense, features), labels).backward()
            optimizer.step()
            seconds[length].append(time.process_time() - started)
    events = np.array([SAMPLES * length for length in MEAN_LENGTHS])
    # The quickest of the rounds: what a neighbour on the machine adds is no cost of ours.
    best = np.array([min(seconds[length]) for length in MEAN_LENGTHS])
    slope, base = np.polyfit(events, best, 1)
    residual = np.abs(best - (base + slope * events)).max() / best.max()
    result = {
        "samples": SAMPLES,
        "mean_lengths": MEAN_LENGTHS,
        "cpu_milliseconds": [round(1e3 * value, 3) for value in best],
        "nanoseconds_per_event": 1e9 * slope,
        "milliseconds_without_events": 1e3 * base,
        "largest_deviation_from_a_line": residual,
    }
    (FOLDER / "results").mkdir(exist_ok=True)
    (FOLDER / "results" / "history_length.json").write_text(json.dumps(result, indent=1) + "\n")
    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    axis.plot(events, 1e3 * best, "o", label="measured, quickest of the rounds")
    axis.plot(events, 1e3 * (base + slope * events), label=f"{1e9 * slope:.0f} ns an event")
    axis.set_xlabel(f"events of all histories in a batch of {SAMPLES} samples")
    axis.set_ylabel("CPU milliseconds a step")
    axis.legend()
    figure.tight_layout()
    figure.savefig(FOLDER / "results" / "history_length.png", dpi=100)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
