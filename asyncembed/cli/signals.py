"""Ctrl-C and SIGTERM: the first ends a run well, the second cancels it, the third kills the process."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context in which the first signal sets `stop`, and the second cancels the task that entered the context.

    Args:
        on_first: Called at the first signal, to inform the user.

    Attributes:
        stop: Set by the first signal.
        received: The first signal; None before it.
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
                signal.signal(number, self._handle_outside_loop)
            except (RuntimeError, ValueError):
                return self  # not in the main thread, where the application handles signals itself
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._remove_handlers()

    @property
    def exit_code(self) -> int:
        """The exit code that shells expect of a process ended by this signal; 0 without a signal."""
        return 0 if self.received is None else 128 + self.received

    def _handle(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            self.stop.set()
            with suppress(OSError):  # standard error is closed or full
                self._on_first()
            return
        self._remove_handlers()
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._task is not None:
            self._task.cancel()

    def _remove_handlers(self) -> None:
        for number in _SIGNALS:
            with suppress(NotImplementedError):
                self._loop.remove_signal_handler(number)

    def _handle_outside_loop(self, number: int, _: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._handle, signal.Signals(number))
