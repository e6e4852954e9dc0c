"""Deep hash embeddings against torch.nn's layers on plainly hashed ids, and their traps."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.hashing import mix, salt
from recemb.memory import estimate_memory
from recemb.method import UNBOUNDED
from recemb.methods.deep_hash import DeepHash
from tests.embedding_cases import BIG, KEYS, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of

K = 64
SMALL = partial(DeepHash, width=5, num_hashes=K, num_layers=2)


def plain_encoding(name: str, value: int, encoding: str) -> list[float]:
    """k hashes of one id by Python's integers, scaled to reals."""
    mixed = int(mix(torch.tensor(value), torch.tensor(salt(name))))
    bits = mix(torch.arange(2 * K), torch.tensor(salt("deep_hash"))).tolist()
    reals = []
    for times, plus in zip(bits[:K], bits[K:], strict=True):
        product = (mixed * (times | 1) + plus) % 2**64
        upper = product >> 40
        reals.append((upper - 2**24 if upper >= 2**23 else upper) / 2**23)
    if encoding == "uniform":
        return reals
    pairs = list(zip(reals[: K // 2], reals[K // 2 :], strict=True))
    radii = [math.sqrt(-2 * math.log((1 - u) / 2)) for u, _ in pairs]
    cosines = [r * math.cos(math.pi * v) for r, (_, v) in zip(radii, pairs, strict=True)]
    return cosines + [r * math.sin(math.pi * v) for r, (_, v) in zip(radii, pairs, strict=True)]


def torch_decoder(method: DeepHash, number: int) -> nn.Sequential:
    """The decoder in torch.nn's layers."""
    state = {
        name.removeprefix(f"decoders.{number}."): tensor
        for name, tensor in method.state_dict().items()
        if name.startswith(f"decoders.{number}.")
    }
    layers: list[nn.Module] = []
    for layer in range(2):
        linear, norm = nn.Linear(state[f"hidden.{layer}.weight"].shape[1], 5, bias=False), nn.BatchNorm1d(5)
        linear.load_state_dict({"weight": state[f"hidden.{layer}.weight"]})
        norm.load_state_dict(
            {key: state[f"norms.{layer}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")},
            strict=False,
        )
        layers += [linear, norm, nn.Mish()]
    output = nn.Linear(5, 8)
    output.load_state_dict({key: state[f"output.{key}"] for key in ("weight", "bias")})
    return nn.Sequential(*layers, output)


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("encoding", ["uniform", "normal"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("merge_ids", [True, False])
def test_vectors_equal_torchs_layers_on_plain_hashes(
    ids: list[list[list[int]]], encoding: str, shared: bool, merge_ids: bool
) -> None:
    method = partial(SMALL, encoding=encoding, shared=shared, merge_ids=merge_ids)
    collection = CompressedEmbeddingBagCollection(small_tables(), method).eval()
    group = group_of(collection)
    assert isinstance(group, DeepHash)
    assert [config.name for config in group.full] == ([] if shared else ["t_one"])
    decoders = [torch_decoder(group, number).eval() for number in range(len(group.decoders))]

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        if config in group.full:
            return rows_of(group)[value]
        decoder = decoders[0 if shared else group.decoded.index(config)]
        return decoder(torch.tensor([plain_encoding(config.name, value, encoding)])).squeeze(0)

    check_batch(collection, vector, ids)


@pytest.mark.parametrize("merge_ids", [True, False])
def test_training_normalises_over_every_occurrence_as_torchs_batch_norm_does(merge_ids: bool) -> None:
    """Merged ids weigh as often as they come: outputs, gradients and running statistics are those without merging."""
    collection = CompressedEmbeddingBagCollection([table("a", 4000)], partial(SMALL, merge_ids=merge_ids))
    group = group_of(collection)
    assert isinstance(group, DeepHash)
    reference = torch_decoder(group, 0)
    ids = [7, 7, 7, 3999, 0, 7, 0, 12]
    output = collection(bags(["a"], [[[value] for value in ids]])).values()
    expected = reference(torch.tensor([plain_encoding("t_a", value, "uniform") for value in ids]))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream)
    ours, theirs = group.decoders[0], reference
    torch.testing.assert_close(ours.get_parameter("hidden.0.weight").grad, theirs[0].weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.get_parameter("norms.1.weight").grad, theirs[4].weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.get_buffer("norms.0.running_mean"), theirs[1].running_mean)
    torch.testing.assert_close(ours.get_buffer("norms.1.running_var"), theirs[4].running_var)


def test_a_batch_of_one_id_is_normalised_by_running_statistics() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 4000)], SMALL)
    one = bags(["a"], [[[], [17]]])
    before = {name: tensor.clone() for name, tensor in collection.state_dict().items()}
    trained = collection.train()(one).values()
    torch.testing.assert_close(collection.eval()(one).values(), trained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in collection.state_dict().items())


def test_evaluation_depends_on_no_other_id_and_repeats_itself() -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), SMALL)
    for _ in range(3):
        collection.train()(bags(KEYS, MULTI_HOT)).values().sum().backward()
    collection.eval()
    assert torch.equal(collection(bags(KEYS, SINGLE)).values(), collection(bags(KEYS, SINGLE)).values())
    together = collection(bags(KEYS, SINGLE))["ad"][1]
    alone = collection(bags(KEYS, [[[0]], *[[[]]] * 4]))["ad"][0]
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("encoding", ["uniform", "normal"])
def test_encodings_have_the_distribution_they_should_and_hashes_are_independent(encoding: str) -> None:
    method = DeepHash([table("a", 2**30)], width=1, num_hashes=K, encoding=encoding)
    # Ids above 2**31 would overflow in 32 bits, consecutive ones would line up under a weak hash.
    codes = method._encode(mix(torch.arange(20_000) + 2**40, method.salts[0])).double()
    variance = 1.0 if encoding == "normal" else 1 / 3
    assert abs(float(codes.mean())) < 0.01
    assert abs(float(codes.var()) / variance - 1) < 0.02
    correlation = torch.corrcoef(codes.T) - torch.eye(K)
    assert float(correlation.abs().max()) < 6 / 20_000**0.5
    kurtosis = float((codes**4).mean() / codes.var() ** 2)
    assert abs(kurtosis - (3.0 if encoding == "normal" else 1.8)) < 0.1


