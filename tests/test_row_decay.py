"""Mini-batch aware decay against the plain definition, for every method."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.budget import fit_to_budget
from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compressed_groups
from recemb.memory import full_table_bytes
from recemb.method import UNBOUNDED, method_class
from recemb.methods.full import Full
from recemb.methods.hashing import Hashing
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.row_decay import count_rows, decay_rows
from tests.embedding_cases import KEYS, MULTI_HOT, bags, embedding_configs, load_embedding_config, small_tables

TABLES = [
    EmbeddingConfig(
        name=t.name, num_embeddings=t.num_embeddings, embedding_dim=t.embedding_dim, feature_names=t.feature_names
    )
    for t in small_tables()
]
STRENGTH = 0.5


def train_counts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {t.name: torch.randint(0, 50, (t.num_embeddings,), generator=generator) for t in small_tables()}


def method_of(config: str):
    content = load_embedding_config(config)
    method = instantiate(content["method"])
    if content["budget"] is None or method_class(method).searches:
        return method
    return fit_to_budget(small_tables(), method, sum(full_table_bytes(small_tables()).values()) // 4)


@pytest.fixture(params=embedding_configs())
def collection(request: pytest.FixtureRequest) -> CompressedEmbeddingCollection:
    torch.manual_seed(0)
    return CompressedEmbeddingCollection(TABLES, method_of(request.param))


class Recorder:
    """Reads as usual and remembers which rows were read."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, str], list[Tensor]] = {}

    def __call__(self, group, index: int, features: KeyedJaggedTensor) -> Tensor:
        for config in group.physical_tables[index]:
            for name in config.feature_names:
                self.rows.setdefault((index, config.name), []).append(features[name].values().clone())
        return group.read_rows(index, features)


def rows_of(group, features: KeyedJaggedTensor) -> dict[tuple[int, str], Tensor]:
    """(lookup, table) -> rows that one look-up of ``features`` reads, with repeats."""
    recorder, reader = Recorder(), group.reader
    group.reader = recorder
    training = group.training
    group.eval()
    with torch.no_grad():
        group.vectors(features)
    group.train(training)
    group.reader = reader
    return {key: torch.cat(parts) for key, parts in recorder.rows.items()}


def test_rows_are_counted_as_by_looking_up_one_id_after_another(collection: CompressedEmbeddingCollection) -> None:
    counts = {name: values % 4 for name, values in train_counts().items()}
    for group in compressed_groups(collection):
        expected = [
            {c.name: torch.zeros(c.num_embeddings, dtype=torch.float64) for c in t} for t in group.physical_tables
        ]
        for table in group.tables:
            for position, count in enumerate(counts[table.name].tolist()[:60]):
                ids = [[[]] for _ in group.feature_names]
                ids[group.feature_names.index(table.feature_names[0])] = [[position]]
                for (index, name), rows in rows_of(group, bags(group.feature_names, ids)).items():
                    for row in rows.tolist():
                        expected[index][name][row] += count
        first_60 = {name: torch.where(torch.arange(len(c)) < 60, c, 0) for name, c in counts.items()}
        found = count_rows(group, first_60)
        for index, tables in enumerate(expected):
            for name, values in tables.items():
                assert torch.equal(found[index][name], values), name


