from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig

from recemb.assembly import ModelInputs
from recemb.collection import CompressedEmbeddingCollection
from recemb.data.parquet import ParquetLoader
from recemb.evaluation.attention_plot import attended_histories, attention_plot, value_names
from recemb.methods.full import Full
from recemb.models.din import DIN
from tests.histories import write_behaviour_log


def model_of(manifest, **options) -> DIN:
    inputs = ModelInputs.of(manifest)
    tables = [
        EmbeddingConfig(name=t.name, num_embeddings=t.num_embeddings, embedding_dim=8, feature_names=t.feature_names)
        for t in inputs.logical_tables(8)
    ]
    collection = CompressedEmbeddingCollection(tables, Full)
    return DIN(collection, num_dense=1, histories=inputs.histories, bags=inputs.bags, **options)


def test_weights_stand_beside_the_events_of_their_rows(tmp_path: Path) -> None:
    manifest = write_behaviour_log(tmp_path / "log", rows=400)
    torch.manual_seed(0)
    model = model_of(manifest)
    batch = next(iter(ParquetLoader(manifest, "test", batch_size=40)))
    items, categories = batch.sparse["item_history"].to_dense(), batch.sparse["category_history"].to_dense()
    lengths = [len(row) for row in items]
    rows = [lengths.index(max(lengths)), lengths.index(0)]
    full, empty = attended_histories(model, batch, rows, names=value_names(manifest))
    assert full.events == tuple(
        f"{int(item)}, {int(category)}" for item, category in zip(items[rows[0]], categories[rows[0]], strict=True)
    )
    weights, offsets = model.eval().attention_weights(batch.sparse)["history"]
    assert list(full.weights) == weights[offsets[rows[0]] : offsets[rows[0] + 1]].tolist()
    target = int(batch.sparse["category"].values()[rows[0]])
    assert list(full.same) == [int(category) == target for category in categories[rows[0]]]
    assert empty.events == empty.weights == ()
    attention_plot([full, empty], tmp_path / "attention.png", title="two users")
    assert (tmp_path / "attention.png").stat().st_size > 5000
    cut = attended_histories(model_of(manifest, max_history=2), batch, rows[:1])[0]
    assert cut.events == full.events[-2:] and len(cut.weights) == 2


def test_unusable_arguments_are_named(tmp_path: Path) -> None:
    manifest = write_behaviour_log(tmp_path / "log", rows=400)
    batch = next(iter(ParquetLoader(manifest, "test", batch_size=40)))
    with pytest.raises(ValueError, match=r"rows must be in \[0, 40\).*got 40"):
        attended_histories(model_of(manifest), batch, [40])
    with pytest.raises(ValueError, match="pooling='sum'"):
        attended_histories(model_of(manifest, pooling="sum"), batch, [0])
    with pytest.raises(ValueError, match="one history at least"):
        attention_plot([], tmp_path / "attention.png")
