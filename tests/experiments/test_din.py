"""What the study of DIN draws and counts of attention weights, against plain loops over a small log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig

from data_pipelines.behaviour import prepare_behaviour
from data_pipelines.behaviour_model import ITEMS_PER_STYLE, STYLES, BehaviourModel
from recemb.assembly import ModelInputs
from recemb.collection import CompressedEmbeddingCollection
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluation.attention_plot import AttendedHistory, value_names
from recemb.methods.full import Full
from recemb.models.din import DIN

DIN_STUDY = Path(__file__).resolve().parents[2] / "experiments" / "din"


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.syspath_prepend(str(DIN_STUDY))
    return prepare_behaviour(tmp_path / "log", rows=4000, seed=3, max_history=20)


def model_of(manifest: Manifest) -> DIN:
    torch.manual_seed(0)
    inputs = ModelInputs.of(manifest)
    tables = [
        EmbeddingConfig(name=t.name, num_embeddings=t.num_embeddings, embedding_dim=4, feature_names=t.feature_names)
        for t in inputs.logical_tables(4)
    ]
    collection = CompressedEmbeddingCollection(tables, Full)
    return DIN(collection, num_dense=0, histories=inputs.histories, bags=inputs.bags).eval()


def test_styles_are_those_of_the_log(manifest: Manifest) -> None:
    from interests import item_styles

    names = BehaviourModel(seed=3, max_history=20).names
    assert item_styles(manifest) == {str(names[i]): i // ITEMS_PER_STYLE % STYLES for i in range(len(names))}


def test_weights_of_matching_events_equal_a_plain_loop(manifest: Manifest) -> None:
    from attention_match import by_property
    from interests import item_styles

    model = model_of(manifest)
    batch = next(iter(ParquetLoader(manifest, "test", batch_size=4000)))
    weights, offsets = model.attention_weights(batch.sparse)["history"]
    styles, names = item_styles(manifest), value_names(manifest)["item"]
    targets = {name: batch.sparse[name].values().tolist() for name in ("item", "category")}
    events = {name: batch.sparse[f"{name}_history"].values().tolist() for name in targets}
    same: dict[str, list[float]] = {"item": [], "category": [], "style": []}
    other: dict[str, list[float]] = {"item": [], "category": [], "style": []}
    larger: dict[str, list[bool]] = {"item": [], "category": [], "style": []}
    for row in range(len(batch)):
        mine: dict[tuple[str, bool], list[float]] = {}
        for event in range(int(offsets[row]), int(offsets[row + 1])):
            item, category = (events[name][event] == targets[name][row] for name in targets)
            first, second = names[events["item"][event]], names[targets["item"][row]]
            style = category and styles.get(first, -1) == styles.get(second, -1)
            for kind, match in (("item", item), ("category", category), ("style", style)):
                if kind == "style" or targets[kind][row]:
                    (same if match else other)[kind].append(float(weights[event]))
                    mine.setdefault((kind, match), []).append(float(weights[event]))
        for kind in same:
            if (kind, True) in mine and (kind, False) in mine:
                larger[kind].append(np.abs(mine[kind, True]).mean() > np.abs(mine[kind, False]).mean())
    found = by_property(model, manifest)
    assert set(found) == {"item", "category", "style"}
    for kind, result in found.items():
        assert result["mean_weight_same"] == pytest.approx(np.mean(same[kind]), rel=1e-5)
        assert result["mean_weight_other"] == pytest.approx(np.mean(other[kind]), rel=1e-5)
        assert result["mean_size_same"] == pytest.approx(np.abs(same[kind]).mean(), rel=1e-5)
        assert result["mean_size_other"] == pytest.approx(np.abs(other[kind]).mean(), rel=1e-5)
        assert (result["events_same"], result["events_other"]) == (len(same[kind]), len(other[kind]))
        assert result["histories_with_both"] == len(larger[kind])
        assert result["same_larger_in"] == pytest.approx(np.mean(larger[kind]))


def test_users_drawn_were_shown_two_interests_and_none(manifest: Manifest) -> None:
    from interests import FEWEST_EVENTS, LONGEST, SHORTEST, rows_of_users

    assert manifest.user is not None
    batch = next(iter(ParquetLoader(manifest, "test", batch_size=4000, extra_columns=[manifest.user])))
    users = batch.extra[manifest.user]
    histories, targets = batch.sparse["category_history"].to_dense(), batch.sparse["category"].values()
    found = rows_of_users(batch, users)
    assert found
    for rows in found:
        matches = [int((histories[row] == targets[row]).sum()) for row in rows]
        assert matches[0] >= matches[1] >= FEWEST_EVENTS and matches[2] == 0
        assert len({int(targets[row]) for row in rows}) == 3 and len({users[row] for row in rows}) == 1
        assert all(SHORTEST <= len(histories[row]) <= LONGEST for row in rows)


def test_matching_events_are_drawn_upwards_whatever_sign_they_were_trained_to(manifest: Manifest) -> None:
    from interests import oriented

    events = (("1", "a"), ("2", "b"), ("3", "a"))
    for weights in ((0.5, -0.1, 0.3), (-0.5, 0.1, -0.3)):
        history = AttendedHistory(("9", "a"), events, weights, clicked=True, probability=0.5)
        assert oriented([[history]])[0][0].weights == (0.5, -0.1, 0.3)
