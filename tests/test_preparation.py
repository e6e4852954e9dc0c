"""Fused kernels against torch's own optimizers, and the one optimizer object of the training loop."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.checkpoint import Checkpoints, load_model_tensors, load_optimizer_tensors
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.fused import FusedTables
from recemb.method import WIDEST_ROW
from recemb.methods.hashing import Hashing
from recemb.optimizers import EmbeddingOptimizer, TrainingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import KEYS, MULTI_HOT, SINGLE, bags, small_tables, table

ADAM = partial(torch.optim.Adam, lr=1e-2)


class Model(nn.Module):
    """A plain TorchRec model, as a user has it before recemb."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = EmbeddingBagCollection(tables=small_tables())
        self.head = nn.Linear(40, 1)

    def forward(self, ids: list[list[list[int]]]) -> torch.Tensor:
        return self.head(self.tables(bags(KEYS, ids)).values())


def train(model: nn.Module, optimizer: object, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()  # type: ignore[attr-defined]
        (model(MULTI_HOT) ** 2 - model(MULTI_HOT)).mean().backward()
        optimizer.step()  # type: ignore[attr-defined]


def one_step(name: str, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights before, gradient, weights after two steps with the same gradient) of a single table."""
    torch.manual_seed(0)
    collection = EmbeddingBagCollection(tables=[table("a", 6, dim=4)])
    before = collection.embedding_bags["t_a"].weight.detach().clone()
    slope = torch.randn(2, 4)
    model, optimizer = prepare(collection, EmbeddingOptimizer(name, learning_rate, eps=1e-8), ADAM)
    for _ in range(2):
        optimizer.zero_grad()
        (model(bags(["a"], [[[1, 1, 4], [4]]])).values() * slope).sum().backward()
        optimizer.step()
    gradient = torch.zeros(6, 4)
    for sample, bag in enumerate([[1, 1, 4], [4]]):
        for value in bag:
            gradient[value] += slope[sample]
    return before, gradient, model.state_dict()["embedding_bags.t_a.weight"]


def test_rowwise_adagrad_follows_its_definition() -> None:
    before, gradient, after = one_step("rowwise_adagrad", 0.1)
    weight, accumulator = before.clone(), torch.zeros(6)
    for _ in range(2):
        accumulator += (gradient**2).mean(dim=1)
        weight -= 0.1 * gradient / (accumulator.sqrt() + 1e-8).unsqueeze(1)
    torch.testing.assert_close(after, weight)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_rows_updated_in_torch_equal_rows_updated_by_fbgemm(is_weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two widths, sum and mean, shared tables, multi-hot, single and empty batches, per-id weights."""
    tables = [*small_tables(8)[:3], table("one", 1, dim=4)]
    if is_weighted:
        tables[1].pooling = PoolingType.SUM
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(3, 8 * 4 + 4, generator=generator)
    results = []
    for in_torch in (False, True):
        monkeypatch.setattr("recemb.fused.fbgemm_stalls", lambda in_torch=in_torch: in_torch)
        torch.manual_seed(0)
        collection = EmbeddingBagCollection(tables=tables, is_weighted=is_weighted)
        model, optimizer = prepare(collection, EmbeddingOptimizer("rowwise_adagrad", 0.1), ADAM)
        for ids in (MULTI_HOT, SINGLE, [[[]] * 3] * 5, MULTI_HOT):
            features = bags(KEYS, ids)
            if is_weighted:
                weights = torch.linspace(0.5, 2, features.values().numel())
                features = KeyedJaggedTensor(KEYS, features.values(), weights=weights, lengths=features.lengths())
            (model(features).values() * slope).sum().backward()
        [fused] = optimizer.fused.values()
        results.append((model.state_dict(), {name: state[0] for name, state in fused.optimizer_state().items()}))
    for kernel, ours in zip(*results, strict=True):
        for name, tensor in kernel.items():
            torch.testing.assert_close(ours[name], tensor, msg=name)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
def test_optimizers_equal_torchs(name: str) -> None:
    before, gradient, after = one_step(name, 0.1)
    parameter = nn.Parameter(before.clone())
    reference: torch.optim.Optimizer
    if name == "adam":
        # Dense Adam leaves rows alone whose gradients were always zero, as the sparse one does.
        reference = torch.optim.Adam([parameter], lr=0.1, eps=1e-8)
    else:
        reference = (
            torch.optim.SGD([parameter], lr=0.1)
            if name == "sgd"
            else torch.optim.Adagrad([parameter], lr=0.1, eps=1e-8)
        )
    for _ in range(2):
        parameter.grad = gradient.clone()
        reference.step()
    torch.testing.assert_close(after, parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_fused_adam_equals_torchs_whatever_is_evaluated_and_after_a_resume(tmp_path: Path) -> None:
    torch.manual_seed(0)
    collection = EmbeddingBagCollection(tables=[table("a", 6, dim=4)])
    parameter = nn.Parameter(collection.embedding_bags["t_a"].weight.detach().clone())
    reference = torch.optim.Adam([parameter], lr=0.1, eps=1e-8)
    features = bags(["a"], [[[1, 1, 4], [4]]]).to("cuda")
    fresh, by = copy.deepcopy(collection), EmbeddingOptimizer("adam", 0.1, eps=1e-8)
    model, optimizer = prepare(collection, by, ADAM, device="cuda")
    for step in range(6):
        slope = torch.randn(2, 4)
        with torch.no_grad():
            for _ in range(20):
                model(features)
        if step == 3:
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved = Checkpoints(tmp_path).save(step, tensors, {}, best_step=None)
            model, optimizer = prepare(fresh, by, ADAM, device="cuda")
            load_model_tensors(saved, model)
            load_optimizer_tensors(saved, optimizer)
        optimizer.zero_grad()
        (model(features).values() * slope.cuda()).sum().backward()
        optimizer.step()
        parameter.grad = torch.zeros(6, 4)
        parameter.grad[1], parameter.grad[4] = 2 * slope[0], slope.sum(dim=0)
        reference.step()
        torch.testing.assert_close(
            model.state_dict()["embedding_bags.t_a.weight"].cpu(), parameter.detach(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("kept", [True, False], ids=["count kept", "a checkpoint from before it was"])
def test_kernels_that_count_are_told_the_updates_alone_and_after_a_resume(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row-wise Adagrad in place of Adam, which has no kernel on CPU: fbgemm counts its lookups as well."""
    monkeypatch.setattr("recemb.optimizers._COUNTING", {EmbOptimType.EXACT_ROWWISE_ADAGRAD})
    monkeypatch.setattr("recemb.fused.fbgemm_stalls", lambda: False)
    features = bags(KEYS, MULTI_HOT)

    def prepared() -> tuple[nn.Module, TrainingOptimizer]:
        model, optimizer = prepare(EmbeddingBagCollection(tables=small_tables()), EmbeddingOptimizer(), ADAM)
        evaluate(model)
        return model, optimizer

    def evaluate(model: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(3):
                model(features)

    def step(model: nn.Module, optimizer: TrainingOptimizer, number: int) -> None:
        optimizer.zero_grad()
        values = model(features).values()
        # Small tables have two modes of pooling, and so two kernels. The first update has number 1.
        assert [int(kernel.iter_cpu) for kernel in optimizer.fused[""].kernels] == [number, number]
        values.sum().backward()
        optimizer.step()
        evaluate(model)
        optimizer.step_architecture()

    model, optimizer = prepared()
    for number in (1, 2, 3):
        step(model, optimizer, number)
    state = optimizer.state_dict()
    if not kept:
        del state["updates"]
    saved = Checkpoints(tmp_path).save(3, {"model": model.state_dict(), "optimizer": state}, {}, best_step=None)
    again, its_optimizer = prepared()
    load_model_tensors(saved, again)
    load_optimizer_tensors(saved, its_optimizer)
    step(again, its_optimizer, 4)


def test_states_of_sharded_adam_come_in_the_order_of_those_in_one_process() -> None:
    weight, first, second = torch.zeros(3, 2, 4)
    # As TorchRec calls fbgemm's momentum1 and momentum2.
    states = {weight: {"t_a.momentum1": first, "t_a.exp_avg_sq": second}}
    sharded = KeyedOptimizer({"tables.embedding_bags.t_a.weight": weight}, states, [{"params": [weight], "lr": 0.1}])
    found = TrainingOptimizer({}, {}, sharded).state_dict()["fused"]["tables"]["t_a"]
    assert [id(tensor) for tensor in found] == [id(first), id(second)]


def test_dense_adam_moves_all_rows_as_adam_over_embedding_bags_does() -> None:
    """Other ids in every step: rows that were looked up before move by their moments, those that never were decay."""
    torch.manual_seed(0)
    collection = EmbeddingBagCollection(tables=small_tables())
    before = copy.deepcopy(collection.state_dict())
    bag_modules = {
        config.name: nn.EmbeddingBag(config.num_embeddings, 8, mode=config.pooling.value.lower())
        for config in collection.embedding_bag_configs()
    }
    for name, module in bag_modules.items():
        module.load_state_dict({"weight": before[f"embedding_bags.{name}.weight"]})
    weights = [module.weight for module in bag_modules.values()]
    reference = torch.optim.Adam(weights, lr=0.05, eps=1e-6, weight_decay=0.1)
    by = EmbeddingOptimizer("dense_adam", 0.05, eps=1e-6, weight_decay=0.1)
    model, optimizer = prepare(collection, by, ADAM)
    slope = torch.randn(3, 8 * len(KEYS))
    for ids in (SINGLE, MULTI_HOT, [[[]] * 3] * 5, SINGLE):
        features = bags(KEYS, ids)
        optimizer.zero_grad()
        (model(features).values() * slope).sum().backward()
        optimizer.step()
        reference.zero_grad()
        outputs = [
            bag_modules[config.name](features[key].values(), features[key].offsets()[:-1])
            for config in collection.embedding_bag_configs()
            for key in config.feature_names
        ]
        (torch.cat(outputs, dim=1) * slope).sum().backward()
        reference.step()
    for name, module in bag_modules.items():
        after = model.state_dict()[f"embedding_bags.{name}.weight"]
        torch.testing.assert_close(after, module.weight.detach())
        assert (after != before[f"embedding_bags.{name}.weight"]).any(dim=1).all()


def test_duplicate_ids_of_a_batch_are_summed_before_the_update() -> None:
    """Row 1 occurs twice in one bag: Adagrad must see the summed gradient once, not two gradients in turn."""
    before, gradient, after = one_step("rowwise_adagrad", 0.1)
    first = gradient[1] / (gradient[1] ** 2).mean().sqrt()
    second = gradient[1] / (2 * (gradient[1] ** 2).mean()).sqrt()
    torch.testing.assert_close(before[1] - after[1], 0.1 * (first + second), rtol=1e-3, atol=1e-5)


def test_state_dict_keys_stay_torchrecs() -> None:
    plain = Model()
    keys = list(plain.state_dict())
    model, _ = prepare(plain, EmbeddingOptimizer(), ADAM)
    assert list(model.state_dict()) == keys
    assert isinstance(model.get_submodule("tables"), FusedTables)


def test_dense_optimizer_gets_everything_but_tables() -> None:
    _, optimizer = prepare(Model(), EmbeddingOptimizer(), ADAM)
    [group] = optimizer.optimizers["dense"].param_groups
    assert sorted(parameter.numel() for parameter in group["params"]) == [1, 40]


@pytest.mark.parametrize("name", ["rowwise_adagrad", "adagrad", "sgd", "adam", "dense_adam"])
def test_saved_state_continues_exactly(name: str) -> None:
    torch.manual_seed(0)
    start = Model()
    by = EmbeddingOptimizer(name, 0.05, weight_decay=0.01 if name == "dense_adam" else 0.0)
    first, first_optimizer = prepare(copy.deepcopy(start), by, ADAM)
    train(first, first_optimizer, 3)
    weights, state = copy.deepcopy(first.state_dict()), copy.deepcopy(first_optimizer.state_dict())
    train(first, first_optimizer, 3)
    second, second_optimizer = prepare(copy.deepcopy(start), by, ADAM)
    second.load_state_dict(weights)
    second_optimizer.load_state_dict(state)
    train(second, second_optimizer, 3)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("name", ["rowwise_adagrad", "adam", "dense_adam"])
def test_learning_rate_factor_reaches_tables_and_head(name: str) -> None:
    torch.manual_seed(0)
    model, optimizer = prepare(Model(), EmbeddingOptimizer(name, 0.05), ADAM)
    before = copy.deepcopy(model.state_dict())
    optimizer.set_learning_rate_factor(0.0)
    train(model, optimizer, 2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer.set_learning_rate_factor(1.0)
    train(model, optimizer, 2)
    assert not any(
        torch.equal(model.state_dict()[key], before[key])
        for key in ("head.weight", "tables.embedding_bags.t_ad.weight")
    )


def test_state_of_another_model_is_refused() -> None:
    _, optimizer = prepare(Model(), EmbeddingOptimizer(), ADAM)
    with pytest.raises(ValueError, match="optimizer state must have"):
        optimizer.load_state_dict({"dense": {}})
    with pytest.raises(ValueError, match="optimizer state must be of tables"):
        optimizer.load_state_dict({"fused": {}, "dense": {}})


def test_kernels_fail_on_ids_out_of_range_rather_than_read_row_zero() -> None:
    model, _ = prepare(Model(), EmbeddingOptimizer(), ADAM)
    wrong = copy.deepcopy(MULTI_HOT)
    wrong[3] = [[], [500], [3]]
    with pytest.raises(RuntimeError, match="idx < num_rows"):
        model(wrong)


def test_weights_of_averaged_bags_are_refused() -> None:
    with pytest.raises(ValueError, match="'t_item': per-id weights need sum pooling, got mean"):
        prepare(EmbeddingBagCollection(tables=small_tables(), is_weighted=True), EmbeddingOptimizer(), ADAM)


@pytest.mark.parametrize("width", [6, WIDEST_ROW + 4])
def test_widths_that_fused_kernels_lack_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=rf"'t_a': embedding_dim must be a multiple of 4 up to 16,384 .*got {width:,}"):
        prepare(EmbeddingBagCollection(tables=[table("a", 6, dim=width)]), EmbeddingOptimizer(), ADAM)


@pytest.mark.parametrize("name", ["sgd", "rowwise_adagrad", "adagrad"])
def test_the_widest_row_trains(name: str) -> None:
    """Rows twice as wide end the process: fbgemm keeps copies of one on the stack."""
    collection = EmbeddingBagCollection(tables=[table("a", 3, dim=WIDEST_ROW)])
    before = collection.embedding_bags["t_a"].weight.detach().clone()
    model, _ = prepare(collection, EmbeddingOptimizer(name, 0.5), ADAM)
    model(bags(["a"], [[[1], [1, 2]]])).values().sum().backward()
    # Gradients of 2 and 1 for all values of rows 1 and 2: Adagrads move by their sign at first.
    steps = torch.tensor([0.0, 1.0, 0.5] if name == "sgd" else [0.0, 0.5, 0.5])
    after = model.state_dict()["embedding_bags.t_a.weight"]
    torch.testing.assert_close(before - after, steps.unsqueeze(1).expand_as(before), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lamb"}, "must be one of"),
        ({"learning_rate": -1.0}, "at least 0, got -1"),
        ({"eps": np.nan}, "eps"),
        ({"name": "dense_adam", "weight_decay": -1.0}, "weight_decay must be at least 0, got -1"),
        ({"name": "adam", "weight_decay": 1e-5}, "'adam' moves the rows of the batch alone and has no weight_decay"),
    ],
)
def test_optimizer_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingOptimizer(**options)  # type: ignore[arg-type]


def test_tables_on_the_meta_device_are_initialised_in_the_kernels() -> None:
    collection = EmbeddingBagCollection(tables=small_tables(), device=torch.device("meta"))
    torch.manual_seed(3)
    model, _ = prepare(collection, EmbeddingOptimizer(), ADAM)
    torch.manual_seed(3)
    for config in small_tables():
        # TorchRec's own rule: uniform within 1 / sqrt(rows).
        bound = config.num_embeddings**-0.5
        expected = torch.empty(config.num_embeddings, config.embedding_dim).uniform_(-bound, bound)
        assert torch.equal(model.state_dict()[f"embedding_bags.{config.name}.weight"], expected)


def test_other_tensors_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = CompressedEmbeddingBagCollection(small_tables(), partial(Hashing, num_embeddings=10))
    with pytest.raises(ValueError, match=r"only tables of fused kernels may lie on the meta device, got 'groups\.0\."):
        prepare(model, EmbeddingOptimizer(), ADAM)
    collection = EmbeddingBagCollection(tables=small_tables(), device=torch.device("meta"))
    with pytest.raises(ValueError, match=r"got 'embedding_bags\.t_ad\.weight' there"):
        prepare(collection, EmbeddingOptimizer("adam"), ADAM)
