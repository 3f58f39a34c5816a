"""SIGTERM and SIGINT as a wish that the loop reads between two steps, so a run ends with a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np


class StopWish:
    """Context manager: while open, the first SIGTERM or SIGINT sets ``received``; a second SIGINT interrupts at once.

    Outside the main thread Python allows no handlers, and this does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopWish":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any process received one. Where there are several, all must call this at the same step."""
        return any_process(self.received is not None)


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true on any process; every process must call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
