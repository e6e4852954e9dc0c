"""Every stage of DNIS, PEP and AutoDim on a small log, from the supernet to the model that serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import recemb
from recemb.collection import compressed_groups
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.methods.autodim import AutoDim
from recemb.methods.dnis import Dnis
from recemb.methods.mixed_dimension import MixedDimension
from recemb.plan import CompressionPlan
from recemb.run_folder import load_model
from recemb.training.run import train
from tests.data.encoded import write_encoded
from tests.training.test_stages import config_of, results_of

FULL = (20 + 100 + 1000) * 8 * 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "encoded"
    write_encoded(root, rows=3000)
    return root


def check_served(run: Path, data: Path) -> None:
    """The saved model gives the logits of the last checkpoint."""
    served, masked = recemb.load(run / "model"), load_model(run)[0]
    batch = next(iter(ParquetLoader(Manifest.load(data), "test", batch_size=100)))
    with torch.no_grad():
        torch.testing.assert_close(served(batch.dense, batch.sparse), masked(batch.dense, batch.sparse))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("dnis", ["embedding.method.learning_rate=0.1", "embedding.method.structured=true", "embedding.budget=4x"]),
        ("pep", []),
        ("pep", ["embedding.method.per=column"]),
    ],
    ids=["dnis structured", "pep", "pep per column"],
)
def test_search_ends_with_a_model_of_the_budgets_bytes(
    name: str, overrides: list[str], data: Path, tmp_path: Path
) -> None:
    train(config_of(data, tmp_path / "run", f"embedding={name}", "trainer.validate_every_steps=40", *overrides))
    results = results_of(tmp_path / "run")
    budget = FULL / (4 if "embedding.budget=4x" in overrides else 10)
    assert 0.7 * budget < results["embedding"]["bytes"] <= budget
    check_served(tmp_path / "run", data)


def test_selections_move_in_the_search_alone_and_dense_layers_outside_of_it(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config_of(data, run, "embedding=dnis", "trainer.validate_every_steps=40"))
    assert 0.95 * FULL / 10 < results_of(run)["embedding"]["bytes"] <= FULL / 10
    models = [
        load_model(run / "stages" / stage / "checkpoints" / which)[0]
        for stage, which in (("0-warm_start", "best"), ("1-search", "last"))
    ]
    warm, searched = models
    [warm_group], [group] = compressed_groups(warm), compressed_groups(searched)
    assert isinstance(warm_group, Dnis) and isinstance(group, Dnis)
    assert bool((warm_group.selection == 1).all())
    assert bool((group.selection < 1).any())
    dense = {name: weight for name, weight in warm.named_parameters() if not name.startswith("embeddings.")}
    assert dense and all(torch.equal(weight, searched.get_parameter(name)) for name, weight in dense.items())


@pytest.mark.parametrize("reset", ["fresh", "none"])
def test_autodim_ends_with_mixed_dimensions_of_its_plan(reset: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(
        config_of(
            data,
            run,
            "embedding=autodim",
            "embedding.budget=3x",
            f"embedding.stages.2.reset={reset}",
            "trainer.validate_every_steps=40",
        )
    )
    widths = CompressionPlan.load(run / "stages" / "1-prune" / "plan").options["widths"]
    [group] = compressed_groups(load_model(run)[0])
    assert isinstance(group, MixedDimension)
    assert [widths[table.name] for table in group.tables] == group.widths
    assert results_of(run)["embedding"]["bytes"] <= FULL / 3
    [search] = compressed_groups(load_model(run / "stages" / "0-search" / "checkpoints" / "last")[0])
    assert isinstance(search, AutoDim)
    assert bool(search.architecture.any()) and int(search.num_steps) > 0
    check_served(run, data)
