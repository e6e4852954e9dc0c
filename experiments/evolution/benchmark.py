"""Candidates a second of the evolution of widths, against a search that passes over the data for each of them.

    python experiments/evolution/benchmark.py data/criteo_head80k

The supernet is untrained: what a pass costs does not depend on the weights. Both searches score the same candidates, by
turns, on the validation rows; the plain one evaluates the model anew for each.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recemb.assembly import ModelInputs
from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluation import metrics
from recemb.evaluation.predictions import collect
from recemb.files import write_json
from recemb.methods.optembed import OptEmbed, Thresholds
from recemb.models.dlrm import DLRM
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.run_folder import git_state
from recemb.training.candidates import CandidateScores
from recemb.training.evolution import Candidate, Evolution, EvolutionSettings

HERE = Path(__file__).parent
BATCH_SIZE = 16_384
DIM = 16
POPULATION = 20
CPU = torch.device("cpu")


class PlainScores:
    """A pass over the data for each candidate."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str], loader: Callable[[], ParquetLoader]) -> None:
        self.model, self.names, self.loader = model, names, loader
        [group] = compressed_groups(model)
        assert isinstance(group, OptEmbed)
        self.group = group

    def __call__(self, candidates: Sequence[Candidate], sample: bool = False) -> list[float]:
        scores = []
        for candidate in candidates:
            self.group.set_widths(dict(zip(self.names, candidate, strict=True)))
            predictions = collect(self.model, self.loader())
            scores.append(metrics.auc(predictions.labels, predictions.scores))
        self.group.set_widths(None)
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    manifest = Manifest.load(arguments.data)
    inputs = ModelInputs.of(manifest)
    tables = inputs.logical_tables(DIM)
    names = [table.name for table in tables]
    model = DLRM(
        CompressedEmbeddingBagCollection(tables, partial(OptEmbed, thresholds=Thresholds()), check_ids=False),
        num_dense=len(inputs.numeric),
        bottom_layers=[256, 128, DIM],
        over_layers=[256, 128, 1],
    )
    model, _ = prepare(model, EmbeddingOptimizer("sgd"), partial(torch.optim.SGD, lr=0.1))

    def loader() -> ParquetLoader:
        return ParquetLoader(manifest, "validation", batch_size=BATCH_SIZE)

    every = 5
    plain = PlainScores(model, names, loader)
    ours = CandidateScores(model, names, loader, device=CPU, every=every)
    generator = random.Random(0)
    candidates = [tuple(generator.randint(1, DIM) for _ in names) for _ in range(POPULATION)]
    assert plain(candidates[:3]) == ours(candidates[:3])
    rates: dict[str, list[float]] = {"plain": [], "one_pass": [], "one_pass_and_sample": []}
    for _ in range(arguments.rounds):
        rates["plain"].append(rate(lambda: plain(candidates)))
        rates["one_pass"].append(rate(lambda: ours(candidates)))
        # Of 20, the better 5 are scored on all rows.
        rates["one_pass_and_sample"].append(rate(lambda: (ours(candidates, True), ours(candidates[: POPULATION // 4]))))
    settings = EvolutionSettings(generations=3)
    winners = [Evolution([DIM] * len(names), settings, seed=1).run(score) for score in (plain, ours)]
    result = {
        "data": arguments.data.name,
        "rows": manifest.split("validation").rows,
        "tables": len(names),
        "candidates_per_cpu_second": {name: statistics.median(values) for name, values in rates.items()},
        "times_plain": {
            name: statistics.median(value / base for value, base in zip(values, rates["plain"], strict=True))
            for name, values in rates.items()
        },
        "same_winner": winners[0] == winners[1],
        "git": git_state(),
    }
    write_json(HERE / "results" / f"{arguments.data.name}.json", result)
    print(json.dumps(result, indent=2))


def rate(task: Callable[[], object]) -> float:
    """Candidates a second of CPU time."""
    begun = time.process_time()
    task()
    return POPULATION / (time.process_time() - begun)


if __name__ == "__main__":
    main()
