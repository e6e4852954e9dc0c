"""Which config a continued run has: its own, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recemb.run_folder import RunFolder

# Keys in which a continued run may differ from itself: how it is addressed, and which of its stages are run.
_ADDRESSES = ("resume", "paths.run", "stage")


def config_to_train(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``config`` with absolute paths for a new run; the stored config for ``resume=RUN_FOLDER``.

    Args:
        config: what the command line says.
        overrides: the overrides it is made of. With none but ``resume``, the command line says nothing else; with
            others, they must say what the run was begun with.

    Raises:
        FileNotFoundError: no run in that folder.
        ValueError: an override that would change the run; names the keys.
    """
    config = _absolute(config)
    if config["resume"] is None:
        return config
    path = Path(config["resume"])
    stored = RunFolder(path).config()
    if any(not override.lstrip("+").startswith(("resume=", "stage=")) for override in overrides):
        now, then = dict(_flat(config)), dict(_flat(stored))
        changed = [
            f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(now.keys() | then.keys())
            if key not in _ADDRESSES and now.get(key) != then.get(key)
        ]
        if changed:
            raise ValueError(
                f"resume={path} continues a run with its own config, but {'; '.join(changed)}. "
                "Leave the other overrides out, or begin a new run"
            )
    stored["paths"]["run"] = str(path.resolve())
    stored.pop("stage", None)
    if config.get("stage") is not None:
        stored["stage"] = config["stage"]
    return stored


def _absolute(config: dict[str, Any]) -> dict[str, Any]:
    """A run may be continued from another working directory, where its relative paths mean something else."""

    def resolved(path: str | None) -> str | None:
        return None if path is None else str(Path(path).resolve())

    data = config["data"]
    synthetic = {**data["synthetic"], "path": resolved(data["synthetic"]["path"])}
    allowed = data["allow_synthetic"]
    return {
        **config,
        "data": {
            **data,
            "path": resolved(data["path"]),
            "allow_synthetic": resolved(allowed) if isinstance(allowed, str) else allowed,
            "synthetic": synthetic,
        },
        "paths": {name: resolved(path) for name, path in config["paths"].items()},
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
