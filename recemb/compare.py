"""Compare methods under byte budgets: tune alike, train every cell once, draw and read the result.

    python -m recemb.compare +experiment=criteo methods=[unified,hashing] budgets=[10x,100x] seeds=3
    python -m recemb.compare recommend=10x output=STUDY_FOLDER

The same command goes on with a study that was killed, one command at a time. Every key: ``configs/compare.yaml``.
``--config-dir DIR`` adds methods and others of the user's own.
"""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig

from recemb import command_line


def task(config: dict[str, Any]) -> None:
    """Run the study that ``config`` describes, or read it."""
    # Here, because they import torch: `--help` need not wait for it.
    from recemb.comparison.job import CompareConfig, compare

    own = {key: config[key] for key in CompareConfig.__dataclass_fields__}
    hydra = HydraConfig.get()
    # Of --config-dir and hydra.searchpath; the trainings find the others themselves.
    folders = [
        f"{source.schema}://{source.path}"
        for source in hydra.runtime.config_sources
        if source.provider not in ("hydra", "main", "schema")
    ]
    print(compare(own, list(hydra.overrides.task), folders))


def main() -> None:
    command_line.run(task, "compare")


if __name__ == "__main__":
    main()
