"""DIN as a whole: against its parts put together by hand, over every method, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.collection import CompressedEmbeddingCollection
from recemb.methods.full import Full
from recemb.methods.unified import Unified
from recemb.models.din import DIN
from recemb.models.histories import History, keep_latest
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import bags
from tests.models.tables import normal

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
TABLES = [
    EmbeddingConfig(
        name="t_item", num_embeddings=50, embedding_dim=8, feature_names=["item", "item_history", "item_bought"]
    ),
    EmbeddingConfig(
        name="t_category", num_embeddings=9, embedding_dim=4, feature_names=["category", "category_history"]
    ),
    EmbeddingConfig(name="t_group", num_embeddings=5, embedding_dim=4, feature_names=["group"]),
    EmbeddingConfig(name="t_tags", num_embeddings=6, embedding_dim=4, feature_names=["tags"]),
]
HISTORIES = (
    History("history", ("item_history", "category_history"), ("item", "category")),
    History("bought", ("item_bought",), ("item",)),
)
KEYS = [name for table in TABLES for name in table.feature_names]
IDS = {
    "item": [[3], [49], [0], [7]],
    "item_history": [[1, 2, 3], [], [5], [4, 4, 4, 49, 0, 9]],
    "item_bought": [[], [9, 8], [], [1]],
    "category": [[1], [8], [0], [2]],
    "category_history": [[1, 2, 3], [], [5], [4, 4, 4, 8, 0, 1]],
    "group": [[0], [4], [2], [2]],
    "tags": [[], [5, 0, 0], [1], [2, 3]],
}


def features(ids: dict[str, list[list[int]]] | None = None, rows: list[int] | None = None) -> KeyedJaggedTensor:
    ids = IDS if ids is None else ids
    return bags(KEYS, [[ids[key][row] for row in (range(len(ids["item"])) if rows is None else rows)] for key in KEYS])


def din(method=Full, *, check_ids: bool = True, **options) -> DIN:
    torch.manual_seed(2)
    collection = CompressedEmbeddingCollection(TABLES, method, check_ids=check_ids)
    settings = {"num_dense": 2, "histories": HISTORIES, "bags": ["tags"], "layers": [12, 6, 1]} | options
    model = DIN(collection, **settings)
    # Far from the small initial values, so that differences show.
    with torch.no_grad():
        for parameter in collection.parameters():
            parameter.normal_()
    return model


def by_hand(model: DIN, dense: Tensor) -> Tensor:
    """Logits in evaluation, sample after sample from the rows of full tables."""
    weights = {
        t.name: model.embeddings.get_parameter(f"groups.{i}.lookups.0.embedding_bags.{t.name}.weight")
        for i, t in enumerate(TABLES)
    }
    table_of = {name: weights[table.name] for table in TABLES for name in table.feature_names}
    logits = []
    for row in range(4):

        def rows(name: str, row: int = row) -> list[Tensor]:
            return [table_of[name][i] for i in IDS[name][row]]

        pooled = []
        for number, history in enumerate(HISTORIES):
            target = torch.cat([rows(name)[0] for name in history.targets])
            events = [torch.cat(parts) for parts in zip(*(rows(name) for name in history.sequences), strict=True)]
            total = torch.zeros_like(target)
            for event in events:
                weight = 1.0
                if model.head.attention:
                    mlp = model.head.attention[number].mlp
                    weight = mlp(torch.cat([target, event, target - event, target * event]).unsqueeze(0)).squeeze()
                total = total + weight * event
            pooled.append(total)
        tags = sum(rows("tags"), torch.zeros(4))
        plain = [dense[row], rows("item")[0], rows("category")[0], rows("group")[0], tags]
        logits.append(model.head.mlp(torch.cat([*pooled, *plain]).unsqueeze(0)).squeeze())
    return torch.stack(logits)


@pytest.mark.parametrize("activation", ["dice", "prelu"])
@pytest.mark.parametrize("pooling", ["attention", "sum"])
def test_logits_are_those_of_the_definition(pooling, activation) -> None:
    model = din(pooling=pooling, activation=activation)
    dense = normal(4, 2)
    for _ in range(3):
        model(dense, features())
    model.eval()
    torch.testing.assert_close(model(dense, features()), by_hand(model, dense))


@pytest.mark.parametrize("method", [Full, partial(Unified, num_embeddings=40)], ids=["full", "unified"])
@pytest.mark.parametrize("pooling", ["attention", "softmax", "sum"])
def test_evaluation_knows_no_batch_and_no_order_of_samples(method, pooling) -> None:
    model, dense = din(method, pooling=pooling), normal(4, 2)
    model(dense, features())
    model.eval()
    together = model(dense, features())
    for rows in ([0], [1], [3, 1], [2, 0, 1, 3], [1, 1]):
        torch.testing.assert_close(model(dense[rows], features(rows=rows)), together[rows])


def test_empty_histories_everywhere_train_and_leave_zero_interest() -> None:
    model = din()
    ids = IDS | {name: [[]] * 4 for name in ("item_history", "category_history", "item_bought")}
    model(normal(4, 2), features(ids)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    captured: list[Tensor] = []
    model.head.mlp[0].register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    model(normal(4, 2), features(ids))
    assert not captured[0][:, : 8 + 4 + 8].any()


def test_longer_histories_keep_the_latest_events() -> None:
    model, dense = din(max_history=2), normal(4, 2)
    model.eval()
    cut = IDS | {name: [bag[-2:] for bag in IDS[name]] for name in ("item_history", "category_history", "item_bought")}
    torch.testing.assert_close(model(dense, features()), model(dense, features(cut)))
    cut_features = keep_latest(features(), ["item_history"], 2)
    assert cut_features["item_history"].values().tolist() == [2, 3, 5, 0, 9]
    assert cut_features["category_history"].values().tolist() == features()["category_history"].values().tolist()
    assert keep_latest(features(), ["item_history"], 6).values() is not None


def test_parallel_sequences_are_attended_jointly() -> None:
    model, dense = din(), normal(4, 2)
    model.eval()
    before = model.attention_weights(features())["history"][0]
    # Another category of one event changes the weight of that event alone.
    changed = IDS | {"category_history": [[1, 2, 7], [], [5], [4, 4, 4, 8, 0, 1]]}
    after = model.attention_weights(features(changed))["history"][0]
    assert (before != after).tolist() == [False, False, True] + [False] * 7
    assert not torch.equal(model(dense, features()), model(dense, features(changed)))


def test_attention_weights_belong_to_events() -> None:
    model = din().eval()
    weights, offsets = model.attention_weights(features())["bought"]
    assert offsets.tolist() == [0, 0, 2, 2, 3] and weights.shape == (3,)
    with pytest.raises(ValueError, match="pooling='sum', which weighs all events alike"):
        din(pooling="sum").attention_weights(features())


def test_torchrecs_own_collection_serves_too() -> None:
    # Which takes one width only.
    tables = [dataclasses.replace(table, embedding_dim=8) for table in TABLES]
    torch.manual_seed(2)
    reference = DIN(CompressedEmbeddingCollection(tables, Full), num_dense=2, histories=HISTORIES, bags=["tags"]).eval()
    plain = EmbeddingCollection(tables=tables)
    for index, table in enumerate(tables):
        key = f"groups.{index}.lookups.0.embedding_bags.{table.name}.weight"
        plain.embeddings[table.name].weight.data.copy_(reference.embeddings.get_parameter(key))
    model = copy.deepcopy(reference)
    model.embeddings = plain
    dense = normal(4, 2)
    torch.testing.assert_close(model(dense, features()), reference(dense, features()))


def test_fused_training_equals_plain_sgd() -> None:
    reference, dense = din(), normal(4, 2)
    fused, optimizer = prepare(
        copy.deepcopy(reference), EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1)
    )
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        for model, stepper in ((reference, plain), (fused, optimizer)):
            stepper.zero_grad()
            model(dense, features()).square().sum().backward()
            stepper.step()
    found = fused.state_dict()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"category_history": [[1, 2], [], [5], [4] * 6]},
            r"history 'history', row 0.*'item_history' and 'category_his",
        ),
        ({"item": [[3], [], [0], [7]]}, "feature 'item', row 1 of the batch: exactly one id is required.*got 0"),
        ({"group": [[0], [4], [2, 3], [2]]}, "feature 'group', row 2 of the batch.*got 2"),
        ({"item": [[3], [50], [0], [7]]}, "'item'.*50"),
        ({"item_history": [[1, 2, -3], [], [5], [4, 4, 4, 49, 0, 9]]}, "'item_history'.*-3"),
    ],
    ids=["unequal lengths", "no target", "two ids", "target outside its table", "history outside its table"],
)
def test_bad_batches_are_named(change: dict[str, list[list[int]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        din()(normal(4, 2), features(IDS | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"histories": ()}, "needs at least one history"),
        ({"histories": [History("h", ("clicks",), ("item",))]}, "'clicks' has no table"),
        (
            {"histories": [History("h", ("item_history",), ("category",))]},
            "must read one table.*'t_item'.*'t_category'",
        ),
        ({"bags": ["item_history"]}, "'item_history': a sequence belongs to one history"),
        ({"bags": ["item", "tags"]}, "target 'item' must be a single feature"),
        ({"bags": ["brand"]}, "'brand' has no table"),
        ({"layers": [8, 2]}, r"layers must end in 1 \(the logit\), got \[8, 2\]"),
        ({"pooling": "mean"}, "pooling must be 'attention', 'softmax' or 'sum', got 'mean'"),
        ({"max_history": 0}, "max_history must be at least 1 event"),
        ({"num_dense": -1}, "num_dense must be at least 0"),
    ],
)
def test_unusable_arguments_are_named(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        din(**options)


def test_histories_pair_sequences_with_targets() -> None:
    with pytest.raises(ValueError, match="one target a sequence"):
        History("h", ("a", "b"), ("item",))
    with pytest.raises(ValueError, match="sequences must differ"):
        History("h", ("a", "a"), ("item", "item"))


def test_another_number_of_numeric_features_is_an_error() -> None:
    with pytest.raises(ValueError, match="built for 2 numeric features"):
        din()(normal(4, 3), features())


@pytest.mark.parametrize("name", ["din", "din_base"])
def test_configs_build_the_model(name: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    build = instantiate(config)
    model = build(
        embeddings=CompressedEmbeddingCollection(TABLES, Full), num_dense=2, histories=HISTORIES, bags=["tags"]
    )
    assert model(normal(4, 2), features()).shape == (4,)
    assert len(model.head.attention) == (2 if name == "din" else 0)
