from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig
from torchrec.models.dlrm import DLRM as TorchRecDLRM
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recemb.models.dlrm import DLRM, DLRMHead
from tests.models.tables import embedding_bags, normal, single_ids

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
SETTINGS: dict[str, dict[str, Any]] = {
    "dot": {},
    "dcnv2": {"interaction": "dcnv2", "cross_layers": 2, "cross_rank": 3},
}


def logits_by_definition(model: DLRM, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
    """DLRM sample by sample, from the weights: bottom MLP, dot products i > j, over MLP."""
    pooled = model.embeddings(ids).to_dict()

    def mlp(module: nn.Module | None, x: Tensor, relu_last: bool) -> Tensor:
        assert isinstance(module, nn.Sequential)
        linears = [layer for layer in module if isinstance(layer, nn.Linear)]
        for k, linear in enumerate(linears):
            x = linear.weight @ x + linear.bias
            if relu_last or k < len(linears) - 1:
                x = torch.where(x > 0, x, 0.0)
        return x

    logits = []
    for b in range(len(dense)):
        vectors = [pooled[f"f{i}"][b] for i in range(len(pooled))]
        numeric = []
        if dense.shape[1]:
            numeric = [mlp(model.head.bottom, dense[b], relu_last=True)]
            vectors = numeric + vectors
        pairs = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)]
        logits.append(mlp(model.head.over, torch.cat([*numeric, torch.stack(pairs)]), relu_last=False)[0])
    return torch.stack(logits)


@pytest.mark.parametrize("num_dense", [0, 3])
def test_logits_equal_the_definition_sample_by_sample(num_dense: int) -> None:
    torch.manual_seed(0)
    bottom = [6, 4] if num_dense else []
    model = DLRM(embedding_bags([4] * 5), num_dense=num_dense, bottom_layers=bottom, over_layers=[8, 5, 1])
    dense, ids = normal(9, num_dense), single_ids(5, 9)
    logits = model(dense, ids)
    assert logits.shape == (9,) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, logits_by_definition(model, dense, ids))


@pytest.mark.parametrize("num_dense", [0, 3])
def test_every_parameter_gets_the_gradient_of_the_definition(num_dense: int) -> None:
    torch.manual_seed(0)
    model = DLRM(embedding_bags([4] * 3), num_dense=num_dense, bottom_layers=[6, 4], over_layers=[5, 1])
    dense, ids = normal(9, num_dense), single_ids(3, 9)
    parameters = list(model.parameters())
    got = torch.autograd.grad(model(dense, ids).square().sum(), parameters)
    expected = torch.autograd.grad(logits_by_definition(model, dense, ids).square().sum(), parameters)
    torch.testing.assert_close(got, expected)


def test_equals_torchrec_dlrm_where_the_pair_orders_agree() -> None:
    # With two features the pairs are (1,0), (2,0), (2,1) in both: the same weights give the same logits.
    torch.manual_seed(0)
    tables = embedding_bags([4, 4])
    ours = DLRM(tables, num_dense=3, bottom_layers=[6, 4], over_layers=[8, 1])
    theirs = TorchRecDLRM(tables, 3, [6, 4], [8, 1])
    layers = [m for part in (theirs.dense_arch, theirs.over_arch) for m in part.modules() if isinstance(m, nn.Linear)]
    ours_layers = [layer for layer in ours.head.modules() if isinstance(layer, nn.Linear)]
    for mine, other in zip(ours_layers, layers, strict=True):
        other.load_state_dict(mine.state_dict())
    dense, ids = normal(5, 3), single_ids(2, 5)
    torch.testing.assert_close(ours(dense, ids), theirs(dense, ids).squeeze(1))


def test_multi_valued_and_empty_bags_reach_the_head_pooled() -> None:
    torch.manual_seed(0)
    model = DLRM(embedding_bags([4, 4]), num_dense=0, bottom_layers=[], over_layers=[1])
    ids = KeyedJaggedTensor(
        keys=["f0", "f1"],
        values=torch.tensor([3, 5, 7, 2, 2]),
        lengths=torch.tensor([3, 0, 0, 2], dtype=torch.int32),
    )
    torch.testing.assert_close(model(torch.empty(2, 0), ids), logits_by_definition(model, torch.empty(2, 0), ids))


