"""Checkpoints that are whole or not there: ``step-00000400/`` folders and two links, ``last`` and ``best``.

A checkpoint is a torch.distributed.checkpoint folder (tensors, resharded on load) with ``state.json`` (all that is not
a tensor). It is written aside, forced to disk and renamed; then ``last`` is moved to it, then ``best``; then folders
that no link names are removed. At whatever point a process is killed, ``last`` names a whole checkpoint.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys, load
from torch.distributed.checkpoint.state_dict_saver import save

from recemb.evaluation.gather import gather_texts
from recemb.files import sync_folder, write_json

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
# Less than this free after a failed write: the disk is full, whatever the writer said.
_FULL_BYTES = 1 << 16


class Optimizer(Protocol):
    """An optimizer's state, as far as checkpoints are concerned."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie, ``RUN/checkpoints``; made on first use.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def last(self) -> Path | None:
        """Folder of the latest checkpoint, None before the first."""
        return self._linked("last")

    @property
    def best(self) -> Path | None:
        """Folder of the checkpoint with the best validation, None before the first."""
        return self._linked("best")

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], *, best_step: int | None) -> Path:
        """Write a checkpoint, make it ``last``, and make that of ``best_step`` ``best``.

        Args:
            step: steps done.
            tensors: nested state dicts; anything torch.distributed.checkpoint takes.
            state: whatever else a run needs, fit for JSON.
            best_step: step of the best validation so far, this one or one whose checkpoint was kept; None: not known.

        Raises:
            OSError: the disk is full, or another error of the file system; earlier checkpoints are untouched.
        """
        needed = sum(tensor.size().numel() * tensor.dtype.itemsize for tensor in _tensors(tensors))
        # The first rank decides on names and moves folders; the others write tensors where it says.
        names = _on_first_rank(lambda: self._begin(step, needed))
        final, partial = (self.folder / name for name in names.split("/"))
        try:
            with _single_process_is_fine():
                save(dict(tensors), checkpoint_id=str(partial), no_dist=not dist.is_initialized())
            _on_first_rank(lambda: self._finish(final, partial, {"step": step, **state}))
        except (OSError, CheckpointException) as error:
            # Before what was written is removed. torch's writer calls a full disk "unexpected pos".
            free = shutil.disk_usage(self.folder).free
            shutil.rmtree(partial, ignore_errors=True)
            if free < max(_FULL_BYTES, needed // 100):
                raise _disk_full(final, needed, free) from error
            causes = (
                [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
            )
            for cause in [error, *causes]:
                if isinstance(cause, OSError):
                    raise OSError(cause.errno, f"checkpoint not written: {cause.strerror}", str(final)) from error
            raise OSError(errno.EIO, f"checkpoint not written: {error}", str(final)) from error
        _on_first_rank(lambda: self._publish(final, step, best_step))
        return final

    def _begin(self, step: int, needed: int) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_partial()
        final = self._free_name(step)
        partial = self.folder / f".{final.name}.partial-{os.getpid()}"
        self._check_space(final, needed)
        partial.mkdir()
        return f"{final.name}/{partial.name}"

    def _finish(self, final: Path, partial: Path, state: Mapping[str, Any]) -> str:
        write_json(partial / STATE_FILE, state)
        sync_folder(partial)
        partial.rename(final)
        sync_folder(self.folder)
        return ""

    def _publish(self, final: Path, step: int, best_step: int | None) -> str:
        self._link("last", final)
        if best_step == step:
            self._link("best", final)
        self.repair_best(best_step)
        self._remove_unlinked()
        return ""

    def repair_best(self, best_step: int | None) -> None:
        """Point ``best`` to the checkpoint of ``best_step``: a run killed between the two links left it behind."""
        if best_step is None or (self.best is not None and _step_of(self.best) == best_step):
            return
        last = self.last
        if last is None or _step_of(last) != best_step:
            raise FileNotFoundError(f"{self.folder}: no checkpoint of step {best_step}, the best of this run")
        self._link("best", last)

    def _linked(self, name: str) -> Path | None:
        link = self.folder / name
        return self.folder / os.readlink(link) if link.is_symlink() else None

    def _link(self, name: str, target: Path) -> None:
        # A link cannot be overwritten in place; replacing it by rename is atomic.
        temporary = self.folder / f".{name}.partial-{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.replace(self.folder / name)
        sync_folder(self.folder)

    def _free_name(self, step: int) -> Path:
        # A run killed after the rename and before the link left a folder of this name: its content is not trusted.
        name = self.folder / f"step-{step:08d}"
        if name.exists() and name not in (self.last, self.best):
            shutil.rmtree(name)
        retry = 1
        while name.exists():
            name = self.folder / f"step-{step:08d}-{retry}"
            retry += 1
        return name

    def _remove_unlinked(self) -> None:
        kept = (self.last, self.best)
        for path in self.folder.glob("step-*"):
            if path not in kept:
                shutil.rmtree(path)

    def _remove_partial(self) -> None:
        for path in self.folder.glob(".*.partial-*"):
            logger.info("removing %s: a checkpoint that was not finished", path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _check_space(self, path: Path, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise _disk_full(path, needed, free)


def load_model_tensors(path: Path, model: nn.Module) -> None:
    """Fill ``model`` from the checkpoint at ``path``.

    Raises:
        FileNotFoundError: not a checkpoint.
        ValueError: the checkpoint lacks a tensor of the model, or has it in another shape; names it.
    """
    if not (path / STATE_FILE).is_file():
        raise FileNotFoundError(f"{path}: not a checkpoint (no {STATE_FILE})")
    tensors = {"model": model.state_dict()}
    try:
        with _single_process_is_fine():
            load(tensors, checkpoint_id=str(path), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        cause = next((str(failure[0]) for failure in error.failures.values()), str(error))
        raise ValueError(f"{path}: does not fit this model: {cause}") from error
    model.load_state_dict(tensors["model"])


def load_optimizer_tensors(path: Path, optimizer: Optimizer) -> None:
    """Restore ``optimizer`` from what was saved under ``optimizer``.

    State of tables is read in place, shard by shard where they are sharded; by how many ranks it was saved does not
    matter. That of torch's optimizers is read without a template to fill: one that has not stepped yet has no state
    tensors, and those of the checkpoint would silently be left out.

    Raises:
        FileNotFoundError: not a checkpoint.
        ValueError: the checkpoint holds no optimizer, or that of another model.
    """
    if not (path / STATE_FILE).is_file():
        raise FileNotFoundError(f"{path}: not a checkpoint (no {STATE_FILE})")
    restored = optimizer.state_dict()
    plain = {name for name, part in restored.items() if isinstance(part, Tensor) or "param_groups" in part}
    in_place = {name: part for name, part in restored.items() if name not in plain}
    try:
        with _single_process_is_fine():
            saved = _load_state_dict_from_keys({f"optimizer.{name}" for name in plain}, checkpoint_id=str(path))
            if "updates" in plain:
                # Checkpoints from before updates of tables were counted: one a step.
                saved.setdefault("optimizer", {}).setdefault("updates", torch.tensor(load_state(path)["step"]))
            # A rank that holds no table has nothing to read, and yet must take part.
            has_tensors = next(_tensors(in_place), None) is not None
            if "True" in gather_texts(str(has_tensors)):
                load({"optimizer": in_place}, checkpoint_id=str(path), no_dist=not dist.is_initialized())
        parts = {name: saved["optimizer"][name] for name in plain}
    except KeyError as error:
        raise ValueError(f"{path}: holds no optimizer {error}") from error
    except CheckpointException as error:
        cause = next((str(failure[0]) for failure in error.failures.values()), str(error))
        raise ValueError(f"{path}: holds another optimizer: {cause}") from error
    # torch.distributed.checkpoint makes all keys text: with "0" for 0 torch's optimizers would silently start anew.
    for name, part in parts.items():
        restored[name] = part
        if not isinstance(part, Tensor):
            restored[name] = {**part, "state": {int(key): value for key, value in part.get("state", {}).items()}}
    optimizer.load_state_dict(restored)


def load_state(path: Path) -> dict[str, Any]:
    """``state.json`` of the checkpoint at ``path``.

    Raises:
        FileNotFoundError: not a checkpoint.
    """
    if not (path / STATE_FILE).is_file():
        raise FileNotFoundError(f"{path}: not a checkpoint (no {STATE_FILE})")
    content: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
    return content


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """torch.distributed.checkpoint warns that it assumes a single process, which is what we mean."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        yield


def _on_first_rank(task: Callable[[], str]) -> str:
    """What ``task`` returns on the first rank, on all of them; OSError on all where it fails there.

    Also a barrier: nobody goes on before it is done.
    """
    if not dist.is_initialized():
        return task()
    result, failure = "", None
    if dist.get_rank() == 0:
        try:
            result = task()
        except OSError as error:
            failure = error
    code = 0 if failure is None else failure.errno or errno.EIO
    first = json.loads(gather_texts(json.dumps([result, code, str(failure)]))[0])
    if failure is not None:
        raise failure
    if first[1]:
        raise OSError(first[1], f"rank 0: {first[2]}")
    return str(first[0])


def _disk_full(path: Path, needed: int, free: int) -> OSError:
    text = f"disk full: the checkpoint needs {needed:,} bytes, {free:,} are free; earlier checkpoints are whole"
    return OSError(errno.ENOSPC, text, str(path))


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