def test_unbounded_and_large_ids_stay_apart() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", UNBOUNDED)], SMALL).eval()
    output = collection(bags(["a"], [[[2**63 - 1], [BIG], [BIG + 1], [2**62], []]])).values()
    assert torch.unique(output, dim=0).shape[0] == 5
    # As many bytes as for any other vocabulary.
    assert estimate_memory([table("a", 10**6)], SMALL).serving_bytes == sum(
        tensor.nbytes for tensor in collection.state_dict().values()
    )


def test_bytes_count_hashes_running_statistics_and_full_tables() -> None:
    tables = [table("a", 10_000), table("b", 20)]
    report = estimate_memory(tables, SMALL)
    floats = K * 5 + 5 * 5 + 2 * 4 * 5 + 5 * 8 + 8
    assert report.dense_bytes == floats * 4
    # Two coefficients a hash, a salt for the decoded table, the first row of the full one.
    assert report.index_bytes == (2 * K + 1 + 1) * 8
    assert [(physical.name, physical.num_embeddings) for physical in report.tables] == [("deep_hash__full", 20)]


@pytest.mark.parametrize("shared", [False, True])
def test_vectors_start_as_wide_as_a_full_tables_in_training_and_evaluation(shared: bool) -> None:
    torch.manual_seed(0)
    method = partial(DeepHash, width=32, num_hashes=256, shared=shared)
    collection = CompressedEmbeddingBagCollection([table("a", 9000, dim=16)], method)
    for training in (True, False):
        variance = float(all_vectors(collection.train(training), "a", 9000).square().mean())
        assert 0.7 < variance * 3 * 9000 < 1.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"width": 1, "num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"width": 1, "num_hashes": 7, "encoding": "normal"}, r"num_hashes must be even .*, got 7"),
        ({"width": 1, "encoding": "one_hot"}, "encoding must be one of .*, got 'one_hot'"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepHash([table("a", 10)], **options)  # type: ignore[arg-type]
