"""A model as two files that need nothing else to serve: no config, no data set, no process group.

    FOLDER/model.safetensors   every parameter and persistent buffer
    FOLDER/recemb.json         what to build, checksums, golden answers, where it comes from; written last

Refused are folders of another format version, with a byte changed, or of hashes that today's code computes otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule

from recemb.data.manifest import Manifest, checksum
from recemb.files import write_json
from recemb.golden import check_hash, check_vectors, hash_answers, vector_answers
from recemb.memory import measure_memory
from recemb.model_description import build, collections_of, describe
from recemb.tensor_files import save_tensors
from recemb.vocabulary_reference import describe_data

FORMAT_VERSION = 1
DESCRIPTION_FILE = "recemb.json"
TENSORS_FILE = "model.safetensors"
_PACKAGES = ("recemb", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "safetensors")


def save(model: nn.Module, path: str | Path, *, manifest: Manifest | None = None) -> Path:
    """Write ``model`` into a new folder; ``load`` gives it back, bit for bit.

    Convert a model whose tables were pruned first (``recemb.convert``); ``python -m recemb.export`` does all of it.

    Args:
        model: a model of ``recemb.models`` over recemb's collections, or a collection; a model of another class if it,
            or a subclass, remembers its arguments (``recemb.arguments.remember_arguments``). Before or after
            ``recemb.prepare``, not sharded over ranks.
        path: folder to make; must not exist, or be empty.
        manifest: the encoded data set whose ids the model takes. Its features and the checksums of its vocabularies are
            written down, so that ids of another vocabulary can be told (``recemb.vocabulary_reference``).

    Returns:
        ``path``.

    Raises:
        FileExistsError: something lies there.
        ValueError: a model that cannot be described, sharded tables, values that are NaN in golden vectors.
        OSError: the disk is full, for instance; nothing that looks like a model is left.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: a new or empty folder is required to save a model, something lies there")
    if any(isinstance(module, ShardedModule) for module in model.modules()):
        raise ValueError("tables must lie in one process, these are sharded over ranks: load the checkpoint in one")
    description = describe(model)
    collections = collections_of(model)
    content = {
        "format_version": FORMAT_VERSION,
        "model": description,
        "hash": hash_answers(),
        "golden": {name: vector_answers(collection) for name, collection in collections.items()},
        "memory": {name: measure_memory(collection).to_dict() for name, collection in collections.items()},
        "data": None if manifest is None else describe_data(manifest),
        "made_by": _made_by(),
    }
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f".{TENSORS_FILE}.partial-{os.getpid()}"
    try:
        save_tensors(temporary, {name: _whole(tensor) for name, tensor in model.state_dict().items()})
        content["tensors"] = {
            "file": TENSORS_FILE,
            "bytes": temporary.stat().st_size,
            "checksum": checksum(temporary),
        }
        temporary.replace(path / TENSORS_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(path / DESCRIPTION_FILE, {**content, "checksum": _checksum_of(content)})
    return path


def load(path: str | Path, device: torch.device | str = "cpu", *, check_ids: bool = True) -> nn.Module:
    """The model in a folder that ``save`` wrote, in eval mode and without gradients.

    To train it on: ``model.train().requires_grad_(True)``, then ``recemb.prepare``. Packed tables stay as they are.

    Args:
        path: the folder; it may have been moved.
        device: where to put the model.
        check_ids: raise on ids outside [0, num_embeddings), naming feature, table, range and id, whether or not the
            model that was saved did. For 4096 samples of 26 features it takes one core 0.1 ms with one id each, 0.3 ms
            with bags, of the 12 ms and more of a small DLRM. False is for callers who have checked: an id that does
            not exist then gets some vector, or fails in a kernel that does not say whose it is.

    Raises:
        FileNotFoundError: no saved model there.
        ValueError: another format version, a file that was changed, cut or mixed with another model's, hashes or
            vectors that differ from those at the time of saving. Nothing is repaired.
    """
    path = Path(path)
    content = read_description(path)
    check_hash(content["hash"])
    tensors = path / content["tensors"]["file"]
    _check_tensors(tensors, content["tensors"])
    # Building draws initial values, which must not move the caller's generators.
    with torch.random.fork_rng(devices=[]):
        model = build(content["model"], check_ids=check_ids)
    _fill(model, tensors)
    for name, collection in collections_of(model).items():
        check_vectors(collection, content["golden"][name])
    return model.to(device).eval().requires_grad_(False)


def read_description(path: str | Path) -> dict[str, Any]:
    """``recemb.json`` of a saved model, checked.

    Raises:
        FileNotFoundError: no saved model there.
        ValueError: not JSON, another format version, or edited.
    """
    file = Path(path) / DESCRIPTION_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path}: not the folder of a saved model (no {DESCRIPTION_FILE})")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format_version must be {FORMAT_VERSION}, got {version}; load it with the recemb that wrote it"
        )
    written = content.pop("checksum", None)
    if (found := _checksum_of(content)) != written:
        raise ValueError(f"{file}: checksum must be {found}, got {written}: the file was changed since it was saved")
    return cast(dict[str, Any], content)


def _check_tensors(file: Path, written: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: named in {DESCRIPTION_FILE}, not on disk")
    if (size := file.stat().st_size) != written["bytes"]:
        raise ValueError(f"{file}: must have {written['bytes']} bytes, got {size}: cut, or of another model")
    if (found := checksum(file)) != written["checksum"]:
        raise ValueError(f"{file}: checksum must be {written['checksum']}, got {found}: changed, or of another model")


@torch.no_grad()
def _fill(model: nn.Module, file: Path) -> None:
    """Every tensor from the file, one at a time: beside the model, memory for the largest alone."""
    targets = model.state_dict()
    try:
        with safe_open(str(file), framework="pt") as tensors:
            names = set(tensors.keys())
            if names != set(targets):
                raise ValueError(
                    f"{file}: tensors must be those of the model; missing {sorted(set(targets) - names)}, "
                    f"unknown {sorted(names - set(targets))}"
                )
            for name, target in targets.items():
                tensor = tensors.get_tensor(name)
                if (tensor.dtype, tensor.shape) != (target.dtype, target.shape):
                    raise ValueError(
                        f"{file}: {name} must be {target.dtype} of shape {tuple(target.shape)}, got {tensor.dtype} of "
                        f"shape {tuple(tensor.shape)}"
                    )
                target.copy_(tensor)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error


def _whole(tensor: Tensor) -> Tensor:
    """A contiguous tensor on the CPU that shares memory with no other: fused kernels keep several in one block."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _checksum_of(content: Mapping[str, Any]) -> str:
    """XXH3-64 of what ``recemb.json`` holds beside it, whatever the spelling of its JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return str(xxhash.xxh3_64(text.encode()).hexdigest())


def _made_by() -> dict[str, Any]:
    # Here, because it reads configs, which loading has no need of.
    from recemb.run_folder import git_state

    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"git": git_state(), "packages": packages}