def test_decay_adds_strength_by_count_times_row_once_a_distinct_row(collection: CompressedEmbeddingCollection) -> None:
    decayed = copy.deepcopy(collection)
    decay_rows(decayed, train_counts(), STRENGTH)
    features = bags(KEYS, MULTI_HOT)

    def gradients(module: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(1)
        sum(vectors.values().square().sum() for vectors in module(features).values()).backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    plain, found = gradients(collection), gradients(decayed)
    for number, group in enumerate(compressed_groups(collection)):
        part = features.permute([KEYS.index(name) for name in group.feature_names])
        counts = count_rows(group, train_counts())
        for (index, name), rows in rows_of(group, part).items():
            key = f"groups.{number}.lookups.{index}.embedding_bags.{name}.weight"
            weight, expected = collection.get_parameter(key), plain.pop(key).clone()
            # Tables with an optimizer of their own hold state of the method (thresholds), not vectors.
            for row in set(rows.tolist()) if group.lookup_optimizers[index] is None else ():
                count = max(1.0, float(counts[index][name][row]))
                expected[row] += STRENGTH / count * weight[row].detach()
            torch.testing.assert_close(found.pop(key), expected)
    # Everything that is no table row is left alone.
    for key, gradient in plain.items():
        torch.testing.assert_close(found[key], gradient)


@pytest.mark.parametrize("method", [Full, partial(Hashing, num_embeddings=7)], ids=["full", "hashing"])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad"])
def test_fused_kernels_see_one_gradient_a_row(method, optimizer: str) -> None:
    tables = [EmbeddingConfig(name="t", num_embeddings=20, embedding_dim=4, feature_names=["target", "history"])]
    counts = {"t": torch.arange(20)}
    features = bags(["target", "history"], [[[3], [4], [3]], [[3, 4, 4, 19], [], [7]]])
    torch.manual_seed(0)
    reference = CompressedEmbeddingCollection(tables, method)
    fused = copy.deepcopy(reference)
    settings = EmbeddingOptimizer(optimizer, learning_rate=0.1)
    for module in (reference, fused):
        decay_rows(module, counts, STRENGTH)
    fused, stepper = prepare(nn.ModuleDict({"e": fused}), settings, partial(torch.optim.SGD, lr=0.0))
    weight = next(reference.parameters())
    if optimizer == "sgd":
        plain = torch.optim.SGD([weight], lr=0.1)
    elif optimizer == "adagrad":
        plain = torch.optim.Adagrad([weight], lr=0.1, eps=settings.eps)
    else:
        plain = None
    accumulators = torch.zeros(len(weight))
    for _ in range(3):
        for module in (reference, fused["e"]):
            sum((v.values() - 1).square().sum() for v in module(features).values()).backward()
        stepper.step()
        if plain is not None:
            plain.step()
        else:
            accumulators += weight.grad.square().mean(1)
            with torch.no_grad():
                step = 0.1 * weight.grad / (accumulators.sqrt().unsqueeze(1) + settings.eps)
                weight -= step.where(weight.grad.abs().sum(1, keepdim=True) > 0, torch.zeros(()))
        weight.grad = None
    torch.testing.assert_close(next(iter(fused["e"].state_dict().values())), weight.detach())


def test_pooled_collections_decay_alike() -> None:
    table = EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=4, feature_names=["f"])
    collection = CompressedEmbeddingBagCollection([table], Full)
    decay_rows(collection, {"t": torch.full((10,), 4)}, STRENGTH)
    collection(bags(["f"], [[[1, 2, 2], [], [5]]])).values().sum().backward()
    weight = next(collection.parameters())
    expected = torch.zeros(10, 4)
    for row, occurrences in ((1, 1), (2, 2), (5, 1)):
        expected[row] = occurrences + STRENGTH / 4 * weight[row].detach()
    torch.testing.assert_close(weight.grad, expected)


def test_evaluation_and_empty_batches_are_left_alone() -> None:
    table = EmbeddingConfig(name="t", num_embeddings=10, embedding_dim=4, feature_names=["f"])
    collection = CompressedEmbeddingCollection([table], Full)
    features = bags(["f"], [[[1], [2]]])
    before = collection(features)["f"].values().detach()
    decay_rows(collection, {"t": torch.ones(10, dtype=torch.int64)}, STRENGTH)
    assert torch.equal(collection(features)["f"].values(), before)
    collection.eval()(features)["f"].values().sum().backward()
    assert torch.equal(next(collection.parameters()).grad.unique(), torch.tensor([0.0, 1.0]))
    collection.train()(bags(["f"], [[[], []]]))["f"].values().sum().backward()


def test_tables_without_counts_are_named() -> None:
    tables = [EmbeddingConfig(name="t", num_embeddings=10, embedding_dim=4, feature_names=["f"])]
    collection = CompressedEmbeddingCollection(tables, Full)
    with pytest.raises(ValueError, match=r"table 't'.*none were given"):
        decay_rows(collection, {}, STRENGTH)
    with pytest.raises(ValueError, match=r"table 't': 10 train counts are required, got \(9,\)"):
        decay_rows(collection, {"t": torch.ones(9)}, STRENGTH)
    with pytest.raises(ValueError, match="strength must be at least 0, got -1"):
        decay_rows(collection, {"t": torch.ones(10)}, -1)
    hashed = [EmbeddingConfig(name="t", num_embeddings=UNBOUNDED, embedding_dim=4, feature_names=["f"])]
    with pytest.raises(ValueError, match=r"table 't'.*hashes, which nobody counts"):
        decay_rows(CompressedEmbeddingCollection(hashed, partial(Hashing, num_embeddings=9)), {}, STRENGTH)
