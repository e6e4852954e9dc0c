"""What an object was built with, as plain JSON data, so that a file can say how to build it again without a config.

{"_target_": "recemb.methods.unified.Unified", "num_embeddings": 1000, "num_lookups": 2}
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

TARGET = "_target_"
# In place of a module: the path to it inside the one that was built with it.
MODULE = "_module_"

Init = TypeVar("Init", bound=Callable[..., None])


@dataclasses.dataclass(frozen=True)
class Unwritable:
    """Stands for an argument that JSON cannot hold, and says why."""

    reason: str


def remember_arguments(init: Init) -> Init:
    """Decorates ``__init__`` of a module class: ``recemb.save`` then knows how to build it again.

    The arguments of the outermost ``__init__`` are kept as JSON data in ``module.remembered_arguments``, those that are
    modules as where they lie inside the new one: a class of another library can be saved as a subclass whose
    ``__init__`` is decorated. Arguments that JSON cannot hold are refused only when saved.

    Example:
        >>> class Tower(nn.Module):
        ...     @remember_arguments
        ...     def __init__(self, embeddings: nn.Module, *, width: int) -> None:
        ...         super().__init__()
        ...         self.embeddings = embeddings
        >>> Tower(nn.Linear(1, 1), width=8).remembered_arguments
        {'embeddings': {'_module_': 'embeddings'}, 'width': 8}
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if "remembered_arguments" in self.__dict__:
            init(self, *args, **kwargs)
            return
        try:
            bound = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            # For its own error.
            init(self, *args, **kwargs)
            raise
        del bound[next(iter(signature.parameters))]
        remembered = {name: _remembered(name, value) for name, value in bound.items()}
        # Not through nn.Module, which is not initialised yet.
        object.__setattr__(self, "remembered_arguments", remembered)
        init(self, *args, **kwargs)
        if modules := {name: value for name, value in bound.items() if isinstance(value, nn.Module)}:
            paths = {module: path for path, module in self.named_modules()}
            remembered.update({name: {MODULE: paths.get(value, name)} for name, value in modules.items()})

    return wrapper  # type: ignore[return-value]


def _remembered(name: str, value: Any) -> Any:
    if isinstance(value, nn.Module):
        return {MODULE: name}
    try:
        return encode(value)
    except ValueError as error:
        return Unwritable(str(error))


def encode(value: Any) -> Any:
    """``value`` as JSON data: scalars, sequences, mappings with string keys, dataclasses with their class in a key.

    Raises:
        ValueError: anything else, or NaN and infinities.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a finite number is required, got {value}")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {TARGET: class_path(type(value)), **fields}
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str) or key in (TARGET, MODULE)]:
            raise ValueError(f"keys must be names, got {wrong[0]!r}")
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [encode(item) for item in value]
    raise ValueError(f"numbers, text, lists, mappings and dataclasses of them can be written, got {type(value)}")


def decode(value: Any) -> Any:
    """The value that ``encode`` was given, sequences as lists; dataclasses turn their own into what they need.

    Raises:
        ValueError: a class that cannot be imported, or that is no dataclass.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    arguments = {key: decode(item) for key, item in value.items() if key != TARGET}
    if TARGET not in value:
        return arguments
    cls = import_class(value[TARGET])
    # Nothing but data is built here, whatever a file says.
    if not dataclasses.is_dataclass(cls):
        raise ValueError(f"{value[TARGET]} must be a dataclass")
    return cls(**arguments)


def class_path(cls: type) -> str:
    """``"package.module.Class"``.

    Raises:
        ValueError: a class that cannot be found by such a name.
    """
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        raise ValueError(f"{cls.__module__}.{cls.__qualname__} must be importable by that name, to be found again")
    return f"{cls.__module__}.{cls.__qualname__}"


def import_class(path: str) -> type:
    """The class of a ``class_path``.

    Raises:
        ValueError: no such module or class.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {path}: {error}") from error
    if not isinstance(found, type):
        raise ValueError(f"{path} must be a class, got {type(found)}")
    return found
