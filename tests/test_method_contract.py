"""What every method owes, run over every configs/embedding/*.yaml: a new method is tested by being there."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.conversion import convert
from recemb.memory import estimate_memory, measure_memory
from recemb.method import Method
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.shared_features import select_keys
from tests.embedding_cases import (
    KEYS,
    MULTI_HOT,
    SINGLE,
    bags,
    embedding_configs,
    pool_plainly,
    quarter_sized,
    small_tables,
)

MEANS = [False, True, True, False, False]
DENSE = partial(torch.optim.SGD, lr=0.1)
_OPTIMIZERS = {"adagrad": torch.optim.Adagrad}


@pytest.fixture(params=embedding_configs())
def method(request: pytest.FixtureRequest) -> Method:
    """The method of one config, at a quarter of the small tables' bytes where it has a size to choose."""
    return quarter_sized(request.param)


def build(method: Method, seed: int = 0) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(seed)
    return CompressedEmbeddingBagCollection(small_tables(), method)


def call(module: nn.Module, features: KeyedJaggedTensor) -> torch.Tensor:
    """Output values; methods that draw at random in training draw the same in every call."""
    torch.manual_seed(0)
    return module(features).values()


def test_output_looks_like_torchrecs(method: Method) -> None:
    reference = EmbeddingBagCollection(tables=small_tables())
    features = bags(KEYS, MULTI_HOT)
    expected, output = reference(features), build(method)(features)
    assert output.keys() == expected.keys()
    assert output.values().shape == expected.values().shape
    assert output.values().dtype == expected.values().dtype
    assert output.length_per_key() == expected.length_per_key()


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE, [[[]] * 2] * 5], ids=["multi-hot", "single", "all empty"])
def test_batches_equal_a_plain_loop_over_ids(method: Method, ids: list[list[list[int]]]) -> None:
    # In training, batch normalisation ties the ids of a batch to each other.
    collection = build(method).eval()
    vectors: dict[str, dict[int, torch.Tensor]] = {}
    for key, feature in zip(KEYS, ids, strict=True):
        vectors[key] = {value: one_vector(collection, key, value) for bag in feature for value in [0, *bag]}
        vectors[key] = vectors[key] or {0: one_vector(collection, key, 0)}
    output = collection(bags(KEYS, ids)).values()
    torch.testing.assert_close(output, pool_plainly(vectors, ids, MEANS), rtol=1e-5, atol=1e-6)


def test_a_batch_of_no_samples_gives_no_rows_and_moves_nothing(method: Method) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    expected = torch.cat([nn.EmbeddingBag(9, 8, mode="sum")(none, none) for _ in KEYS], dim=1)
    for features in (bags(KEYS, [[]] * 5), bags(["other", *reversed(KEYS)], [[]] * 6)):
        fused, optimizer = prepare(build(method), EmbeddingOptimizer("sgd", 0.1), DENSE)
        before = copy.deepcopy(fused.state_dict())
        output = fused(features)
        assert output.keys() == KEYS and output.length_per_key() == [8] * 5
        assert torch.equal(output.values(), expected) and output.values().dtype == expected.dtype
        output.values().sum().backward()
        optimizer.step()
        for name, tensor in fused.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert torch.equal(convert(fused.eval())(features).values(), expected)


def one_vector(collection: CompressedEmbeddingBagCollection, key: str, value: int) -> torch.Tensor:
    """The vector of one id, alone in its batch: every other bag is empty."""
    features = bags(KEYS, [[[value] if name == key else []] for name in KEYS])
    return collection(features)[key][0].detach()


def test_features_of_one_table_share_vectors(method: Method) -> None:
    output = build(method)(bags(KEYS, [[[0]], [[4321]], [[4321]], [[0]], [[0]]]))
    assert torch.equal(output["target"], output["history"])


def test_keys_may_come_in_any_order_and_with_others(method: Method) -> None:
    collection = build(method)
    features = bags(KEYS, SINGLE)
    order = [4, 0, 3, 1, 2]
    shuffled = bags([*(KEYS[i] for i in order), "other"], [*(SINGLE[i] for i in order), [[1], [2], [3]]])
    assert torch.equal(call(collection, shuffled), call(collection, features))


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
def test_int32_ids_have_the_vectors_of_int64_ids(method: Method, ids: list[list[list[int]]]) -> None:
    collection = build(method).eval()
    expected = collection(bags(KEYS, ids)).values()
    narrow = bags(KEYS, ids, torch.int32)
    assert torch.equal(collection(narrow).values(), expected)
    fused, _ = prepare(collection, EmbeddingOptimizer("sgd", 0.1), DENSE)
    assert torch.equal(fused(narrow).values(), expected)
    assert narrow.values().dtype == torch.int32


