"""Saved models: equal bits after loading, bytes as reported, and no file that is not exactly the one that was saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig

from recemb import golden, saved_model
from recemb.arguments import remember_arguments
from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compressed_groups
from recemb.conversion import convert
from recemb.data.manifest import checksum
from recemb.memory import measure_memory
from recemb.method import method_class
from recemb.methods.full import Full
from recemb.methods.pruned import Pruned
from recemb.methods.unified import Unified
from recemb.models.din import DIN
from recemb.models.histories import History
from recemb.optimizers import EmbeddingOptimizer
from recemb.plan import CompressionPlan
from recemb.preparation import prepare
from recemb.saved_model import DESCRIPTION_FILE, TENSORS_FILE, load, read_description, save
from tests.embedding_cases import (
    KEYS,
    MULTI_HOT,
    SINGLE,
    bags,
    dlrm,
    embedding_configs,
    quarter_sized,
    small_tables,
    table,
)
from tests.plans import KINDS, pruned_plan, table_plan


def rewrite(folder: Path, change: Any) -> None:
    """Change recemb.json and make its checksum fit again, as somebody who means to."""
    content = json.loads((folder / DESCRIPTION_FILE).read_text())
    change(content)
    del content["checksum"]
    content["checksum"] = saved_model._checksum_of(content)
    (folder / DESCRIPTION_FILE).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    return save(dlrm(CompressedEmbeddingBagCollection(small_tables(), partial(Unified, num_embeddings=500))), folder)


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("name", embedding_configs())
def test_every_method_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), quarter_sized(name))
    for tensor in collection.state_dict().values():
        if tensor.is_floating_point():
            # As after training: nothing may be what the constructor makes of it.
            tensor.add_(torch.rand_like(tensor) / 8)
    state = torch.random.get_rng_state()
    loaded = load(save(collection, tmp_path / "saved"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert collection.training and not loaded.training
    assert list(loaded.state_dict()) == list(collection.state_dict())
    collection.eval()
    for ids in (MULTI_HOT, SINGLE):
        features = bags(KEYS, ids)
        assert torch.equal(loaded(features).values(), collection(features).values())
    assert measure_memory(loaded) == measure_memory(collection)


@pytest.mark.parametrize("dropped", ["zero", "vector"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_packed_form_comes_back_bit_for_bit(kind: str, dropped: str, tmp_path: Path) -> None:
    collection = CompressedEmbeddingBagCollection(
        small_tables(), partial(Pruned, plan=pruned_plan(kind), dropped=dropped)
    )
    expected = collection(bags(KEYS, MULTI_HOT)).values()
    loaded = load(save(convert(collection), tmp_path / "saved"))
    assert torch.equal(loaded(bags(KEYS, MULTI_HOT)).values(), expected)


@pytest.mark.parametrize("name", [name for name in embedding_configs() if method_class(quarter_sized(name)).searches])
def test_what_every_search_leads_to_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    search = CompressedEmbeddingBagCollection(small_tables(), quarter_sized(name))
    budget = int(0.4 * measure_memory(search).full_bytes)
    [group] = compressed_groups(search)
    found = CompressedEmbeddingBagCollection(small_tables(), type(group).from_plan(group.derive_plan(budget))).eval()
    expected = found(bags(KEYS, MULTI_HOT)).values()
    loaded = load(save(convert(found), tmp_path / "saved"))
    assert torch.equal(loaded(bags(KEYS, MULTI_HOT)).values(), expected)
    assert measure_memory(loaded).serving_bytes <= budget


@pytest.mark.parametrize("name", ["unified", "full", "cafe", "mixed_dimension"])
def test_a_whole_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, optimizer = prepare(
        dlrm(CompressedEmbeddingBagCollection(small_tables(), quarter_sized(name))),
        EmbeddingOptimizer("rowwise_adagrad", 0.1),
        partial(torch.optim.SGD, lr=0.1),
    )
    dense = torch.randn(3, 3)
    model(dense, bags(KEYS, MULTI_HOT)).sum().backward()
    optimizer.step()
    model.eval()
    loaded = load(save(model, tmp_path / "saved"))
    for ids in (MULTI_HOT, SINGLE):
        assert torch.equal(loaded(dense, bags(KEYS, ids)), model(dense, bags(KEYS, ids)))


@pytest.mark.parametrize("name", ["unified", "hashing", "full", "pruned"])
def test_a_sequence_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    tables = [
        EmbeddingConfig(name="t_item", num_embeddings=600, embedding_dim=8, feature_names=["item", "past"]),
        EmbeddingConfig(name="t_user", num_embeddings=90, embedding_dim=8, feature_names=["user"]),
    ]
    plan = CompressionPlan(
        {each.name: table_plan(each.num_embeddings, 8, "blocks", 0.6, 0) for each in tables}, source="by hand"
    )
    method = partial(Pruned, plan=plan) if name == "pruned" else quarter_sized(name)
    model = DIN(
        CompressedEmbeddingCollection(tables, method),
        num_dense=2,
        histories=[History("history", ("past",), ("item",))],
        layers=[8, 1],
    ).eval()
    features = bags(["item", "past", "user"], [[[5], [599]], [[1, 2, 3], []], [[0], [89]]])
    dense = torch.randn(2, 2)
    expected = model(dense, features)
    assert torch.equal(load(save(convert(model), tmp_path / "saved"))(dense, features), expected)


def test_mixed_methods_and_tables_below_a_size_keep_their_groups(tmp_path: Path) -> None:
    methods = {"t_ad": partial(Unified, num_embeddings=300), "*": partial(Pruned, plan=pruned_plan("rows"))}
    collection = CompressedEmbeddingBagCollection(small_tables(), methods, full_below_rows=100)
    loaded = load(save(convert(collection), tmp_path / "saved"))
    assert [type(group) for group in loaded.groups] == [type(group) for group in collection.groups]
    assert torch.equal(loaded(bags(KEYS, SINGLE)).values(), collection(bags(KEYS, SINGLE)).values())


def test_weighted_collections_come_back_weighted(tmp_path: Path) -> None:
    tables = [table("a", 50), table("b", 70)]
    collection = CompressedEmbeddingBagCollection(tables, Full, is_weighted=True, check_ids=False)
    loaded = load(save(collection, tmp_path / "saved"), check_ids=False)
    assert loaded.is_weighted() and not loaded.checks_ids()
    plain = bags(["a", "b"], [[[1, 2]], [[3]]])
    features = type(plain)(plain.keys(), plain.values(), weights=torch.rand(3), lengths=plain.lengths())
    assert torch.equal(loaded(features).values(), collection(features).values())


@pytest.mark.parametrize("kind", ["rows", "values", "blocks", "none"])
def test_the_file_is_as_large_as_the_memory_report_says(kind: str, tmp_path: Path) -> None:
    tables = [table("a", 60_000, dim=16), table("b", 40_000, dim=16)]
    plan = CompressionPlan(
        {each.name: table_plan(each.num_embeddings, 16, kind, 0.4, 0) for each in tables}, source="by hand"
    )
    method = Full if kind == "none" else partial(Pruned, plan=plan)
    collection = convert(CompressedEmbeddingBagCollection(tables, method))
    reported = measure_memory(collection).serving_bytes
    size = (save(collection, tmp_path / "saved") / TENSORS_FILE).stat().st_size
    assert reported > 1_000_000
    assert reported <= size < 1.01 * reported


def test_loading_needs_neither_hydra_nor_a_config_nor_a_process_group(saved: Path) -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hydra", "omegaconf"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import recemb, torch
from torchrec import KeyedJaggedTensor
model = recemb.load({str(saved)!r})
ids = KeyedJaggedTensor({KEYS!r}, torch.zeros(5, dtype=torch.int64), lengths=torch.ones(5, dtype=torch.int64))
print(model(torch.zeros(1, 3), ids).item())
assert not torch.distributed.is_initialized()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    logit = load(saved)(torch.zeros(1, 3), bags(KEYS, [[[0]]] * 5)).item()
    assert float(done.stdout) == pytest.approx(logit, rel=1e-5)


def test_whoever_reads_the_description_may_read_the_tensors(saved: Path) -> None:
    """safetensors makes its files for their owner alone; models are served by others than those who train them."""
    description, tensors = (saved / name for name in ("recemb.json", "model.safetensors"))
    assert tensors.stat().st_mode == description.stat().st_mode


def test_the_description_says_where_the_model_comes_from(saved: Path) -> None:
    content = read_description(saved)
    assert content["made_by"]["packages"]["torch"] == metadata.version("torch")
    assert content["memory"]["embeddings"]["serving_bytes"] == 500 * 4 * 8 + 5 * 8
    group = content["model"]["arguments"]["embeddings"]["_module_"]["groups"][0]
    assert group["arguments"] == {"num_embeddings": 500}
    assert set(content["golden"]["embeddings"]) == set(KEYS)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_the_tensors_is_refused(copied: Path, share: float, bit: int) -> None:
    file = copied / TENSORS_FILE
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1 << bit
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        with pytest.raises(ValueError, match=r"checksum must be .*: changed, or of another model"):
            load(copied)
    finally:
        file.write_bytes(whole)


def test_every_byte_of_the_header_and_of_the_salts_counts(copied: Path) -> None:
    file = copied / TENSORS_FILE
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for position in (0, 7, 8, 8 + header // 2, 8 + header - 1, 8 + header, len(whole) - 1):
        content = bytearray(whole)
        content[position] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match="checksum"):
            load(copied)


def test_a_cut_file_is_refused(copied: Path) -> None:
    whole = (copied / TENSORS_FILE).read_bytes()
    (copied / TENSORS_FILE).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"must have {len(whole)} bytes, got {len(whole) - 1}: cut"):
        load(copied)
    (copied / TENSORS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"named in recemb.json, not on disk"):
        load(copied)


def test_an_edited_description_is_refused(copied: Path) -> None:
    file = copied / DESCRIPTION_FILE
    file.write_text(file.read_text().replace('"num_embeddings": 500', '"num_embeddings": 501', 1))
    with pytest.raises(ValueError, match="the file was changed since it was saved"):
        load(copied)
    file.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load(copied)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="not the folder of a saved model"):
        load(copied)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_format_version_is_refused(copied: Path, version: object) -> None:
    rewrite(copied, lambda content: content.update(format_version=version))
    with pytest.raises(ValueError, match=f"format_version must be 1, got {version}; load it with the recemb that"):
        load(copied)


def test_another_hash_function_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = golden.hash_to_slots
    monkeypatch.setattr(golden, "hash_to_slots", lambda ids, salts, slots: (real(ids, salts, slots) + 1) % slots)
    with pytest.raises(ValueError, match="must hash as it did when the model was saved"):
        load(copied)


def test_salts_of_another_seed_are_refused(copied: Path) -> None:
    """Both files agree about their checksums: only what the vectors should be gives it away."""
    tensors = load_file(str(copied / TENSORS_FILE))
    foreign = Unified(small_tables(), num_embeddings=500, seed=1)
    tensors["embeddings.groups.0.salts"] = foreign.salts
    save_file(tensors, str(copied / TENSORS_FILE))
    rewrite(copied, lambda content: content["tensors"].update(checksum=checksum(copied / TENSORS_FILE)))
    with pytest.raises(ValueError, match=r"feature 'ad': the vector of id 0 must have .* another hash seed"):
        load(copied)


def test_tensors_of_another_model_are_refused(copied: Path, tmp_path: Path) -> None:
    other = save(
        dlrm(CompressedEmbeddingBagCollection(small_tables(), partial(Unified, num_embeddings=400))), tmp_path / "other"
    )
    shutil.copy(other / TENSORS_FILE, copied / TENSORS_FILE)
    size = (copied / TENSORS_FILE).stat().st_size
    rewrite(copied, lambda content: content["tensors"].update(bytes=size, checksum=checksum(copied / TENSORS_FILE)))
    with pytest.raises(ValueError, match=r"must be torch.float32 of shape \(500, 8\), got .* \(400, 8\)"):
        load(copied)


def test_a_file_cannot_make_loading_call_a_function(copied: Path) -> None:
    rewrite(copied, lambda content: content["model"].update(_target_="os.system"))
    with pytest.raises(ValueError, match=r"os.system must be a class"):
        load(copied)


def test_nothing_is_written_over(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="a new or empty folder is required"):
        save(load(saved), saved)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        save(load(saved), tmp_path / "file")


def test_forms_that_train_are_refused_with_what_to_do(tmp_path: Path) -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), partial(Pruned, plan=pruned_plan("rows")))
    with pytest.raises(ValueError, match=r"Pruned: argument 'plan' cannot be saved .* recemb.convert"):
        save(collection, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_models_that_remember_nothing_are_refused_with_what_to_do(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decorate its __init__ with recemb.arguments.remember_arguments"):
        save(nn.Sequential(load(saved)), tmp_path / "saved")


def test_a_module_that_is_not_held_cannot_be_saved(tmp_path: Path) -> None:
    class Forgetful(nn.Module):
        @remember_arguments
        def __init__(self, tables: nn.Module) -> None:
            super().__init__()

    with pytest.raises(ValueError, match="Forgetful must hold its argument 'tables', a module, at 'tables'"):
        save(Forgetful(nn.Linear(1, 1)), tmp_path / "saved")


def test_a_failed_write_leaves_nothing_that_loads(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recemb.tensor_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(load(saved), tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="not the folder of a saved model"):
        load(tmp_path / "new")
