"""What a person sees while training runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

# Where there is no terminal, a line at most this often: a day of training must not fill a log file.
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Rows done, rows a second, time left and running loss.

    Args:
        total_samples: rows of the whole training.
        done_samples: rows that the run being continued has done already.
        terminal: draw a bar; None asks whether stderr is a terminal.
    """

    def __init__(self, total_samples: int, *, done_samples: int = 0, terminal: bool | None = None) -> None:
        terminal = sys.stderr.isatty() if terminal is None else terminal
        self._total = total_samples
        self._start_samples = self._samples = done_samples
        self._start = self._last_line = time.perf_counter()
        self._bar = (
            tqdm(total=total_samples, initial=done_samples, unit=" rows", unit_scale=True, dynamic_ncols=True)
            if terminal
            else None
        )

    def update(self, *, step: int, num_samples: int, loss: float) -> None:
        """Show ``num_samples`` more rows, after ``step`` steps, with ``loss`` the mean over them."""
        self._samples += num_samples
        if self._bar is not None:
            self._bar.set_postfix(step=step, loss=f"{loss:.4f}", refresh=False)
            self._bar.update(num_samples)
            return
        now = time.perf_counter()
        if now - self._last_line < SECONDS_BETWEEN_LINES and self._samples < self._total:
            return
        self._last_line = now
        # Validation and checkpoints included, unlike train.samples_per_second: it is the time left that people ask for.
        rate = (self._samples - self._start_samples) / max(now - self._start, 1e-9)
        left = max(0, self._total - self._samples) / max(rate, 1e-9)
        logger.info(
            "step %d: %s of %s rows (%.0f%%), %s rows/s, loss %.4f, %s left",
            step,
            f"{self._samples:,}",
            f"{self._total:,}",
            100.0 * self._samples / max(1, self._total),
            f"{rate:,.0f}",
            loss,
            duration(left),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """``3725 -> "1:02:05"``, ``65 -> "1:05"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
