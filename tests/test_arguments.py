"""What modules remember of their constructors, and what a file may make of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from torch import nn

from recemb.arguments import Unwritable, decode, encode, import_class, remember_arguments
from recemb.models.histories import History
from recemb.pruned_bytes import PackedSizes


class Tower(nn.Module):
    @remember_arguments
    def __init__(self, embeddings: nn.Module, *, widths: Sequence[int], rate: float = 0.5) -> None:
        super().__init__()
        self.embeddings = embeddings


class TallTower(Tower):
    @remember_arguments
    def __init__(self, embeddings: nn.Module, *, height: int) -> None:
        super().__init__(embeddings, widths=[height, height])


def test_arguments_are_remembered_by_name_and_modules_by_attribute() -> None:
    tower = Tower(nn.Linear(1, 1), widths=(4, 2))
    assert tower.remembered_arguments == {"embeddings": {"_module_": "embeddings"}, "widths": [4, 2]}


def test_the_outermost_constructor_counts() -> None:
    assert TallTower(nn.Linear(1, 1), height=3).remembered_arguments["height"] == 3
    assert "widths" not in TallTower(nn.Linear(1, 1), height=3).remembered_arguments


class Deep(nn.Module):
    @remember_arguments
    def __init__(self, embeddings: nn.Module, other: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Tower(embeddings, widths=[1])])


def test_modules_are_remembered_where_they_lie() -> None:
    remembered = Deep(nn.Linear(1, 1), nn.Linear(1, 1)).remembered_arguments
    assert remembered == {"embeddings": {"_module_": "inner.0.embeddings"}, "other": {"_module_": "other"}}


def test_later_changes_of_an_argument_are_not_seen() -> None:
    widths = [4, 2]
    tower = Tower(nn.Linear(1, 1), widths=widths)
    widths.append(9)
    assert copy.deepcopy(tower).remembered_arguments["widths"] == [4, 2]


def test_wrong_arguments_raise_the_constructors_own_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'widths'"):
        Tower(nn.Linear(1, 1))


def test_what_json_cannot_hold_is_remembered_as_such() -> None:
    tower = Tower(nn.Linear(1, 1), widths={1, 2})
    assert isinstance(tower.remembered_arguments["widths"], Unwritable)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x"], "b": {"c": []}},
        History("history", ("items",), ("item",)),
        PackedSizes(8, ((4, 10), (8, 2)), 2, 3, 2, 1, 500, 0, 0, 0, 0, 1, 2),
        [PackedSizes(8, (), 0, 1, 1, 1, 0, 7, 9, 3, 4, 0, 1)],
    ],
)
def test_values_come_back(value: object) -> None:
    assert decode(encode(value)) == value


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), b"x", {1: 2}, {"_target_": "os.system"}, object()])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"must be|can be written|is required"):
        encode(value)


@pytest.mark.parametrize("path", ["os.system", "torch.nn.Linear", "no.such.Thing", "Thing", ""])
def test_a_file_cannot_name_anything_but_data(path: str) -> None:
    with pytest.raises(ValueError, match=r"must be a|cannot import"):
        decode({"_target_": path})


def test_local_classes_cannot_be_found_again() -> None:
    @dataclass(frozen=True)
    class Local:
        value: int

    with pytest.raises(ValueError, match="must be importable by that name"):
        encode(Local(1))
    assert import_class("recemb.models.histories.History") is History
