"""What a loaded model does: no graphs, ids checked, trained on where asked; models of other libraries."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec.models.dlrm import DLRM as TorchRecDLRM
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import recemb
from recemb.arguments import remember_arguments
from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.conversion import convert
from recemb.method import UNBOUNDED
from recemb.methods.full import Full
from recemb.methods.pruned import Pruned
from recemb.methods.unified import Unified
from recemb.optimizers import EmbeddingOptimizer
from recemb.plan import CompressionPlan
from recemb.preparation import prepare
from recemb.saved_model import load, save
from tests.embedding_cases import (
    KEYS,
    MULTI_HOT,
    SINGLE,
    bags,
    dlrm,
    quarter_sized,
    small_tables,
    table,
)
from tests.plans import pruned_plan, table_plan


@pytest.mark.parametrize("name", ["unified", "full", "deep_hash", "pruned"])
def test_predictions_of_a_loaded_model_keep_no_graph(name: str, tmp_path: Path) -> None:
    method = partial(Pruned, plan=pruned_plan("rows")) if name == "pruned" else quarter_sized(name)
    loaded = load(save(convert(dlrm(CompressedEmbeddingBagCollection(small_tables(), method))), tmp_path / "saved"))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for ids in (MULTI_HOT, SINGLE):
        logits = loaded(torch.zeros(3, 3), bags(KEYS, ids))
        assert logits.grad_fn is None and not logits.requires_grad


@pytest.mark.parametrize("name", ["unified", "full", "mixed_dimension"])
def test_a_loaded_model_trains_on_where_it_is_told_to(name: str, tmp_path: Path) -> None:
    model = dlrm(CompressedEmbeddingBagCollection(small_tables(), quarter_sized(name)))
    loaded = load(save(model, tmp_path / "saved")).train().requires_grad_(True)
    states = []
    for each in (model, loaded):
        trained, optimizer = prepare(each, EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1))
        before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
        trained(torch.ones(3, 3), bags(KEYS, MULTI_HOT)).sum().backward()
        optimizer.step()
        states.append(trained.state_dict())
        assert not torch.equal(states[-1]["head.over.0.weight"], before["head.over.0.weight"])
    for key, tensor in states[0].items():
        assert torch.equal(states[1][key], tensor), key


@pytest.mark.parametrize("value", [26, 5000, -1])
@pytest.mark.parametrize("name", ["full", "hashing", "pruned"])
def test_ids_that_do_not_exist_are_refused_however_the_model_was_trained(name: str, value: int, tmp_path: Path) -> None:
    tables = [table("a", 26), table("b", 90)]
    plan = CompressionPlan(
        {each.name: table_plan(each.num_embeddings, 8, "rows", 0.6, 0) for each in tables}, source="by hand"
    )
    method = partial(Pruned, plan=plan) if name == "pruned" else quarter_sized(name)
    trained = dlrm(CompressedEmbeddingBagCollection(tables, method, check_ids=False))
    by_hand = CompressedEmbeddingBagCollection(tables, method)
    wrong = bags(["a", "b"], [[[25], [value]], [[89], [0]]])
    with pytest.raises(ValueError) as expected:
        by_hand(wrong)
    assert f"(table 't_a'): ids must be in [0, 26), got {value}" in str(expected.value)
    folder = save(convert(trained), tmp_path / "saved")
    with pytest.raises(ValueError) as refused:
        load(folder)(torch.zeros(2, 3), wrong)
    assert str(refused.value) == str(expected.value)
    right = bags(["a", "b"], [[[25], [0]], [[89], [0]]])
    checked, unchecked = load(folder), load(folder, check_ids=False)
    assert torch.equal(checked(torch.zeros(2, 3), right), unchecked(torch.zeros(2, 3), right))
    assert not unchecked.embeddings.checks_ids()


def test_sequences_of_loaded_models_are_checked_too(tmp_path: Path) -> None:
    tables = [EmbeddingConfig(name="t_item", num_embeddings=6, embedding_dim=8, feature_names=["item", "past"])]
    folder = save(CompressedEmbeddingCollection(tables, Full, check_ids=False), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"'past' \(table 't_item'\): ids must be in \[0, 6\), got 6 in sample 1"):
        load(folder)(bags(["item", "past"], [[[5], [0]], [[], [1, 6]]]))


def test_any_64_bit_hash_is_an_id_of_an_unbounded_table(tmp_path: Path) -> None:
    collection = CompressedEmbeddingBagCollection([table("a", UNBOUNDED)], partial(Unified, num_embeddings=50))
    loaded = load(save(collection, tmp_path / "saved"))
    features = bags(["a"], [[[2**63 - 1], [0]]])
    assert torch.equal(loaded(features).values(), collection(features).values())
    with pytest.raises(ValueError, match=r"'a' \(table 't_a'\): ids must be in .*, got -1"):
        loaded(bags(["a"], [[[0], [-1]]]))


class SavedDLRM(TorchRecDLRM):
    """As anybody would make a class of another library one that can be saved."""

    @remember_arguments
    def __init__(
        self,
        embedding_bag_collection: nn.Module,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
    ) -> None:
        super().__init__(embedding_bag_collection, dense_in_features, dense_arch_layer_sizes, over_arch_layer_sizes)


def trained_in_place(cls: type[TorchRecDLRM]) -> nn.Module:
    """A model of TorchRec that existed before its tables were compressed and trained."""
    model = cls(EmbeddingBagCollection(tables=small_tables()), 3, [16, 8], [16, 1])
    recemb.compress_(model, {"t_ad": partial(Unified, num_embeddings=300), "*": Full})
    model, optimizer = prepare(model, EmbeddingOptimizer("sgd", 0.1), partial(torch.optim.SGD, lr=0.1))
    model(torch.ones(3, 3), bags(KEYS, MULTI_HOT)).sum().backward()
    optimizer.step()
    return model.eval()


def test_a_model_of_another_library_is_saved_whole_as_a_subclass_that_remembers(tmp_path: Path) -> None:
    model = trained_in_place(SavedDLRM)
    loaded = load(save(model, tmp_path / "saved"))
    assert type(loaded) is SavedDLRM
    for ids in (MULTI_HOT, SINGLE):
        assert torch.equal(loaded(torch.ones(3, 3), bags(KEYS, ids)), model(torch.ones(3, 3), bags(KEYS, ids)))


def test_a_model_of_another_library_is_saved_in_parts_as_its_error_says(tmp_path: Path) -> None:
    model = trained_in_place(TorchRecDLRM)
    with pytest.raises(ValueError) as refused:
        save(model, tmp_path / "saved")
    path = "sparse_arch.embedding_bag_collection"
    assert f"recemb.save(model.get_submodule(path), ...) for path in ['{path}']" in str(refused.value)
    assert "model.state_dict() for the rest" in str(refused.value)
    save(model.get_submodule(path), tmp_path / "tables")
    torch.save(model.state_dict(), tmp_path / "rest.pt")
    again = TorchRecDLRM(load(tmp_path / "tables"), 3, [16, 8], [16, 1]).eval()
    again.load_state_dict(torch.load(tmp_path / "rest.pt", weights_only=True))
    assert torch.equal(again(torch.ones(3, 3), bags(KEYS, MULTI_HOT)), model(torch.ones(3, 3), bags(KEYS, MULTI_HOT)))