def test_every_trainable_parameter_gets_a_gradient(method: Method) -> None:
    collection = build(method)
    # Many ids, so that every table is read somewhere; random weights, so that no gradient cancels.
    ids = [[[i % n] for i in range(512)] for n in (4000, 6000, 6000, 500, 1)]
    output = collection(bags(KEYS, ids)).values()
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in collection.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_vectors_start_as_wide_as_a_full_tables(method: Method) -> None:
    reference = EmbeddingBagCollection(tables=small_tables()[:2])
    full = torch.cat([bag.weight.detach().view(-1) for bag in reference.embedding_bags.values()]).std()
    ids = [[[i] for i in range(4000)], [[i] for i in range(4000)], *[[[]] * 4000] * 3]
    output = build(method)(bags(KEYS, ids))
    ours = torch.cat([output["ad"].reshape(-1), output["target"].reshape(-1)]).std()
    assert full / 2 < ours < full * 2


def test_seed_decides_everything(method: Method) -> None:
    features = bags(KEYS, MULTI_HOT)
    first, second, other = (build(method, seed)(features).values() for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_state_dict_carries_the_whole_model(method: Method, tmp_path: Path) -> None:
    first, second = build(method, 1), build(method, 2)
    torch.save(first.state_dict(), tmp_path / "model.pt")
    second.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    features = bags(KEYS, MULTI_HOT)
    assert torch.equal(call(first, features), call(second, features))


def test_estimate_equals_measurement_and_bytes_on_disk(method: Method) -> None:
    collection = build(method)
    estimate = estimate_memory(small_tables(), method)
    assert estimate == measure_memory(collection)
    assert estimate.trained_bytes == sum(tensor.nbytes for tensor in collection.state_dict().values())
    served = convert(copy.deepcopy(collection))
    assert estimate.serving_bytes == sum(tensor.nbytes for tensor in served.state_dict().values())
    assert measure_memory(served).serving_bytes == estimate.serving_bytes


def test_fused_tables_serve_the_same_vectors(method: Method) -> None:
    collection = build(method)
    plain = copy.deepcopy(collection)
    fused, _ = prepare(collection, EmbeddingOptimizer("sgd", 0.1), DENSE)
    assert not any(type(module) is EmbeddingBagCollection for module in fused.modules())
    assert list(fused.state_dict()) == list(plain.state_dict())
    for ids in (MULTI_HOT, SINGLE):
        features = bags(KEYS, ids)
        assert torch.equal(call(fused, features), call(plain, features))


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
def test_a_fused_sgd_step_equals_autograd_and_torch_sgd(method: Method, ids: list[list[list[int]]]) -> None:
    plain, fused = build(method), build(method)
    target = torch.randn(3, 5 * 8, generator=torch.Generator().manual_seed(1))
    model, optimizer = prepare(fused, EmbeddingOptimizer("sgd", 0.1), DENSE)
    # What a search learns besides weights has an optimizer of its own.
    own = {id(parameter) for group in compressed_groups(plain) for parameter in group.architecture_parameters()}
    # So have tables of numbers that are not trained as rows are.
    others = [
        _OPTIMIZERS[by.name](group.lookups[index].parameters(), lr=by.learning_rate, eps=by.eps)
        for group in compressed_groups(plain)
        for index, by in enumerate(group.lookup_optimizers)
        if by is not None
    ]
    own |= {id(weight) for other in others for part in other.param_groups for weight in part["params"]}
    reference = torch.optim.SGD([weight for weight in plain.parameters() if id(weight) not in own], lr=0.1)
    for module, step in ((model, optimizer), (plain, reference)):
        step.zero_grad()
        ((call(module, bags(KEYS, ids)) - target) ** 2).sum().backward()
        step.step()
    for other in others:
        other.step()
    for group in compressed_groups(plain):
        if (architecture := group.architecture_optimizer()) is not None:
            architecture.step()
    trained = plain.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-4, atol=1e-6, msg=name)


def test_autocast_of_the_dense_layers_leaves_vectors_alone(method: Method) -> None:
    collection = build(method).eval()
    features = bags(KEYS, MULTI_HOT)
    with torch.autocast("cpu", torch.bfloat16):
        output = collection(features).values()
    assert output.dtype == torch.float32
    assert torch.equal(output, collection(features).values())


def test_ids_are_never_repaired(method: Method) -> None:
    collection = build(method)
    for value in (-1, 500):
        wrong = [SINGLE[0], SINGLE[1], SINGLE[2], [[0], [value], [1]], SINGLE[4]]
        with pytest.raises(
            ValueError, match=rf"'site' \(table 't_site'\): ids must be in \[0, 500\), got {value} in sample 1"
        ):
            collection(bags(KEYS, wrong))


def test_group_embeds_one_vector_an_id(method: Method) -> None:
    """Methods that pool in the kernel still define the vector of a single id."""
    collection = build(method)
    for group in compressed_groups(collection):
        features = select_keys(bags(KEYS, SINGLE), group.feature_names)
        assert Bags.of(features).single
        assert group(features).shape == (3, 8 * len(group.feature_names))


def test_model_moves_through_deepcopy_and_eval(method: Method) -> None:
    collection = build(method)
    features = bags(KEYS, MULTI_HOT)
    assert torch.equal(copy.deepcopy(collection).eval()(features).values(), collection.eval()(features).values())
    assert isinstance(collection, nn.Module)
