"""Methods that reorganise themselves between steps, in the training loop: when they are called, and resuming."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.method import Method
from recemb.methods.cafe import Cafe
from recemb.methods.cce import ClusteredCompositional
from recemb.methods.full import Full
from recemb.models.dlrm import DLRM
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.training.loop import TrainingLoop
from tests.training import test_loop
from tests.training.small import FEATURES, NUM_EMBEDDINGS


class Recording(Full):
    """Full tables that note the steps they are told of."""

    def after_step(self, step: int) -> None:
        self.steps = [*getattr(self, "steps", []), step]


def model_of(method: Method) -> Any:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=NUM_EMBEDDINGS, embedding_dim=4, feature_names=[name])
        for name in FEATURES
    ]
    embeddings = CompressedEmbeddingBagCollection(tables, method)
    model = DLRM(embeddings, num_dense=3, bottom_layers=[8, 4], over_layers=[8, 1])
    return prepare(model, EmbeddingOptimizer(learning_rate=0.05), partial(torch.optim.Adam, lr=1e-2))


def loop_of(method: Method, folder: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingLoop:
    monkeypatch.setattr(test_loop, "model_and_optimizer", lambda name: model_of(method))
    return test_loop.make_loop(folder, checkpoint_every_steps=1)


def test_methods_are_told_of_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_of(Recording, tmp_path, monkeypatch)
    test_loop.run(loop, tmp_path)
    assert [group.steps for group in compressed_groups(loop.model)] == [list(range(1, 21))]


METHODS: dict[str, Method] = {
    "cce": partial(ClusteredCompositional, num_clusters=5, cluster_at_steps=[4, 9, 13]),
    "cafe": partial(Cafe, num_embeddings=50, threshold=2.0, decay=0.5),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("killed_at", [3, 4, 12])
def test_a_resumed_run_reorganises_as_if_it_had_not_been_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, killed_at: int
) -> None:
    for part in ("whole", "killed"):
        (tmp_path / part).mkdir()
    whole = loop_of(METHODS[name], tmp_path / "whole", monkeypatch)
    test_loop.run(whole, tmp_path / "whole")
    killed = loop_of(METHODS[name], tmp_path / "killed", monkeypatch)
    inner = killed._train_step

    def step(batch: Any) -> None:
        if killed.step == killed_at:
            raise test_loop.Killed
        inner(batch)

    monkeypatch.setattr(killed, "_train_step", step)
    with pytest.raises(test_loop.Killed):
        test_loop.run(killed, tmp_path / "killed")
    resumed = loop_of(METHODS[name], tmp_path / "killed", monkeypatch)
    resumed.resume()
    assert resumed.step == killed_at
    test_loop.run(resumed, tmp_path / "killed")
    expected = test_loop.state(whole)
    for key, tensor in test_loop.state(resumed).items():
        assert torch.equal(tensor, expected[key]), key
