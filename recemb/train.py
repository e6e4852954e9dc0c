"""Train a click model on compressed tables and evaluate it.

    python -m recemb.train +experiment=criteo
    python -m recemb.train data=parquet data.path=DIR embedding=unified embedding.budget=10x seed=1
    python -m recemb.train +experiment=criteo embedding=magnitude     # a search: all its stages, to the test split
    python -m recemb.train resume=RUN_FOLDER                          # +stage=NAME for one stage of a search
    torchrun --nproc-per-node 2 -m recemb.train +experiment=criteo

Every key: ``configs/train.yaml`` and the groups beside it.
"""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig

from recemb import command_line


def task(config: dict[str, Any]) -> float:
    """Run, or continue, the training that ``config`` describes; the validation metric, for Hydra's sweepers."""
    # Here, because they import torch: `--help` need not wait for it.
    from recemb.ranks import joined_ranks
    from recemb.training.report import summary_table
    from recemb.training.resume import config_to_train
    from recemb.training.run import train

    with joined_ranks() as ranks:
        content = config_to_train(config, HydraConfig.get().overrides.task)
        results = train(content, continues=config["resume"] is not None, ranks=ranks)
    if ranks.is_first:
        print(f"\n{summary_table(results)}")
    return float(next(value for key, value in results["validation"].items() if key in ("auc", "gauc", "logloss")))


def main() -> None:
    command_line.run(task, "train")


if __name__ == "__main__":
    main()