@pytest.mark.parametrize("setting", SETTINGS)
def test_output_in_another_key_order_gives_the_same_logits(setting: str) -> None:
    # Sharded collections order their output by sharding plan.
    class Reordered(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
            return self.inner.embedding_bag_configs()  # type: ignore[operator]

        def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
            pooled = self.inner(features).to_dict()
            keys = list(reversed(pooled))
            return KeyedTensor(keys, [4] * len(keys), torch.cat([pooled[key] for key in keys], dim=1))

    torch.manual_seed(0)
    model = DLRM(embedding_bags([4] * 3), num_dense=2, bottom_layers=[4], over_layers=[5, 1], **SETTINGS[setting])
    reordered = copy.deepcopy(model)
    reordered.embeddings = Reordered(reordered.embeddings)
    dense, ids = normal(6, 2), single_ids(3, 6)
    torch.testing.assert_close(reordered(dense, ids), model(dense, ids))


def test_one_feature_in_two_tables_counts_as_two_vectors() -> None:
    class TwoTables(nn.Module):
        def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
            return [
                EmbeddingBagConfig(name=name, embedding_dim=4, num_embeddings=5, feature_names=["ad"]) for name in "tu"
            ]

        def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
            return KeyedTensor(["ad@t", "ad@u"], [4, 4], torch.ones(features.stride(), 8))

    model = DLRM(TwoTables(), num_dense=0, bottom_layers=[], over_layers=[1])
    ids = KeyedJaggedTensor(keys=["ad"], values=torch.tensor([1]), lengths=torch.tensor([1], dtype=torch.int32))
    assert model(torch.empty(1, 0), ids).shape == (1,)
    assert model.head.over[0].in_features == 1


def test_cross_layers_take_tables_of_unequal_width() -> None:
    torch.manual_seed(0)
    model = DLRM(embedding_bags([4, 8]), num_dense=3, bottom_layers=[5], over_layers=[6, 1], **SETTINGS["dcnv2"])
    dense, ids = normal(7, 3), single_ids(2, 7)
    pooled = model.embeddings(ids).to_dict()
    head = model.head
    assert head.bottom is not None and head.cross is not None
    expected = head.over(head.cross(torch.cat([head.bottom(dense), pooled["f0"], pooled["f1"]], dim=1)))
    torch.testing.assert_close(model(dense, ids), expected.squeeze(1))


@pytest.mark.parametrize("setting", SETTINGS)
def test_bfloat16_autocast_stays_close_to_float32_and_gives_float32_logits(setting: str) -> None:
    torch.manual_seed(0)
    head = DLRMHead([16] * 26, num_dense=13, bottom_layers=[64, 16], over_layers=[64, 1], **SETTINGS[setting])
    dense, pooled = normal(128, 13), (0.1 * normal(128, 26 * 16)).requires_grad_()
    exact = head(dense, pooled)
    (exact_gradient,) = torch.autograd.grad(exact.sigmoid().sum(), pooled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head(dense, pooled)
    (rounded_gradient,) = torch.autograd.grad(rounded.sigmoid().sum(), pooled)
    assert rounded.dtype == torch.float32 and rounded_gradient.dtype == torch.float32
    # bfloat16 keeps 8 bits: each rounding is off by up to 0.4%, a few of them stand in a row.
    assert (rounded - exact).abs().max().item() < 0.03 * exact.abs().max().item()
    # A ReLU whose input rounds across zero turns a whole path of the gradient on or off.
    assert (rounded_gradient - exact_gradient).norm().item() < 0.1 * exact_gradient.norm().item()


@pytest.mark.parametrize(
    ("config", "dim", "over_inputs", "head_parameters"),
    [
        # Sums over layers of in * out + out: 13-512-256-64-16 with 367-512-256-1, and
        # 13-512-256-128 with 479-1024-1024-512-256-1.
        ("dlrm_kaggle", 16, 367, 155_984 + 320_001),
        ("dlrm_mlperf", 128, 479, 171_392 + 2_197_505),
    ],
)
def test_published_settings_have_the_published_sizes(
    config: str, dim: int, over_inputs: int, head_parameters: int
) -> None:
    head = head_of_config(config, dim)
    assert head.over[0].in_features == over_inputs
    assert sum(p.numel() for p in head.parameters()) == head_parameters


def test_mlperf_cross_setting_has_three_layers_of_rank_512() -> None:
    head = head_of_config("dlrm_dcnv2_mlperf", 128)
    width = 27 * 128
    assert head.cross is not None and head.over[0].in_features == width
    assert sum(p.numel() for p in head.cross.parameters()) == 3 * (2 * width * 512 + width)


def head_of_config(name: str, dim: int) -> DLRMHead:
    """The head of a model config for Criteo, its references to the embedding config resolved."""
    config = OmegaConf.create({"embedding": {"embedding_dim": dim}, "model": OmegaConf.load(CONFIGS / f"{name}.yaml")})
    arguments = {str(key): value for key, value in config.model.items() if not str(key).startswith("_")}
    return DLRMHead([dim] * 26, num_dense=13, **arguments)


@pytest.mark.parametrize(
    ("dims", "arguments", "message"),
    [
        ([4, 4], {"bottom_layers": [8]}, r"end in the tables' embedding_dim \(4\) for 'dot', got 8"),
        ([4, 8], {}, r"one embedding_dim for all tables, got \[4, 8\]"),
        ([4], {"num_dense": 0}, "at least 2 vectors a sample, got 1"),
        ([4], {"over_layers": [8]}, r"over_layers must end in 1 \(the logit\), got \[8\]"),
        ([4], {"over_layers": []}, r"over_layers must end in 1 \(the logit\), got \[\]"),
        ([4], {"bottom_layers": []}, "at least one layer"),
        ([4], {"num_dense": -1}, "num_dense must be at least 0, got -1"),
        ([4], {"interaction": "cross"}, "must be 'dot' or 'dcnv2', got 'cross'"),
        ([4], {"interaction": "dcnv2"}, "needs cross_layers and cross_rank"),
        ([4], {"cross_rank": 8}, "belong to interaction='dcnv2'"),
    ],
)
def test_impossible_settings_are_named(dims: list[int], arguments: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"num_dense": 3, "bottom_layers": [4], "over_layers": [1], **arguments}
    with pytest.raises(ValueError, match=message):
        DLRM(embedding_bags(dims), **settings)


def test_a_batch_of_another_width_is_named() -> None:
    model = DLRM(embedding_bags([4, 4]), num_dense=3, bottom_layers=[4], over_layers=[1])
    with pytest.raises(ValueError, match=r"built for 3 numeric features .* got dense \(5, 2\)"):
        model(normal(5, 2), single_ids(2, 5))


def test_state_dict_round_trip_and_copy_give_the_same_logits() -> None:
    torch.manual_seed(0)
    model = DLRM(embedding_bags([4, 4]), num_dense=3, bottom_layers=[4], over_layers=[1])
    other = DLRM(embedding_bags([4, 4]), num_dense=3, bottom_layers=[4], over_layers=[1])
    dense, ids = normal(5, 3), single_ids(2, 5)
    assert not torch.equal(model(dense, ids), other(dense, ids))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(dense, ids), model(dense, ids))
    torch.testing.assert_close(copy.deepcopy(model)(dense, ids), model(dense, ids))


@pytest.mark.slow
def test_compiled_head_gives_the_same_logits_gradients_and_keys() -> None:
    torch.manual_seed(0)
    head = DLRMHead([16] * 5, num_dense=3, bottom_layers=[8, 16], over_layers=[8, 1])
    keys = list(head.state_dict())
    dense, pooled = normal(64, 3), normal(64, 80, seed=1).requires_grad_()
    eager = head(dense, pooled)
    (eager_gradient,) = torch.autograd.grad(eager.square().sum(), pooled)
    head.compile()
    compiled = head(dense, pooled)
    (compiled_gradient,) = torch.autograd.grad(compiled.square().sum(), pooled)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled_gradient, eager_gradient, rtol=1e-4, atol=1e-5)
    assert list(head.state_dict()) == keys
