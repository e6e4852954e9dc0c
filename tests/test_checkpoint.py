from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from recemb import checkpoint
from recemb.checkpoint import STATE_FILE, Checkpoints, load_model_tensors, load_optimizer_tensors, load_state


def save(checkpoints: Checkpoints, step: int, best_step: int | None, value: float | None = None) -> None:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step if value is None else value)
    tensors = {"model": model.state_dict(), "optimizer": {"dense": {"state": {0: {"step": torch.tensor(float(step))}}}}}
    checkpoints.save(step, tensors, {"note": f"step {step}"}, best_step=best_step)


def weight(path) -> float:
    model = nn.Linear(3, 2)
    load_model_tensors(path, model)
    return float(model.weight.detach()[0, 0])


def steps_on_disk(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in checkpoints.folder.glob("step-*"))


def test_last_and_best_hold_what_was_saved_and_nothing_else_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last is None and checkpoints.best is None
    for step, best in ((10, 10), (20, 20), (30, 20), (40, 20)):
        save(checkpoints, step, best)
    assert weight(checkpoints.last) == 40
    assert weight(checkpoints.best) == 20
    assert steps_on_disk(checkpoints) == [20, 40]
    assert load_state(checkpoints.last) == {"step": 40, "note": "step 40"}


class Optimizers:
    """A torch optimizer as one part of several, one of them without any state."""

    def __init__(self, parameters) -> None:
        self.adam = torch.optim.Adam(parameters, lr=0.1)

    def state_dict(self):
        return {"dense": self.adam.state_dict(), "fused": {}}

    def load_state_dict(self, state) -> None:
        assert set(state) == {"dense", "fused"}
        self.adam.load_state_dict(state["dense"])


@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_that_has_not_stepped_takes_over_the_state_of_one_that_has(tmp_path, steps):
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Optimizers(model.parameters()) for model in models]

    def step(index: int) -> None:
        optimizers[index].adam.zero_grad()
        models[index](torch.ones(1, 3)).square().sum().backward()
        optimizers[index].adam.step()

    for _ in range(steps):
        step(0)
    checkpoints = Checkpoints(tmp_path)
    tensors = {"model": models[0].state_dict(), "optimizer": optimizers[0].state_dict()}
    checkpoints.save(steps, tensors, {}, best_step=None)
    load_model_tensors(checkpoints.last, models[1])
    load_optimizer_tensors(checkpoints.last, optimizers[1])
    for _ in range(2):
        step(0)
        step(1)
    assert torch.equal(models[0].weight, models[1].weight)


def test_checkpoints_can_be_moved_and_addressed_through_their_links(tmp_path):
    save(Checkpoints(tmp_path / "a"), 10, 10)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert weight(tmp_path / "b" / "best") == 10


@pytest.mark.parametrize("moment", ["save", "write_json", "rename", "last", "best", "remove"])
def test_killed_at_any_moment_last_is_whole_and_the_next_save_goes_through(tmp_path, monkeypatch, moment):
    """Every system call that changes what is on disk is a moment to die in; nothing after it happens."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10, 10)

    class Killed(BaseException):
        pass

    def die(*arguments, **named):
        raise Killed

    with monkeypatch.context() as patch:
        if moment in ("save", "write_json"):
            patch.setattr(checkpoint, moment, die)
        elif moment == "rename":
            # Metadata inside the folder is renamed too, by torch.
            rename = Path.rename
            patch.setattr(Path, "rename", lambda path, to: die() if to.name.startswith("step-") else rename(path, to))
        elif moment == "remove":
            patch.setattr(Checkpoints, "_remove_unlinked", die)
        else:
            link = Checkpoints._link
            patch.setattr(
                Checkpoints, "_link", lambda self, name, to: die() if name == moment else link(self, name, to)
            )
        with pytest.raises(Killed):
            save(checkpoints, 20, 20, value=-1.0)

    again = Checkpoints(tmp_path)
    assert weight(again.last) == {10: 10.0, 20: -1.0}[load_state(again.last)["step"]]
    again.repair_best(load_state(again.last)["step"])
    assert again.best == again.last
    save(again, 20, 20)
    assert weight(again.last) == weight(again.best) == 20
    assert steps_on_disk(again) == [20]
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10, 10)

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            save(checkpoints, 20, 20)
        usage = namedtuple("usage", "total used free")(100, 97, 3)
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match="disk full: the checkpoint needs 36 bytes, 3 are free") as caught:
            save(checkpoints, 20, 20)
        assert caught.value.errno == errno.ENOSPC
    assert weight(checkpoints.last) == weight(checkpoints.best) == 10
    assert steps_on_disk(checkpoints) == [10]


def test_a_disk_that_fills_up_while_torch_writes_is_called_full(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10, 10)
    usage = namedtuple("usage", "total used free")
    answers = iter([usage(10**6, 0, 10**6), usage(10**6, 10**6, 500)])

    def writer(*arguments, **named):
        raise CheckpointException("save", {0: (RuntimeError("unexpected pos 704 vs 598"), None)})

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: next(answers))
    monkeypatch.setattr(checkpoint, "save", writer)
    with pytest.raises(OSError, match="disk full: the checkpoint needs 36 bytes, 500 are free") as caught:
        save(checkpoints, 20, 20)
    assert caught.value.errno == errno.ENOSPC
    assert steps_on_disk(checkpoints) == [10]
    assert not list(tmp_path.glob(".*"))


def test_a_model_of_another_shape_or_with_another_tensor_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10, None)
    with pytest.raises(ValueError, match=r"does not fit this model.*[Ss]ize"):
        load_model_tensors(checkpoints.last, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"does not fit this model.*0\.weight"):
        load_model_tensors(checkpoints.last, nn.Sequential(nn.Linear(3, 2)))


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path):
    for call in (lambda: load_state(tmp_path), lambda: load_model_tensors(tmp_path, nn.Linear(1, 1))):
        with pytest.raises(FileNotFoundError, match=f"not a checkpoint .no {STATE_FILE}"):
            call()


def test_a_best_step_without_a_checkpoint_is_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10, 10)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5"):
        checkpoints.repair_best(5)
