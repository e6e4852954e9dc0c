"""Figures over steps: ``metrics.jsonl`` for programs, TensorBoard for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from recemb.files import write_atomically

FILE_NAME = "metrics.jsonl"


class StepLog(Protocol):
    """Takes the figures of a step."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None: ...


class NoLog:
    """For ranks that write no files."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Nothing."""


class MetricsLog:
    """Appends one JSON object a line: ``{"step": 100, "split": "train", "loss": 0.51, ...}``.

    Args:
        folder: the run's folder; TensorBoard's events go to ``folder/tensorboard``.
        resume_step: steps already done by the run that is continued, None for a new one. Lines of later steps, which a
            killed run wrote after its last checkpoint, are dropped: they are about to be written again.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        # Here, because importing it takes a second that no other part of the library has to wait for.
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / FILE_NAME
        last = -1 if resume_step is None else resume_step
        kept = [line for line in read_metrics(folder) if line["step"] <= last]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._stream = self.path.open("a")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Log the ``values`` of ``split`` (``"train"`` or ``"validation"``) after ``step`` steps."""
        self._stream.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        # Flushed line by line: what a killed run leaves is what it did.
        self._stream.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._stream.close()
        self._tensorboard.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``folder/metrics.jsonl``; a last line that a killed run left half-written is passed over."""
    path = folder / FILE_NAME
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
