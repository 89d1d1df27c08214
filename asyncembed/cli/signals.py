"""Ctrl-C and SIGTERM: the first asks a run to end well, the second cancels it, the third is the system's affair."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While this is entered, signals go to `stop` first, and then to the task that entered it.

    Args:
        on_first: Called when the first one comes, to tell the user what happens now.

    Attributes:
        stop: Set by the first signal.
        received: The first signal; None if there was none.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.stop = asyncio.Event()
        self.received: signal.Signals | None = None
        self._on_first = on_first
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            try:
                self._loop.add_signal_handler(number, self._handle, number)
            except NotImplementedError:  # Windows
                signal.signal(number, self._handle_outside)
            except (RuntimeError, ValueError):
                return self  # not in the main thread: whoever runs us there sees to signals
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._let_go()

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that this signal has ended; 0 if there was none."""
        return 0 if self.received is None else 128 + self.received

    def _handle(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            self.stop.set()
            with suppress(OSError):  # nobody is there to be told
                self._on_first()
            return
        self._let_go()
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._task is not None:
            self._task.cancel()

    def _let_go(self) -> None:
        for number in _SIGNALS:
            with suppress(NotImplementedError):
                self._loop.remove_signal_handler(number)

    def _handle_outside(self, number: int, _: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._handle, signal.Signals(number))
