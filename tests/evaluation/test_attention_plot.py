from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from torchrec.modules.embedding_configs import EmbeddingConfig

from recemb.assembly import ModelInputs
from recemb.collection import CompressedEmbeddingCollection
from recemb.data.parquet import ParquetLoader
from recemb.evaluation.attention_plot import AttendedHistory, attended_histories, attention_plot, value_names
from recemb.evaluation.interest_plot import interest_plot
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
        (str(int(item)), str(int(category))) for item, category in zip(items[rows[0]], categories[rows[0]], strict=True)
    )
    weights, offsets = model.eval().attention_weights(batch.sparse)["history"]
    assert list(full.weights) == weights[offsets[rows[0]] : offsets[rows[0] + 1]].tolist()
    assert full.target == tuple(str(int(batch.sparse[name].values()[rows[0]])) for name in ("item", "category"))
    target = int(batch.sparse["category"].values()[rows[0]])
    assert full.same() == [int(category) == target for category in categories[rows[0]]]
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


def history(target: str, categories: str, weights: list[float]) -> AttendedHistory:
    events = tuple((f"item {place}", category) for place, category in enumerate(categories))
    return AttendedHistory(("item", target), events, tuple(weights), True, 0.5)


def test_interests_keep_their_colour_from_target_to_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    user = [history("a", "aaabbc", [1, 2, 3, 0, 0.5, -1]), history("b", "aaabbcdef", [0] * 9), history("z", "a", [0.1])]
    marked = {"a": [0, 2], "b": [3], "z": []}
    interest_plot(
        [user, user],
        tmp_path / "interests.png",
        title="two users",
        marked=lambda item: [place in marked[item.target[1]] for place in range(len(item.events))],
        mark_meaning="dot",
    )
    axes = figures[0].axes
    assert len(axes) == 6
    assert [bar.get_height() for bar in axes[0].patches] == [1, 2, 3, 0, 0.5, -1]
    colours = {}
    for item, axis in zip(user, axes, strict=False):
        for (_, category), bar in zip(item.events, axis.patches, strict=True):
            assert colours.setdefault(category, bar.get_facecolor()) == bar.get_facecolor()
        [heading] = [text for text in axis.get_children() if isinstance(text, Text) and "target of" in text.get_text()]
        assert to_rgba(heading.get_color()) == colours.get(item.target[1], to_rgba("#24292f"))
    # Of six categories four have a colour; the two rarest share the grey.
    assert len({colours[name] for name in "abcd"}) == 4 and colours["e"] == colours["f"] not in map(colours.get, "abcd")
    assert [line.get_xdata().tolist() for line in axes[0].lines if line.get_marker() == "o"] == [[0, 2]]


def test_every_user_needs_as_many_targets(tmp_path: Path) -> None:
    one = history("a", "a", [1])
    with pytest.raises(ValueError, match=r"as many targets for each are required, got \[1, 2\] targets"):
        interest_plot([[one], [one, one]], tmp_path / "interests.png", title="")
    with pytest.raises(ValueError, match=r"one user at least.* got \[\] targets"):
        interest_plot([], tmp_path / "interests.png", title="")
