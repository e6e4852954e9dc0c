"""Fills window buffers in a background thread while the consumer reads the one before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence

from recemb.data.row_groups import Window
from recemb.data.window import WindowBuffers


def prefetched_windows(
    windows: Sequence[Window],
    buffers: Sequence[WindowBuffers],
    fill: Callable[[WindowBuffers, Window], None],
) -> Generator[WindowBuffers, None, None]:
    """Yield every window filled, in order; one is valid until the next is asked for.

    The buffers go round between two queues, so what is read ahead is bounded by their number. An error of ``fill`` is
    raised here, at the window it belongs to. Closing the generator stops the thread after the window in its hands.

    Args:
        windows: what to read.
        buffers: two for reading ahead by one window.
        fill: reads a window into buffers; runs in the thread.
    """
    free: queue.SimpleQueue[WindowBuffers | None] = queue.SimpleQueue()
    ready: queue.SimpleQueue[WindowBuffers | BaseException] = queue.SimpleQueue()
    for buffer in buffers:
        free.put(buffer)

    def work() -> None:
        try:
            for window in windows:
                target = free.get()
                if target is None:
                    return
                fill(target, window)
                ready.put(target)
        except BaseException as error:
            # Also what is not an Exception: a consumer that never hears of it would wait for ever.
            ready.put(error)

    # A daemon: an abandoned iterator must not keep the process from ending.
    thread = threading.Thread(target=work, name="recemb-loader", daemon=True)
    thread.start()
    try:
        for _ in windows:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            free.put(item)
    finally:
        # Before whatever is left in the queue: the thread takes it at its next window.
        while not free.empty():
            free.get()
        free.put(None)
        thread.join()
